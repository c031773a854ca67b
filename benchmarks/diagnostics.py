"""What the inner-step diagnostics cost: ``python -m benchmarks.diagnostics [pairs] [key=value ...]``.

The same training step, from the same weights, with and without them, in alternating order; the share of time that
they add, with the 95 % interval of its mean over the pairs (t). Each side of a pair is the least of ten steps, made
in turns with the other's: on a virtual machine single steps vary by a tenth.
"""

import dataclasses
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from scipy import stats

from benchmarks.preset import Steps, make_trainer


def step_s(steps: Steps, every: int) -> tuple[float, float]:
    """Wall and processor seconds of the first step with diagnostics every so many steps; all is put back after it."""
    trainer = steps.trainer
    diagnostics = dataclasses.replace(trainer.config.diagnostics, every=every)
    trainer.config = dataclasses.replace(trainer.config, diagnostics=diagnostics)
    made = steps.step(again=True)
    return made["seconds"], made["processor_s"]


def pair_s(steps: Steps, order: tuple[int, int]) -> dict[int, tuple[float, float]]:
    """Wall and processor seconds without diagnostics and with them, the least of ten steps in turns."""
    made = [{every: step_s(steps, every) for every in order} for _ in range(10)]
    return {every: (min(m[every][0] for m in made), min(m[every][1] for m in made)) for every in order}


def interval(added: list[float]) -> dict[str, float]:
    """Mean of the shares added, with its 95 % interval."""
    mean, error = statistics.mean(added), statistics.stdev(added) / len(added) ** 0.5
    half = error * stats.t.ppf(0.975, len(added) - 1)
    return {"added_share_mean": mean, "ci95_low": mean - half, "ci95_high": mean + half}


def main() -> None:
    """Print the pairs' result as JSON."""
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory() as directory:
        steps = Steps(make_trainer(sys.argv[2:], Path(directory)))
        for every in (0, 1):
            step_s(steps, every)
        seconds = [pair_s(steps, (0, 1) if number % 2 else (1, 0)) for number in range(pairs)]
    result = {
        "pairs": pairs,
        "step_s_median": statistics.median(pair[0][0] for pair in seconds),
        "wall": interval([pair[1][0] / pair[0][0] - 1 for pair in seconds]),
        "processor": interval([pair[1][1] / pair[0][1] - 1 for pair in seconds]),
        "threads": torch.get_num_threads(),
        "device": str(steps.trainer.policy.device),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
