"""Kills at random instants: no run is lost, no directory corrupt, and every end is that of the unbroken run."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from forked import REWARD, TINY, ends, fork, make, only_run, wait
from training import composed

from pspo.host import ranks
from pspo.run.job import run
from pspo.sync import sync
from tests.wandb_server import serving

NUM_KILLS, NUM_RANK_KILLS, NUM_PROCESS_KILLS = 200, 50, 8
SEED = int(os.environ.get("PSPO_KILLS_SEED", "0"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def kill_runs(start, length_s, expected, folder, most, whole=lambda directory: True):
    """Start runs, kill them ``most`` times in all, compare the ends; returns the lost and the corrupt ones."""
    random, kills, lost, corrupt, lengths_s = np.random.default_rng(SEED), [], [], [], [length_s]
    for number in itertools.count():
        if len(kills) == most or lost:
            break
        cwd = folder / f"run{number}"
        if (status := until_done(lambda cwd=cwd: start(cwd), cwd, lengths_s, random, kills, most)) != 0:
            lost.append((cwd, status, (cwd / "output.txt").read_text()[-2000:]))
        elif ends(only_run(cwd)) != expected or not whole(only_run(cwd)):
            corrupt.append(cwd)
    print(f"{len(kills)} kills, {number} runs: {len(lost)} lost, {len(corrupt)} corrupt")
    rows = {step: [at for at, _ in kills].count(step) for step in range(-1, 7)}
    print(f"rows of metrics at the kill: {rows}; in a save: {sum(saving for _, saving in kills)}")
    return lost, corrupt


def until_done(start, cwd, lengths_s, random, kills, most):
    """Start a run, kill it at a random instant of its length, and so on until it ends by itself: its exit status."""
    for attempt in itertools.count():
        pid, begun = start(), time.time()
        deadline = begun + random.uniform(0, 1.25 * lengths_s[-1] * (1 + attempt / 8))  # the machine may become slower
        status = None
        while status is None and (len(kills) == most or time.time() < deadline):
            done, raw = os.waitpid(pid, os.WNOHANG)
            status = os.waitstatus_to_exitcode(raw) if done else None
            time.sleep(0.001)
        if status is None:
            os.kill(pid, signal.SIGKILL)
            status = wait(pid)
        if status != -signal.SIGKILL:
            lengths_s += [length(cwd, begun)] * (attempt == 0)  # or faster
            return status
        kills.append(progress(cwd))


def length(cwd, begun):
    """Seconds to the last row of an unbroken run; what follows, figures above all, takes long and cannot be lost."""
    return (only_run(cwd) / "metrics.jsonl").stat().st_mtime - begun


def progress(cwd):
    """How far the killed process had come: the last row on disk, and whether it was at work on a checkpoint."""
    rows = list(cwd.glob("outputs/main/*/metrics.jsonl"))
    saving = list(cwd.glob("outputs/main/*/checkpoints/.*"))
    return len(rows[0].read_bytes().splitlines()) if rows else -1, bool(saving)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_200_kills_of_forks(cache, tmp_path, threads):
    """A hundred with one CPU thread, and a hundred with two."""
    overrides = [f"threads={threads}"]
    assert make(tmp_path / "warm", cache, overrides) == 0
    begun = time.time()
    assert make(tmp_path / "unbroken", cache, overrides) == 0
    length_s, expected = length(tmp_path / "unbroken", begun), ends(only_run(tmp_path / "unbroken"))
    start = lambda cwd: fork(cwd, cache, overrides)  # noqa: E731
    lost, corrupt = kill_runs(start, length_s, expected, tmp_path, NUM_KILLS // 2)
    assert not lost
    assert not corrupt


@pytest.mark.slow
def test_50_kills_of_a_rank(cache, tmp_path, monkeypatch):
    """One of two ranks is killed; the other leaves by itself, and the same command goes on."""
    for name, seconds in {"START_S": 5.0, "BEAT_S": 0.5, "SILENT_S": 5.0}.items():
        monkeypatch.setattr(ranks, name, seconds)
    assert make(tmp_path / "warm", cache) == 0
    begun = time.time()
    assert [wait(pid) for pid in fork_ranks(tmp_path / "unbroken", cache)] == [0, 0]
    length_s, expected = length(tmp_path / "unbroken", begun), ends(only_run(tmp_path / "unbroken"))
    random, kills = np.random.default_rng(SEED), 0
    for number in itertools.count():
        cwd = tmp_path / f"run{number}"
        for attempt in itertools.count():
            pids = fork_ranks(cwd, cache)
            if kills < NUM_RANK_KILLS:
                time.sleep(random.uniform(0, length_s * (1 + attempt / 8)))
                os.kill(pids[random.integers(2)], signal.SIGKILL)
                kills += 1
            statuses = [wait(pid) for pid in pids]  # returns, as none stays
            if statuses == [0, 0] or (only_run(cwd) / "DONE").exists():
                break
        assert ends(only_run(cwd)) == expected
        if kills == NUM_RANK_KILLS:
            break
    print(f"{kills} kills, {number + 1} runs: 0 lost, 0 corrupt")


def fork_ranks(cwd, cache):
    """Start the two ranks of a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    config = composed(*TINY)

    def work():
        with ranks.joined():
            run(config, TINY)

    return [fork(cwd, cache, work=work, environment=shared | {"RANK": n, "LOCAL_RANK": n}) for n in "01"]


@pytest.mark.slow
def test_kills_of_whole_processes_with_wandb(cache, tmp_path):
    """As a user calls it, with two threads; W&B's history, made online by all the killed ones, is without flaw."""
    with serving() as server:
        kill_processes(cache, tmp_path, server)


def kill_processes(cache, tmp_path, server):
    overrides = [*TINY, "threads=2", "tracker=wandb"]
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    started = []  # a Popen that nothing refers to takes away the status of one that had nothing left to do

    def start(cwd):
        """Returns when the run is at work: importing takes longer than all else, and nothing can be lost then."""
        cwd.mkdir(exist_ok=True)
        (cwd / "mine.py").write_text(REWARD)
        begun = time.time()
        with (cwd / "output.txt").open("a") as output:
            command = [sys.executable, "-m", "pspo.run", *overrides]
            process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=output, stderr=output)
            started.append(process)
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            if any(path.stat().st_mtime > begun for path in cwd.glob("outputs/main/*/.owner")):
                break
            time.sleep(0.01)
        return process.pid

    assert wait(start(tmp_path / "warm")) == 0
    pid = start(tmp_path / "unbroken")
    begun = time.time()
    assert wait(pid) == 0
    length_s, expected = length(tmp_path / "unbroken", begun), ends(only_run(tmp_path / "unbroken"))

    def mirrored(directory):
        sync(directory.parent)  # what a busy machine could not upload in the time that a run waits for it
        return server.steps(directory) == list(range(6))

    assert mirrored(only_run(tmp_path / "unbroken"))
    lost, corrupt = kill_runs(start, length_s, expected, tmp_path, NUM_PROCESS_KILLS, mirrored)
    assert not lost
    assert not corrupt
