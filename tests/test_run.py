import collections
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forked import REWARD, SMALL, TINY, at, command, fingerprint, fork, log_of, make, only_run, output_of, wait
from training import composed
from transformers import AutoModelForCausalLM, AutoTokenizer

from pspo import checkpoint, dataset, model, report, trainer
from pspo.config import compose
from pspo.host import environment
from pspo.report import meaning
from pspo.reward import Reward
from pspo.run import earlier, evaluation, job
from pspo.run.earlier import run_directory
from pspo.sync import sync
from pspo.tracker import Tracker
from tests.wandb_server import serving

DATA = Path(os.environ.get("PSPO_DATA", Path(__file__).parents[2] / "shared" / "data"))


def start(cwd, cache, *overrides, mode="offline"):
    """The command, in a process of its own, from beginning to end."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "WANDB_MODE": mode, "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, "-m", "pspo.run", *overrides]
    done = subprocess.run(
        arguments, cwd=cwd, env=environment, capture_output=True, text=True, timeout=3600, check=False
    )
    return done.returncode, done.stdout + done.stderr


def rows_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def summary_of(directory):
    return json.loads((directory / "summary.json").read_text())


@pytest.fixture(scope="module")
def commanded(tmp_path_factory, cache):
    """A run by the command, and what it printed."""
    cwd = tmp_path_factory.mktemp("commanded")
    (cwd / "mine.py").write_text(REWARD)
    status, output = start(cwd, cache, *TINY)
    assert status == 0, output
    return only_run(cwd), output


def test_a_run_leaves_everything_it_promises(commanded):
    directory, output = commanded
    files = "config.yaml overrides.yaml inputs.json environment.json metrics.jsonl completions.jsonl summary.json"
    for name in f"{files} curves.png report.html run.log DONE checkpoints model evaluation".split():
        assert (directory / name).exists(), name
    summary, rows = summary_of(directory), rows_of(directory)
    assert summary["status"] == "done"
    assert summary["objective"] == {"name": "pspo", "alpha": 0.1}
    assert summary["steps"] == 5
    assert summary["optimizer_steps"] == 20
    assert summary["seed"] == 0
    for when in ("before", "after"):
        result = summary["evaluation"]["embedded"][when]
        assert 0 <= result["ci95_low"] <= result["accuracy"] <= result["ci95_high"] <= 1
        assert result["n"] == 8
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert summary["completion_tokens"] == rows[-1]["budget/completion_tokens"] > 0
    assert {key for row in rows for key in row if meaning(key) is None} == set()
    assert str(directory.name) in output
    assert "95 %" in output


def test_the_model_is_a_plain_hugging_face_directory(commanded):
    directory = commanded[0] / "model"
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Tom has 2 pens."}], add_generation_prompt=True, return_tensors="pt"
    )
    assert model.generate(**ids, max_new_tokens=4).shape[1] > ids["input_ids"].shape[1]


def test_a_finished_run_is_not_run_twice(commanded, cache, tmp_path):
    directory = tmp_path / "outputs" / "main" / commanded[0].name
    shutil.copytree(commanded[0], directory)
    assert make(tmp_path, cache, work=command(*TINY)) == 0
    assert "already done" in output_of(tmp_path)
    assert "changed" not in output_of(tmp_path).replace("rerun=changed", "")
    assert fingerprint(directory) == fingerprint(commanded[0])
    made_from = directory / "inputs.json"
    made_from.write_text(json.dumps(json.loads(made_from.read_text()) | {"code": "beef"}))
    assert make(tmp_path, cache, work=command(*TINY)) == 0
    assert "since that run began, code changed" in output_of(tmp_path)


@pytest.mark.process
def test_two_runs_of_one_configuration_have_the_same_bytes(commanded, cache, tmp_path):
    assert make(tmp_path, cache, drawn=True) == 0, output_of(tmp_path)
    assert fingerprint(only_run(tmp_path)) == fingerprint(commanded[0])


INSTANTS = {
    "in the test before": (evaluation, "answer", 1),
    "in the test after": (evaluation, "answer", 2),
    "before the first row": (Tracker, "log", 1),
    "between a row and its checkpoint": (checkpoint, "save", 2),
    "before old checkpoints go": (checkpoint, "prune", 4),
    "before the page": (report, "write_report", 1),
}


@pytest.mark.process
@pytest.mark.parametrize("instant", INSTANTS)
def test_a_run_killed_after_any_step_ends_like_the_unbroken_one(unbroken, cache, tmp_path, instant):
    place, name, call = INSTANTS[instant]
    assert make(tmp_path, cache, hook=at(place, name, call, signal.SIGKILL)) == -signal.SIGKILL
    assert not (only_run(tmp_path) / "DONE").exists()
    assert make(tmp_path, cache) == 0, output_of(tmp_path)
    assert "restart 1" in log_of(tmp_path)
    assert "the last at work here, was killed: kill -9, out of memory, or a lost node" in log_of(tmp_path)
    assert len(json.loads((only_run(tmp_path) / "environment.json").read_text())) == 2
    assert fingerprint(only_run(tmp_path)) == fingerprint(unbroken)


@pytest.mark.process
def test_a_run_that_was_told_to_stop_was_not_killed(cache, tmp_path):
    assert make(tmp_path, cache, hook=at(trainer, "update", 1, signal.SIGTERM)) == 143
    assert make(tmp_path, cache) == 0, output_of(tmp_path)
    assert "restart 1" in log_of(tmp_path)
    assert "killed" not in log_of(tmp_path)


@pytest.mark.process
def test_lost_answers_of_the_initial_weights_are_given_again_by_those(unbroken, cache, tmp_path):
    assert make(tmp_path, cache, hook=at(checkpoint, "prune", 4, signal.SIGKILL)) == -signal.SIGKILL
    answers = only_run(tmp_path) / "evaluation" / "before" / "greedy" / "embedded_t0.jsonl"
    whole = answers.read_bytes()
    answers.write_bytes(whole[: len(whole) // 2])
    assert make(tmp_path, cache) == 0, output_of(tmp_path)
    assert answers.read_bytes() == whole
    assert fingerprint(only_run(tmp_path)) == fingerprint(unbroken)


@pytest.mark.process
def test_answers_of_weights_that_were_lost_are_given_again(unbroken, cache, tmp_path):
    """The last checkpoint is torn, so that the last step is made again, on a GPU with other bits."""
    assert make(tmp_path, cache, hook=at(report, "write_report", 1, signal.SIGKILL)) == -signal.SIGKILL
    directory = only_run(tmp_path)
    (directory / "checkpoints" / "step_000005" / "state.pt").write_bytes(b"torn")
    answers = directory / "evaluation" / "after" / "greedy" / "embedded_t0.jsonl"
    answers.write_text(answers.read_text().replace('"reward": ', '"reward": 1'))
    assert make(tmp_path, cache) == 0, output_of(tmp_path)
    assert fingerprint(directory) == fingerprint(unbroken)


def test_seeds_and_batching_make_other_runs_of_the_same_name_rule():
    base = composed(*SMALL)
    assert run_directory(base, SMALL) == run_directory(composed(*SMALL, "tracker=wandb", "checkpoint.keep=9"), SMALL)
    for other in ("seed=1", "objective=clip", "objective.alpha=0.2", "optimizer.lr=1e-5"):
        assert run_directory(composed(*SMALL, other), []).name[-8:] != run_directory(base, []).name[-8:]


OWN = """
open("imports", "a").write("1")
from pspo.objective.clip import NoClip as Own
"""


@pytest.mark.process
def test_a_run_makes_every_check_once(cache, tmp_path, monkeypatch):
    """User code is imported once, the package hashed once, the data read once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    (tmp_path / "mine.py").write_text(OWN + REWARD)
    calls, checks = collections.Counter(), [(job, "check"), (model, "check"), (earlier, "look"), (dataset, "load")]
    for place, name in (*checks, (Reward, "check_gold")):
        function, label = getattr(place, name), f"{place.__name__}.{name}"
        counted = lambda *a, f=function, n=label, **k: (calls.update([n]), f(*a, **k))[1]  # noqa: E731
        monkeypatch.setattr(place, name, counted)
    environment.code_digest.cache_clear()
    overrides = [*TINY, "budget.steps=1", "objective=custom", "objective.function=mine.py:Own"]
    job.run(compose(overrides), overrides)
    assert set(calls.values()) == {1}
    assert len(calls) == 5
    assert environment.code_digest.cache_info().misses == 1
    assert Path("imports").read_text() == "1"


@pytest.mark.process
def test_a_second_process_in_one_directory_is_refused(cache, tmp_path):
    long = ["budget.steps=500", "checkpoint.every=500"]
    first = fork(tmp_path, cache, long)
    try:
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline and not list(tmp_path.glob("outputs/main/*/metrics.jsonl")):
            time.sleep(0.05)
        assert make(tmp_path, cache, work=command(*TINY, *long)) == 2
        assert f"another process (process {first} on " in output_of(tmp_path)
    finally:
        os.kill(first, signal.SIGKILL)
        wait(first)


@pytest.mark.process
def test_wandb_gets_the_same_numbers_online_and_later(cache, tmp_path):
    with serving() as server:
        for name, mode in {"online": "online", "later": "offline"}.items():
            overrides, environment = ["tracker=wandb", "budget.steps=2"], {"WANDB_MODE": mode}
            assert make(tmp_path / name, cache, overrides, environment=environment) == 0, output_of(tmp_path / name)
            directory = only_run(tmp_path / name)
            if mode == "offline":
                assert list(sync(directory.parent)) == [(directory.name, 3, "")]
            assert [row["step"] for row in rows_of(directory)] == server.steps(directory) == [0, 1, 2]
            assert [row["reward/mean"] for row in rows_of(directory)[1:]] == [
                row["reward/mean"] for row in server.history(directory)[1:]
            ]


@pytest.mark.process
def test_selection_best_keeps_the_weights_of_the_best_validation(cache, tmp_path):
    assert make(tmp_path, cache, ["selection=best"]) == 0, output_of(tmp_path)
    rewards = {
        row["step"]: row["validation/sampled_reward_mean"]
        for row in rows_of(only_run(tmp_path))
        if "validation/sampled_accuracy" in row
    }
    assert summary_of(only_run(tmp_path))["selected_step"] == max(rewards, key=lambda step: (rewards[step], -step))


@pytest.mark.process
def test_zero_steps_evaluate_only(cache, tmp_path):
    assert make(tmp_path, cache, ["budget.steps=0"], drawn=True) == 0, output_of(tmp_path)
    assert list(summary_of(only_run(tmp_path))["evaluation"]["embedded"]) == ["after"]
    assert [path.name for path in (only_run(tmp_path) / "evaluation").iterdir()] == ["after"]
    assert "accuracy [95 %]" in output_of(tmp_path)
    assert "points" not in output_of(tmp_path)
    assert "→" not in (only_run(tmp_path) / "report.html").read_text()


@pytest.mark.process
def test_multirun_is_a_matched_comparison(cache, tmp_path):
    arms = command("-m", *SMALL, "objective=noclip,clip", "budget.steps=1")
    assert make(tmp_path, cache, work=arms) == 0, output_of(tmp_path)
    runs = sorted((tmp_path / "outputs" / "main").iterdir())
    assert len(runs) == 2
    assert len({json.dumps(summary_of(run)["evaluation"]["embedded"]["before"]) for run in runs}) == 1
    first = [(run / "completions.jsonl").read_text().splitlines()[0] for run in runs]
    assert first[0] == first[1]


def test_every_job_of_a_multirun_is_checked_before_the_first_starts(cache, tmp_path):
    assert make(tmp_path, cache, work=command("-m", *SMALL, "objective.alpha=0.1,0.2,2")) == 2
    told = output_of(tmp_path).splitlines()[-1]
    assert told.startswith("pspo: objective.alpha must be in [0, 1), got 2.0: at 1")
    assert not (tmp_path / "outputs").exists()


@pytest.mark.process
@pytest.mark.skipif(not (DATA / "gsm8k").is_dir(), reason=f"no real data in {DATA}; set PSPO_DATA")
def test_real_gsm8k_with_the_tiny_architecture(cache, tmp_path):
    """The first problems of each file; those whose prompt is too long for so small a tokenizer are dropped."""
    for split, number in (("train", 400), ("test", 40)):
        with (DATA / "gsm8k" / f"{split}.jsonl").open() as lines:
            (tmp_path / f"{split}.jsonl").write_text("".join(itertools.islice(lines, number)))
    small = [key for key in SMALL if not key.startswith(("dataset.num_train", "dataset.num_test", "budget"))]
    overrides = ["dataset=gsm8k", f"dataset.path={tmp_path}", "dataset.test_limit=8", "budget.steps=2"]
    assert make(tmp_path, cache, work=command(*small, *overrides)) == 0, output_of(tmp_path)
    assert 0 < summary_of(only_run(tmp_path))["evaluation"]["gsm8k"]["after"]["n"] <= 8
    assert [row["step"] for row in rows_of(only_run(tmp_path))] == [0, 1, 2]


@pytest.mark.slow
def test_a_qwen_0_5b_shape_takes_two_steps_under_24_gib(cache, tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from pspo.dataset import embedded
    from pspo.model import tiny

    texts = [text for p in embedded.load("train", 512) for text in (p.question, p.solution)]
    tokenizer = tiny.train_tokenizer(texts, 256)
    config = Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "shape")
    tokenizer.save_pretrained(tmp_path / "shape")
    overrides = [
        "model=qwen0_5b", f"model.path={tmp_path / 'shape'}", "dataset=embedded", "rollout.prompts=2",
        "rollout.group_size=2", "rollout.max_new_tokens=16", "budget.steps=2", "dataset.num_test=2",
        "dataset.num_validation=2", "evaluate.every=9", "tracker=jsonl",
    ]  # fmt: skip
    status, output = start(tmp_path, cache, *overrides)
    assert status == 0, output
    rows = [json.loads(line) for line in (only_run(tmp_path) / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2
    assert max(row.get("memory/peak_gib", 0) for row in rows) < 24
    shutil.rmtree(tmp_path / "outputs")
