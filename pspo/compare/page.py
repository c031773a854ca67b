"""One self-contained HTML page about a comparison: what differs, what came out, and how the arms got there."""

import base64
import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from pspo.base.files import read_lines, write_text
from pspo.compare import figures
from pspo.compare.arms import WHERE, ComparedRuns, labels_of, selections
from pspo.compare.comparison import Comparison, Table, compare, tables
from pspo.compare.figures import Figure
from pspo.report.page import MAX_COMPLETION_CHARACTERS, templates
from pspo.report.panels import INNER_STEPS, SECTIONS
from pspo.report.qualities import MEASURES, measure

MAX_ARMS_SHOWN = 8
"""Arms whose curves are shown at first, the reference among them; the boxes of the legend show the others."""
MAX_COMPLETIONS_SHOWN = 6
MAX_MEASURED_ANSWERS = 600
"""Answers of an arm, about as many of each run, whose texts are read for the cheap measures."""
LENGTHS = {0.05: "low", 0.5: "value", 0.95: "high"}  # quantile -> column of a figure's rows
TIMES = {"time/rollout_s": "rollout", "time/update_s": "update", "time/validation_s": "validation"}
"""Metric with the seconds of a part of a step -> the part."""
INNER_STEP = "optimizer step of the rollout"


@dataclass(frozen=True)
class Section:
    """A heading with what stands under it; ``completions`` are rows of answers with the ``arms`` that gave them."""

    title: str
    text: list[str]
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    completions: list[dict[str, Any]] = field(default_factory=list)


def write_page(comparison: Comparison, path: Path) -> Path:
    """Write the page of a comparison, whose numbers stand first, and of the runs' training."""
    group = comparison.group
    sections = [_arms(group), _outcome(comparison), *_training(comparison)]
    sections += [*_completions(comparison), _qualities(comparison)]
    drawn = [figure for section in sections for figure in section.figures]
    environment = templates(Path(__file__).parent)
    environment.filters |= {"digest": _digest, "number": drawn.index}
    script = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
    page = environment.get_template("page.html").render(
        title=", ".join(sorted({Path(run).parent.name for run in group.runs.index})),
        group=group,
        arms={arm: figures.style(number) for number, arm in enumerate(group.arms)},
        shown=sorted(group.arms, key=lambda arm: arm != comparison.against)[:MAX_ARMS_SHOWN],
        max_characters=MAX_COMPLETION_CHARACTERS,
        sections=sections,
        figures=htmlsafe_json_dumps([{"traces": figure.traces, "layout": figure.layout} for figure in drawn]),
        scripts=[Markup(get_plotlyjs()), Markup(script)],
    )
    write_text(path, page)
    return path


def _arms(group: ComparedRuns) -> Section:
    """The keys that set the arms apart, and what each arm has spent."""
    of_arms, settings = group.runs.groupby("arm", sort=False), group.runs.drop_duplicates("arm").set_index("arm")
    seeds = of_arms["seed"].agg(lambda own: " ".join(map(str, sorted(set(own)))))
    spent = of_arms[[key for key in group.runs if key.startswith("spent.")]].mean()
    numbers = pd.concat([settings[group.by], seeds, spent], axis=1).reset_index()
    return Section(
        "What differs", ["Budgets are means over runs."], tables=[Table("Arms", numbers.map(_text), numbers)]
    )


def _outcome(comparison: Comparison) -> Section:
    """Every arm's accuracy, its paired difference from the reference, and the same as tables."""
    drawn, arms = [], list(comparison.group.arms)
    for selection, rows in comparison.arms.groupby("selection", sort=False):
        drawn.append(figures.forest(_percent(rows, "mean"), arms, f"Accuracy: {selection}", "per cent"))
    for selection, rows in comparison.differences.groupby("selection", sort=False):
        title, points = f"Difference from {comparison.against}: {selection}", _percent(rows, "difference")
        drawn.append(figures.forest(points, arms, title, "percentage points", zero=True))
    text = ["Marks: means; bars: 95 % intervals over seeds and problems.", *comparison.notes]
    return Section("Outcome", text, drawn, [*tables(comparison)])


def _training(comparison: Comparison) -> Iterator[Section]:
    """The panels' sections: curves over the steps, the trust region by inner step, the test answers, the time."""
    group, arms = comparison.group, list(comparison.group.arms)
    columns = {metric for panel in INNER_STEPS for metric in panel.curves}
    steps = _with_arms(group.results.steps, group)
    inner = _with_arms(group.results.inner_steps.filter(["run", "step", *columns]), group)  # all else is large
    for title, panels in SECTIONS.items():
        drawn = [figure for panel in panels for figure in figures.curves(steps, arms, "step", panel)]
        if title == "Trust region" and len(inner):
            inner[INNER_STEP] = inner.groupby(["run", "step"]).cumcount() + 1
            if inner[INNER_STEP].max() > 1:
                drawn += [figure for panel in INNER_STEPS for figure in figures.curves(inner, arms, INNER_STEP, panel)]
        if title == "Evaluation":
            drawn += _evaluation(comparison)
        printed = []
        if title == "Speed" and TIMES.keys() & set(steps):
            seconds = steps[steps["step"] > 0].reindex(columns=["arm", *TIMES]).fillna(0).groupby("arm").mean()
            numbers = seconds.loc[[arm for arm in arms if arm in seconds.index]].rename(columns=TIMES).reset_index()
            printed.append(Table("Where the time goes: seconds per step", numbers.map(_text), numbers))
        if drawn:
            text = (
                "Line: mean over an arm's runs; band, with up to five arms shown: from the lowest to the highest run."
            )
            yield Section(title, [text], drawn, printed)


def _evaluation(comparison: Comparison) -> Iterator[Figure]:
    """Accuracy over every swept number and over the temperature, pass@k, lengths and truncation."""
    group, arms = comparison.group, list(comparison.group.arms)
    answers = _with_arms(group.results.answers, group)
    for selection, rows in comparison.arms.groupby("selection", sort=False):
        for keys, swept in _sweeps(group, rows):
            title = f"Accuracy over {keys}: {selection}"
            yield figures.intervals(swept, swept["arm"].unique(), keys, title, legend=True)
    after = [selection for selection in selections(group) if selection.when == "after"]
    everything = compare(group, after, comparison.against) if after else comparison
    for (name, evaluation), rows in everything.arms.groupby(["set", "evaluation"], sort=False):
        if rows["temperature"].nunique() > 1:
            title = f"Accuracy over the temperature: {name}, {evaluation}"
            yield figures.intervals(rows.rename(columns={"mean": "value"}), arms, "temperature", title)
    for _, rows in everything.pass_at_k.groupby(["set", "evaluation"], sort=False):
        hottest = rows[rows["temperature"] == rows["temperature"].max()].rename(columns={"pass_at_k": "value"})
        yield figures.intervals(hottest, arms, "k", f"pass@k: {hottest['selection'].iloc[0]}")
    for (selection, *where), _ in comparison.arms.groupby(["selection", *WHERE], sort=False):
        own = answers[(answers[WHERE] == where).all(axis=1)]
        for is_correct, rows in own.groupby("correct"):
            lengths = rows.groupby("arm")["tokens"].quantile([*LENGTHS]).unstack().rename(columns=LENGTHS)
            lengths = lengths.loc[[arm for arm in arms if arm in lengths.index]]
            title = f"Length of {'correct' if is_correct else 'wrong'} answers, 5, 50 and 95 %: {selection}"
            yield figures.forest(lengths.reset_index(), arms, title, "tokens")


def _sweeps(group: ComparedRuns, rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each key with several numbers, and the rows of arms that share all other keys; ``arm`` is what the arms share.

    Keys that take new values together, as eps_low and eps_high of a symmetric clip, count as one, by all their names.
    """
    settings = group.runs.drop_duplicates("arm").set_index("arm").loc[rows["arm"], group.by]
    for key in group.by:
        own = settings[pd.to_numeric(settings[key].map(str), errors="coerce").notna()]
        values = {other: own[other].factorize()[0] for other in group.by}  # numbered in the order of the arms
        together = [other for other in group.by if (values[other] == values[key]).all()]
        if together[0] == key and len(own):
            shared, name = labels_of(own, [other for other in group.by if other not in together]), ", ".join(together)
            swept = rows[rows["arm"].isin(own.index)].rename(columns={"mean": "value"})
            numbers = swept["arm"].map(own[key]).astype(float)
            swept = swept.assign(arm=swept["arm"].map(shared), **{name: numbers})
            if (is_swept := swept.groupby("arm")[name].transform("nunique") > 1).any():
                yield name, swept[is_swept]


def _completions(comparison: Comparison) -> Iterator[Section]:
    """Side by side what the arms answered to the problem on which they differ most; equal completions stand once."""
    answers, where = comparison.group.results.answers, comparison.arms.iloc[0][WHERE].to_list()
    arms = sorted(comparison.group.arms.items(), key=lambda own: own[0] != comparison.against)  # the reference first
    first = {runs[0]: arm for arm, runs in arms}
    rows = answers[(answers[WHERE] == where).all(axis=1) & (answers["sample"] == 0) & answers["run"].isin(first)]
    kinds = rows.groupby("problem", sort=False)[["correct", "tokens"]].nunique()
    if kinds.empty:
        return
    problem = kinds.sort_values(["correct", "tokens"], ascending=False, kind="stable").index[0]
    cards, answered = dict[str, dict[str, Any]](), rows.loc[rows["problem"] == problem, "run"].unique()
    for run in (run for run in first if run in answered):
        of_run = read_lines(_file(run, *where))
        row = next(row for row in of_run if row["problem"] == problem and row["sample"] == 0)
        cards.setdefault(row["completion"], row | {"arms": []})["arms"].append(first[run])
    text = f"The problem with the most different answers; {comparison.arms['selection'].iloc[0]}: first seeds."
    yield Section("Completions of one problem", [text], completions=[*cards.values()][:MAX_COMPLETIONS_SHOWN])


def _qualities(comparison: Comparison) -> Section:
    """What can be counted in the answers' texts: means over the runs of each arm."""
    group, where, rows = comparison.group, comparison.arms.iloc[0][WHERE].to_list(), []
    for arm, runs in group.arms.items():
        for run in (run for run in runs if _file(run, *where).is_file()):
            with _file(run, *where).open("rb") as file:
                lines = [*itertools.islice(file, math.ceil(MAX_MEASURED_ANSWERS / len(runs)))]
            rows += [
                {"arm": arm, "run": run} | measure(json.loads(line), group.runs.loc[run, "dataset.system_prompt"])
                for line in lines
            ]
    means = pd.DataFrame(rows).groupby(["arm", "run"], sort=False).mean().groupby("arm", sort=False).mean()
    numbers = means.reset_index()
    text = [f"Means over {MAX_MEASURED_ANSWERS} answers of an arm, or all: {comparison.arms['selection'].iloc[0]}."]
    text += ["; ".join(f"{name}: {meaning}" for name, meaning in MEASURES.items()) + "."]
    table = Table("Measures without a judge", numbers.map(_text), numbers)
    return Section("Counted in the answers", text, tables=[table])


def _with_arms(rows: pd.DataFrame, group: ComparedRuns) -> pd.DataFrame:
    """The rows of finished runs, with the label of the run's arm."""
    return rows.join(group.runs["arm"], on="run", how="inner") if len(rows) else rows


def _percent(rows: pd.DataFrame, value: str) -> pd.DataFrame:
    """The rows with ``value``, ``low`` and ``high`` in per cent."""
    rows = rows.rename(columns={value: "value"})
    return rows.assign(**rows[["value", "low", "high"]] * 100)


def _file(run: str, name: str, evaluation: str, temperature: float, when: str) -> Path:
    """Where a run has its answers to a set."""
    return Path(run, "evaluation", when, evaluation, f"{name}_t{temperature:g}.jsonl")


def _text(cell: Any) -> str:
    """A setting or a count as text; a setting that an arm does not have is a dash."""
    if isinstance(cell, str | bool | list):
        return str(cell)
    return "–" if pd.isna(cell) else f"{cell:,.0f}" if cell >= 1000 else f"{cell:.4g}"


def _digest(script: str) -> str:
    """The digest by which a Content-Security-Policy admits a script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
