"""What goes on around the steps: ``python -m benchmarks.shares [preset] [steps] [key=value ...]``.

Seconds of validation, checkpoints, metrics and tables in a whole training of so many steps, at the intervals of the
preset, beside all its seconds. The GPU presets validate and save as often as ``conf/model`` has it, so few steps tell
nothing of them: give at least as many as ``evaluate.every``.
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.preset import PRESETS, make_trainer
from pspo.base.schema import ConfigError
from pspo.trainer import Trainer


def timed(spent: defaultdict[str, float], name: str, owner: Any, method: str) -> None:
    """Add the seconds of an object's method to ``spent[name]``."""
    work: Callable[..., Any] = getattr(owner, method)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        try:
            return work(*args, **kwargs)
        finally:
            spent[name] += time.perf_counter() - begun

    setattr(owner, method, wrapped)


def shares(trainer: Trainer) -> tuple[dict[str, float], float]:
    """Seconds by what they went to, and all."""
    spent: defaultdict[str, float] = defaultdict(float)
    timed(spent, "validation", trainer, "_validate")
    timed(spent, "checkpoints", trainer, "_save")
    timed(spent, "metrics", trainer.tracker, "log")
    for table in trainer.files.values():
        timed(spent, "tables", table, "append")
    begun = time.perf_counter()
    trainer.run()
    return spent, time.perf_counter() - begun


def main() -> None:
    """One training."""
    parser = argparse.ArgumentParser(prog="benchmarks.shares", epilog="key=value sets the run's own configuration")
    parser.add_argument("preset", nargs="?", choices=PRESETS, default="tiny")
    parser.add_argument("steps", nargs="?", type=int, help="of the training; the preset's own number otherwise")
    asked = measure.arguments(parser)
    preset = PRESETS[asked.preset]
    steps = [f"budget.steps={asked.steps}"] if asked.steps else []
    with tempfile.TemporaryDirectory() as directory:
        try:
            trainer = make_trainer([*preset.overrides, *steps, *asked.overrides], Path(directory), preset.shape)
        except ConfigError as error:
            sys.exit(f"benchmarks.shares: {error}")
        spent, total = shares(trainer)
    rows = []
    for name in ("validation", "checkpoints", "metrics", "tables"):
        values = measure.summary([spent[name]]), "the whole training", measure.summary([total])
        share, target = measure.ratio([spent[name]], [total]), "≤ 0.05" if preset.shape else ""
        rows.append(measure.row(f"{asked.preset}: {name}, s", *values, share, target))
    measure.write(f"shares_{asked.preset}", rows, steps=trainer.state.progress.steps, overrides=asked.overrides)


if __name__ == "__main__":
    main()
