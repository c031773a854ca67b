import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
import yaml

from pspo.base.schema import ConfigError, build
from pspo.tracker import Tracker, TrackerConfig, WandbConfig
from tests.wandb_server import CONFIG, make_run, serving, wait_for

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf" / "tracker"
JSONL = {"name": "jsonl"}
WANDB = CONFIG["tracker"]


def open_tracker(directory, values):
    return Tracker(build(TrackerConfig, values), directory)


def rows(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def record(directory, *steps, values=WANDB, state=None):
    """One process of a run, from the checkpoint ``state`` on."""
    tracker = open_tracker(directory, values)
    tracker.rewind(state)
    for step in steps:
        tracker.log({"reward/mean": step / 7}, step)
        tracker.commit(step)
    state = tracker.state()
    tracker.close()
    return state


@pytest.fixture(autouse=True)
def no_login_of_this_machine(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "no-config"))


@pytest.fixture
def server():
    with serving() as server:
        yield server


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "outputs" / "smoke" / "pspo_seed0")


@pytest.fixture
def warnings(caplog):
    """What a user would read; W&B's own logger is not meant for them."""
    caplog.set_level(logging.WARNING, logger="pspo")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "pspo"]


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_configuration_files_build(path):
    config = build(TrackerConfig, yaml.safe_load(path.read_text()))
    assert config.name == path.stem
    assert isinstance(config, WandbConfig) == (path.stem == "wandb")


def test_configuration_errors_name_the_choices():
    with pytest.raises(ConfigError, match="unknown tracker tensorboard; known: jsonl, wandb"):
        build(TrackerConfig, WANDB | {"name": "tensorboard"})
    with pytest.raises(ConfigError, match=r"unknown key tracker\.projects \(did you mean tracker\.project\?\)"):
        build(TrackerConfig, {"name": "wandb", "projects": "x", "entity": None})


def test_jsonl_does_not_import_wandb(tmp_path):
    code = (
        "import sys; from pathlib import Path; from pspo.base.schema import build; from pspo.tracker import *\n"
        "t = Tracker(build(TrackerConfig, {'name': 'jsonl'}), Path(sys.argv[1]))\n"
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
    record(whole, *range(1, 7), values=JSONL)
    tracker = open_tracker(broken, JSONL)
    for step in range(1, 4):
        tracker.log({"reward/mean": step / 7}, step)
    state = json.loads(json.dumps(tracker.state()))
    tracker.log({"reward/mean": 4 / 7}, 4)
    with (broken / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "rewa')  # killed while writing
    record(broken, *range(4, 7), values=JSONL, state=state)
    assert (broken / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_rewind_to_nothing_and_to_more_than_there_is(tmp_path):
    tracker = open_tracker(tmp_path, JSONL)
    tracker.log({"reward/mean": 1}, 1)
    with pytest.raises(ValueError, match="shorter than its checkpoint says"):
        tracker.rewind({"metrics_rows": 10_000})
    tracker.rewind(None)
    assert rows(tmp_path) == []


def test_wandb_gets_the_same_numbers(run, server, warnings):
    tracker = open_tracker(run, WANDB)
    tracker.log({"validation/greedy_accuracy": 0.25}, step=0)
    for step in (1, 2):
        tracker.log({"reward/mean": step / 7, "loss/mean": math.nan}, step)
    tracker.commit(1)
    tracker.log({"reward/mean": 3 / 7}, 3)
    tracker.commit(3)
    tracker.log({"reward/mean": 4 / 7}, 4)  # not committed, so not sent
    tracker.summarize({"evaluation": {"embedded": {"after": {"accuracy": 0.5}}}, "notes": ["one"]})
    tracker.close()
    tracker.close()

    assert warnings() == []
    assert server.steps(run) == [0, 1, 2, 3]
    history = server.history(run)
    assert math.isnan(history[1]["loss/mean"])
    for item, row in zip(history, rows(run), strict=False):
        assert {name: item[name] for name, value in row.items() if value is not None}.items() <= row.items()
    (id,) = server.lines
    told, summary = server.told[id], server.summary[id]
    assert (told["displayName"], told["groupName"], told["jobType"]) == (run.name, "smoke", "pspo")
    assert json.loads(told["config"])["objective"]["value"] == {"name": "pspo", "alpha": 0.1}
    assert summary["evaluation/embedded/after/accuracy"] == 0.5
    assert summary["notes"] == ["one"]


ATTEMPT = """
import json, pathlib, signal, sys
from pspo.base.schema import build
from pspo.tracker import Tracker, TrackerConfig
directory = pathlib.Path(sys.argv[1])
tracker = Tracker(build(TrackerConfig, json.loads(sys.argv[2])), directory)
saved = directory / "state.json"
state = json.loads(saved.read_text()) if saved.exists() else {"metrics_rows": 0}
tracker.rewind(state)
first = state["metrics_rows"]
for step in range(first, first + 5):  # checkpoints keep four of the five steps
    tracker.log({"reward/mean": step / 7}, step)
    if step - first in (1, 3):
        saved.write_text(json.dumps(tracker.state()))
        tracker.commit(step)
(directory / "logged").touch()
signal.pause()
"""


def attempt(run, until, *, whole_group=True):
    """A process of a run, killed as soon as ``until()``, with W&B's own process or without it."""
    (run / "logged").unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-c", ATTEMPT, str(run), json.dumps(WANDB)], cwd=ROOT, start_new_session=True
    )
    try:
        wait_for(lambda: until() or process.poll() is not None, "the attempt")
    finally:
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def finish(run):
    """The last process of a run, in this one."""
    state = json.loads((run / "state.json").read_text())
    last = state["metrics_rows"]
    record(run, *range(last, last + 3), state=state)
    assert [row["step"] for row in rows(run)] == list(range(last + 3))


@pytest.mark.process
@pytest.mark.parametrize("arrived", [0, 2, 4])
def test_kills_online_leave_neither_gap_nor_double_step(run, server, arrived, monkeypatch):
    """Killed twice: when all is logged and when the server has so many rows of the attempt."""
    monkeypatch.setenv("WANDB__FILE_STREAM_TRANSMIT_INTERVAL", "1")
    for before in (0, 4):

        def until(before=before):
            return (run / "logged").exists() and (
                not arrived or ((run / "wandb.json").exists() and len(server.steps(run)) >= before + arrived)
            )

        attempt(run, until)
    finish(run)
    assert server.steps(run) == list(range(11))
    assert [row["reward/mean"] for row in server.history(run)] == [step / 7 for step in range(11)]
    assert len(server.lines) == 1


@pytest.mark.process
def test_a_kill_that_wandbs_own_process_survives(run, server):
    attempt(run, lambda: (run / "logged").exists() and (run / "wandb.json").exists(), whole_group=False)
    finish(run)
    assert server.steps(run) == list(range(7))


def test_a_run_that_was_offline_for_a_while_leaves_no_gap(run, server, monkeypatch):
    state = record(run, 0, 1)
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        state = record(run, 2, 3, state=state)
    assert server.steps(run) == [0, 1]
    record(run, 4, state=state)
    assert server.steps(run) == [0, 1, 2, 3, 4]


def test_rows_that_the_server_has_beyond_a_checkpoint_are_not_sent_again(run, server):
    record(run, 0, 1, 2, 3)
    record(run, 2, 3, 4, state={"metrics_rows": 2})  # the newest checkpoint was torn, an older one counts
    assert server.steps(run) == [0, 1, 2, 3, 4]


def test_an_error_midway_costs_one_warning_and_resume_fills_the_gap(run, server, warnings, monkeypatch):
    import wandb

    def fail(self, *args, step, **kwargs):
        if step == 2:
            raise RuntimeError("an error of no public class")
        log(self, *args, step=step, **kwargs)

    with monkeypatch.context() as patch:
        log = wandb.Run.log
        patch.setattr(wandb.Run, "log", fail)
        state = record(run, 1, 2, 3)
    assert warnings() == [
        "W&B is off for the rest of this run (RuntimeError: an error of no public class); metrics.jsonl goes on, and "
        f"python -m pspo.sync {run.parent} sends W&B what it lacks"
    ]
    assert [row["step"] for row in rows(run)] == [1, 2, 3]
    record(run, 4, state=state)
    assert server.steps(run) == [1, 2, 3, 4]


def services():
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    threads = [Path(f"{task}/children") for task in Path("/proc/self/task").iterdir()]
    pids = {pid for path in (children, *threads) if path.exists() for pid in path.read_text().split()}
    return [int(pid) for pid in pids if "wandb-core" in Path(f"/proc/{pid}/comm").read_text()]


@pytest.mark.process
def test_a_killed_service_costs_one_warning_and_the_next_run_gets_a_new_one(run, server, warnings):
    tracker = open_tracker(run, WANDB)
    wait_for(lambda: server.told, "the start of W&B's service")
    for pid in services():
        os.kill(pid, signal.SIGKILL)
    for step in (1, 2, 3):
        tracker.log({"reward/mean": step}, step)
        tracker.commit(step)
    tracker.close()
    assert len(warnings()) == 1
    assert [row["step"] for row in rows(run)] == [1, 2, 3]

    second = make_run(run.with_name("second"))
    record(second, 1)
    assert server.steps(second) == [1]
    assert len(warnings()) == 1


@pytest.mark.parametrize("broken", ["torn record", "no folder", "bad variable", "bad key", "unreachable", "refused"])
def test_what_hinders_wandb_costs_one_warning(run, server, warnings, monkeypatch, broken):
    monkeypatch.setattr("pspo.tracker.INIT_TIMEOUT_S", 1.0)
    if broken == "torn record":
        (run / "wandb.json").write_text("torn")
    if broken == "no folder":
        (run / "wandb").write_text("in the way")
    if broken == "bad variable":
        monkeypatch.setenv("WANDB_MODE", "sometimes")
    if broken == "bad key":
        monkeypatch.setenv("WANDB_API_KEY", "short")
    if broken == "unreachable":
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    if broken == "refused":
        server.status.append(("", 401))
    record(run, 1)
    assert len(warnings()) == 1
    assert "W&B is off" in warnings()[0]
    assert [row["step"] for row in rows(run)] == [1]


@pytest.mark.process
@pytest.mark.parametrize("silent", ["RunResumeStatus", "file_stream"])
def test_a_silent_server_holds_up_nobody(run, server, warnings, monkeypatch, silent):
    """The bound is on the waiting in ``close``, measured against a server that would hold it for ever."""
    monkeypatch.setattr("pspo.tracker.INIT_TIMEOUT_S", 3600.0)
    monkeypatch.setattr("pspo.tracker.FINISH_TIMEOUT_S", 3600.0)
    monkeypatch.setattr("pspo.tracker.CLOSE_TIMEOUT_S", 0.5)
    server.status.append((silent, 0))
    tracker = open_tracker(run, WANDB)
    for step in (1, 2):
        tracker.log({"reward/mean": step}, step)
        tracker.commit(step)
    wait_for(lambda: server.told or silent == "RunResumeStatus", "the start of the run")
    mirror, begun = tracker._mirror, time.monotonic()
    tracker.close()
    assert time.monotonic() - begun < 600
    assert len(warnings()) == 1
    assert "no end after 0.5 s" in warnings()[0]
    server.status.clear()
    server.stopped.set()
    mirror._thread.join(120)
    assert not mirror._thread.is_alive()
    assert len(warnings()) == 1


@pytest.mark.parametrize("environment", [{"WANDB_MODE": "offline"}, {}], ids=["offline", "no-login"])
def test_offline_nothing_is_sent_and_nobody_is_asked(run, warnings, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked for a key"))
    record(run, 1)
    assert warnings() == []
    assert {path.name for path in run.iterdir()} == {"config.yaml", "metrics.jsonl", "wandb.json", ".wandb.lock"}


def test_disabled_by_the_environment_leaves_no_trace(run, server, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    record(run, 1)
    assert {path.name for path in run.iterdir()} == {"config.yaml", "metrics.jsonl"}
    assert server.told == {}


def test_one_mirror_at_a_time(run, server, warnings, monkeypatch):
    monkeypatch.setattr("pspo.tracker.INIT_TIMEOUT_S", 0.1)
    with filelock.FileLock(run / ".wandb.lock", timeout=0):
        record(run, 1)
    assert len(warnings()) == 1
    assert "another process sends it the rows of this run" in warnings()[0]
    assert server.told == {}


def add_completions(run, *steps):
    """Three completions of each step, as a trainer leaves them; text of any kind."""
    lines = [
        {"step": step, "problem": "p", "question": "<b>?", "answer": "7", "sample": sample, "reward": 0.5 * sample}
        | {
            "completion": f"{step}.{sample} \ud800\x1b" + "x" * 5000,
            "correct": sample == 1,
            "tokens": 9,
            "truncated": False,
        }
        for step in steps
        for sample in range(3)
    ]
    with (run / "completions.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def test_completions_go_along_as_increments_of_a_small_table(run, server, warnings):
    add_completions(run, 1, 2, 3)
    tracker = open_tracker(run, WANDB)
    for step in range(3):
        tracker.log({"reward/mean": step / 7}, step)
    tracker.commit(1)
    tracker.commit(2)
    tracker.close()
    add_completions(run, 4)
    record(run, 4, state=tracker.state())
    assert warnings() == []
    assert server.steps(run) == [0, 1, 2, 4]
    assert [row.get("completions", {}).get("_type") for row in server.history(run)] == [
        None, *["incremental-table-file"] * 3,
    ]  # fmt: skip
    (id,) = server.files
    tables = [
        json.loads(body) for name, body in server.files[id].items() if name.startswith("media/table/completions_")
    ]
    rows_sent = [dict(zip(table["columns"], row, strict=True)) for table in tables for row in table["data"]]
    assert sorted((row["step"], row["completion"][:3]) for row in rows_sent) == [
        (step, f"{step}.{sample}") for step in (1, 2, 4) for sample in (0, 1)
    ]
    assert all(len(row["completion"]) == 4000 and row["question"] == "<b>?" for row in rows_sent)


def test_a_run_at_wandb_can_be_found_by_what_it_is_and_by_its_code(tmp_path, server):
    run = make_run(tmp_path / "outputs" / "smoke" / "pspo_alpha=0.2_seed0_1a2b3c4d")
    code = {"sha256": "0123456789abcdef", "commit": "f" * 40, "uncommitted_changes": False}
    (run / "environment.json").write_text(json.dumps([{"code": {}}, {"code": code}]))
    (run / "curves.png").write_bytes((ROOT / "docs" / "alpha.png").read_bytes())
    tracker = open_tracker(run, WANDB)
    tracker.log({"reward/mean": 1.0}, 1)
    tracker.commit(1)
    tracker.summarize({"evaluation": {"gsm8k": {"after": {"accuracy": 0.5}}}})
    tracker.close()
    (id,) = server.told
    assert server.told[id]["displayName"] == "pspo_alpha=0.2_seed0"
    assert server.told[id]["tags"] == ["pspo", "Qwen2.5-0.5B", "gsm8k"]
    assert json.loads(server.told[id]["config"])["code"]["value"] == code
    (figure,) = (body for name, body in server.files[id].items() if name.startswith("media/images/figures/curves_"))
    assert figure == (run / "curves.png").read_bytes()
    assert server.summary[id]["evaluation/gsm8k/after/accuracy"] == 0.5
    assert server.steps(run) == [1]
