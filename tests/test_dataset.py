import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pspo import dataset
from pspo.base.schema import ConfigError, build
from pspo.dataset import embedded, sources
from pspo.dataset.problem import Problem, boxed, worked
from pspo.dataset.sources import RawRow

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("PSPO_DATA", ROOT.parent / "shared" / "data"))
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data at {DATA}; set PSPO_DATA")
NAMES = sorted(file.stem for file in (ROOT / "conf" / "dataset").glob("*.yaml"))
GSM8K = {"question": "How many?", "answer": "6*<<6*7=42>>7.\n#### 1,042"}


def config(name, **changes):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        values = OmegaConf.to_container(compose(f"dataset/{name}")["dataset"])
    return build(dataset.DatasetConfig, values | changes)


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(list(rows))
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    else:
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


# --- configuration


@pytest.mark.parametrize("name", NAMES)
def test_every_option_composes_and_builds(name):
    made = config(name)
    assert made.name == name
    assert isinstance(made, dataset.EmbeddedConfig) == (name == "embedded")
    assert made.made == (name in ("embedded", "reversal"))
    assert ("####" in made.system_prompt) != made.made


def test_every_data_set_has_an_option_and_the_reverse():
    assert sorted([*sources.SETS, "embedded", "reversal"]) == NAMES


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("embedded", {"path": "x"}, "dataset.path='x': dataset=embedded is made"),
        ("gsm8k", {"path": "/nowhere"}, "dataset.path='/nowhere' does not exist"),
        ("jsonl", {}, "dataset.path=None: dataset=jsonl needs"),
        ("gsm8k", {"num_train": 3}, "unknown key dataset.num_train"),
        ("gsm8k", {"test_limit": 0}, r"dataset.test_limit must be in \[1, inf\)"),
    ],
)
def test_check_refuses(name, changes, message):
    with pytest.raises(ConfigError, match=message):
        dataset.check(config(name, **changes))


# --- the embedded task


@pytest.fixture(scope="module")
def made():
    return dataset.load(config("embedded"), seed=0)


def tale(problem):
    return tuple(problem.id.split("/")[1:3])


def test_embedded_sizes_and_unique_ids(made):
    assert (len(made.train), len(made.validation), len(made.test["embedded"])) == (4096, 128, 512)
    everything = made.train + made.validation + made.test["embedded"]
    assert len({problem.id for problem in everything}) == len(everything)
    assert {tale(problem)[0] for problem in made.test["embedded"]} == set(embedded.FAMILIES)
    assert len(embedded.FAMILIES) == 8


def test_embedded_splits_share_no_family_and_numbers(made):
    train, validation, test = ({tale(p) for p in split} for split in (made.train, made.validation, *made.test.values()))
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_embedded_solutions_are_right_and_use_the_numbers_of_the_story(made):
    for problem in made.train:
        steps = re.findall(r"(\d+)([-+*/])(\d+)=(\d+)", problem.solution)
        assert len(steps) == 2
        for left, sign, right, result in steps:
            a, b = int(left), int(right)
            assert {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign] == int(result)
            assert 1 <= int(result) <= 999
        given = [int(number) for number in re.findall(r"\d+", problem.question)]
        assert sorted(given) == sorted(int(number) for number in tale(problem)[1].split("-"))
        assert all(2 <= number <= 10 for number in given)
        first, second = steps
        assert first[3] in (second[0], second[2])
        used = [int(n) for n in (first[0], first[2], second[0], second[2])]
        used.remove(int(first[3]))
        assert sorted(used) == sorted(given)
        assert problem.solution.endswith(f"\n#### {problem.answer}")
        assert problem.answer == second[3]


def test_embedded_golden_problem():
    assert [problem.id for problem in embedded.load("test", 3)] == [
        "embedded/sell/7-10-10/0",
        "embedded/trade/7-10-6/0",
        "embedded/fill/5-7-7/0",
    ]
    assert embedded.make(("gain", 9, 9, 9), 0).solution == "First, 9*9=81 balls. Then 81+9=90 balls.\n#### 90"
    assert worked(embedded.make(("gain", 9, 9, 9), 0).answer) == "#### 90"


def test_embedded_test_set_is_the_same_for_all_seeds_and_sizes(made):
    again = dataset.load(config("embedded", num_train=10, num_test=100), seed=5)
    assert again.test["embedded"] == made.test["embedded"][:100]
    assert again.train == made.train[:10]
    assert again.validation == made.validation


# --- the real sets, in the authors' formats


@real
def test_gsm8k():
    path = str(DATA / "gsm8k")
    splits = dataset.load(config("gsm8k", path=path), seed=3)
    assert (len(splits.train), len(splits.validation), len(splits.test["gsm8k"])) == (7000, 473, 1319)
    both = splits.train + splits.validation
    assert {problem.id for problem in both} == {f"gsm8k/train/{i}" for i in range(7473)}
    assert all(re.fullmatch(r"-?\d+(\.\d+)?", problem.answer) for problem in both)
    assert not any("<<" in problem.solution for problem in both)
    assert all(problem.solution.endswith(f"\n#### {problem.answer}") for problem in both)
    natalia = next(problem for problem in both if problem.id == "gsm8k/train/0")
    assert natalia.solution.startswith("Natalia sold 48/2 = 24 clips in May.\n")
    assert dataset.load(config("gsm8k", path=path), seed=3) == splits
    other = dataset.load(config("gsm8k", path=path), seed=4)
    assert other.validation != splits.validation
    assert other.test == splits.test


@real
def test_svamp_in_one_file_is_a_test_set():
    made = config("svamp", path=str(DATA / "svamp"))
    splits = dataset.load(made, seed=0)
    test = splits.test["svamp"]
    assert (splits.train, splits.validation, len(test)) == ([], [], 1000)
    assert (test[0].id, test[0].answer) == ("svamp/test/chal-1", "51")
    assert test[0].question.endswith("on each pack How much do you have to pay to buy each pack?")
    assert all(re.fullmatch(r"\d+", problem.answer) for problem in test)
    dataset.check(config("svamp"), training=True)
    with pytest.raises(ConfigError, match=r"dataset=svamp is a test set in \S+svamp: train on .*budget\.steps=0"):
        dataset.check(made, training=True)


@real
def test_asdiv_golds():
    splits = dataset.load(config("asdiv", path=str(DATA / "asdiv")), seed=0)
    answers = [problem.answer for problem in splits.test["asdiv"]]
    assert (splits.train, len(answers), answers[0]) == ([], 2305, "9")
    assert sum(not re.match(r"-?\(?\d", answer) for answer in answers) == 59
    assert splits.test["asdiv"][0].extra == {
        **{"id": "nluds-0001", "grade": "1", "source": "http://www.k5learning.com"},
        **{"solution-type": "Addition", "formula": "7+2=9"},
    }
    assert {"Yes", "February 3rd", "14", "-(1/3)", "5; 15; 20", "3:30 p.m.", "2:3"} <= set(answers)


@real
def test_asdiv_split_is_fixed_and_holds_every_problem_once():
    whole = dataset.load(config("asdiv", path=str(DATA / "asdiv")), seed=0).test["asdiv"]
    one, other = (dataset.load(config("asdiv_split", path=str(DATA / "asdiv")), seed=seed) for seed in (0, 1))
    test = one.test["asdiv_split"]
    train, questions = [*one.train, *one.validation], {problem.question for problem in test}
    assert len(test) == 696
    assert test == other.test["asdiv_split"]  # whatever the seed
    assert questions.isdisjoint(problem.question for problem in train)
    assert questions | {problem.question for problem in train} == {problem.question for problem in whole}
    assert train[0].solution.endswith(f"#### {train[0].answer}")
    assert test[0].solution == f"{test[0].solution.splitlines()[0]}\n#### {test[0].answer}"


@real
def test_math500_is_a_test_set_and_its_golds_stand_in_boxes():
    made = config("math500", path=str(DATA / "math500"))
    splits = dataset.load(made, seed=0)
    test = splits.test["math500"]
    assert (splits.train, len(test), test[0].id) == ([], 500, "math500/test/precalculus/807.json")
    assert all(boxed(problem.solution) == problem.answer for problem in test)
    with pytest.raises(ConfigError) as caught:
        dataset.check(made, training=True)
    assert str(caught.value) == (
        f"dataset=math500 is a test set in {DATA / 'math500'}: train on dataset=math, add a train file, or set "
        "budget.steps=0 to evaluate"
    )


@real
def test_test_limit_takes_nested_subsets_in_the_order_of_the_set():
    path = str(DATA / "math500")
    whole, fifty, ten = (
        [problem.id for problem in dataset.load(config("math500", path=path, test_limit=limit), 0).test["math500"]]
        for limit in (None, 50, 10)
    )
    assert (len(fifty), len(ten)) == (50, 10)
    assert set(ten) < set(fifty)
    assert fifty == [name for name in whole if name in fifty]


# --- the Hub's layouts


def gsm8k_rows(split, num):
    return [GSM8K | {"question": f"{split} {i}?"} for i in range(num)]


def sizes(splits):
    return len(splits.train), len(splits.validation), {name: len(problems) for name, problems in splits.test.items()}


@pytest.mark.parametrize(
    "layout",
    [
        "main/{}-00000-of-00001.parquet",
        "data/{}-00000-of-00001-9186e3688e6659a2.parquet",
        "{}/data-00000-of-00001.arrow",
        "{}/0000.parquet",
        "{}.jsonl",
    ],
)
def test_gsm8k_as_downloaded_or_saved(tmp_path, layout):
    for split, num in (("train", 4), ("test", 2)):
        write(tmp_path / layout.format(split), *gsm8k_rows(split, num))
        write(tmp_path / f"{split}_socratic.jsonl", GSM8K)  # beside it in the authors' repository
        if layout.startswith("main"):
            write(tmp_path / "socratic" / f"{split}-00000-of-00001.parquet", GSM8K)
    splits = dataset.load(config("gsm8k", path=str(tmp_path), num_validation=1), seed=0)
    assert sizes(splits) == (3, 1, {"gsm8k": 2})
    assert splits.test["gsm8k"][0] == Problem("gsm8k/test/0", "test 0?", "1042", "6*7.\n#### 1042")


def test_svamp_as_downloaded(tmp_path):
    row = {"ID": "chal-777", "Body": "2 cats", "Question": "Eyes?", "Answer": "4.0", "question_concat": "2 cats Eyes?"}
    write(tmp_path / "data" / "train-00000-of-00001.parquet", row, row | {"ID": "chal-1", "Body": "3 cats"})
    write(tmp_path / "data" / "test-00000-of-00001.parquet", row | {"ID": "chal-2", "Body": "4 cats"})
    made = config("svamp", path=str(tmp_path), num_validation=1)
    splits = dataset.load(made, seed=0)
    assert sizes(splits) == (1, 1, {"svamp": 1})
    assert splits.test["svamp"] == [
        Problem("svamp/test/chal-2", "4 cats Eyes?", "4", "", {"question_concat": "2 cats Eyes?"})
    ]
    dataset.check(made, training=True)


def test_asdiv_as_downloaded_is_a_test_set(tmp_path):
    row = {"body": "2 cats.", "question": "Eyes? ", "solution_type": "x", "answer": "4 (eyes)", "formula": "2*2=4"}
    write(tmp_path / "asdiv" / "validation-00000-of-00001.parquet", row)
    splits = dataset.load(config("asdiv", path=str(tmp_path)), seed=0)
    problem = Problem("asdiv/test/0", "2 cats. Eyes?", "4", "", {"solution_type": "x", "formula": "2*2=4"})
    assert splits == dataset.Splits([], [], {"asdiv": [problem]})
    with pytest.raises(ConfigError, match="dataset=asdiv is a test set: train on dataset=gsm8k"):
        dataset.check(config("asdiv"), training=True)


def test_asdiv_split_trains_on_the_downloaded_set_by_the_hash_of_each_question(tmp_path):
    row = {"body": "2 cats.", "solution_type": "x", "answer": "4 (eyes)", "formula": "2*2=4"}
    rows = [row | {"question": question} for question in "Eyes? Paws? Ears? Tails? Legs? Toes? Noses?".split()]
    write(tmp_path / "asdiv" / "validation-00000-of-00001.parquet", *rows)
    splits = dataset.load(config("asdiv_split", path=str(tmp_path), num_validation=0), seed=0)
    share = {row["question"]: hash_share(f"{row['body']} {row['question']}") for row in rows}
    assert {p.question.split()[-1] for p in splits.test["asdiv_split"]} == {q for q, s in share.items() if s < 0.3}
    assert {p.question.split()[-1] for p in splits.train} == {q for q, s in share.items() if s >= 0.3}
    assert splits.train[0].solution == "2*2=4\n#### 4"
    dataset.check(config("asdiv_split"), training=True)


def hash_share(text):
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) / 2**256


def test_math_trains_on_the_training_problems_only(tmp_path, caplog):
    for subject in ("algebra", "geometry"):
        row = {
            "problem": f"{subject} 0",
            "level": "Level 5",
            "type": subject,
            "solution": "So $\\boxed{\\frac{1}{2}}$.",
        }
        write(
            tmp_path / "hendrycks_math" / subject / "train-00000-of-00001.parquet", row, row | {"problem": "Shared  X"}
        )
        write(tmp_path / "hendrycks_math" / subject / "test-00000-of-00001.parquet", row)
    row = {"problem": "shared x", "solution": "", "answer": "2", "unique_id": "test/algebra/1.json"}
    write(tmp_path / "MATH-500" / "test.jsonl", row)
    splits = dataset.load(config("math", path=str(tmp_path), num_validation=0), seed=0)
    assert sizes(splits) == (2, 0, {"math500": 1})
    assert {problem.question for problem in splits.train} == {"algebra 0", "geometry 0"}
    assert splits.train[0].solution == "So $\\boxed{\\frac{1}{2}}$.\n#### \\frac{1}{2}"
    assert "left out 2 training problems" in caplog.text


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{1} then \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed 7$.", "7"),
        ("so \\boxed{3} or $\\boxed 4.5.$", "4.5"),
        ("\\boxed\\frac{1}{2}, so", "\\frac{1}{2}"),
        ("\\boxed {7}", "7"),
        ("\\fbox{3}", "3"),
        ("\\boxed{\\{1\\}}", "\\{1\\}"),
    ],
)
def test_the_answer_of_a_solution_of_math(text, answer):
    assert sources.hendrycks(RawRow({"problem": "x", "solution": text}, "line 1")).answer == answer


@pytest.mark.parametrize("text", ["none", "\\boxed{", "\\boxed{ }"])
def test_a_solution_of_math_without_an_answer_is_refused(text):
    with pytest.raises(ConfigError, match=r"line 1: solution must hold its answer in \\boxed"):
        sources.hendrycks(RawRow({"problem": "x", "solution": text}, "line 1"))


@pytest.mark.parametrize("name", sorted(set(sources.SETS) - {"jsonl"}))
def test_not_cached_and_no_network(tmp_path, monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ConfigError, match=rf"dataset={name} is not in the cache .* run `python -m pspo.prefetch dataset={name}`"
    ):
        dataset.load(config(name), seed=0)


def test_the_cache_that_hf_download_fills_serves_offline(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "datasets--openai--gsm8k"
    for split in ("train", "test"):
        write(repo / "snapshots" / "abc" / "main" / f"{split}-00000-of-00001.parquet", *gsm8k_rows(split, 2))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    assert sizes(dataset.load(config("gsm8k", num_validation=1), seed=0)) == (1, 1, {"gsm8k": 2})


def test_digests_name_the_bytes_of_files_and_the_commits_of_repositories(tmp_path, monkeypatch):
    assert dataset.digests(config("embedded")) == {}
    folder = tmp_path / "mine"
    train, test = (write(folder / f"{split}.jsonl", {"question": "1+1?", "answer": 2}) for split in ("train", "test"))
    write(folder / "notes.jsonl", "not read")
    before = dataset.digests(config("jsonl", path=str(folder)))
    assert before == {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in (train, test)}
    write(test, {"question": "1+2?", "answer": 3})
    after = dataset.digests(config("jsonl", path=str(folder)))
    assert [name for name in before if before[name] != after[name]] == [str(test)]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for repo, file, commit in (
        ("EleutherAI/hendrycks_math", "algebra/train.parquet", "a" * 40),
        ("HuggingFaceH4/MATH-500", "test.jsonl", "b" * 40),
    ):
        root = tmp_path / f"datasets--{repo.replace('/', '--')}"
        write(root / "snapshots" / commit / file, {"problem": "x"})
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(commit)
    assert dataset.digests(config("math")) == {
        "EleutherAI/hendrycks_math": "a" * 40,
        "HuggingFaceH4/MATH-500": "b" * 40,
    }


# --- a user's own problems


def test_jsonl_folder(tmp_path):
    write(tmp_path / "train.jsonl", {"question": "1+1?", "answer": 2}, "", {"prompt": "2+2?", "answer": "4", "id": "b"})
    write(tmp_path / "validation.jsonl", {"question": "3+3?", "answer": 6.0, "solution": "3+3=6"})
    write(tmp_path / "test.jsonl", {"question": "x?", "answer": -1.5, "solution": "y\n#### -1.50"})
    splits = dataset.load(config("jsonl", path=str(tmp_path), num_validation=1), seed=0)
    assert splits.train == [Problem("jsonl/train/0", "1+1?", "2", ""), Problem("jsonl/train/b", "2+2?", "4", "")]
    assert splits.validation == [Problem("jsonl/validation/0", "3+3?", "6", "3+3=6\n#### 6")]
    assert splits.test == {"jsonl": [Problem("jsonl/test/0", "x?", "-1.5", "y\n#### -1.5")]}


def test_jsonl_file_is_for_training(tmp_path):
    path = write(tmp_path / "mine.jsonl", *[{"question": f"{i}?", "answer": i} for i in range(10)])
    assert sizes(dataset.load(config("jsonl", path=str(path), num_validation=3), seed=0)) == (7, 3, {})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "a", "ans', "train.jsonl line 2 is not JSON"),
        ("[1]", "line 2: must be an object with named fields, got list"),
        ({"question": "a"}, "line 2: answer is missing; the row has question"),
        ({"answer": "a"}, "line 2: question or prompt is missing"),
        ({"question": 3, "answer": "a"}, "line 2: question must be text that is not blank, got 3"),
        ({"question": "a", "answer": " "}, "line 2: answer must be text that is not blank"),
        ({"question": "a", "answer": True}, "line 2: answer must be text"),
        ('{"question": "a", "answer": NaN}', "line 2: answer must be a finite number"),
        ({"question": "a", "answer": "1+1=2 #### 2"}, "line 2: answer must be the final answer alone"),
        ({"question": "a", "answer": 1, "id": 7}, "line 2: id 7 stands here for the second time"),
        ('{"question": "\\ud800", "answer": 1}', "line 2 is not JSON in UTF-8: .* surrogates not allowed"),
        ('{"question": "a", "answer": 1, "extra": ["\\udc00"]}', "line 2 is not JSON in UTF-8: .* surrogates"),
        ('{"\\ud800": "a", "answer": 1}', "line 2 is not JSON in UTF-8: .* surrogates not allowed"),
        (
            f'{{"question": "a", "answer": {"9" * 5000}}}',
            "line 2 is not JSON in UTF-8: Exceeds the limit .*digits; rep",
        ),
        (f'{{"question": "a", "answer": {"[" * 100_000}', "line 2 is not JSON in UTF-8: .*(recursion|overflow)"),
        ('{"question": "a", "answer": 1e999}', "line 2: answer must be a finite number, got inf"),
        ('{"question": "a", "answer": -Infinity}', "line 2: answer must be a finite number, got -inf"),
        ('{"question": "a\x00", "answer": 1}', "line 2 is not JSON in UTF-8: Invalid control character"),
    ],
)
def test_broken_line_is_named(tmp_path, line, message):
    write(tmp_path / "train.jsonl", {"question": "ok", "answer": "1", "id": "7"}, line)
    with pytest.raises(ConfigError, match=message):
        dataset.load(config("jsonl", path=str(tmp_path)), seed=0)


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        (
            "gsm8k",
            "train.jsonl",
            b'{"question": "a", "answer": "no mark"}',
            "line 1: answer must end in '#### <number>'",
        ),
        (
            "gsm8k",
            "train.jsonl",
            b'{"question": "\xff", "answer": "#### 1"}',
            "line 1 is not JSON in UTF-8: .* can't decode byte 0xff",
        ),
        (
            "gsm8k",
            "test.parquet",
            b"version https://git-lfs",
            "test.parquet cannot be read: .*a Git LFS pointer is not data",
        ),
        ("gsm8k", "test.arrow", b"nothing of the kind", "test.arrow cannot be read"),
        ("gsm8k", "test.jsonl", b"", "test.jsonl has no rows"),
        ("asdiv", "ASDiv.xml", b"<a><Problem></a>", "ASDiv.xml cannot be read: mismatched tag"),
        ("asdiv", "ASDiv.xml", b"<a><Problem ID='n1'><Body>b</Body></Problem></a>", "problem n1: answer is missing"),
        ("svamp", "SVAMP.json", b"[{]", "SVAMP.json is not JSON"),
        ("asdiv", "ASDiv.xml", b"<a>&#xD800;</a>", "ASDiv.xml cannot be read: reference to invalid character"),
        ("asdiv", "ASDiv.xml", b"<?xml version='1.0' encoding='gbk'?><a/>", "ASDiv.xml cannot be read"),
        ("svamp", "SVAMP.json", b'[{"ID": "\\ud800"}]', "SVAMP.json is not JSON in UTF-8"),
        ("gsm8k", "train.jsonl", '{"question": "a"}'.encode("utf-16"), "line 1 is not JSON in UTF-8|answer is missing"),
        ("gsm8k", "train.jsonl", b"\x1f\x8b\x08\x00", "line 1 is not JSON in UTF-8"),  # compressed
        ("gsm8k", "train.jsonl.gz", b"\x1f\x8b\x08\x00", "holds no train or test file in one of the formats"),
        ("math500", "train.jsonl", b"{}", "holds no test file in one of the formats .*; dataset=math500 needs one"),
        ("svamp", "notes.json", b"{}", "holds no SVAMP.json or train or test file"),
    ],
)
def test_broken_files_are_named(tmp_path, name, file, content, message):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        dataset.load(config(name, path=str(tmp_path)), seed=0)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_broken_row_of_a_table_is_named(tmp_path, suffix):
    """A table's text is promised to be UTF-8, which the writer of the file need not have looked at."""
    half = pa.array([b"ok?", b"caf\xe9?"]).view(pa.string())
    table, path = pa.table({"question": half, "answer": ["1", "2"]}), tmp_path / f"train.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    with pytest.raises(ConfigError, match=rf"train\.{suffix} row 2 is not UTF-8"):
        dataset.load(config("jsonl", path=str(tmp_path)), seed=0)


def test_a_torn_table_is_named(tmp_path):
    for suffix in ("parquet", "arrow"):
        path = write(tmp_path / suffix / f"train.{suffix}", *gsm8k_rows("train", 100))
        path.write_bytes(path.read_bytes()[:-300])
        with pytest.raises(ConfigError, match=rf"train\.{suffix} cannot be read"):
            dataset.load(config("gsm8k", path=str(path)), seed=0)


def test_what_the_system_refuses_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="cannot be read: File name too long; mend its name"):
        dataset.check(config("jsonl", path="x" * 300))
    with pytest.raises(ConfigError, match="does not exist"):
        dataset.check(config("jsonl", path="a\0b"))
    write(tmp_path / "train.jsonl", {"question": "1+1?", "answer": 2})
    made = config("jsonl", path=str(tmp_path))

    def refuse(path, *mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)  # the user who runs the tests may be allowed to read all files
    with pytest.raises(ConfigError, match=r"train\.jsonl cannot be read: Permission denied; mend its name or perm"):
        dataset.load(made, seed=0)


def test_a_folder_is_no_data_file(tmp_path):
    (tmp_path / "train.jsonl").mkdir()
    with pytest.raises(ConfigError, match="holds no train or validation or test file"):
        dataset.check(config("jsonl", path=str(tmp_path)))
    write(tmp_path / "train.jsonl" / "train.jsonl", {"question": "1+1?", "answer": 2})
    assert sizes(dataset.load(config("jsonl", path=str(tmp_path), num_validation=0), seed=0)) == (1, 0, {})


def test_a_byte_order_mark_and_a_long_line_are_read(tmp_path):
    row = json.dumps({"question": "a " * 10**6, "answer": 2})
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + row.encode() + b"\r\n")
    splits = dataset.load(config("jsonl", path=str(tmp_path), num_validation=0), seed=0)
    assert len(splits.train[0].question) == 2 * 10**6 - 1


def test_unknown_format_and_two_formats(tmp_path):
    with pytest.raises(ConfigError, match=r"the format must be one of \.jsonl"):
        dataset.check(config("jsonl", path=str(write(tmp_path / "a.csv"))))
    write(tmp_path / "train.jsonl", GSM8K)
    write(tmp_path / "train.parquet", GSM8K)
    with pytest.raises(ConfigError, match=r"holds train as \.jsonl and as \.parquet"):
        dataset.check(config("gsm8k", path=str(tmp_path)))


@pytest.mark.parametrize("files", [{"train": 3}, {"train": 5, "validation": 2}])
def test_too_few_problems_for_validation(tmp_path, files):
    for split, num in files.items():
        write(tmp_path / f"{split}.jsonl", *[{"question": f"{split} {i}", "answer": i} for i in range(num)])
    with pytest.raises(ConfigError, match=r"dataset\.num_validation=3: "):
        dataset.load(config("jsonl", path=str(tmp_path), num_validation=3), seed=0)


# --- order


@pytest.mark.parametrize("num", [1, 7, 100])
def test_each_epoch_visits_every_problem_once(num):
    for epoch in range(3):
        assert sorted(dataset.order(num, 0, epoch * num, num)) == list(range(num))


@pytest.mark.parametrize("cuts", [[0, 5, 5, 12, 40], [0, 1, 2, 3, 40], [0, 39, 40], [0, 7, 14, 40]])
def test_any_slicing_of_the_order_is_the_same_sequence(cuts):
    pieces = [dataset.order(7, 3, start, stop - start) for start, stop in itertools.pairwise(cuts)]
    assert list(itertools.chain(*pieces)) == dataset.order(7, 3, 0, 40)


def test_order_depends_on_seed_and_epoch():
    first = dataset.order(100, 0, 0, 100)
    assert first != dataset.order(100, 1, 0, 100)
    assert first != dataset.order(100, 0, 100, 100)
    assert first == dataset.order(100, 0, 0, 100)


def test_order_is_pinned():
    assert dataset.order(8, 0, 0, 8) == [0, 7, 2, 1, 4, 6, 5, 3]  # a change here breaks the resume of every run


def test_every_further_column_of_a_row_is_the_problems_extra(tmp_path):
    row = {"id": "a", "question": "1 + 1?", "answer": 2, "solution": "one and one", "level": 3, "tests": ["f() == 2"]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + '\n{"prompt": "2 + 2?", "answer": "4", "tests": null}\n')
    (located,) = sources.locate("jsonl", str(tmp_path))
    first, second = sources.read(*located)
    assert (first.extra, second.extra) == ({"level": 3, "tests": ["f() == 2"]}, {"tests": None})
    assert len({first, second, dataclasses.replace(first, extra={})}) == 3  # hashed by all else


@pytest.mark.parametrize("name", sources.SETS)
def test_the_columns_of_a_source_are_those_that_its_rows_are_read_by(name):
    class Seen(dict):
        def get(self, column, default=None):
            seen.add(column)
            return super().get(column, default)

    for source in sources.SETS[name]:
        seen = set()
        texts = dict.fromkeys(source.columns.split(), "\\boxed{7}") | {"answer": "#### 7" if name == "gsm8k" else "7"}
        for fields in (texts, {column: text for column, text in texts.items() if column != "question"}):
            with contextlib.suppress(ConfigError):
                source.parse(RawRow(Seen(fields), "line 1"))
        assert seen == set(source.columns.split())


# --- test sets of an evaluation, and examples


@real
def test_the_papers_four_test_sets_stand_in_one_folder():
    made = config("gsm8k", test_limit=7)
    for name, total in {"gsm8k": 1319, "svamp": 1000, "asdiv": 2305, "math500": 500}.items():
        assert len(dataset.load_set(config("gsm8k"), name, str(DATA))) == total
        some = dataset.load_set(made, name, str(DATA))
        assert len({problem.id for problem in some}) == 7
        assert all(problem.id.startswith(f"{name}/test/") for problem in some)
        assert all(Path(file).is_relative_to(DATA / name) for file in dataset.set_digests(name, str(DATA)))


def test_a_test_set_may_be_a_file_of_ones_own(tmp_path):
    write(tmp_path / "mine.jsonl", {"question": "1 + 1?", "answer": 2}, {"question": "2 + 2?", "answer": 4})
    assert [p.answer for p in dataset.load_set(config("embedded"), str(tmp_path / "mine.jsonl"), None)] == ["2", "4"]
    write(tmp_path / "both" / "train.jsonl", {"question": "1 + 1?", "answer": 2})
    write(tmp_path / "both" / "test.jsonl", {"question": "3 + 3?", "answer": 6})
    assert [p.answer for p in dataset.load_set(config("embedded"), str(tmp_path / "both"), None)] == ["6"]
    assert len(dataset.load_set(config("gsm8k", test_limit=5), "embedded", None)) == 5


def test_an_unknown_test_set_lists_the_known_ones(tmp_path):
    with pytest.raises(
        ConfigError, match=r"evaluate.sets gsm80k \(did you mean gsm8k\?\); known: gsm8k, svamp, asdiv, "
    ):
        dataset.check_set("gsm80k", None)
    with pytest.raises(ConfigError, match="has no svamp; give a folder"):
        dataset.check_set("svamp", str(tmp_path))
    write(tmp_path / "gsm8k" / "train.jsonl", GSM8K)
    with pytest.raises(ConfigError, match="no test"):
        dataset.load_set(config("gsm8k"), "gsm8k", str(tmp_path))


def test_examples_are_held_out_of_training_and_equal_for_every_seed():
    zero = dataset.load(config("embedded", num_train=50), seed=0)
    shown = [dataset.load(config("embedded", num_train=50, shots=3), seed=seed) for seed in (0, 1)]
    assert shown[0].shots == shown[1].shots
    assert len(shown[0].shots) == 3
    assert all(shot.solution.endswith(f"#### {shot.answer}") for shot in shown[0].shots)
    assert {p.id for p in zero.train} == {p.id for p in [*shown[0].train, *shown[0].shots]}


@real
def test_examples_need_solutions():
    with pytest.raises(ConfigError, match=r"dataset\.shots=2: there are only 0 training problems with a solution"):
        dataset.load(config("asdiv", path=str(DATA / "asdiv"), shots=2), seed=0)
