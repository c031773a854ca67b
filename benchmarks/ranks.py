"""How a step scales with ranks: ``python -m benchmarks.ranks [preset] [rounds] [--ranks 1,2] [key=value ...]``.

Seconds of a step, the share of it in collectives (the waiting for slower ranks included) and completion tokens per
second, of 1, 2, ... ranks of one thread each, and of one rank with as many threads as there are ranks at most. Each
number of ranks is a ``torchrun`` of its own; all make the same steps from the same weights, the first one a warm-up.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.preset import PRESETS, Steps, make_trainer
from pspo.host import ranks


def timed(name: str, spent: list[float]) -> None:
    """Let a function of ``ranks`` add its seconds to ``spent``, without those of the work that it calls."""
    inner: Callable[..., Any] = getattr(ranks, name)

    def outer(given: Any) -> Any:
        begun, work_s = time.perf_counter(), [0.0]

        def work() -> Any:
            started = time.perf_counter()
            try:
                return given()
            finally:
                work_s[0] = time.perf_counter() - started

        result = inner(work if callable(given) else given)
        spent.append(time.perf_counter() - begun - work_s[0])
        return result

    setattr(ranks, name, outer)


def steps(preset: str, rounds: int, overrides: list[str]) -> None:
    """As one of the ranks: make the steps; rank 0 prints their numbers as JSON."""
    with ranks.joined(), tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer([*PRESETS[preset].overrides, *overrides], Path(directory), PRESETS[preset].shape)
        ours, found, spent = Steps(trainer), [], list[float]()
        for name in ("gather", "total"):
            timed(name, spent)
        for _ in range(rounds + 1):
            spent.clear()
            made = ours.step(again=True)
            found.append((made["seconds"], sum(spent) / made["seconds"], made["completion_tokens"] / made["seconds"]))
        if ranks.is_first():
            sys.stdout.write(json.dumps(found[1:]) + "\n")


def measured(number: int, threads: int, asked: argparse.Namespace) -> list[list[float]]:
    """The numbers of each step of so many ranks."""
    words = [asked.preset, str(asked.rounds), "--child", f"threads={threads}", *asked.overrides]
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={number}", "--standalone"]
    command = [*launch, "-m", "benchmarks.ranks", *words]
    made = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    return list(json.loads(made.stdout.splitlines()[-1]))


def main() -> None:
    """Every number of ranks, one after the other."""
    parser = argparse.ArgumentParser(prog="benchmarks.ranks", epilog="key=value sets the run's own configuration")
    parser.add_argument("preset", nargs="?", choices=PRESETS, default="smollm2")
    parser.add_argument("rounds", nargs="?", type=int, default=3)
    parser.add_argument("--ranks", default="1,2", help="numbers of ranks, with commas")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    asked = measure.arguments(parser)
    if asked.child:
        steps(asked.preset, asked.rounds, asked.overrides)
        return
    numbers = [int(number) for number in asked.ranks.split(",")]
    found = {f"{n} rank{'s' * (n > 1)} of one thread": measured(n, 1, asked) for n in numbers}
    found[f"one rank of {max(numbers)} threads"] = measured(1, max(numbers), asked)
    one, rows = next(iter(found.values())), []
    for what, values in found.items():
        seconds, first = ([step for step, *_ in of] for of in (values, one))
        share = statistics.median(share for _, share, _ in values)
        label = f"{asked.preset}, {what} ({share:.0%} in collectives): s per step"
        beside = measure.summary(seconds), "one of one thread", measure.summary(first), measure.ratio(first, seconds)
        rows.append(measure.row(label, *beside, "≥ 1.7" if what.startswith("2 ranks") else ""))
    measure.write(f"ranks_{asked.preset}", rows, rounds=found, overrides=asked.overrides)


if __name__ == "__main__":
    main()
