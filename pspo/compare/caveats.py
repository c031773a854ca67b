"""What a reader must know before the numbers of a comparison: one sentence each, the gravest first."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pspo.base.files import read_json
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


def differing_keys(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The keys that do not have one value in all rows: the objective's first, and in each block its ``name`` first."""
    rows = list(rows)
    keys = dict.fromkeys(key for row in rows for key in row)
    differing = [key for key in keys if any(row.get(key) != rows[0].get(key) for row in rows)]
    return sorted(differing, key=lambda key: (not key.startswith("objective."), not key.endswith(".name")))


def caveats(
    results: Results, arms: Arms, labels: Mapping[str, str], confounds: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """One sentence for each thing that makes arms differ in more than what is compared, or less than their names say.

    ``labels`` has the arm of every run, unfinished ones too; ``confounds`` the values, by run, of each key that differs
    and is not what is compared.
    """
    trained = {label: runs for label, runs in arms.items() if not label.startswith(UNTRAINED)}
    runs = results.runs.set_index("run")
    return [
        *(
            f"arms differ in more than what is compared: {key} is {_listed(trained, confounds[key])}"
            for key in confounds
        ),
        *_code(arms, runs["code"].to_dict()),
        *_budgets(trained, runs),
        *_seeds(trained, labels, runs),
        *_inert(trained),
        *_truncation(results, arms),
        *_settings(arms),
        *_problems(results.answers, arms),
    ]


def _code(arms: Arms, code: Mapping[str, Any]) -> Iterable[str]:
    if len({code[run] for runs in arms.values() for run in runs}) > 1:
        yield f"runs were made by different code: its digest is {_listed(arms, code)}"


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
    alike: dict[str, list[str]] = {}
    for label, of_arm in seeds.items():
        if lacking := [f"{seed} ({states.get((label, seed), 'no run')})" for seed in every if seed not in of_arm]:
            alike.setdefault(f"lacks seed {', '.join(lacking)}", []).append(label)
        if repeated := [str(seed) for seed, count in of_arm.items() if count > 1]:
            sentence = f"several runs of seed {', '.join(repeated)}, which count as one, by their mean"
            alike.setdefault(sentence, []).append(label)
    for sentence, of_arms in alike.items():
        yield f"{', '.join(of_arms)}: {sentence}"
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
    """Arms with many completions that ended at the token limit, in training or among the answers to a set after it."""
    places = [("training", results.steps, "completion/truncated_rate")]
    if len(answers := results.answers):
        narrow = answers.loc[answers["when"] == "after", ["run", "set", "evaluation", "truncated"]]
        after = narrow.groupby(["set", "evaluation"], observed=True)
        places += [(f"answers to {name} ({evaluation})", rows, "truncated") for (name, evaluation), rows in after]
    for place, rows, column in places:
        if column in rows:
            rate = rows.groupby("run", observed=True)[column].mean()
            rates = {label: float(rate.reindex(list(runs)).mean()) for label, runs in arms.items()}
            if high := [f"{label} {100 * share:.0f} %" for label, share in rates.items() if share > MAX_TRUNCATED_RATE]:
                yield f"more than {100 * MAX_TRUNCATED_RATE:.0f} % truncated completions in {place}: {', '.join(high)}"


def _settings(arms: Arms) -> Iterable[str]:
    """Answers that were made with other lengths, samples or prompts under the same name."""
    by_place: dict[str, dict[str, dict[str, Any]]] = {}
    for run in (run for runs in arms.values() for run in runs):
        for path in Path(run).glob("evaluation/*/*/settings.json"):
            by_place.setdefault(f"{path.parts[-3]}/{path.parts[-2]}", {})[run] = read_json(path)
    for place, settings in sorted(by_place.items()):
        for key in differing_keys(settings.values()):
            if key != "ungradable":
                values = {run: values.get(key) for run, values in settings.items()}
                yield f"answers {place} were made with another {key}: {_listed(arms, values)}"


def _problems(answers: pd.DataFrame, arms: Arms) -> Iterable[str]:
    """Arms that answered other problems of a set than the first arm did; nothing pairs their answers."""
    if answers.empty:
        return
    arm_of = {run: label for label, runs in arms.items() for run in runs}
    chosen = (answers["when"] == "after") & answers["run"].isin(arm_of.keys())
    after = answers.loc[chosen, ["run", "set", "evaluation", "problem"]]
    for (name, evaluation), rows in after.groupby(["set", "evaluation"], observed=True):
        problems = rows.groupby("run", observed=True)["problem"].agg(frozenset)
        if problems.nunique() > 1:
            counts = problems.map(len).to_dict()
            yield f"{name} ({evaluation}): runs answered different problems: their number is {_listed(arms, counts)}"
        if absent := [label for label, runs in arms.items() if not any(run in problems for run in runs)]:
            yield f"{name} ({evaluation}): no answers of {', '.join(absent)}"


def _listed(arms: Arms, value_of: Mapping[str, Any]) -> str:
    """``0.1 (pspo), 0.2 (clip, cispo)``: the values of an arm's runs, with the arms that have these values."""
    arms_of: dict[str, list[str]] = {}
    for label, runs in arms.items():
        if texts := dict.fromkeys(str(value_of[run])[:20] for run in runs if run in value_of):
            arms_of.setdefault(" and ".join(texts), []).append(label)
    return ", ".join(f"{text} ({', '.join(labels)})" for text, labels in arms_of.items())
