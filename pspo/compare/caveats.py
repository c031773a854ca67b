"""What a reader must know before the numbers of a comparison: one sentence each, the gravest first."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from pspo.base.files import read_json
from pspo.config import read
from pspo.results import Results
from pspo.run.advice import advice

UNTRAINED = "untrained"
"""First word of the label of an arm that was not trained."""
MAX_TRUNCATED_RATE = 0.2
"""Share of truncated completions above which an arm's scores say as much about lengths as about answers."""
MAX_SPENT_RATIO = {"prompts": 1.01, "completion_tokens": 1.1}
"""Largest over smallest mean budget spent by an arm, above which the budgets count as unequal."""


def differing(settings: pd.DataFrame) -> list[str]:
    """The keys that do not have one value in all rows: the objective's first, and in each block its ``name`` first."""
    keys = settings.columns[settings.nunique(dropna=False) > 1]
    return sorted(keys, key=lambda key: (not key.startswith("objective."), not key.endswith(".name")))


def caveats(results: Results, runs: pd.DataFrame, finished: pd.DataFrame, confounds: pd.DataFrame) -> Iterator[str]:
    """One sentence for each thing that makes arms differ in more than what is compared, or less than their names say.

    ``runs``, of which ``finished`` are compared, have the column ``arm``; ``confounds`` has the values of each key that
    differs and is not what is compared.
    """
    trained = finished[~finished["arm"].str.startswith(UNTRAINED)]
    for key, values in confounds.items():
        yield f"arms differ in more than what is compared: {key} is {_listed(trained, values)}"
    if finished["code"].nunique(dropna=False) > 1:
        yield f"runs were made by different code: its digest is {_listed(finished, finished['code'])}"
    for unit, ratio in MAX_SPENT_RATIO.items():
        spent = trained.reindex(columns=["arm", key := f"spent.{unit}"]).groupby("arm", sort=False)[key].mean()
        if spent.max() > ratio * spent.min():
            ends = f"{spent.min():,.0f} ({spent.idxmin()}) to {spent.max():,.0f} ({spent.idxmax()})"
            yield f"arms have spent unequal budgets: mean {unit.replace('_', ' ')} from {ends}"
    for sentence, of_arms in _arms_of([*_seeds(trained, runs), *_inert(trained)]).items():
        yield f"{of_arms}: {sentence}"
    for arm in sorted({*runs["arm"]} - {*finished["arm"]}):
        yield f"{arm} has no finished run"
    yield from _truncation(results, finished)
    yield from _settings(finished)
    for (name, evaluation), rows in _after(results.answers, finished):
        problems = rows.groupby("run")["problem"].agg(frozenset)
        if problems.nunique() > 1:
            counts = _listed(finished, problems.map(len))
            yield f"{name} ({evaluation}): runs answered different problems: their number is {counts}"
        if absent := finished["arm"][~finished["arm"].isin(finished["arm"][problems.index])].unique().tolist():
            yield f"{name} ({evaluation}): no answers of {', '.join(absent)}"


def _seeds(trained: pd.DataFrame, runs: pd.DataFrame) -> Iterator[tuple[str, str]]:
    """Arms with the seeds that only other arms have, and with repeated seeds."""
    arms = trained["arm"].unique()
    states = runs[runs["arm"].isin(arms)].groupby(["arm", "seed"])["state"].agg(list)
    for arm in arms:
        by_seed = {seed: states.get((arm, seed), ["no run"]) for seed in sorted(states.index.unique("seed"))}
        if lacking := [f"{seed} ({of_runs[-1]})" for seed, of_runs in by_seed.items() if "done" not in of_runs]:
            yield arm, f"lacks seed {', '.join(lacking)}"
        if repeated := [str(seed) for seed, of_runs in by_seed.items() if of_runs.count("done") > 1]:
            yield arm, f"several runs of seed {', '.join(repeated)}, which count as one, by their mean"


def _inert(trained: pd.DataFrame) -> Iterator[tuple[str, str]]:
    """Arms with a trust region without an effect: what a run of the arm says of itself when it starts."""
    for run, arm in trained["arm"].drop_duplicates().items():
        for sentence in advice(read(Path(run, "config.yaml"))):
            yield arm, sentence.partition(";")[0]


def _truncation(results: Results, finished: pd.DataFrame) -> Iterator[str]:
    """Arms with many completions that ended at the token limit, in training or among the answers to a set after it."""
    places = [("training", results.steps, "completion/truncated_rate")]
    for (name, evaluation), rows in _after(results.answers, finished):
        places.append((f"answers to {name} ({evaluation})", rows, "truncated"))
    for place, rows, column in places:
        if column in rows:
            rate = rows.groupby("run")[column].mean().reindex(finished.index)
            rates = rate.groupby(finished["arm"], sort=False).mean()
            if high := [f"{arm} {100 * share:.0f} %" for arm, share in rates.items() if share > MAX_TRUNCATED_RATE]:
                yield f"more than {100 * MAX_TRUNCATED_RATE:.0f} % truncated completions in {place}: {', '.join(high)}"


def _settings(finished: pd.DataFrame) -> Iterator[str]:
    """Answers that were made with other lengths, samples or prompts under the same name."""
    by_place: dict[str, dict[str, dict[str, Any]]] = {}
    for run in finished.index:
        for path in Path(run).glob("evaluation/*/*/settings.json"):
            by_place.setdefault(f"{path.parts[-3]}/{path.parts[-2]}", {})[run] = read_json(path)
    for place, settings in sorted(by_place.items()):
        table = pd.DataFrame.from_dict(settings, orient="index").drop(columns="ungradable", errors="ignore").astype(str)
        for key in differing(table):
            yield f"answers {place} were made with another {key}: {_listed(finished, table[key])}"


def _after(answers: pd.DataFrame, finished: pd.DataFrame) -> Any:
    """The finished runs' answers after training, by set and evaluation."""
    answers = answers.reindex(columns=["when", "run", "set", "evaluation", "problem", "truncated"])
    return answers[(answers["when"] == "after") & answers["run"].isin(finished.index)].groupby(["set", "evaluation"])


def _listed(runs: pd.DataFrame, values: pd.Series) -> str:
    """``0.1 (pspo), 0.2 (clip, cispo)``: the values of the arms' runs, with the arms that have these values."""
    texts = values[runs.index.intersection(values.index)].map(lambda value: str(value)[:20])
    of_arms = texts.groupby(runs["arm"], sort=False).agg(lambda own: " and ".join(dict.fromkeys(own)))
    return ", ".join(f"{text} ({arms})" for text, arms in _arms_of(of_arms.items()).items())


def _arms_of(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The arms of each text, from pairs of an arm and a text."""
    return dict(pd.DataFrame(pairs, columns=["arm", "text"]).groupby("text", sort=False)["arm"].agg(", ".join))
