"""Which answers are judged, the questions about them, and the verdicts in the replies."""

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import pandas as pd

from pspo.base.files import read_json
from pspo.base.schema import ConfigError
from pspo.compare.arms import Group, selections
from pspo.evaluate.answers import SETTINGS
from pspo.judge.questions import Pair, ReplyError, Score, body, digest, read

Row = dict[str, Any]
NUM_REPEATED_QUESTIONS = 50
"""Questions for a score that are asked a second time, for the judge's agreement with itself."""
POINTS = ({"1": 1.0, "2": 0.0, "tie": 0.5}, {"1": 0.0, "2": 1.0, "tie": 0.5})
"""What a winner is worth to a pair's arm: in the order where its answer comes first, and where its answer is second."""


@dataclass(frozen=True)
class Question:
    """A verdict to be had: ``row`` says on what; ``requests`` are bodies by digest, for a pair one in each order."""

    row: Row
    requests: Mapping[str, Row]


def fitting(group: Group, wanted: Mapping[str, Any]) -> pd.DataFrame:
    """The arms' answers, of several samples the first, that have the values ``wanted`` in their columns.

    Raises ConfigError where there is none.
    """
    answers = group.results.answers
    if not answers.empty:
        fits = answers["run"].isin(group.arm_of.keys()) & (answers["sample"] == 0)
        for column, value in wanted.items():
            fits &= answers[column] == value
        answers = answers[fits]
    if answers.empty:
        asked = ", ".join(f"{name}={value}" for name, value in wanted.items())
        known = "; ".join(map(str, selections(group))) or "none; run python -m pspo.evaluate"
        raise ConfigError(f"there are no answers with {asked}; there are answers of: {known}")
    return answers


def choose(group: Group, answers: pd.DataFrame, arms: Sequence[str], limit: int) -> list[dict[str, Row]]:
    """At most ``limit`` items: one problem with its answer by arm, as rows of ``answers`` with the ``task`` they met.

    An item's answers are of one seed, except where an arm has a single run. Problems come in an order by digest, and
    each time round every problem comes with its next seed: a higher limit adds items and changes none. Raises
    ConfigError where there is no item.
    """
    seed_of = group.results.runs.set_index("run")["seed"]
    task = functools.cache(
        lambda *place: read_json(Path(place[0], "evaluation", *place[1:], SETTINGS))["system_prompt"]
    )
    run_of = {arm: {seed_of[run]: run for run in reversed(group.arms[arm])} for arm in arms}
    several = [set(by_seed) for by_seed in run_of.values() if len(by_seed) > 1]
    seeds = sorted(set.intersection(*several)) if several else [None]
    rows: dict[tuple[str, str], dict[str, Row]] = {}
    for row in answers.to_dict("records"):
        row["task"] = task(row["run"], row["when"], row["evaluation"])
        rows.setdefault((row["set"], row["problem"]), {})[row["run"]] = row
    problems = sorted(rows, key=lambda name: hashlib.sha256(repr(name).encode()).digest())

    def items() -> Iterator[dict[str, Row]]:
        for turn in range(len(seeds)):
            for place, name in enumerate(problems):
                seed = seeds[(place + turn) % len(seeds)]
                run = {arm: by_seed.get(seed, next(iter(by_seed.values()))) for arm, by_seed in run_of.items()}
                if set(run.values()) <= rows[name].keys():
                    yield {arm: rows[name][run[arm]] for arm in arms}

    if chosen := list(islice(items(), limit)):
        return chosen
    raise ConfigError(
        f"no problem has answers of one seed in each of the arms {', '.join(arms)}; judge others by --pairs"
    )


def questions_about(
    items: Sequence[Mapping[str, Row]], pairs: Sequence[tuple[str, str]], metrics: Sequence[str], base_url: str,
    model: str, changes: Mapping[str, Any],
) -> list[Question]:  # fmt: skip
    """Every question: the score of each answer, some scores again, the pairs in both orders, one metric at a time.

    Two equal answers are a tie without a request.
    """

    def requests(metric: str, *orders: Sequence[Row], repeat: int = 0) -> dict[str, Row]:
        bodies = [body(model, metric, _quoted(answers), changes) for answers in orders]
        return {digest(base_url, request, repeat): request for request in bodies}

    scores, repeats, comparisons = [], {}, []
    for item, metric in product(items, metrics):
        for arm, answer in item.items():
            row = {"metric": metric, "arm": arm, **{name: answer[name] for name in ("set", "problem", "run")}}
            scores.append(Question({"kind": "score", **row}, requests(metric, [answer])))
            again = requests(metric, [answer], repeat=1)  # equal answers make equal requests
            repeats[min(again)] = Question({"kind": "repeat", **row}, again)
        for arm, against in pairs:
            one, other = item[arm], item[against]
            row = {"kind": "pair", "metric": metric, "arm": arm, "against": against}
            row |= {name: one[name] for name in ("set", "problem", "run", "tokens")}
            row |= {f"against_{name}": other[name] for name in ("run", "tokens")}
            orders = [(one, other), (other, one)] if one["completion"] != other["completion"] else []
            comparisons.append(Question(row, requests(metric, *orders)))
    return scores + [repeats[name] for name in sorted(repeats)[:NUM_REPEATED_QUESTIONS]] + comparisons


def _quoted(answers: Sequence[Row]) -> dict[str, str]:
    """The texts that a request quotes about one answer, or about two answers to one problem."""
    names = ["answer_1", "answer_2"] if len(answers) == 2 else ["answer"]
    tasks = {name: answer["task"] for name, answer in zip(names, answers, strict=True)}
    one_task = len(set(tasks.values())) == 1
    task = answers[0]["task"] if one_task else "\n".join(f"of {name}: {task}" for name, task in tasks.items())
    texts = {name: str(answer["completion"]) for name, answer in zip(names, answers, strict=True)}
    return {"task": task, "problem": answers[0]["question"], "reference": answers[0]["answer"], **texts}


def verdicts(questions: Sequence[Question], replies: Mapping[str, Row]) -> list[Row]:
    """The verdict on each question whose replies are there, or None with an ``error`` where a reply holds none.

    A pair's verdict is 1 where its arm wins in both orders, 0 where it loses in both, else 0.5: a tie.
    """
    rows = []
    for asked in questions:
        if asked.requests.keys() <= replies.keys():
            row = asked.row | {"requests": list(asked.requests), "verdict": None, "error": None}
            try:
                if row["kind"] == "pair":
                    winners = [read(replies[name], Pair) for name in asked.requests]
                    row["orders"] = [points[str(winner)] for points, winner in zip(POINTS, winners, strict=False)]
                    row["verdict"] = row["orders"][0] if len(set(row["orders"])) == 1 else 0.5
                else:
                    (row["verdict"],) = (read(replies[name], Score) for name in asked.requests)
            except ReplyError as error:
                row["error"] = str(error)
            rows.append(row)
    return rows
