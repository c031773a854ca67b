"""The default step beside busy processes: ``python -m benchmarks.neighbour [rounds] [key=value ...]``.

Seconds of the same step alone, beside one process that keeps one core busy, and beside one on each core, in turns, the
first round a warm-up. On an idle machine: what else runs is a neighbour too.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks.preset import Steps, make_trainer
from pspo.base.schema import ConfigError


@contextlib.contextmanager
def busy(cores: list[int]) -> Iterator[None]:
    """A process on each of these cores that does nothing but work."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in cores]
    try:
        for process, core in zip(processes, cores, strict=True):
            os.sched_setaffinity(process.pid, {core})
        time.sleep(0.5)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def fair(cores: int, busy: int, threads: int) -> float:
    """How many times the seconds are: work goes to idle cores first and has half of a busy one."""
    threads = min(cores, threads)
    idle = min(threads, cores - busy)
    return threads / (idle + (threads - idle) / 2)


def main() -> None:
    """With no neighbour, one, and one on each core."""
    parser = argparse.ArgumentParser(prog="benchmarks.neighbour", epilog="key=value sets the run's own configuration")
    parser.add_argument("rounds", nargs="?", type=int, default=7)
    asked = measure.arguments(parser)
    cores = sorted(os.sched_getaffinity(0))
    found: dict[int, list[float]] = {count: [] for count in (0, 1, len(cores))}
    with tempfile.TemporaryDirectory() as directory:
        try:
            steps = Steps(make_trainer(asked.overrides, Path(directory)))
        except ConfigError as error:
            sys.exit(f"benchmarks.neighbour: {error}")
        for _ in range(asked.rounds + 1):
            for count, seconds in found.items():
                with busy(cores[:count]):
                    seconds.append(steps.step(again=True)["seconds"])
    found = {count: seconds[1:] for count, seconds in found.items()}
    rows = []
    for count in [count for count in found if count]:
        share = fair(len(cores), count, torch.get_num_threads())
        beside, target = f"{count} of {len(cores)} cores busy", f"{share:.2g} is the fair share"
        values = measure.summary(found[0]), beside, measure.summary(found[count])
        rows.append(measure.row("the default step, s", *values, measure.ratio(found[count], found[0]), target))
    measure.write("neighbour", rows, rounds=found, cores=len(cores), overrides=asked.overrides)


if __name__ == "__main__":
    main()
