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
    """What a run left in its directory.

    Attributes:
        directory: the run directory.
        config: the resolved configuration, as nested dictionaries.
        summary: final numbers, or {} where the run has not ended.
        metrics: one row for each step, columns as in README's table of metrics.
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
    """The results of a run, finished or at work. Raises ConfigError where there is no run."""
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
    metrics, diagnostics, completions = (
        pd.DataFrame(read_lines(directory / f"{name}.jsonl")) for name in ("metrics", "diagnostics", "completions")
    )
    return Results(
        directory=directory,
        config=yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8")),
        summary=json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {},
        metrics=metrics,
        diagnostics=diagnostics,
        completions=completions,
        answers=pd.DataFrame(answers),
    )


def load_group(directory: str | Path) -> list[Results]:
    """The results of all runs of ``outputs/<group>``, by name. Raises ConfigError where there is none."""
    runs = sorted(path.parent for path in Path(directory).expanduser().glob("[!.]*/config.yaml"))
    if not runs:
        raise ConfigError(f"{directory} holds no runs; give outputs/<group>")
    return [load(run) for run in runs]
