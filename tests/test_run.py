import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pspo.config import compose, run_directory
from pspo.report import meaning

DATA = Path(os.environ.get("PSPO_DATA", Path(__file__).parents[2] / "shared" / "data"))
SMALL = [
    "model.warm_start.worked_steps=20",
    "model.warm_start.mixed_steps=10",
    "model.warm_start.batch_size=16",
    "model.architecture.hidden_size=32",
    "model.architecture.intermediate_size=64",
    "model.architecture.num_layers=2",
    "rollout.prompts=4",
    "rollout.group_size=4",
    "dataset.num_train=64",
    "dataset.num_validation=8",
    "dataset.num_test=16",
    "budget.steps=4",
    "evaluation.every=2",
    "checkpoint.every=1",
    "threads=1",
    "tracker=jsonl",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One warm policy for all runs of this module."""
    return tmp_path_factory.mktemp("cache")


def start(cwd, cache, *overrides, wait=True, mode="offline"):
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "WANDB_MODE": mode, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pspo.run", *overrides]
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if not wait:
        return process
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def only_run(cwd, group="main"):
    (directory,) = (cwd / "outputs" / group).iterdir()
    return directory


def fingerprint(directory):
    """Every file's content without what depends on the clock or on memory, and without W&B's own files."""
    found = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if not path.is_file() or name.startswith(("wandb", ".")):
            continue
        content = path.read_bytes()
        if path.name == "run.log":  # the story of the processes: a resumed run has more of them
            continue
        if path.suffix in (".json", ".jsonl"):
            content = re.sub(rb'"(time|memory)/.*?(,|\n|})', b"", content)
        if path.suffix == ".html":  # one line of the page for each such number
            content = b"\n".join(line for line in content.split(b"\n") if not re.search(rb"(time|memory)/", line))
        found[name] = hashlib.sha256(content).hexdigest()
    return found


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, cache):
    cwd = tmp_path_factory.mktemp("unbroken")
    status, output = start(cwd, cache, *SMALL)
    assert status == 0, output
    return cwd, output


def test_a_run_leaves_everything_it_promises(unbroken):
    cwd, output = unbroken
    directory = only_run(cwd)
    files = "config.yaml overrides.yaml environment.json metrics.jsonl completions.jsonl summary.json curves.png"
    for name in f"{files} report.html run.log DONE checkpoints model evaluation".split():
        assert (directory / name).exists(), name
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["status"] == "done"
    assert summary["objective"] == {"name": "pspo", "alpha": 0.1}
    assert summary["steps"] == 4
    assert summary["optimizer_steps"] == 16
    assert summary["seed"] == 0
    assert summary["time/wall_s"] > 0
    for when in ("before", "after"):
        result = summary["evaluation"]["embedded"][when]
        assert 0 <= result["ci95_low"] <= result["accuracy"] <= result["ci95_high"] <= 1
        assert result["n"] == 16
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert summary["completion_tokens"] == rows[-1]["budget/completion_tokens"] > 0
    assert {key for row in rows for key in row if meaning(key) is None} == set()
    assert str(directory.name) in output
    assert "95 %" in output


def test_the_model_is_a_plain_hugging_face_directory(unbroken):
    directory = only_run(unbroken[0]) / "model"
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Tom has 2 pens."}], add_generation_prompt=True, return_tensors="pt"
    )
    assert model.generate(**ids, max_new_tokens=4).shape[1] > ids["input_ids"].shape[1]


def test_a_finished_run_is_not_run_twice(unbroken, cache):
    cwd, _ = unbroken
    before = fingerprint(only_run(cwd))
    status, output = start(cwd, cache, *SMALL)
    assert status == 0
    assert "already done" in output
    assert fingerprint(only_run(cwd)) == before
    (only_run(cwd) / "DONE").write_text("another version\n")
    status, output = start(cwd, cache, *SMALL)
    assert status == 0
    assert "code has changed" in output


def test_two_runs_of_one_configuration_have_the_same_bytes(unbroken, cache, tmp_path):
    status, output = start(tmp_path, cache, *SMALL)
    assert status == 0, output
    (only_run(unbroken[0]) / "DONE").write_text((only_run(tmp_path) / "DONE").read_text())
    assert fingerprint(only_run(tmp_path)) == fingerprint(only_run(unbroken[0]))


@pytest.mark.parametrize("at_step", [0, 1, 3])
def test_a_run_killed_after_any_step_ends_like_the_unbroken_one(unbroken, cache, tmp_path, at_step):
    process = start(tmp_path, cache, *SMALL, wait=False)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        rows = list(tmp_path.glob("outputs/main/*/metrics.jsonl"))
        if rows and len(rows[0].read_text().splitlines()) > at_step:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (only_run(tmp_path) / "DONE").exists()
    status, output = start(tmp_path, cache, *SMALL)
    assert status == 0, output
    expected = fingerprint(only_run(unbroken[0])) | {"DONE": fingerprint(only_run(tmp_path))["DONE"]}
    assert fingerprint(only_run(tmp_path)) == expected


def test_seeds_and_batching_make_other_runs_of_the_same_name_rule():
    base = compose(SMALL)
    assert run_directory(base, SMALL) == run_directory(compose([*SMALL, "tracker=wandb", "checkpoint.keep=9"]), SMALL)
    for other in ("seed=1", "objective=clip", "objective.alpha=0.2", "optimizer.lr=1e-5"):
        assert run_directory(compose([*SMALL, other]), []).name[-8:] != run_directory(base, []).name[-8:]


def test_a_second_process_in_one_directory_is_refused(cache, tmp_path):
    first = start(tmp_path, cache, *SMALL, "budget.steps=500", "checkpoint.every=500", wait=False)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not list(tmp_path.glob("outputs/main/*/metrics.jsonl")):
            time.sleep(0.05)
        status, output = start(tmp_path, cache, *SMALL, "budget.steps=500", "checkpoint.every=500")
        assert status == 2
        assert "another process" in output
        assert str(first.pid) in output
    finally:
        first.kill()
        first.wait()


def test_wandb_gets_the_same_numbers_offline(cache, tmp_path):
    small = [*SMALL[:-1], "budget.steps=2"]
    status, output = start(tmp_path, cache, *small)
    assert status == 0, output
    directory = only_run(tmp_path)
    (log,) = directory.glob("wandb/offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    records = [json.loads(line) for line in text.splitlines()]
    history = [record["history"] for record in records if record.get("type") == "history"]
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2] == [record["step"]["num"] for record in history]


def test_a_step_without_spread_of_rewards_is_told(cache, tmp_path):
    (tmp_path / "mine.py").write_text("def reward(completion, problem):\n    return 0.5\n")
    overrides = ["reward=custom", "reward.function=mine.py:reward", "budget.steps=5", "checkpoint.every=5"]
    status, output = start(tmp_path, cache, *SMALL, *overrides)
    assert status == 0, output
    assert "nothing to learn from" in output
    notes = json.loads((only_run(tmp_path) / "summary.json").read_text())["notes"]
    assert any("nothing to learn from" in note for note in notes)


def test_selection_best_keeps_the_weights_of_the_best_validation(cache, tmp_path):
    status, output = start(tmp_path, cache, *SMALL, "selection=best")
    assert status == 0, output
    directory = only_run(tmp_path)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    rewards = {
        row["step"]: row["validation/sampled_reward_mean"] for row in rows if "validation/sampled_accuracy" in row
    }
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["selected_step"] == max(rewards, key=lambda step: (rewards[step], -step))


def test_zero_steps_evaluate_only(cache, tmp_path):
    status, output = start(tmp_path, cache, *SMALL, "budget.steps=0")
    assert status == 0, output
    evaluation = json.loads((only_run(tmp_path) / "summary.json").read_text())["evaluation"]["embedded"]
    assert evaluation["before"] == evaluation["after"]


def test_multirun_is_a_matched_comparison(cache, tmp_path):
    status, output = start(tmp_path, cache, "-m", *SMALL, "objective=noclip,clip", "budget.steps=1")
    assert status == 0, output
    runs = sorted((tmp_path / "outputs" / "main").iterdir())
    assert len(runs) == 2
    before = {
        json.dumps(json.loads((run / "summary.json").read_text())["evaluation"]["embedded"]["before"]) for run in runs
    }
    assert len(before) == 1
    first = [(run / "completions.jsonl").read_text().splitlines()[0] for run in runs]
    assert first[0] == first[1]


def test_every_job_of_a_multirun_is_checked_before_the_first_starts(cache, tmp_path):
    status, output = start(tmp_path, cache, "-m", *SMALL, "objective.alpha=0.1,0.2,2")
    assert status == 2
    assert output.splitlines()[-1].startswith("pspo: objective.alpha must be in [0, 1), got 2.0: at 1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not (DATA / "gsm8k").is_dir(), reason=f"no real data in {DATA}; set PSPO_DATA")
def test_real_gsm8k_with_the_tiny_architecture(cache, tmp_path):
    small = [o for o in SMALL if not o.startswith(("dataset.num_train", "dataset.num_test"))]
    overrides = ["dataset=gsm8k", f"dataset.path={DATA / 'gsm8k'}", "dataset.test_limit=8", "dataset.num_validation=8"]
    status, output = start(tmp_path, cache, *small, *overrides, "budget.steps=2", "rollout.prompts=2")
    assert status == 0, output
    evaluation = json.loads((only_run(tmp_path) / "summary.json").read_text())["evaluation"]
    assert (
        evaluation["gsm8k"]["after"]["n"] <= 8
    )  # problems with too long a prompt for so small a tokenizer are dropped


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
        "dataset.num_validation=2", "evaluation.every=9", "tracker=jsonl",
    ]  # fmt: skip
    status, output = start(tmp_path, cache, *overrides)
    assert status == 0, output
    rows = [json.loads(line) for line in (only_run(tmp_path) / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2
    assert max(row.get("memory/peak_gib", 0) for row in rows) < 24
    shutil.rmtree(tmp_path / "outputs")
