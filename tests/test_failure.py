import errno
import json
import os
import re

import pytest
import torch
from forked import make, only_run

from pspo import trainer
from pspo.base.files import SaveError
from pspo.base.schema import ConfigError
from pspo.run import outcome as failure
from pspo.run.lock import Owner
from pspo.update import NonFiniteError

OWNER = Owner("node", 1, "123_4", 0, 2, "2026-01-01T00:00:00+00:00", ended=False)

KINDS = [
    (ConfigError("budget.steps=-1: no"), "configuration"),
    (MemoryError(), "out of memory"),
    (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
    (SaveError("no room"), "cannot save"),
    (NonFiniteError("loss is nan"), "non-finite"),
    (ZeroDivisionError("division by zero"), "error"),
]


def raised(directory, error):
    with pytest.raises(type(error)) as caught, failure.recorded(directory, OWNER):
        raise error
    return caught.value, json.loads((directory / "FAILED").read_text())


@pytest.mark.parametrize(("error", "kind"), KINDS)
def test_what_was_raised_is_recorded_with_its_kind_and_raised_on(tmp_path, error, kind):
    value, record = raised(tmp_path, error)
    assert value is error
    assert list(record) == ["kind", "error", "job_id", "restart"]
    assert (record["kind"], record["job_id"], record["restart"]) == (kind, "123_4", 2)
    assert type(error).__name__ in record["error"].splitlines()[-1]
    assert len(record["error"].splitlines()) <= failure.TRACEBACK_LINES


def test_memory_that_the_cpu_refuses_is_told_as_such(tmp_path):
    with pytest.raises(RuntimeError), failure.recorded(tmp_path, OWNER):
        torch.empty(1 << 60)
    assert json.loads((tmp_path / "FAILED").read_text())["kind"] == "out of memory"


@pytest.mark.parametrize("number", failure.CANNOT_WRITE)
def test_a_disk_without_room_is_one_sentence(tmp_path, number):
    error = OSError(number, os.strerror(number), "metrics.jsonl")
    with (
        pytest.raises(SaveError, match=r"cannot write metrics.jsonl .*same command again"),
        failure.recorded(tmp_path, OWNER),
    ):
        raise error
    assert json.loads((tmp_path / "FAILED").read_text())["kind"] == "cannot save"


def test_a_record_that_cannot_be_written_does_not_hide_the_failure(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(failure, "write_json", full)
    with pytest.raises(ZeroDivisionError), failure.recorded(tmp_path, OWNER):
        raise ZeroDivisionError


def test_the_next_attempt_removes_it_and_leaving_is_no_failure(tmp_path):
    raised(tmp_path, ValueError("x"))
    with failure.recorded(tmp_path, OWNER):
        assert not (tmp_path / "FAILED").exists()
    with pytest.raises(SystemExit), failure.recorded(tmp_path, OWNER):
        raise SystemExit(75)
    with pytest.raises(KeyboardInterrupt), failure.recorded(tmp_path, OWNER):
        raise KeyboardInterrupt
    assert not (tmp_path / "FAILED").exists()


def test_a_run_that_ends_in_an_error_of_its_own_leaves_a_record(cache, tmp_path):
    def raised(*args, **kwargs):
        raise NonFiniteError("the loss is nan at step 1")

    assert make(tmp_path, cache, hook=lambda: setattr(trainer, "update", raised)) == 1
    record = json.loads((only_run(tmp_path) / "FAILED").read_text())
    assert record["kind"] == "non-finite"
    assert record["error"].endswith("the loss is nan at step 1")


def test_a_reward_that_raises_before_the_first_step_fails_the_run(tmp_path):
    (tmp_path / "bad.py").write_text("def reward(completion, problem):\n    raise KeyError('a bug in a reward')\n")
    assert make(tmp_path, tmp_path / "cache", ["reward.function=bad.py:reward"]) == 1
    record = json.loads((only_run(tmp_path) / "FAILED").read_text())
    assert record["kind"] == "reward"
    told = r"reward.function=bad.py:reward raised KeyError: 'a bug in a reward' on problem embedded\S+;"
    assert re.search(told, record["error"].splitlines()[-1])
    assert "in reward\n    raise KeyError" in (only_run(tmp_path) / "run.log").read_text()  # the user's own traceback
    assert not (only_run(tmp_path) / "checkpoints").exists()  # nothing was loaded or begun
