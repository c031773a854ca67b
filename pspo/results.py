"""Finished runs as pandas data frames, for notebooks and scripts.

from pspo.results import load
run = load("outputs/main/pspo_seed0_1a2b3c4d")
run.metrics.plot(x="step", y="validation/sampled_accuracy")
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from pspo.base.files import read_lines
from pspo.base.schema import ConfigError


@dataclass(frozen=True)
class Results:
    """The files of a run directory.

    Attributes:
        directory: the run directory.
        config: the resolved configuration, as nested dictionaries.
        summary: final numbers, {} before the end of the run.
        metrics: one row for each step; README's table of metrics explains the columns.
        diagnostics: one row for each optimizer step.
        completions: one row for each completion of the first prompt of every step.
        answers: one row for each test answer; columns ``set`` and ``when`` ("before" or "after" training) come first.
    """

    directory: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    metrics: pd.DataFrame
    diagnostics: pd.DataFrame
    completions: pd.DataFrame
    answers: pd.DataFrame


def load(directory: str | Path) -> Results:
    """The results of a run, done or still training. Raises ConfigError where there is no run."""
    directory = Path(directory).expanduser()
    if not (directory / "config.yaml").is_file():
        raise ConfigError(f"{directory} is no run directory: it has no config.yaml; give outputs/<group>/<run>")
    summary = directory / "summary.json"
    answers = [
        {"set": name, "when": when} | row
        for path in sorted(directory.glob("evaluation/[!.]*.jsonl"))
        for name, _, when in [path.stem.rpartition("_")]
        for row in read_lines(path)
    ]
    tables = ("metrics", "diagnostics", "completions")
    return Results(
        directory,
        yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8")),
        json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {},
        **{name: pd.DataFrame(read_lines(directory / f"{name}.jsonl")) for name in tables},
        answers=pd.DataFrame(answers),
    )


def load_group(directory: str | Path) -> list[Results]:
    """The results of all runs of ``outputs/<group>``, by name. Raises ConfigError where there is none."""
    runs = sorted(path.parent for path in Path(directory).expanduser().glob("[!.]*/config.yaml"))
    if not runs:
        raise ConfigError(f"{directory} holds no runs; give outputs/<group>")
    return [load(run) for run in runs]
