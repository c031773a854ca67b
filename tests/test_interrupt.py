import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import submitit
import torch
from forked import REWARD, TINY, at, ends, log_of, make, only_run
from submitit.core.submission import process_job
from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE
from training import composed, make_trainer

from pspo import trainer
from pspo.host import interrupt, slurm
from pspo.rollout.samplers import own
from pspo.run.job import run
from pspo.update import rows as row_module

RARELY = ["checkpoint.every=100"]
"""Nothing but a signal, the end of the job's time and the end of the run makes a checkpoint."""


# A run of TINY draws 8 tokens at a time: 8 for the test before, 16 for validation 0, 8 for a step, 16 after 2, 4, 5.
INSTANTS = {
    "the first validation": (own, "draw", 20, None),
    "the first rollout": (own, "draw", 28, 0),
    "the first update": (trainer, "update", 1, 1),
    "the second rollout": (own, "draw", 36, 1),
    "the test after": (own, "draw", 116, 5),
}


@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.process)])
def test_a_step_is_whole_or_was_never_begun(tiny_policy, tmp_path, monkeypatch, threads):
    """A signal at each poll of a run in turn, also inside of an update: the end is that of an unbroken run."""
    overrides = ["budget.steps=2", "checkpoint.every=100", "update.num_epochs=1", "rollout.prompts=2"]
    polls, check, batch_of = [0, 0], interrupt.check, row_module.batch_of

    def polled():
        polls[0] += 1
        if polls[0] == polls[1]:
            interrupt._note(signal.SIGUSR2, None)
        check()

    def polling(*given):
        interrupt.check()
        return batch_of(*given)

    monkeypatch.setattr(interrupt, "check", polled)
    monkeypatch.setattr(row_module, "batch_of", polling)

    def made(name, stop_at):
        """Weights, steps and counters of a run that is stopped at one of its polls and begun again."""
        polls[:] = 0, stop_at
        stops = 0
        while True:
            policy = tiny_policy()
            run = make_trainer(policy, tmp_path / name, *overrides)
            try:
                run.run()
                break
            except interrupt.Interrupted:
                interrupt._received, stops = None, stops + 1
        assert stops == (stop_at > 0)  # it did stop, and began again
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        steps = [(row["step"], row.get("budget/optimizer_steps")) for row in rows]
        return torch.cat([p.detach().flatten() for p in policy.trainable().values()]), steps

    torch.set_num_threads(threads)
    try:
        weights, steps = made("unbroken", 0)
        assert steps == [(0, None), (1, 2), (2, 4)]
        number = polls[0]
        assert number > 12
        for stop_at in range(1, number + 1):
            stopped, told = made(f"stopped_{stop_at}", stop_at)
            assert told == steps, stop_at
            assert torch.equal(stopped, weights), stop_at  # a promise: on a CPU resume is exact
    finally:
        torch.set_num_threads(1)


@pytest.mark.process
@pytest.mark.parametrize("instant", INSTANTS)
def test_a_signal_at_any_instant_loses_nothing(unbroken, cache, tmp_path, instant):
    module, name, call, saved = INSTANTS[instant]
    assert make(tmp_path, cache, RARELY, hook=at(module, name, call, signal.SIGUSR2)) == 75
    assert not (only_run(tmp_path) / "DONE").exists()
    assert "stopped by SIGUSR2, exit status 75; the same command resumes" in log_of(tmp_path)
    rows = (only_run(tmp_path) / "metrics.jsonl").read_text().splitlines()
    if saved is not None:
        assert [path.name for path in (only_run(tmp_path) / "checkpoints").iterdir()] == [f"step_{saved:06d}"]
        assert len(rows) == saved + 1
    assert make(tmp_path, cache, RARELY) == 0
    assert f"restart 1: process {owner(tmp_path)['pid']} on host {os.uname().nodename}, resumed" in log_of(tmp_path)
    assert ends(only_run(tmp_path)) == ends(unbroken)


def owner(cwd):
    return json.loads((only_run(cwd) / ".owner").read_text())


@pytest.mark.process
def test_an_interrupted_validation_does_not_cost_the_step(unbroken, cache, tmp_path):
    assert make(tmp_path, cache, RARELY, hook=at(trainer, "update", 2, signal.SIGUSR2)) == 75
    (saved,) = (only_run(tmp_path) / "checkpoints").iterdir()
    assert saved.name == "step_000001_updated"
    assert make(tmp_path, cache, [*RARELY, "checkpoint.keep=1"], hook=at(trainer, "update", 3, signal.SIGUSR2)) == 75
    rows = [json.loads(line) for line in (only_run(tmp_path) / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5][: len(rows)]
    assert "validation/greedy_accuracy" in rows[2]
    assert make(tmp_path, cache, RARELY) == 0
    assert ends(only_run(tmp_path)) == ends(unbroken)


@pytest.mark.process
@pytest.mark.parametrize("critic", ["trunk", "separate"])
def test_a_critic_a_reference_and_a_moving_alpha_are_resumed(cache, tmp_path, critic):
    """Stopped after the update of step 2, and so when a value model, its optimizer and alpha have moved."""
    ppo = ["objective=pspo_geometric", "smoothing=adaptive", "advantage=gae", f"advantage.critic={critic}"]
    overrides = [*RARELY, *ppo, "loss.kl=k3", "loss.kl_weight=0.1", "evaluate.every=5"]
    assert make(tmp_path / "unbroken", cache, overrides) == 0
    assert make(tmp_path / "broken", cache, overrides, hook=at(trainer, "update", 2, signal.SIGUSR2)) == 75
    (saved,) = (only_run(tmp_path / "broken") / "checkpoints").iterdir()
    assert saved.name == "step_000002"
    assert make(tmp_path / "broken", cache, overrides) == 0
    rows = [json.loads(line) for line in (only_run(tmp_path / "broken") / "metrics.jsonl").read_text().splitlines()]
    assert len({row["objective/alpha"] for row in rows[1:]}) == 5
    assert ends(only_run(tmp_path / "broken")) == ends(only_run(tmp_path / "unbroken"))


@pytest.mark.process
@pytest.mark.parametrize(
    ("signals", "status"),
    [
        ([signal.SIGTERM], 143),
        ([signal.SIGUSR2, signal.SIGTERM], 143),
        ([signal.SIGTERM, signal.SIGUSR2], 143),
        ([signal.SIGUSR2, signal.SIGUSR2], 75),
    ],
)
def test_sigterm_saves_and_has_the_last_word(cache, tmp_path, signals, status):
    def hook():
        earlier = trainer.update

        def update(*args, **kwargs):
            for signum in signals:
                os.kill(os.getpid(), signum)
            return earlier(*args, **kwargs)

        trainer.update = update

    assert make(tmp_path, cache, RARELY, hook=hook) == status
    assert (only_run(tmp_path) / "checkpoints" / "step_000001").is_dir()
    assert not (only_run(tmp_path) / "FAILED").exists()


@pytest.mark.process
def test_the_handler_that_was_there_before_is_called_when_all_is_saved(cache, tmp_path):
    def hook():
        at(trainer, "update", 1, signal.SIGUSR2)()

        def requeue(signum, frame):
            saved = [path.name for path in Path().glob("outputs/main/*/checkpoints/*")]
            Path("requeued").write_text(json.dumps([signum, saved]))
            sys.exit(17)

        signal.signal(signal.SIGUSR2, requeue)

    assert make(tmp_path, cache, RARELY, hook=hook) == 17
    assert json.loads((tmp_path / "requeued").read_text()) == [signal.SIGUSR2, ["step_000001"]]


@pytest.mark.process
def test_a_handler_that_refuses_to_requeue_fails_the_run(cache, tmp_path):
    def hook():
        at(trainer, "update", 1, signal.SIGUSR2)()

        def refuse(signum, frame):
            raise RuntimeError("timed-out too many times")

        signal.signal(signal.SIGUSR2, refuse)

    assert make(tmp_path, cache, RARELY, hook=hook) == 1
    assert "timed-out too many times" in json.loads((only_run(tmp_path) / "FAILED").read_text())["error"]
    assert (only_run(tmp_path) / "checkpoints" / "step_000001").is_dir()


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ("echo '7|RUNNING|0|0|0|None'", 17),
        ("echo '7|COMPLETING|0|0|0|None'", 143),
        ("echo '7|CANCELLED by 0|0|0|0|None'", 143),
        ("true", 143),
        ("exit 1", 143),
    ],
)
def test_sigterm_to_a_job_that_slurm_calls_running_is_a_preemption(monkeypatch, tmp_path, answer, status):
    (tmp_path / "squeue").write_text(f"#!/bin/sh\n{answer}\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    before = signal.signal(signal.SIGUSR2, lambda signum, frame: sys.exit(17))
    try:
        with interrupt.caught():
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SystemExit) as left, interrupt.caught():
            interrupt.check()
        assert left.value.code == status
    finally:
        signal.signal(signal.SIGUSR2, before)


class Job:
    """What submitit pickles: no state but what to run."""

    def __call__(self):
        return str(run(composed(*TINY, *RARELY), [*TINY, *RARELY]))

    def checkpoint(self):
        return submitit.helpers.DelayedSubmission(self)


@pytest.mark.process
def test_submitit_requeues_and_the_run_ends_like_the_unbroken_one(unbroken, cache, tmp_path):
    """What submitit starts for a job, in a fork, and again where it asks for that; test_slurm has the whole of it."""
    delayed = submitit.helpers.DelayedSubmission(Job())
    delayed.set_timeout(5, max_num_timeout=3)
    delayed.dump(tmp_path / "7_submitted.pkl")
    names = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "7"}
    settings = {"work": lambda: process_job(tmp_path), "environment": names}
    assert make(tmp_path, cache, hook=at(trainer, "update", 2, signal.SIGUSR2), **settings) == LOCAL_REQUEUE_RETURN_CODE
    assert not (only_run(tmp_path) / "DONE").exists()
    assert make(tmp_path, cache, **settings) == 0
    log = log_of(tmp_path)
    assert "stopped by SIGUSR2; handing over to SignalHandler.checkpoint_and_try_requeue" in log
    assert "restart 1" in log
    assert ends(only_run(tmp_path)) == ends(unbroken)


@pytest.mark.process
@pytest.mark.parametrize("end", ["past", "in time", "unknown"])
def test_checkpoints_are_made_when_the_time_is_nearly_over_and_change_nothing_else(unbroken, cache, tmp_path, end):
    told = {"past": time.time() - 1, "in time": time.time() + 9e6, "unknown": None}[end]
    environment = {} if told is None else {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": str(int(told))}
    assert make(tmp_path, cache, [*RARELY, "checkpoint.keep=9"], environment=environment) == 0
    saved = sorted(path.name for path in (only_run(tmp_path) / "checkpoints").iterdir())
    assert saved == [f"step_{step:06d}" for step in (range(6) if end == "past" else [5])]
    assert ends(only_run(tmp_path)) == ends(unbroken)


def test_time_is_short_when_it_does_not_do_for_one_and_a_half_steps_and_saves(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1100")
    limit = interrupt.TimeLimit()
    for lasts, saves, near in [(10, 4, False), (20, 2, False), (5, 0, False), (22, 0, True), (1, 0, True)]:
        now += lasts
        assert limit.near() is near, now  # 1100 - now < 1.5 * (20 + 4) from now = 1064 on
        with limit.saving():
            now += saves
    assert (limit.step_s, limit.save_s) == (22, 4)


@pytest.mark.parametrize(
    ("answer", "expected"), [("2026-01-02T03:04:05", "2026-01-02T03:04:05"), ("NONE", None), ("N/A", None), ("", None)]
)
def test_an_older_slurm_is_asked_when_the_job_ends(monkeypatch, tmp_path, answer, expected):
    (tmp_path / "squeue").write_text(f"#!/bin/sh\necho $* > {tmp_path}/asked\necho {answer}\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    found = slurm.job_end()
    assert "--jobs=12_3" in (tmp_path / "asked").read_text()
    assert found == (None if expected is None else time.mktime(time.strptime(expected, "%Y-%m-%dT%H:%M:%S")))


def test_outside_of_slurm_there_is_no_end(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    assert slurm.job_end() is None
    assert interrupt.TimeLimit().near() is False


def test_handlers_are_restored_and_other_threads_left_alone():
    before = [signal.getsignal(signum) for signum in interrupt.STATUS]
    with interrupt.caught():
        assert [signal.getsignal(signum) for signum in interrupt.STATUS] != before
    assert [signal.getsignal(signum) for signum in interrupt.STATUS] == before
    seen = []

    def elsewhere():
        with interrupt.caught():
            seen.append([signal.getsignal(signum) for signum in interrupt.STATUS])

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_signal_that_comes_too_late_stops_the_next_run_of_the_process():
    with interrupt.caught():
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit) as left, interrupt.caught():
        interrupt.check()
    assert left.value.code == 143
    interrupt.check()


@pytest.mark.slow
def test_a_multirun_stops_as_a_whole(cache, tmp_path):
    (tmp_path / "mine.py").write_text(REWARD)
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "WANDB_MODE": "offline"}
    command = [sys.executable, "-m", "pspo.run", "-m", *TINY, "objective=noclip,clip"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and not list(tmp_path.glob("outputs/main/*/completions.jsonl")):
        time.sleep(0.01)
    process.terminate()
    output = process.communicate(timeout=600)[0].decode()
    assert process.returncode == 143, output
    assert "stopped by SIGTERM" in output
    assert "Traceback" not in output
    only_run(tmp_path)
