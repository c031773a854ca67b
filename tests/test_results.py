import json
import os
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

from pspo.base.schema import ConfigError
from pspo.results import load
from tests.comparison import write_run

SPENT = {"budget/steps": 1, "budget/prompts": 8, "budget/completion_tokens": 64}
NOTEBOOK = Path(__file__).parents[1] / "docs" / "results.ipynb"


def make_run(directory, steps=3, correct=(False, True)):
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text("seed: 4\nobjective:\n  name: clip\n  eps_low: 0.2\n")
    rows = [{"step": n, "reward/mean": None if n == 0 else n / 4, "budget/prompts": 8 * n} for n in range(steps)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "rew')
    for when, is_correct in zip(("before", "after"), correct, strict=True):
        folder = directory / "evaluation" / when / "greedy"
        folder.mkdir(parents=True)
        line = json.dumps({"problem": "p1", "completion": "#### 4", "answer": "2026-01-01", "correct": is_correct})
        (folder / "my_set_t0.jsonl").write_text(line + "\n")
    return directory


def test_a_run_becomes_data_frames(tmp_path):
    results = load(make_run(tmp_path / "group" / "a"))
    run = results.runs.iloc[0]
    assert run[["group", "seed", "state", "objective.name", "objective.eps_low"]].tolist() == [
        "group", 4, "unfinished", "clip", 0.2,
    ]  # fmt: skip
    assert run["spent.prompts"] == 16
    assert results.steps["step"].tolist() == [0, 1, 2]  # the row still being written is left out
    assert pd.isna(results.steps["reward/mean"][0])
    assert results.steps["reward/mean"][2] == 0.5
    assert results.inner_steps.empty
    assert results.answers.set_index("when")["correct"].to_dict() == {"before": False, "after": True}
    assert set(results.answers["set"]) == {"my_set"}
    assert set(results.answers["answer"]) == {"2026-01-01"}  # a text, whatever it looks like
    assert set(results.answers["evaluation"]) == {"greedy"}
    assert set(results.answers["temperature"]) == {0.0}
    assert "completion" not in load(tmp_path / "group" / "a", texts=False).answers


def test_a_group_is_all_its_runs_by_name(tmp_path):
    for name in ("b", "a", ".replaced/a.1"):
        make_run(tmp_path / name)
    assert load(tmp_path).runs["run"].tolist() == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert load([tmp_path / "b", tmp_path / "a"]).runs["run"].tolist() == [str(tmp_path / "b"), str(tmp_path / "a")]
    assert load(tmp_path).answers.groupby("run").size().tolist() == [2, 2]


def test_the_state_of_a_run(tmp_path):
    run = make_run(tmp_path / "a")
    (run / "FAILED").write_text("{}")
    assert load(run).runs["state"].tolist() == ["failed"]
    (run / "DONE").touch()
    assert load(run).runs["state"].tolist() == ["done"]


def test_a_directory_that_cannot_be_read_is_left_out_with_its_reason(tmp_path):
    make_run(tmp_path / "whole")
    (make_run(tmp_path / "half") / "config.yaml").write_text("seed: 4\nobjec")
    (make_run(tmp_path / "torn") / "metrics.jsonl").write_text("{\n{}\n")
    (make_run(tmp_path / "old") / "evaluation" / "my_set_after.jsonl").touch()
    results = load([tmp_path, tmp_path / "missing"])
    assert results.runs["run"].tolist() == [str(tmp_path / "whole")]
    reasons = {sentence.split(" is left out: ")[0]: sentence for sentence in results.left_out}
    assert set(reasons) == {str(tmp_path / name) for name in ("half", "torn", "old", "missing")}
    assert "another version" in reasons[str(tmp_path / "old")]
    assert "no config.yaml" in reasons[str(tmp_path / "missing")]
    assert os.path.isdir(tmp_path / "half")  # and nothing is changed


def test_no_run_at_all_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"it has no config\.yaml"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="no directory"):
        load([])


@pytest.mark.process
def test_the_notebook_runs(tmp_path, monkeypatch):
    for seed in (0, 1):
        for name, correct in {"noclip": [1, 0, 0, 1], "clip": [1, 0, 1, 1]}.items():
            run = write_run(tmp_path / "outputs" / "first", (f"objective={name}",), seed, correct)
            (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward/mean": 0.5} | SPENT) + "\n")
            (run / "diagnostics.jsonl").write_text(json.dumps({"step": 1, "epoch": 0}) + "\n")
    monkeypatch.setenv("PSPO_GROUP", str(tmp_path / "outputs" / "first"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(tmp_path)}}).execute()
    texts = [
        output["data"]["text/plain"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "data" in output
    ]
    assert "clip" in texts[-1]
    assert "noclip" in texts[-1]
