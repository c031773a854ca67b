"""Runs as pandas data frames, for notebooks, scripts and the comparison of arms.

from pspo.results import load
results = load("outputs/main")
results.steps.groupby("run").plot(x="step", y="validation/sampled_accuracy")
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from pspo.base.files import read_json, read_lines
from pspo.base.schema import ConfigError, dotted
from pspo.run.lock import is_held

TEXTS = ("question", "answer", "completion", "components")
"""Columns of the answers that no statistic needs, and that take most of the memory."""


@dataclass(frozen=True)
class Results:
    """The files of one or more run directories; the column ``run`` of every frame is the run's directory as text.

    Attributes:
        runs: one row for each run: ``group``, ``seed``, ``state`` (done, running, failed, unfinished), ``code`` (its
            digest), every key of the configuration (``objective.alpha``), and the budget spent (``spent.prompts``).
        steps: one row for each step: the columns of metrics.jsonl, which README's table of metrics explains.
        inner_steps: one row for each optimizer step: the columns of diagnostics.jsonl.
        completions: one row for each completion of the first prompt of every step.
        answers: one row for each answer to a held-out problem: ``when`` (before, after, step_000010), ``evaluation``
            (the name of its settings), ``set``, ``temperature``, then the columns of the answer files.
        left_out: one sentence for each directory that could not be read.
    """

    runs: pd.DataFrame
    steps: pd.DataFrame
    inner_steps: pd.DataFrame
    completions: pd.DataFrame
    answers: pd.DataFrame
    left_out: list[str]

    def config(self, run: str) -> dict[str, Any]:
        """The resolved configuration of a run, as nested dictionaries."""
        return dict(yaml.safe_load(Path(run, "config.yaml").read_text(encoding="utf-8")))

    def summary(self, run: str) -> dict[str, Any]:
        """The final numbers of a run, {} before its end."""
        return read_json(Path(run, "summary.json"))


def load(paths: str | Path | Sequence[str | Path], *, texts: bool = True) -> Results:
    """The results of run directories or of groups, done or still training.

    Without ``texts`` the answers have no column of ``TEXTS``. Raises ConfigError where no run can be read.
    """
    several = [paths] if isinstance(paths, str | Path) else paths
    runs, left_out = [], []
    frames: dict[str, list[pd.DataFrame]] = {"steps": [], "inner_steps": [], "completions": [], "answers": []}
    for directory in (found for path in several for found in directories(Path(path).expanduser())):
        try:
            row, tables = _read(directory, texts)
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            left_out.append(f"{directory} is left out: {reason or type(error).__name__}")
            continue
        runs.append(row)
        for name, table in tables.items():
            if not table.empty:
                table.insert(0, "run", str(directory))
                frames[name].append(table)
    if not runs:
        raise ConfigError(left_out[0] if left_out else "no directory was given; give outputs/<group>")
    joined = {name: pd.concat(parts, ignore_index=True) if parts else pd.DataFrame() for name, parts in frames.items()}
    return Results(pd.DataFrame(runs), left_out=left_out, **joined)


def directories(path: Path) -> list[Path]:
    """The run directories under a run directory or a group, by name; a path without runs stands for itself."""
    if (path / "config.yaml").is_file():
        return [path]
    return sorted(file.parent for file in path.glob("[!.]*/config.yaml")) or [path]


def _read(directory: Path, texts: bool) -> tuple[dict[str, Any], dict[str, pd.DataFrame]]:
    """The row of a run and its tables. Raises ValueError for a directory that is no run of this version."""
    path = directory / "config.yaml"
    if not path.is_file():
        raise ValueError("it has no config.yaml; give outputs/<group> or outputs/<group>/<run>")
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict) or "objective" not in config:
        raise ValueError("its config.yaml is not whole")
    if any(directory.glob("evaluation/*.jsonl")):
        raise ValueError("another version of pspo wrote its answers; rerun=all makes the run again")
    names = {"steps": "metrics", "inner_steps": "diagnostics", "completions": "completions"}
    tables = {table: pd.DataFrame(read_lines(directory / f"{name}.jsonl")) for table, name in names.items()}
    parts = list(_answers(directory, texts))
    tables["answers"] = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    steps, inputs = tables["steps"], directory / "inputs.json"
    last = {} if steps.empty else steps.iloc[-1].to_dict()
    spent = {f"spent.{name.partition('/')[2]}": x for name, x in last.items() if name.startswith("budget/")}
    about = {"run": str(directory), "group": directory.parent.name, "state": _state(directory)}
    code = {"code": json.loads(inputs.read_text(encoding="utf-8")).get("code") if inputs.is_file() else None}
    return about | code | dotted(config) | spent, tables


def _answers(directory: Path, texts: bool) -> Iterator[pd.DataFrame]:
    """The answers of each file ``evaluation/<when>/<evaluation>/<set>_t<temperature>.jsonl``."""
    for path in sorted(directory.glob("evaluation/[!.]*/[!.]*/[!.]*.jsonl")):
        if rows := read_lines(path):
            name, _, temperature = path.stem.rpartition("_t")
            table = pd.DataFrame(rows if texts else [{k: v for k, v in row.items() if k not in TEXTS} for row in rows])
            about = (path.parts[-3], path.parts[-2], name, float(temperature))
            for place, (column, value) in enumerate(
                zip(("when", "evaluation", "set", "temperature"), about, strict=True)
            ):
                table.insert(place, column, value)
            yield table


def _state(directory: Path) -> str:
    if (directory / "DONE").is_file():
        return "done"
    if is_held(directory):
        return "running"
    return "failed" if (directory / "FAILED").is_file() else "unfinished"
