import json

import pandas as pd
import pytest

from pspo.base.schema import ConfigError
from pspo.results import load, load_group


def make_run(directory, steps=3):
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text("seed: 4\nobjective:\n  name: clip\n")
    rows = [{"step": n, "reward/mean": None if n == 0 else n / 4} for n in range(steps)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "rew')
    (directory / "evaluation").mkdir()
    for when, correct in (("before", False), ("after", True)):
        line = json.dumps({"problem": "p1", "correct": correct})
        (directory / "evaluation" / f"my_set_{when}.jsonl").write_text(line + "\n")
    return directory


def test_a_run_becomes_data_frames(tmp_path):
    run = load(make_run(tmp_path / "a"))
    assert run.config["objective"] == {"name": "clip"}
    assert run.summary == {}
    assert run.metrics["step"].tolist() == [0, 1, 2]  # the row still being written is left out
    assert pd.isna(run.metrics["reward/mean"][0])
    assert run.metrics["reward/mean"][2] == 0.5
    assert run.diagnostics.empty
    assert run.answers.set_index("when")["correct"].to_dict() == {"before": False, "after": True}
    assert set(run.answers["set"]) == {"my_set"}


def test_a_group_is_all_its_runs_by_name(tmp_path):
    for name in ("b", "a", ".replaced/a.1"):
        make_run(tmp_path / name)
    assert [run.directory.name for run in load_group(tmp_path)] == ["a", "b"]


def test_what_is_no_run_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"no run directory: it has no config\.yaml"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="holds no runs"):
        load_group(tmp_path)
