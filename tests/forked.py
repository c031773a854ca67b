"""Runs in forks of this process, which has imported everything: a second each, and to be killed at any instant."""

import hashlib
import json
import os
import re
import signal
import sys
import traceback
from pathlib import Path

from huggingface_hub import constants
from training import composed

from pspo import report
from pspo.run.__main__ import cli
from pspo.run.job import run

SMALL = [
    "model.warm_start.worked_steps=20",
    "model.warm_start.mixed_steps=10",
    "model.warm_start.batch_size=16",
    "model.architecture.hidden_size=32",
    "model.architecture.intermediate_size=64",
    "model.architecture.num_layers=2",
    "rollout.prompts=4",
    "rollout.group_size=4",
    "rollout.max_new_tokens=8",
    "dataset.num_train=64",
    "dataset.num_validation=4",
    "dataset.num_test=8",
    "budget.steps=5",
    "evaluate.every=2",
    "checkpoint.every=1",
    "threads=1",
    "tracker=jsonl",
]
TINY = [*SMALL, "reward=custom", "reward.function=mine.py:reward"]

REWARD = """
import random
import numpy as np
import torch

def reward(completion, problem):  # has a spread in every group, and draws from every global generator
    drawn = random.random() + np.random.rand() + torch.rand(()).item()
    return sum(map(ord, completion)) % 7 + 0.1 * drawn
"""


def fork(cwd, cache, overrides=(), *, work=None, hook=None, environment=(), drawn=False):
    """Start a run, or other work, in a fork, ``hook`` first; returns its process id. It prints into ``output.txt``."""
    cwd.mkdir(parents=True, exist_ok=True)
    (cwd / "mine.py").write_text(REWARD)
    overrides = [*TINY, *overrides]
    if work is None:
        config = composed(*overrides)
        work = lambda: run(config, overrides)  # noqa: E731
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.chdir(cwd)
        for number in (1, 2):
            os.dup2(os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1) for number in (1, 2))  # noqa: SIM115  not pytest's
        for name in ("SIGUSR2", "SIGTERM"):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        constants.HF_HUB_OFFLINE = True  # has been read from the environment already
        os.environ.update({"XDG_CACHE_HOME": str(cache), "WANDB_MODE": "offline"})
        os.environ.update(environment)
        if not drawn:
            report.write_curves = report.write_report = lambda directory: None  # half of so small a run's time
        if hook is not None:
            hook()
        work()
        status = 0
    except SystemExit as left:
        status = left.code or 0
    except BaseException:  # noqa: BLE001  a fork must never return into pytest
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def wait(pid):
    """Its exit status; minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def make(cwd, cache, overrides=(), **settings):
    """A run from beginning to end, or to what stops it."""
    return wait(fork(cwd, cache, overrides, **settings))


def command(*arguments):
    """``python -m pspo.run`` with these arguments, as the work of a fork."""

    def work():
        sys.argv = ["pspo.run", *arguments]
        cli()

    return work


def at(place, name, call, signum):
    """A hook that sends the process a signal in the ``call``-th call of a function."""
    function, calls = getattr(place, name), 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signum)
        return function(*args, **kwargs)

    return lambda: setattr(place, name, counted)


def only_run(cwd):
    (directory,) = (path for path in (cwd / "outputs" / "main").iterdir() if path.name[0] != ".")
    return directory


def fingerprint(directory):
    """Digests of all files, without what depends on the clock, on memory or on the number of processes, and W&B's."""
    found = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if not path.is_file() or name.startswith(("wandb", ".")) or name == "run.log":
            continue
        content = path.read_bytes()
        if path.name == "environment.json":  # one entry for each process: of equal ones, the first
            entries = [{k: v for k, v in e.items() if not k.startswith("time/")} for e in json.loads(content)]
            content = "\n".join(dict.fromkeys(map(json.dumps, entries))).encode()
        if path.suffix in (".json", ".jsonl"):
            content = re.sub(rb'"(time|memory)/.*?(,|\n|})', b"", content)
        if path.suffix == ".html":  # one line of the page for each such number
            content = b"\n".join(line for line in content.split(b"\n") if not re.search(rb"(time|memory)/", line))
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def ends(directory):
    """What a run comes to: its fingerprint without its overrides and processes, and of its checkpoints the newest."""
    newest = max((directory / "checkpoints").glob("step_*")).name
    return {
        name: digest
        for name, digest in fingerprint(directory).items()
        if name not in ("config.yaml", "overrides.yaml", "environment.json")
        and (not name.startswith("checkpoints/step_") or newest in Path(name).parts)
    }


def log_of(cwd):
    return (only_run(cwd) / "run.log").read_text()


def output_of(cwd):
    return Path(cwd, "output.txt").read_text()
