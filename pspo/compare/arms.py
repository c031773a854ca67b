"""Runs as arms and seeds: what sets the arms apart, what a reader must know first, and the score of every problem."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from pspo.base.schema import ConfigError, dotted, unknown
from pspo.compare.caveats import UNTRAINED, caveats, differing
from pspo.config import Config, read, science
from pspo.results import Results
from pspo.run.earlier import short_names

WHERE = ["set", "evaluation", "temperature", "when"]
"""Columns of the answers that a selection fixes."""


@dataclass(frozen=True)
class Selection:
    """Which answers are compared, by the columns ``WHERE``, and by which of their scores."""

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
class ComparedRuns:
    """The runs of a comparison.

    Attributes:
        results: everything that the run directories hold.
        runs: the finished runs, arm by arm and in the order of their seeds: ``results.runs`` with the column ``arm``,
            the arm's label; among the settings a list is its text, an absent value None.
        by: the dotted keys that set the arms apart.
        warnings: one sentence for each thing that a reader must know before the numbers, the gravest first.
        left_out: one sentence for each directory that takes no part.
    """

    results: Results
    runs: pd.DataFrame
    by: list[str]
    warnings: list[str]
    left_out: list[str]

    @cached_property
    def arms(self) -> dict[str, list[str]]:
        """The runs of each arm."""
        return {arm: [*runs.index] for arm, runs in self.runs.groupby("arm", sort=False)}

    def arm(self, name: str) -> str:
        """The label that ``name`` stands for: itself, or the only label that begins with it. Raises ConfigError."""
        near = [name] if name in self.arms else [label for label in self.arms if label.split()[0] == name]
        if len(near) != 1:
            raise unknown(name, self.arms, "arm")
        return near[0]


def group(results: Results, by: Sequence[str] = ()) -> ComparedRuns:
    """Arrange finished runs in arms: by every key of what is trained that differs between runs, or by the keys ``by``.

    Runs of no steps are arms of untrained models. Raises ConfigError for an unknown key, or without a finished run.
    """
    runs, left_out = results.runs.sort_values(["seed", "run"], kind="stable").set_index("run"), [*results.left_out]
    by_run: dict[str, dict[str, Any]] = {}
    for run in runs.index:
        try:
            by_run[run] = settings_of(read(Path(run, "config.yaml")))
        except ConfigError as error:
            left_out.append(f"{run} is left out: {error}")
    runs = runs.loc[[*by_run]]
    is_done = runs["state"] == "done"
    left_out += [f"{run} is left out: {state}, not done" for run, state in runs["state"][~is_done].items()]
    if not is_done.any():
        raise ConfigError(f"no finished run to compare: {'; '.join(left_out)}")
    settings = pd.DataFrame.from_dict(by_run, orient="index", dtype=object)
    settings = settings.where(settings.notna(), None)
    is_untrained = settings["budget.steps"] == 0
    trained, untrained = settings[~is_untrained], settings[is_untrained]
    keys = differing(trained)
    for name in by:
        if name not in keys:
            raise unknown(name, keys or sorted(settings), "key, or one that does not differ:", tree=sorted(settings))
    chosen = [key for key in keys if key in by] if by else keys
    if "objective.name" in keys and any(key.startswith("objective.") for key in by):
        chosen = list(dict.fromkeys(["objective.name", *chosen]))  # one objective's alpha is not another's
    labels = {run: label or trained.loc[run, "objective.name"] for run, label in labels_of(trained, chosen).items()}
    of_models = [key for key in differing(untrained) if key.partition(".")[0] in ("model", "dataset")]
    labels |= {run: f"{UNTRAINED} {label}".strip() for run, label in labels_of(untrained, of_models).items()}
    runs = runs.assign(**settings, arm=labels)
    done = sorted(runs.index[is_done], key=lambda run: (is_untrained[run], _order(settings.loc[run, chosen])))
    subject = chosen if by else [key for key in chosen if key.startswith("objective.")] or chosen[:1]
    if "objective.name" in subject:  # then a knob that has one value in each arm is a part of the objective
        knobs = trained.filter(like="objective.")
        subject = [*subject, *knobs.columns[knobs.groupby(trained.index.map(labels)).nunique(dropna=False).max() == 1]]
    confounds = trained[[key for key in keys if key not in subject]]
    return ComparedRuns(results, runs.loc[done], chosen, [*caveats(results, runs, runs.loc[done], confounds)], left_out)


def samples(group: ComparedRuns, selection: Selection) -> dict[str, tuple[pd.DataFrame, pd.DataFrame]]:
    """Each arm's sum of scores over samples and their number: a row for each seed, a column for each problem.

    Problems that a seed of the arm has not answered, and arms without such answers, are missing. Runs of one arm and
    one seed count as one run with the samples of all: what is independent is the seed.
    """
    answers = group.results.answers.reindex(columns=["run", "problem", *WHERE, selection.score])
    rows = answers[(answers[WHERE] == [getattr(selection, name) for name in WHERE]).all(axis=1)]
    rows = rows.join(group.runs[["arm", "seed"]], on="run", how="inner").astype({selection.score: float})
    cells = rows.groupby(["arm", "seed", "problem"])[selection.score].agg(["sum", "size"])
    answered = [arm for arm in group.arms if arm in cells.index.levels[0]]
    tables = {arm: cells.loc[arm].unstack("problem").dropna(axis=1) for arm in answered}
    return {arm: (table["sum"], table["size"]) for arm, table in tables.items() if not table.empty}


def selections(group: ComparedRuns) -> list[Selection]:
    """Every (set, evaluation, temperature, when) with answers of an arm."""
    answers = group.results.answers.reindex(columns=["run", *WHERE])
    rows = answers.loc[answers["run"].isin(group.runs.index), WHERE].drop_duplicates().sort_values(WHERE)
    return [Selection(**row) for row in rows.to_dict("records")]


def settings_of(config: Config) -> dict[str, Any]:
    """The settings that could set an arm apart, by dotted key; a list is its text."""
    settings = dotted(science(config))
    del settings["seed"], settings["evaluate.every"]
    return {key: str(value) if isinstance(value, list) else value for key, value in settings.items()}


def labels_of(settings: pd.DataFrame, by: Sequence[str]) -> dict[str, str]:
    """A label for each run from its options and the fewest keys in ``by`` that tell arms apart: ``pspo alpha=0.1``.

    Options stand alone, other values after the short names of their keys; "" where nothing sets arms apart.
    """
    needed, num_arms = list(by), len(settings[list(by)].drop_duplicates())
    for key in reversed(by):
        rest = [name for name in needed if name != key]
        if rest and not key.endswith(".name") and len(settings[rest].drop_duplicates()) == num_arms:
            needed = rest
    short = short_names(key.removeprefix("objective.") for key in settings)
    words: dict[str, list[str]] = {run: [] for run in settings.index}
    for key in needed:
        values = settings[key].dropna().map(str)
        file_names = values.map(lambda value: Path(value).name)
        values = file_names if file_names.nunique() == values.nunique() else values
        name = key.removeprefix("objective.")
        for run, value in values.items():
            text = value if name.endswith("name") else f"{short.get(name, name)}={value}"
            words[run].append(f"{value}-shot" if key == "dataset.shots" else text)
    return {run: " ".join(of_run) for run, of_run in words.items()}


def _order(values: Iterable[Any]) -> list[tuple[bool, float, str]]:
    """A sort key: absent values first, then numbers by size, then texts."""
    return [(v is not None, v if isinstance(v, int | float) else 0.0, str(v)) for v in values]
