import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import make, output_of

from pspo.base.schema import ConfigError, build
from pspo.tracker import Tracker, TrackerConfig, WandbConfig

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf" / "tracker"
JSONL = {"name": "jsonl"}
WANDB = {"name": "wandb", "project": "pspo-test", "entity": None}


def open_tracker(directory, values):
    return Tracker(
        build(TrackerConfig, values),
        directory,
        run_name="pspo-seed0",
        group="smoke",
        job_type="train",
        resolved_config={"objective": {"name": "pspo", "alpha": 0.1}},
    )


def rows(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def wandb_records(directory):
    """Every record of every offline part, in order, as W&B's own reader tells them."""
    from wandb.util import get_core_path

    records = []
    for part in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        place = ["--run-file", str(part), str(directory / "wandb")]  # as `wandb leet inspect` asks it, in no time
        command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", *place]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        records += [json.loads(line) for line in output.splitlines()]
    return records


def wandb_history(directory):
    return [record["history"]["item"] for record in wandb_records(directory) if record["type"] == "history"]


@pytest.fixture
def offline(monkeypatch):
    """W&B as on a machine without a login; the session of an earlier test does not leak in."""
    wandb = pytest.importorskip("wandb")
    wandb.teardown()
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield wandb
    wandb.teardown()


@pytest.fixture
def warnings(caplog):
    """What a user would read; W&B's own logger is not meant for them."""
    caplog.set_level(logging.WARNING, logger="pspo")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "pspo"]


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_configuration_files_build(path):
    yaml = pytest.importorskip("yaml")
    config = build(TrackerConfig, yaml.safe_load(path.read_text()))
    assert config.name == path.stem
    assert isinstance(config, WandbConfig) == (path.stem == "wandb")


def test_configuration_errors_name_the_choices():
    with pytest.raises(ConfigError, match=r"tracker\.name must be one of jsonl, wandb, got 'tensorboard'"):
        build(TrackerConfig, WANDB | {"name": "tensorboard"})
    with pytest.raises(ConfigError, match=r"unknown key tracker\.projects \(did you mean tracker\.project\?\)"):
        build(TrackerConfig, {"name": "wandb", "projects": "x", "entity": None})


def test_jsonl_does_not_import_wandb(tmp_path):
    code = (
        "import sys; from pathlib import Path; from pspo.base.schema import build; from pspo.tracker import *\n"
        "t = Tracker(build(TrackerConfig, {'name': 'jsonl'}), Path(sys.argv[1]),"
        " run_name='r', group='g', job_type='train', resolved_config={})\n"
        "t.log({'a/b_mean': 1}, 1); t.commit(1); t.summarize({}); t.close(); assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1, "a/b_mean": 1}\n'


def test_each_row_is_on_disk_when_log_returns_and_numbers_survive_exactly(tmp_path):
    tracker = open_tracker(tmp_path, JSONL)
    tracker.log({"reward/mean": 0.1 + 0.2, "budget/steps": 1}, step=1)
    assert rows(tmp_path) == [{"step": 1, "reward/mean": 0.1 + 0.2, "budget/steps": 1}]


def test_non_finite_numbers_are_null_so_that_every_line_is_json(tmp_path):
    tracker = open_tracker(tmp_path, JSONL)
    tracker.log({"loss/mean": math.nan, "policy/ratio_max": math.inf, "reward/mean": 1.0}, step=1)
    tracker.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert row == {"step": 1, "loss/mean": None, "policy/ratio_max": None, "reward/mean": 1.0}


def test_rewound_file_equals_an_unbroken_one(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    tracker = open_tracker(whole, JSONL)
    for step in range(1, 7):
        tracker.log({"reward/mean": step / 7}, step)

    tracker = open_tracker(broken, JSONL)
    for step in range(1, 4):
        tracker.log({"reward/mean": step / 7}, step)
    state = json.loads(json.dumps(tracker.state()))
    tracker.log({"reward/mean": 4 / 7}, 4)
    with (broken / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "rewa')  # killed while writing
    tracker = open_tracker(broken, JSONL)
    tracker.rewind(state)
    for step in range(4, 7):
        tracker.log({"reward/mean": step / 7}, step)
    assert (broken / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_rewind_to_nothing_and_to_more_than_there_is(tmp_path):
    tracker = open_tracker(tmp_path, JSONL)
    tracker.log({"reward/mean": 1}, 1)
    with pytest.raises(ValueError, match="shorter than its checkpoint says"):
        tracker.rewind({"metrics_rows": 10_000})
    tracker.rewind(None)
    assert rows(tmp_path) == []


def test_wandb_gets_the_same_numbers(tmp_path, offline):
    tracker = open_tracker(tmp_path, WANDB)
    tracker.log({"validation/greedy_accuracy": 0.25}, step=0)
    for step in (1, 2):
        tracker.log({"reward/mean": step / 7, "loss/mean": math.nan}, step)
    tracker.commit(1)
    tracker.log({"reward/mean": 3 / 7}, 3)
    tracker.commit(3)
    tracker.summarize({"evaluation": {"embedded": {"after": {"accuracy": 0.5}}}, "notes": ["one"]})
    tracker.close()
    tracker.close()

    records = wandb_records(tmp_path)
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [item["step"] for item in history] == [item["_step"] for item in history] == [0, 1, 2, 3]
    assert history[1]["loss/mean"] == "NaN"
    for item, row in zip(history, rows(tmp_path), strict=True):
        assert {name: item[name] for name, value in row.items() if value is not None}.items() <= row.items()

    run = next(record["run"] for record in records if record["type"] == "run")
    saved = json.loads((tmp_path / "wandb.json").read_text())
    assert saved == {"id": run["run_id"], "sent": 3}
    assert (run["display_name"], run["run_group"], run["job_type"]) == ("pspo-seed0", "smoke", "train")
    assert run["config"]["update"]["objective"] == {"name": "pspo", "alpha": 0.1}
    updates = [record["summary"]["update"].items() for record in records if record["type"] == "summary"]
    assert ("evaluation/embedded/after/accuracy", 0.5) in [item for update in updates for item in update]
    assert any(record["metric"].get("step_metric") == "step" for record in records if record["type"] == "metric")


def record_and_die(directory, wait_s):
    """Five steps, of which checkpoints keep four; then the process goes, and W&B's own with it."""
    os.setsid()
    tracker = open_tracker(directory, WANDB)
    tracker.rewind(None)
    for step in range(1, 6):
        tracker.log({"reward/mean": step / 7}, step)
        if step in (2, 4):
            (directory / "state.json").write_text(json.dumps(tracker.state()))
            tracker.commit(step)
    time.sleep(wait_s)
    os.killpg(0, signal.SIGKILL)


@pytest.mark.parametrize("wait_s", [0, 0.5], ids=["before-flush", "after-flush"])
def test_a_kill_leaves_wandb_neither_gap_nor_double_step(tmp_path, offline, wait_s):
    killed = make(tmp_path, tmp_path, work=lambda: record_and_die(tmp_path, wait_s))
    assert killed == -signal.SIGKILL, output_of(tmp_path)
    assert json.loads((tmp_path / "wandb.json").read_text())["sent"] == -1  # nothing is certain within a second

    tracker = open_tracker(tmp_path, WANDB)
    tracker.rewind(json.loads((tmp_path / "state.json").read_text()))
    for step in range(5, 8):
        tracker.log({"reward/mean": step / 7}, step)
    tracker.commit(7)
    tracker.close()
    records = wandb_records(tmp_path)
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [item["step"] for item in history] == [row["step"] for row in rows(tmp_path)] == list(range(1, 8))
    assert [item["reward/mean"] for item in history] == [step / 7 for step in range(1, 8)]
    assert len({record["run"]["run_id"] for record in records if record["type"] == "run"}) == 1


def test_an_sdk_error_midway_costs_one_warning_and_resume_fills_the_gap(tmp_path, offline, warnings):
    tracker = open_tracker(tmp_path, WANDB)
    tracker.log({"reward/mean": 1}, 1)
    tracker.commit(1)

    def fail(*args, **kwargs):
        raise offline.Error("gone")

    tracker._wandb._run.log = fail
    for step in (2, 3):
        tracker.log({"reward/mean": step}, step)
        tracker.commit(step)
    state = tracker.state()
    tracker.summarize({"steps": 3})
    tracker.close()
    assert warnings() == ["W&B is off for the rest of this run, metrics.jsonl goes on: Error: gone"]
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]

    tracker = open_tracker(tmp_path, WANDB)
    tracker.rewind(state)
    tracker.close()
    assert [item["step"] for item in wandb_history(tmp_path)] == [1, 2, 3]


def test_a_killed_service_costs_one_warning_and_the_next_run_gets_a_new_one(tmp_path, offline, warnings):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    tracker = open_tracker(first, WANDB)
    tracker.commit(0)  # which waits for W&B
    children = f"/proc/self/task/{os.getpid()}/children"
    services = [
        pid for pid in Path(children).read_text().split() if "wandb-core" in Path(f"/proc/{pid}/comm").read_text()
    ]
    for pid in services:
        os.kill(int(pid), signal.SIGKILL)
    for step in (1, 2, 3):
        tracker.log({"reward/mean": step}, step)
        tracker.commit(step)
    tracker.close()
    assert len(warnings()) == 1
    assert [row["step"] for row in rows(first)] == [1, 2, 3]

    tracker = open_tracker(second, WANDB)
    tracker.log({"reward/mean": 1}, 1)
    tracker.commit(1)
    tracker.close()
    assert [item["step"] for item in wandb_history(second)] == [1]
    assert len(warnings()) == 1


def test_an_error_that_wandb_has_no_name_for_costs_one_warning(tmp_path, offline, warnings):
    (tmp_path / "wandb.json").write_text("torn")
    tracker = open_tracker(tmp_path, WANDB)
    tracker.log({"reward/mean": 1}, 1)
    tracker.commit(1)
    tracker.close(exit_code=1)
    tracker.close()
    assert len(warnings()) == 1
    assert [row["step"] for row in rows(tmp_path)] == [1]


def test_an_unwritable_wandb_folder_costs_one_warning(tmp_path, offline, warnings):
    (tmp_path / "wandb").write_text("in the way")
    tracker = open_tracker(tmp_path, WANDB)
    tracker.log({"reward/mean": 1}, 1)
    tracker.commit(1)
    tracker.close()
    assert len(warnings()) == 1
    assert "W&B is off" in warnings()[0]
    assert len(rows(tmp_path)) == 1


@pytest.mark.parametrize(
    "environment", [{"WANDB_MODE": "online"}, {"WANDB_API_KEY": "short"}], ids=["no-key", "bad-key"]
)
def test_without_a_usable_login_it_records_offline_and_never_prompts(
    tmp_path, offline, warnings, monkeypatch, environment
):
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.delenv("WANDB_MODE")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked for a key"))
    tracker = open_tracker(tmp_path, WANDB)
    tracker.log({"reward/mean": 1}, 1)
    tracker.commit(1)
    tracker.close()
    assert [item["step"] for item in wandb_history(tmp_path)] == [1]
    assert len(warnings()) == ("WANDB_API_KEY" in environment)


def test_an_unreachable_server_leaves_an_offline_run(tmp_path, offline, warnings, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr("pspo.tracker.INIT_TIMEOUT_S", 0.5)
    tracker = open_tracker(tmp_path, WANDB)
    tracker.log({"reward/mean": 1}, 1)
    tracker.commit(1)
    tracker.close()
    assert [message[:39] for message in warnings()] == ["W&B cannot be reached and is recorded o"]
    assert [item["step"] for item in wandb_history(tmp_path)] == [1]


def test_disabled_by_the_environment_leaves_no_trace(tmp_path, offline, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = open_tracker(tmp_path, WANDB)
    tracker.log({"reward/mean": 1}, 1)
    tracker.commit(1)
    tracker.summarize({"steps": 1})
    tracker.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_online_the_server_says_what_it_lacks(tmp_path, offline, monkeypatch):
    class Server:
        """A resumed online run that has steps 0 to 2, although three were sent by the record."""

        offline, starting_step = False, 3

        def __init__(self):
            self.steps = []

        def log(self, row, step, commit):
            self.steps.append(step)

        def define_metric(self, *args, **kwargs): ...

        def finish(self, exit_code): ...

    server = Server()
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(offline, "login", lambda **kwargs: True)
    monkeypatch.setattr(offline, "init", lambda **kwargs: server)
    (tmp_path / "wandb.json").write_text('{"id": "abc", "sent": 5}')
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(6)))
    tracker = open_tracker(tmp_path, WANDB)
    tracker.rewind({"metrics_rows": 6})
    tracker.log({"reward/mean": 1}, 6)
    tracker.commit(6)
    tracker.close()
    assert server.steps == [3, 4, 5, 6]
