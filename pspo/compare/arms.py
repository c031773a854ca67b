"""Runs as arms and seeds: what sets the arms apart, what a reader must know first, and the score of every problem."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from pspo.base.schema import ConfigError, unknown
from pspo.compare.caveats import UNTRAINED, caveats, differing_keys
from pspo.config import NOT_SCIENCE, ONLY_MEMORY, Config
from pspo.results import Results
from pspo.run.earlier import short_names
from pspo.smoothing import Smoothing


@dataclass(frozen=True)
class Selection:
    """One question to the answers: ``scores`` has them for each arm."""

    set: str
    evaluation: str = "greedy"
    temperature: float = 0.0
    when: str = "after"
    score: str = "correct"

    def __str__(self) -> str:
        decoding = "greedy" if self.temperature == 0 else f"temperature {self.temperature:g}"
        named = "" if self.evaluation == decoding else f", evaluation {self.evaluation}"
        after = "" if self.when == "after" else f", {self.when} training" if "_" not in self.when else f", {self.when}"
        return f"{self.set}, {decoding}{named}{after}" + ("" if self.score == "correct" else f", {self.score} score")


@dataclass(frozen=True)
class Group:
    """The runs of a comparison.

    Attributes:
        results: everything that the run directories hold.
        arms: the finished runs of each arm, in the order of their seeds, by the arm's label.
        by: the dotted keys that set the arms apart.
        warnings: one sentence for each thing that a reader must know before the numbers, the gravest first.
        left_out: one sentence for each directory that takes no part.
    """

    results: Results
    arms: dict[str, list[str]]
    by: list[str]
    warnings: list[str]
    left_out: list[str]

    @property
    def arm_of(self) -> dict[str, str]:
        """The label of each run's arm, by run."""
        return {run: label for label, runs in self.arms.items() for run in runs}

    def arm(self, name: str) -> str:
        """The label that ``name`` stands for: itself, or the only label that begins with it. Raises ConfigError."""
        near = [name] if name in self.arms else [label for label in self.arms if label.split()[0] == name]
        if len(near) != 1:
            raise unknown(name, self.arms, "arm")
        return near[0]


def group(results: Results, by: Sequence[str] = ()) -> Group:
    """Arrange finished runs in arms: by every key of what is trained that differs between runs, or by the keys ``by``.

    Runs of no steps are arms of untrained models. Raises ConfigError for an unknown key, or without a finished run.
    """
    table = results.runs.sort_values(["seed", "run"], kind="stable")
    rows = {row["run"]: science_of(row) for row in table.to_dict("records")}
    state = dict(zip(table["run"], table["state"], strict=True))
    left_out = results.left_out + [f"{run} is left out: {state[run]}, not done" for run in rows if state[run] != "done"]
    untrained = {run: row for run, row in rows.items() if row.get("budget.steps") == 0}
    trained = {run: row for run, row in rows.items() if run not in untrained}
    differing = differing_keys(trained.values())
    for name in by:
        if name not in differing:
            known = {key for row in rows.values() for key in row}
            raise unknown(name, differing or sorted(known), "key, or one that does not differ:", tree=sorted(known))
    chosen = [key for key in differing if key in by] if by else differing
    if "objective.name" in differing and any(key.startswith("objective.") for key in by):
        chosen = list(dict.fromkeys(["objective.name", *chosen]))  # one objective's alpha is not another's
    labels = {run: label or trained[run]["objective.name"] for run, label in _labels(trained, chosen).items()}
    asked = [key for key in differing_keys(untrained.values()) if key.partition(".")[0] in ("model", "dataset")]
    labels |= {run: f"{UNTRAINED} {label}".strip() for run, label in _labels(untrained, asked).items()}
    arms: dict[str, list[str]] = {}
    for run in sorted(rows, key=lambda run: (run in untrained, _order(rows[run], chosen))):
        if state[run] == "done":
            arms.setdefault(labels[run], []).append(run)
    if not arms:
        raise ConfigError(f"no finished run to compare: {'; '.join(left_out)}")
    subject = chosen if by else [key for key in chosen if key.startswith("objective.")] or chosen[:1]
    confounds = {key: {run: row.get(key) for run, row in trained.items()} for key in differing if key not in subject}
    return Group(results, arms, chosen, caveats(results, arms, labels, confounds), left_out)


def scores(group: Group, selection: Selection) -> dict[str, pd.DataFrame]:
    """Each arm's mean score over samples: a row for each seed, a column for each problem that all its seeds answered.

    Arms without such answers are missing.
    """
    return {label: totals / counts for label, (totals, counts) in samples(group, selection).items()}


def samples(group: Group, selection: Selection) -> dict[str, tuple[pd.DataFrame, pd.DataFrame]]:
    """Each arm's sum of scores over samples and their number, seeds × problems.

    Runs of one arm and one seed count as one run with the samples of all: what is independent is the seed.
    """
    answers = group.results.answers
    if answers.empty:
        return {}
    wanted = answers["run"].isin(group.arm_of.keys())
    for name in ("set", "evaluation", "temperature", "when"):
        wanted &= answers[name] == getattr(selection, name)
    rows = answers.loc[wanted, ["run", "problem", selection.score]]
    seeds = dict(zip(group.results.runs["run"], group.results.runs["seed"], strict=True))
    cells = rows.astype({selection.score: float}).groupby(["run", "problem"])[selection.score].agg(["sum", "size"])
    tables = {}
    for label, runs in group.arms.items():
        wide = cells[cells.index.get_level_values("run").isin(runs)].unstack("problem")
        by_seed = wide.groupby(wide.index.map(seeds).rename("seed")).sum(min_count=1).dropna(axis=1)
        if not by_seed.empty:
            tables[label] = (by_seed["sum"], by_seed["size"])
    return tables


def selections(group: Group) -> list[Selection]:
    """Every (set, evaluation, temperature, when) with answers of an arm."""
    answers, names = group.results.answers, ["set", "evaluation", "temperature", "when"]
    if answers.empty:
        return []
    rows = answers.loc[answers["run"].isin(group.arm_of.keys()), names].drop_duplicates().sort_values(names)
    return [Selection(**row) for row in rows.to_dict("records")]


def science_of(row: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run that could set an arm apart, by dotted key."""
    memory = {f"{block}.{name}" for block, names in ONLY_MEMORY.items() for name in names}
    blocks = {field.name for field in fields(Config)} - {*NOT_SCIENCE, "evaluate", "seed"}
    if Smoothing.select({"name": row["smoothing.name"]}).constant:  # its alpha stands in the objective
        blocks.remove("smoothing")
    return {key: _plain(value) for key, value in row.items() if key.partition(".")[0] in blocks and key not in memory}


def _plain(value: Any) -> Any:
    """A cell of the frame that can be compared: null, NaN and an absent key are None, a list is its text."""
    if isinstance(value, list | dict):
        return str(value)
    return None if pd.isna(value) else value


def _labels(rows: dict[str, dict[str, Any]], by: Sequence[str]) -> dict[str, str]:
    """A label for each run from its options and the fewest keys in ``by`` that tell arms apart: ``pspo alpha=0.1``.

    Options stand alone, other values after the short names of their keys; "" where nothing sets arms apart.
    """

    def num_arms(keys: Sequence[str]) -> int:
        return len({tuple(row.get(key) for key in keys) for row in rows.values()})

    def words(row: dict[str, Any], whole_paths: bool) -> str:
        values = {key.removeprefix("objective."): str(row[key]) for key in needed if row.get(key) is not None}
        texts = {name: value if whole_paths else Path(value).name for name, value in values.items()}
        return " ".join(v if k.endswith("name") else f"{short.get(k, k)}={v}" for k, v in texts.items())

    needed = list(by)
    for key in reversed(by):
        rest = [name for name in needed if name != key]
        if rest and not key.endswith(".name") and num_arms(rest) == num_arms(by):
            needed = rest
    short = short_names({key.removeprefix("objective.") for row in rows.values() for key in row})
    labels = {run: words(row, whole_paths=False) for run, row in rows.items()}
    if len(set(labels.values())) < num_arms(by):  # files of one name
        labels = {run: words(row, whole_paths=True) for run, row in rows.items()}
    return labels


def _order(row: dict[str, Any], by: Sequence[str]) -> list[tuple[bool, float, str]]:
    """A sort key: absent values first, then numbers by size, then texts."""
    values = [row.get(key) for key in by]
    return [(v is not None, v if isinstance(v, int | float) else 0.0, str(v)) for v in values]
