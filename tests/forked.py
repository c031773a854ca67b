"""Runs in forks of this process, which has imported everything: a second each, and to be killed at any instant."""

import functools
import hashlib
import os
import re
import signal
import sys
import traceback
from pathlib import Path

from pspo import report
from pspo.config import compose
from pspo.run import run

TINY = [
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
    "evaluation.every=2",
    "checkpoint.every=1",
    "threads=1",
    "tracker=jsonl",
    "reward=custom",
    "reward.function=mine.py:reward",
]

REWARD = """
import random
import numpy as np
import torch

def reward(completion, problem):  # has a spread in every group, and draws from every global generator
    drawn = random.random() + np.random.rand() + torch.rand(()).item()
    return sum(map(ord, completion)) % 7 + 0.1 * drawn
"""


composed = functools.cache(compose)


def fork(cwd, cache, overrides=(), *, hook=None, environment=(), drawn=False):
    """Start a run in a fork, ``hook`` first; returns its process id. What it prints is in ``output.txt``."""
    cwd.mkdir(parents=True, exist_ok=True)
    (cwd / "mine.py").write_text(REWARD)
    config = composed((*TINY, *overrides))
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
        os.environ.update({"XDG_CACHE_HOME": str(cache), "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"})
        os.environ.update(environment)
        if not drawn:
            report.write_curves = report.write_report = lambda directory: None  # half of so small a run's time
        if hook is not None:
            hook()
        run(config, list(overrides))
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


def only_run(cwd):
    (directory,) = (path for path in (cwd / "outputs" / "main").iterdir() if path.name[0] != ".")
    return directory


def ends(directory):
    """Digests of all that a run comes to, the newest checkpoint too, without what depends on the clock or on memory."""
    newest = max((directory / "checkpoints").glob("step_*"))
    found = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if (
            not path.is_file()
            or name.startswith(("wandb", "."))
            or path.name in ("run.log", "config.yaml", "overrides.yaml")
        ):
            continue
        if name.startswith("checkpoints/step_") and newest not in path.parents:
            continue
        content = path.read_bytes()
        if path.suffix in (".json", ".jsonl"):
            content = re.sub(rb'"(time|memory)/.*?(,|\n|})', b"", content)
        if path.suffix == ".html":
            content = b"\n".join(line for line in content.split(b"\n") if not re.search(rb"(time|memory)/", line))
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def log_of(cwd):
    return (only_run(cwd) / "run.log").read_text()


def output_of(cwd):
    return Path(cwd, "output.txt").read_text()
