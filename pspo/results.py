"""Runs as pandas data frames, for notebooks, scripts and the comparison of arms: ``load("outputs/main").steps``."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.json
import yaml

from pspo.base.files import read_json, read_yaml
from pspo.base.schema import ConfigError, dotted
from pspo.run.lock import is_held

NUMBERS = pa.schema(
    {"problem": pa.string(), "sample": pa.int64(), "tokens": pa.int64(), "reward": pa.float64()}
    | {name: pa.bool_() for name in ("correct", "parsed", "strict", "timed_out", "truncated")}
)
"""The columns of the answers that take little memory."""
TEXTS = pa.schema({name: pa.string() for name in ("question", "answer", "completion")})
"""Columns of the answers that no statistic needs; pyarrow would infer a time for a text that looks like a date."""


@dataclass(frozen=True)
class Results:
    """The files of one or more run directories; the column ``run`` of every frame is the run's directory as text.

    Attributes:
        runs: one row for each run: ``group``, ``seed``, ``state`` (done, running, failed, unfinished), ``code`` (its
            digest), every key of the configuration (``objective.alpha``), and the budget spent (``spent.prompts``).
        steps: one row for each step: the columns of metrics.jsonl, which README's table of metrics explains.
        inner_steps: one row for each optimizer step: the columns of diagnostics.jsonl.
        answers: one row for each answer to a held-out problem: ``when`` (before, after, step_000010), ``evaluation``
            (the name of its settings), ``set``, ``temperature``, then the columns of the answer files.
        left_out: one sentence for each directory that could not be read.
    """

    runs: pd.DataFrame
    steps: pd.DataFrame
    inner_steps: pd.DataFrame
    answers: pd.DataFrame
    left_out: list[str]


def load(paths: str | Path | Sequence[str | Path], *, texts: bool = True) -> Results:
    """The results of run directories or of groups, done or still training.

    Without ``texts`` the answers have the columns ``NUMBERS`` alone. Raises ConfigError where no run can be read.
    """
    several = [paths] if isinstance(paths, str | Path) else paths
    runs, left_out = [], []
    tables_of: dict[str, list[pa.Table]] = {"steps": [], "inner_steps": [], "answers": []}
    for directory in (run for path in several for run in directories(Path(path).expanduser())):
        try:
            row, tables = _read(directory, texts)
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            left_out.append(f"{directory} is left out: {reason or type(error).__name__}")
            continue
        runs.append(row)
        for name, table in tables:
            tables_of[name].append(_with(table, {"run": str(directory)}))
    if not runs:
        raise ConfigError(left_out[0] if left_out else "no directory was given; give outputs/<group>")
    frames = {name: _joined(tables) for name, tables in tables_of.items()}
    pa.default_memory_pool().release_unused()
    return Results(pd.DataFrame(runs), left_out=left_out, **frames)


def directories(path: Path) -> list[Path]:
    """The run directories under a run directory or a group, by name; a path without runs stands for itself."""
    if (path / "config.yaml").is_file():
        return [path]
    return sorted(file.parent for file in path.glob("[!.]*/config.yaml")) or [path]


def _read(directory: Path, texts: bool) -> tuple[dict[str, Any], list[tuple[str, pa.Table]]]:
    """The row of a run and its tables that have rows. Raises ValueError for what is no run of this version."""
    path = directory / "config.yaml"
    if not path.is_file():
        raise ValueError("it has no config.yaml; give outputs/<group> or outputs/<group>/<run>")
    config = read_yaml(path)
    if not isinstance(config, dict) or "objective" not in config:
        raise ValueError("its config.yaml is not whole")
    if any(directory.glob("evaluation/*.jsonl")):
        raise ValueError("another version of pspo wrote its answers; rerun=all makes the run again")
    steps = _table(directory / "metrics.jsonl")
    tables = [("steps", steps), ("inner_steps", _table(directory / "diagnostics.jsonl"))]
    tables += [("answers", table) for table in _answers(directory, texts)]
    last = steps.slice(len(steps) - 1).to_pylist()[0] if len(steps) else {}
    spent = {f"spent.{name.partition('/')[2]}": x for name, x in last.items() if name.startswith("budget/")}
    about: dict[str, Any] = {"run": str(directory), "group": directory.parent.name, "state": _state(directory)}
    about["code"] = read_json(directory / "inputs.json").get("code")
    return about | dotted(config) | spent, [(name, table) for name, table in tables if len(table)]


def _answers(directory: Path, texts: bool) -> Iterator[pa.Table]:
    """The answers of each file ``evaluation/<when>/<evaluation>/<set>_t<temperature>.jsonl``."""
    for path in sorted(directory.glob("evaluation/[!.]*/[!.]*/[!.]*.jsonl")):
        name, _, temperature = path.stem.rpartition("_t")
        about = {"when": path.parts[-3], "evaluation": path.parts[-2], "set": name, "temperature": float(temperature)}
        columns = pa.schema([*NUMBERS, *TEXTS]) if texts else NUMBERS
        yield _with(_table(path, columns, "infer" if texts else "ignore"), about)


def _table(path: Path, schema: pa.Schema | None = None, other_columns: str = "infer") -> pa.Table:
    """A file of JSON lines with the columns of ``schema``; ``other_columns`` are inferred or ignored.

    A last line still being written is left out.
    """
    whole = path.read_bytes().rpartition(b"\n")[0] if path.is_file() else b""
    if not whole:
        return pa.table({})
    parse = pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior=other_columns)
    block = pa.json.ReadOptions(use_threads=False, block_size=len(whole) + 1)  # a column's type is the whole file's
    return pa.json.read_json(pa.BufferReader(whole), block, parse)


def _with(table: pa.Table, about: Mapping[str, Any]) -> pa.Table:
    """A table with one more column, the same value in all rows, for each key of ``about``, at its left."""
    for place, (name, value) in enumerate(about.items()):
        table = table.add_column(place, name, pa.repeat(value, len(table)))
    return table


def _joined(tables: list[pa.Table]) -> pd.DataFrame:
    """Tables of one kind under each other."""
    whole = pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({})
    tables.clear()  # so that each column's memory is free as soon as pandas has the column
    return whole.to_pandas(split_blocks=True, self_destruct=True)


def _state(directory: Path) -> str:
    if (directory / "DONE").is_file():
        return "done"
    if is_held(directory):
        return "running"
    return "failed" if (directory / "FAILED").is_file() else "unfinished"
