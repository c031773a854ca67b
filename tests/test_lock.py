import contextlib
import json
import logging
import os
import signal
import time
from dataclasses import replace

import filelock
import pytest

from pspo.base.schema import ConfigError
from pspo.run import lock
from pspo.run.lock import Owner, hold, owner


@pytest.fixture(autouse=True)
def _outside_of_slurm(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(lock, "SETTLE_S", 0.1)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Answers for SLURM: the state of job 77, or what squeue prints to its standard error where the status is not 0."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def answer(text, *, status=0):
        text = f"77|{text}|0|0|0|None\\n" if text and not status else text
        (folder / "squeue").write_text(f"#!/bin/sh\nprintf '{text}' >&{2 if status else 1}\nexit {status}\n")
        (folder / "squeue").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    return answer


@pytest.fixture
def elsewhere():
    """Runs a function in a fork that then holds what it took until it is killed; waits for its word."""
    pids = []

    def start(function):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                function()
                os.write(write, b"held")
                time.sleep(600)
            finally:
                os._exit(1)
        os.close(write)
        assert os.read(read, 9) == b"held"
        os.close(read)
        pids.append(pid)
        return pid

    yield start
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def held(elsewhere, directory, job=None, requeues=0):
    """A process that holds the lock for ever, as that of a job does whose node no longer answers."""
    contexts = []

    def keep():
        if job is not None:
            os.environ.update({"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(requeues)})
        contexts.append(hold(directory))
        contexts[0].__enter__()

    return elsewhere(keep)


def test_the_record_says_who_holds_the_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "123")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    for restart in range(3):
        with hold(tmp_path / "run") as mine:
            record = json.loads((tmp_path / "run" / ".owner").read_text())
            assert record == vars(mine)
            assert (mine.host, mine.pid, mine.job_id) == (os.uname().nodename, os.getpid(), "123_4")
            assert (mine.requeues, mine.restart) == (2, restart)
    assert str(mine) == f"job 123_4, process {os.getpid()} on host {os.uname().nodename}"


def test_a_living_process_is_named_and_left_alone(tmp_path, elsewhere):
    pid = held(elsewhere, tmp_path)
    with pytest.raises(ConfigError, match=rf"another process \(process {pid} on host .*\) is at work in {tmp_path}"):
        hold(tmp_path).__enter__()


def test_the_kernel_releases_the_lock_of_a_process_that_was_killed(tmp_path, elsewhere):
    pid = held(elsewhere, tmp_path)
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        try:
            with hold(tmp_path) as mine:
                break
        except ConfigError:
            time.sleep(0.01)
    assert mine.restart == 1


@pytest.mark.process
@pytest.mark.parametrize(
    ("text", "status"), [("", 0), ("PENDING", 0), ("slurm_load_jobs error: Invalid job id specified", 1)]
)
def test_the_lock_of_a_job_that_is_gone_is_taken_over(tmp_path, elsewhere, slurm, caplog, text, status):
    slurm(text, status=status)
    directory = tmp_path / "run"
    held(elsewhere, directory, "77")
    log = logging.getLogger("pspo")
    log.propagate = True
    with caplog.at_level(logging.WARNING, logger="pspo"), hold(directory) as mine:
        assert mine.restart == 1
        assert "job 77" in caplog.text
        assert "taking over" in caplog.text
        with pytest.raises(ConfigError, match=f"process {os.getpid()}"):  # the new lock keeps others out in its turn
            hold(directory).__enter__()


@pytest.mark.parametrize(("text", "status"), [("RUNNING", 0), ("COMPLETING", 0), ("Unable to contact slurm", 1)])
def test_a_job_that_runs_or_cannot_be_asked_for_keeps_its_lock(tmp_path, elsewhere, slurm, text, status):
    slurm(text, status=status)
    held(elsewhere, tmp_path / "run", "77")
    with pytest.raises(ConfigError, match="job 77"):
        hold(tmp_path / "run").__enter__()


def test_without_squeue_a_job_keeps_its_lock(tmp_path, elsewhere, monkeypatch):
    held(elsewhere, tmp_path / "run", "77")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="job 77"):
        hold(tmp_path / "run").__enter__()


@pytest.mark.parametrize(("requeues", "taken"), [(0, False), (1, True)])
def test_a_requeued_job_takes_over_from_itself_and_a_second_task_of_it_does_not(
    tmp_path, elsewhere, slurm, monkeypatch, requeues, taken
):
    slurm("RUNNING")  # that is us
    held(elsewhere, tmp_path / "run", "77", requeues=0)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(requeues))
    if taken:
        with hold(tmp_path / "run") as mine:
            assert (mine.job_id, mine.requeues, mine.restart) == ("77", 1, 1)
    else:
        with pytest.raises(ConfigError, match="job 77"):
            hold(tmp_path / "run").__enter__()


def test_a_process_that_locked_just_now_is_not_taken_for_the_dead_one(tmp_path, elsewhere, slurm, monkeypatch):
    """The record is that of a job long gone, as its successor holds the lock and has yet to write its own."""
    slurm("")
    with hold(tmp_path):
        dead = vars(owner(tmp_path)) | {"job_id": "77", "pid": 1}
    kept = []
    elsewhere(lambda: kept.append(filelock.FileLock(tmp_path / ".lock").acquire()))
    (tmp_path / ".owner").write_text(json.dumps(dead))

    def settle(seconds):
        if seconds == lock.SETTLE_S:
            (tmp_path / ".owner").write_text(json.dumps(dead | {"job_id": "78", "pid": 2}))

    monkeypatch.setattr(time, "sleep", settle)
    with pytest.raises(ConfigError, match="is at work"):
        hold(tmp_path).__enter__()


def until(condition):
    deadline = time.monotonic() + 600
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_of_many_that_want_to_take_over_one_does(tmp_path, elsewhere, slurm):
    slurm("")
    directory, enough = tmp_path / "run", tmp_path / "enough"
    held(elsewhere, directory, "77")
    pids = []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                with hold(directory):
                    until(enough.exists)  # else one that comes late, on a busy machine, finds the directory free
                    lock.check_owner(directory, owner(directory))
                    status = 0 if owner(directory).pid == os.getpid() else 3
            except ConfigError:
                status = 2
            finally:
                os._exit(status)
        pids.append(pid)
    until(lambda: sum(bool(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)) for pid in pids) == 7)
    enough.touch()
    statuses = sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)
    assert statuses == [0] + [2] * 7


def test_whoever_was_taken_over_from_leaves_before_it_writes(tmp_path):
    with hold(tmp_path) as mine:
        lock.check_owner(tmp_path, mine)
        (tmp_path / ".owner").write_text(json.dumps(vars(mine) | {"pid": 1, "job_id": "78"}))
        with pytest.raises(SystemExit) as left:
            lock.check_owner(tmp_path, mine)
    assert left.value.code == 1


def test_the_record_says_whether_the_process_left_by_itself(tmp_path, elsewhere):
    with contextlib.suppress(ZeroDivisionError), hold(tmp_path) as mine:
        assert not owner(tmp_path).ended
        raise ZeroDivisionError
    assert owner(tmp_path) == replace(mine, ended=True)
    os.kill(held(elsewhere, tmp_path), signal.SIGKILL)
    assert not owner(tmp_path).ended


def test_whoever_was_taken_over_from_leaves_the_record_of_its_successor(tmp_path):
    with hold(tmp_path) as mine:
        successor = vars(mine) | {"pid": 1, "job_id": "78"}
        (tmp_path / ".owner").write_text(json.dumps(successor))
    assert vars(owner(tmp_path)) == successor


@pytest.mark.parametrize("content", ["", "host, process 12", '{"host": "x"}', "[]", "null", '"x"'])
def test_a_record_that_cannot_be_read_is_none(tmp_path, content):
    (tmp_path / ".owner").write_text(content)
    assert owner(tmp_path) is None
    with hold(tmp_path) as mine:
        assert owner(tmp_path) == mine
        assert isinstance(mine, Owner)


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write .* set output_dir="):
        hold(tmp_path / "file" / "run").__enter__()
