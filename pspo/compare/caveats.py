"""What a reader must know before the numbers of a comparison: one sentence each, the gravest first."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pspo.base.schema import ConfigError
from pspo.config import read
from pspo.results import Results
from pspo.run.advice import advice

UNTRAINED = "untrained"
"""First word of the label of an arm that was not trained."""
MAX_TRUNCATED_RATE = 0.2
"""Share of truncated completions above which an arm's scores say as much about lengths as about answers."""
MAX_SPENT_RATIO = {"prompts": 1.01, "completion_tokens": 1.1}
"""Largest over smallest mean budget spent by an arm, above which the budgets count as unequal."""

Arms = Mapping[str, Sequence[str]]
Rows = Mapping[str, Mapping[str, Any]]


def differing_keys(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The keys that do not have one value in all rows: the objective's first, and in each block its ``name`` first."""
    rows = list(rows)
    keys = dict.fromkeys(key for row in rows for key in row)
    differing = [key for key in keys if len({row.get(key) for row in rows}) > 1]
    return sorted(differing, key=lambda key: (not key.startswith("objective."), not key.endswith(".name")))


def caveats(
    results: Results,
    arms: Arms,
    labels: Mapping[str, str],
    rows: Rows,
    compared: Sequence[str],
    differing: Sequence[str],
) -> list[str]:
    """One sentence for each thing that makes arms differ in more than what is compared, or less than their names say.

    ``labels`` has the arm of every run, unfinished ones too, ``rows`` its settings, ``compared`` the keys that set arms
    apart and ``differing`` all keys that differ.
    """
    trained = {label: runs for label, runs in arms.items() if not label.startswith(UNTRAINED)}
    runs = results.runs.set_index("run")
    return [
        *_confounds(trained, rows, compared, differing),
        *_code(arms, runs["code"]),
        *_budgets(trained, runs),
        *_seeds(trained, labels, runs),
        *_inert(trained),
        *_truncation(results, arms),
        *_problems(results.answers, arms),
    ]


def _confounds(arms: Arms, rows: Rows, compared: Sequence[str], differing: Sequence[str]) -> Iterable[str]:
    """Keys that differ beside the subject: the keys asked for, else the objective's, else the first that differs."""
    objective = [key for key in compared if key.startswith("objective.")]
    subject = compared if len(compared) < len(differing) else objective or compared[:1]
    named = "the objective" if subject and subject == objective else ", ".join(subject)
    for key in differing:
        if key not in subject:
            values = {label: [rows[run].get(key) for run in runs] for label, runs in arms.items()}
            yield f"arms differ in more than {named}: {key} is {_listed(values)}"


def _code(arms: Arms, code: "pd.Series[str]") -> Iterable[str]:
    digests = {label: [str(code[run])[:8] for run in runs] for label, runs in arms.items()}
    if len({digest for several in digests.values() for digest in several}) > 1:
        yield f"runs were made by different code: its digest is {_listed(digests)}"


def _budgets(arms: Arms, runs: pd.DataFrame) -> Iterable[str]:
    for unit, ratio in MAX_SPENT_RATIO.items():
        spent = {label: float(runs.loc[list(of_arm), f"spent.{unit}"].mean()) for label, of_arm in arms.items()}
        if spent and max(spent.values()) > ratio * min(spent.values()):
            means = ", ".join(f"{label} {value:,.0f}" for label, value in spent.items())
            yield f"arms have spent unequal budgets: mean {unit.replace('_', ' ')} {means}"


def _seeds(arms: Arms, labels: Mapping[str, str], runs: pd.DataFrame) -> Iterable[str]:
    """Seeds of other arms that an arm lacks, with the state of the run that should be there, and repeated seeds."""
    seeds = {label: Counter(int(runs.loc[run, "seed"]) for run in of_arm) for label, of_arm in arms.items()}
    states = {(label, int(runs.loc[run, "seed"])): runs.loc[run, "state"] for run, label in labels.items()}
    every = sorted({seed for of_arm in seeds.values() for seed in of_arm} | {s for at, s in states if at in arms})
    for label, of_arm in seeds.items():
        if lacking := [f"{seed} ({states.get((label, seed), 'no run')})" for seed in every if seed not in of_arm]:
            yield f"{label} lacks seed {', '.join(lacking)}"
        if repeated := [str(seed) for seed, count in of_arm.items() if count > 1]:
            yield f"{label} has several runs of seed {', '.join(repeated)}; they count as one, by their mean"
    for label in sorted({label for label in labels.values() if not label.startswith(UNTRAINED)} - set(arms)):
        yield f"{label} has no finished run"


def _inert(arms: Arms) -> Iterable[str]:
    """Trust regions without an effect: what a run of the arm says of itself when it starts."""
    arms_of: dict[str, list[str]] = {}
    for label, runs in arms.items():
        try:
            sentences = advice(read(Path(runs[0], "config.yaml")))
        except ConfigError as error:
            sentences = [str(error)]
        for sentence in sentences:
            arms_of.setdefault(sentence.partition(";")[0], []).append(label)
    for sentence, labels in arms_of.items():
        yield f"{', '.join(labels)}: {sentence}"


def _truncation(results: Results, arms: Arms) -> Iterable[str]:
    """Arms with many completions that ended at the token limit, in training or among the answers after it."""
    steps, answers = results.steps, results.answers
    after = answers[answers["when"] == "after"] if len(answers) else answers
    for table, column, place in ((steps, "completion/truncated_rate", "training"), (after, "truncated", "the answers")):
        if column in table:
            rates = {label: float(table.loc[table["run"].isin(runs), column].mean()) for label, runs in arms.items()}
            high = [f"{label} {100 * rate:.0f} %" for label, rate in rates.items() if rate > MAX_TRUNCATED_RATE]
            if high:
                most = f"{100 * MAX_TRUNCATED_RATE:.0f} %"
                yield f"more than {most} of completions are truncated in {place}: {', '.join(high)}"


def _problems(answers: pd.DataFrame, arms: Arms) -> Iterable[str]:
    """Arms that answered other problems of a set than the first arm did; nothing pairs their answers."""
    if answers.empty:
        return
    arm_of = {run: label for label, runs in arms.items() for run in runs}
    after = answers[(answers["when"] == "after") & answers["run"].isin(arm_of.keys())]
    for (name, evaluation), rows in after.groupby(["set", "evaluation"], observed=True):
        problems = rows.groupby("run", observed=True)["problem"].agg(frozenset)
        counts = {label: [len(problems[run]) for run in runs if run in problems] for label, runs in arms.items()}
        if problems.nunique() > 1:
            yield f"{name} ({evaluation}): not all runs answered the same problems: their number is {_listed(counts)}"
        if absent := [label for label, several in counts.items() if not several]:
            yield f"{name} ({evaluation}): no answers of {', '.join(absent)}"


def _listed(values: Mapping[str, Iterable[Any]]) -> str:
    """``0.1 (pspo), 0.2 (clip, cispo)``: each value, or each set of values, with the arms that have it."""
    arms_of: dict[str, list[str]] = {}
    for label, several in values.items():
        texts = dict.fromkeys("null" if v is None else f"{v:g}" if isinstance(v, float) else str(v) for v in several)
        arms_of.setdefault(" and ".join(texts) or "0", []).append(label)
    return ", ".join(f"{text} ({', '.join(labels)})" for text, labels in arms_of.items())
