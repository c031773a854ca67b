"""Which answers are judged, the questions about them, and the verdicts in the replies."""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from pspo.base.files import read_json
from pspo.base.schema import ConfigError
from pspo.compare.arms import Group
from pspo.evaluate.answers import SETTINGS
from pspo.judge.questions import Pair, ReplyError, Score, body, digest, read

Row = dict[str, Any]
Question = tuple[Row, Mapping[str, Row]]
"""What a verdict is about, and the bodies of its requests by digest: for a pair one in each order."""
NUM_REPEATED_QUESTIONS = 50
"""Questions for a score that are asked a second time, for the judge's agreement with itself."""
POINTS = ({"1": 1.0, "2": 0.0, "tie": 0.5}, {"1": 0.0, "2": 1.0, "tie": 0.5})
"""What a winner is worth to a pair's arm: in the order where its answer comes first, and where its answer is second."""


def items(group: Group, answers: pd.DataFrame, arms: Sequence[str], limit: int) -> list[dict[str, Row]]:
    """At most ``limit`` items: one problem with its answer by arm, as rows of ``answers`` with the ``task`` they met.

    An item's answers are of one seed, except where an arm has a single run. Problems and seeds come in an order by
    digest: a higher limit adds items and changes none. Raises ConfigError where there is no item.
    """
    seed_of = group.results.runs.set_index("run")["seed"]
    run_of = {arm: {seed_of[run]: run for run in reversed(group.arms[arm])} for arm in arms}
    several = [set(by_seed) for by_seed in run_of.values() if len(by_seed) > 1]
    seeds = sorted(set.intersection(*several)) if several else [None]
    places = answers[["run", "when", "evaluation"]].drop_duplicates().itertuples(index=False)
    tasks = {run: read_json(Path(run, "evaluation", *folders, SETTINGS))["system_prompt"] for run, *folders in places}
    rows: dict[tuple[str, str], dict[str, Row]] = {}
    for row in answers.assign(task=answers["run"].map(tasks)).to_dict("records"):
        rows.setdefault((row["set"], row["problem"]), {})[row["run"]] = row
    chosen = []
    for name, seed in sorted(product(rows, seeds), key=lambda about: sha256("{} {}".format(*about).encode()).digest()):
        run = {arm: by_seed.get(seed, next(iter(by_seed.values()))) for arm, by_seed in run_of.items()}
        if set(run.values()) <= rows[name].keys():
            chosen.append({arm: rows[name][run[arm]] for arm in arms})
    if not chosen:
        raise ConfigError(f"no problem has answers of one seed in each of the arms {', '.join(arms)}; judge other runs")
    return chosen[:limit]


def questions_about(
    chosen: Sequence[Mapping[str, Row]], against: str, metrics: Sequence[str], base_url: str, model: str,
    changes: Mapping[str, Any],
) -> list[Question]:  # fmt: skip
    """Every question: the score of each answer, some scores again, each other arm with ``against`` in both orders.

    One metric at a time. Two equal answers are a tie without a request.
    """

    def requests(metric: str, *orders: Sequence[Row], repeat: int = 0) -> dict[str, Row]:
        bodies = [body(model, metric, _quoted(answers), changes) for answers in orders]
        return {digest(base_url, request, repeat): request for request in bodies}

    scores, repeats, pairs = list[Question](), dict[str, Question](), list[Question]()
    for item, metric in product(chosen, metrics):
        for arm, answer in item.items():
            row = {"metric": metric, "arm": arm, **{name: answer[name] for name in ("set", "problem", "run", "tokens")}}
            scores.append(({"kind": "score", **row}, requests(metric, [answer])))
            again = requests(metric, [answer], repeat=1)  # equal answers make equal requests
            repeats[min(again)] = {"kind": "repeat", **row}, again
            if arm != against:
                row |= {"against": against} | {f"against_{name}": item[against][name] for name in ("run", "tokens")}
                both = [answer, item[against]]
                orders = [both, both[::-1]] if answer["completion"] != item[against]["completion"] else []
                pairs.append(({"kind": "pair", **row}, requests(metric, *orders)))
    return scores + [repeats[name] for name in sorted(repeats)[:NUM_REPEATED_QUESTIONS]] + pairs


def _quoted(answers: Sequence[Row]) -> dict[str, str]:
    """The texts that a request quotes about one answer, or about two answers to one problem."""
    named = dict(zip(["answer_1", "answer_2"] if len(answers) == 2 else ["answer"], answers, strict=True))
    task = answers[0]["task"]
    if any(answer["task"] != task for answer in answers):
        task = "\n".join(f"of {name}: {answer['task']}" for name, answer in named.items())
    texts = {name: str(answer["completion"]) for name, answer in named.items()}
    return {"task": task, "problem": answers[0]["question"], "reference": answers[0]["answer"], **texts}


def verdicts(questions: Sequence[Question], replies: Mapping[str, Row]) -> list[Row]:
    """The verdict on each question whose replies are there, or None with an ``error`` where a reply holds none.

    A pair's verdict is 1 where its arm wins in both orders, 0 where it loses in both, else 0.5: a tie.
    """
    rows = []
    for about, requests in questions:
        if requests.keys() <= replies.keys():
            row = about | {"requests": list(requests), "verdict": None, "error": None}
            try:
                said = [read(replies[name], Pair if row["kind"] == "pair" else Score) for name in requests]
                if row["kind"] == "pair":
                    row["orders"] = [points[str(winner)] for points, winner in zip(POINTS, said, strict=False)]
                    row["verdict"] = row["orders"][0] if len(set(row["orders"])) == 1 else 0.5
                else:
                    (row["verdict"],) = said
            except ReplyError as error:
                row["error"] = str(error)
            rows.append(row)
    return rows
