"""What stands on the page of a comparison: its sections, each with figures and tables."""

import itertools
import json
import math
import numbers
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd

from pspo.base.files import read_lines
from pspo.compare import figures
from pspo.compare.arms import Group, selections
from pspo.compare.comparison import Comparison, compare
from pspo.compare.figures import Figure
from pspo.compare.tables import tables
from pspo.report.panels import INNER_STEPS, SECTIONS, Panel
from pspo.report.qualities import MEASURES, measure

MAX_COMPLETIONS = 6
MAX_MEASURED_ANSWERS = 600
"""Answers of an arm, about as many of each run, whose texts are read for the cheap measures."""
MIN_LOG_RATIO = 20
"""Largest over smallest value of a swept key from which on its axis is logarithmic."""
WHERE = ["set", "evaluation", "temperature", "when"]
"""Columns of the answers that a selection fixes."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
TIMES = {"rollout": "time/rollout_s", "update": "time/update_s", "validation": "time/validation_s"}
"""Part of a step -> the metric with its seconds."""


@dataclass(frozen=True)
class Table:
    """A table: ``shown`` has it as text, for the page and for print, ``numbers`` with all digits, for programs."""

    title: str
    name: str
    shown: pd.DataFrame
    numbers: pd.DataFrame

    @property
    def csv(self) -> str:
        """The numbers as CSV, in an address that holds them."""
        return "data:text/csv;charset=utf-8," + quote(self.numbers.to_csv(index=False))

    @property
    def latex(self) -> str:
        """The table as shown for LaTeX with booktabs, in an address that holds it."""
        return "data:text/x-tex;charset=utf-8," + quote(self.shown.to_latex(index=False, escape=True))


@dataclass(frozen=True)
class Section:
    """A heading with what stands under it; ``completions`` are rows of answers with the ``arms`` that gave them."""

    title: str
    text: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    completions: list[dict[str, Any]] = field(default_factory=list)
    wide: bool = False


def sections_of(group: Group, comparison: Comparison) -> list[Section]:
    """All sections that a group has something for; ``comparison`` has the answers that stand first."""
    arms = list(group.arms)
    sections = [_arms(group), _outcome(comparison, arms)]
    for section in _training(group, arms):
        if section.title == "Evaluation":
            section.figures.extend(_evaluation(group, comparison, arms))
        sections += [section] if section.figures else []
    return [*sections, *_completions(group, comparison), _qualities(group, comparison)]


def _arms(group: Group) -> Section:
    """The keys that set the arms apart, and what each arm has spent."""
    runs, rows = group.results.runs.set_index("run"), []
    for label, names in group.arms.items():
        own = runs.loc[names]
        spent = {unit: own.get(f"spent.{unit}") for unit in ("steps", "prompts", "completion_tokens")}
        rows.append(
            {"arm": label}
            | {key: own[key].iloc[0] for key in group.by}
            | {"seeds": " ".join(f"{seed}" for seed in sorted(set(own["seed"])))}
            | {unit.replace("_", " "): value.mean() for unit, value in spent.items() if value is not None}
        )
    text = ["Budgets are means over the runs of an arm."]
    numbers = pd.DataFrame(rows)
    return Section("What differs", text, tables=[Table("Arms", "arms", numbers.map(_text), numbers)])


def _training(group: Group, arms: Sequence[str]) -> Iterator[Section]:
    """One section for each of the panels' sections: curves over the steps, the trust region by inner step, the time."""
    columns = [metric for panel in INNER_STEPS for metric in panel.curves]
    steps = _with_arms(group.results.steps, group)
    inner = _with_arms(group.results.inner_steps.filter(["run", "step", *columns]), group)  # all else is large
    for title, panels in SECTIONS.items():
        text = [
            "Line: mean over the runs of an arm; band, with up to five arms shown: from the lowest run to the highest."
        ]
        drawn = list(_curves(steps, panels, arms, "step"))
        if title == "Trust region" and not inner.empty:
            inner["optimizer step of the rollout"] = inner.groupby(["run", "step"]).cumcount() + 1
            if inner["optimizer step of the rollout"].max() > 1:
                drawn += _curves(inner, INNER_STEPS, arms, "optimizer step of the rollout")
        if title == "Speed" and set(TIMES.values()) & set(steps):
            drawn.append(_times(steps, arms))
        yield Section(title, text, drawn)


def _with_arms(rows: pd.DataFrame, group: Group) -> pd.DataFrame:
    """The rows of finished runs, with the label of the run's arm."""
    arm = rows["run"].map(group.arm_of) if not rows.empty else pd.Series(dtype=str)
    return rows.assign(arm=arm)[arm.notna()]


def _curves(rows: pd.DataFrame, panels: Iterable[Panel], arms: Sequence[str], x: str) -> Iterator[Figure]:
    for panel in itertools.chain.from_iterable(panel.parts() for panel in panels):
        for metric, name in panel.curves.items():
            title = f"{panel.title}: {' '.join(name.split())}" if name else panel.title
            title += " by inner step" if x != "step" else ""
            figure = figures.curves(rows, arms, x, metric, title, percent=panel.percent, log=panel.log)
            if figure is not None:
                yield figure


def _times(steps: pd.DataFrame, arms: Sequence[str]) -> Figure:
    """Seconds per training step of each arm, by what they went into."""
    trained = steps[steps["step"] > 0]
    totals = trained.groupby("arm")[[key for key in TIMES.values() if key in trained]].sum()
    seconds = totals.div(trained.groupby("arm").size(), axis=0)
    parts = {part: seconds[key].to_dict() for part, key in TIMES.items() if key in seconds}
    ordered = {part: {arm: by_arm[arm] for arm in arms if arm in by_arm} for part, by_arm in parts.items()}
    return figures.bars(ordered, "Where the time goes", "seconds per step")


def _outcome(comparison: Comparison, arms: Sequence[str]) -> Section:
    """Every arm's accuracy, its paired difference from the reference, and the same as tables."""
    drawn = []
    for selection, rows in comparison.arms.groupby("selection", sort=False):
        drawn.append(figures.forest(_intervals(rows, "mean"), arms, f"Accuracy: {selection}", "per cent"))
        own = comparison.differences.query("selection == @selection") if len(comparison.differences) else ()
        if len(own):
            title = f"Difference from {comparison.against}: {selection}"
            drawn.append(figures.forest(_intervals(own, "difference"), arms, title, "percentage points", zero=True))
    printed = []
    for title, texts, rows in tables(comparison):
        shown = texts.assign(verdict=rows["verdict"].to_numpy()) if "verdict" in rows else texts
        printed.append(Table(title, re.sub(r"[^\w.@]+", "_", title).strip("_"), shown, rows))
    text = ["Marks: means; bars: 95 % intervals over seeds and problems.", *comparison.notes]
    return Section("Outcome", text, drawn, printed, wide=True)


def _intervals(rows: pd.DataFrame, value: str) -> dict[str, tuple[float, float, float]]:
    """Arm -> its value and the ends of its interval, in per cent."""
    return {row["arm"]: (100 * row[value], 100 * row["low"], 100 * row["high"]) for row in rows.to_dict("records")}


def _evaluation(group: Group, comparison: Comparison, arms: Sequence[str]) -> Iterator[Figure]:
    """Accuracy over every swept number and over the temperature, pass@k, lengths and truncation."""
    for selection, rows in comparison.arms.groupby("selection", sort=False):
        for key in group.by:
            if points := _over(group, key, rows):
                xs = [x for own in points.values() for x, *_ in own]
                log = min(xs) > 0 and max(xs) / min(xs) >= MIN_LOG_RATIO
                yield figures.intervals(points, [*points], key, f"Accuracy over {key}: {selection}", log=log)
    after = [selection for selection in selections(group) if selection.when == "after"]
    everything = compare(group, after, comparison.against) if after else comparison
    for (name, evaluation), rows in everything.arms.groupby(["set", "evaluation"], sort=False):
        if rows["temperature"].nunique() > 1:
            points = _points(rows, "temperature", "mean")
            yield figures.intervals(points, arms, "temperature", f"Accuracy over the temperature: {name}, {evaluation}")
    for _, rows in everything.pass_at_k.groupby(["set", "evaluation"], sort=False) if len(everything.pass_at_k) else ():
        hottest = rows[rows["temperature"] == rows["temperature"].max()]
        title = f"pass@k: {hottest['selection'].iloc[0]}"
        yield figures.intervals(_points(hottest, "k", "pass_at_k"), arms, "k", title, log=True)
    answers = _with_arms(group.results.answers, group)
    for (selection, *where), _ in comparison.arms.groupby(["selection", *WHERE], sort=False):
        own = answers[(answers[WHERE] == where).all(axis=1)]
        quantiles = {
            part: {arm: np.quantile(rows["tokens"], QUANTILES) for arm, rows in chosen.groupby("arm")}
            for part, chosen in (("correct", own[own["correct"]]), ("not correct", own[~own["correct"]]))
            if len(chosen)
        }
        yield figures.boxes(quantiles, f"Length of answers: {selection}", "tokens")
        cut = own.groupby("arm")["truncated"].mean().mul(100).to_dict()
        yield figures.bars(
            {"truncated": {arm: cut[arm] for arm in arms if arm in cut}}, f"Truncated answers: {selection}", "per cent"
        )


def _points(rows: pd.DataFrame, x: str, y: str) -> dict[str, list[tuple[float, float, float, float]]]:
    """Arm -> its points (x, y, low, high)."""
    columns = [x, y, "low", "high"]
    return {arm: [*own[columns].itertuples(index=False, name=None)] for arm, own in rows.groupby("arm", sort=False)}


def _qualities(group: Group, comparison: Comparison) -> Section:
    """What can be counted in the answers' texts, a row for each arm: means over its runs."""
    (where, _), rows = next(iter(comparison.arms.groupby(WHERE, sort=False))), []
    prompts = group.results.runs.set_index("run")["dataset.system_prompt"]
    for arm, runs in group.arms.items():
        for run in (run for run in runs if _file(run, *where).is_file()):
            with _file(run, *where).open("rb") as file:
                lines = [
                    json.loads(line) for line in itertools.islice(file, math.ceil(MAX_MEASURED_ANSWERS / len(runs)))
                ]
            rows += [{"arm": arm, "run": run} | measure(line, prompts[run]) for line in lines]
    means = pd.DataFrame(rows).groupby(["arm", "run"], sort=False).mean().groupby("arm", sort=False).mean()
    numbers = means.T.rename_axis("measure").reset_index()
    shown = numbers.map(_text).assign(**{"what is counted": numbers["measure"].map(MEASURES)})
    text = [f"Means over {MAX_MEASURED_ANSWERS} answers of an arm, or all: {comparison.arms['selection'].iloc[0]}."]
    return Section(
        "Counted in the answers", text, tables=[Table("Measures without a judge", "measures", shown, numbers)]
    )


def _file(run: str, name: str, evaluation: str, temperature: float, when: str) -> Path:
    """Where a run has its answers to a set."""
    return Path(run, "evaluation", when, evaluation, f"{name}_t{temperature:g}.jsonl")


def _over(group: Group, key: str, rows: pd.DataFrame) -> dict[str, list[tuple[float, float, float, float]]]:
    """Points (value of a numeric key, mean, low, high) of arms that share all other keys, under those keys' values."""
    settings = group.results.runs.set_index("run")
    series: dict[str, list[tuple[float, float, float, float]]] = {}
    for row in rows.to_dict("records"):
        own = settings.loc[group.arms[row["arm"]][0], group.by]
        if isinstance(own[key], numbers.Real) and not isinstance(own[key], bool) and math.isfinite(own[key]):
            shared = " ".join(f"{value}" for name, value in own.items() if name != key and not pd.isna(value))
            series.setdefault(shared, []).append((float(own[key]), row["mean"], row["low"], row["high"]))
    return {shared: sorted(points) for shared, points in series.items() if len({x for x, *_ in points}) > 1}


def _completions(group: Group, comparison: Comparison) -> list[Section]:
    """Side by side what the arms answered to the problem on which they differ most; equal completions stand once."""
    (name, evaluation, temperature, when), _ = next(iter(comparison.arms.groupby(WHERE, sort=False)))
    answers = group.results.answers
    chosen = (answers[WHERE] == [name, evaluation, temperature, when]).all(axis=1) & (answers["sample"] == 0)
    first = {runs[0]: arm for arm, runs in group.arms.items()}
    rows = answers[chosen & answers["run"].isin(first)]
    kinds = rows.groupby("problem", sort=False).agg(correct=("correct", "nunique"), tokens=("tokens", "nunique"))
    if kinds.empty:
        return []
    problem = kinds.sort_values(["correct", "tokens"], ascending=False, kind="stable").index[0]
    cards: dict[str, dict[str, Any]] = {}
    for run in rows.loc[rows["problem"] == problem, "run"].unique():
        rows_of_run = read_lines(_file(run, name, evaluation, temperature, when))
        row = next(row for row in rows_of_run if row["problem"] == problem and row["sample"] == 0)
        card = cards.setdefault(row["completion"], row | {"arms": []})
        card["arms"].append(first[run])
        if len(cards) == MAX_COMPLETIONS:
            break
    text = [f"The problem of {name} with the most different answers, at temperature {temperature:g}: first seeds."]
    return [Section("Completions of one problem", text, completions=list(cards.values()))]


def _text(cell: Any) -> str:
    """A setting or a count as text; a setting that an arm does not have is a dash."""
    if isinstance(cell, str | bool | list):
        return str(cell)
    return "–" if pd.isna(cell) else f"{cell:,.0f}" if cell >= 1000 else f"{cell:.4g}"
