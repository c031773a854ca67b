"""What verdicts say of the arms, with intervals clustered by problem, and what they say of the judge."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

ABOUT = ["metric", "set", "problem", "run", "against_run"]
"""What a verdict is about: the fields that a person's verdict shares with the judge's."""


def estimate(values: Sequence[float], problems: Sequence[Any], lengths: Sequence[float] = ()) -> list[float]:
    """The mean over problems, each the mean of its values, and the ends of Student's 95 % interval over problems.

    With ``lengths``, the differences Δ in tokens, of which tanh(Δ / sd(Δ)) counts as in AlpacaEval 2 (Dubois et al.
    2024, arXiv 2404.04475), the mean at Δ = 0, by least squares. One problem, or equal values, have no interval. It
    tells of these runs on other problems, not of other seeds.
    """
    x = np.tanh(np.asarray(lengths) / np.std(lengths)) if np.any(lengths) and np.std(lengths) else 0.0
    table = pd.DataFrame({"x": x, "y": np.asarray(values, float)}).groupby(np.asarray(problems)).mean()
    mean, se, df = table["y"].mean(), table["y"].sem(), len(table) - 1
    if len(table) > 2 and np.ptp(table["x"]):
        line = stats.linregress(table["x"], table["y"])
        mean, se, df = line.intercept, line.intercept_stderr, len(table) - 2
    half = stats.t.ppf(0.975, df) * se
    return [float(mean), float(mean - half), float(mean + half)] if se > 0 else [float(mean)]


def kappa(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Cohen's κ with quadratic weights of two raters; None where both always give one and the same value.

    κ = 1 − Σ (i − j)² o_ij / Σ (i − j)² e_ij; o are the observed shares of the values i and j, e the products of each
    rater's own shares (Cohen 1968, Psychol. Bull. 70:213).
    """
    squares = np.subtract.outer(np.asarray(first, float), np.asarray(second, float)) ** 2
    return float(1 - np.diag(squares).mean() / squares.mean()) if squares.any() else None


def summarize(verdicts: Sequence[dict[str, Any]], labels: pd.DataFrame) -> dict[str, Any]:
    """The numbers of summary.json: scores and pairs by arm and metric, and what the judge itself is worth.

    ``labels`` are people's verdicts. Ties of equal answers count in the win rates, not in the judge's own rates.
    """
    rows = pd.DataFrame(verdicts, columns=["kind", "arm", *ABOUT, "verdict", "error", "orders", "lengths"])
    kinds = {kind: rows[rows["error"].isna() & (rows["kind"] == kind)] for kind in ("score", "repeat", "pair")}
    orders = [each for each in kinds["pair"]["orders"] if each]
    again = kinds["score"].merge(kinds["repeat"], on=ABOUT)
    human = {kind: kinds[kind].merge(labels, on=ABOUT) for kind in ("score", "pair")}
    return {
        "scores": _table(kinds["score"], 1, 5),
        "pairs": _table(kinds["pair"], 0, 1),
        "failures": dict(Counter(row["error"].partition(":")[0] for row in verdicts if row["error"])),
        "failure_rate": _rate([row["error"] is not None for row in verdicts if row["requests"]]),
        "tie_rate": _rate([first != second or first == 0.5 for first, second in orders]),
        "position_consistency": _rate([first == second for first, second in orders]),
        "self_agreement": {"n": len(again), "equal_rate": _rate([*(again["verdict_x"] == again["verdict_y"])])},
        "human": {
            kind: {"n": len(both), "kappa": kappa(both["verdict_x"], both["verdict_y"])}
            for kind, both in human.items()
            if len(both)
        },
    }


def _table(rows: pd.DataFrame, least: int, greatest: int) -> list[dict[str, Any]]:
    """Mean verdicts from ``least`` to ``greatest`` by arm and metric; of pairs, also the win rate at equal length."""
    table = []
    for (arm, metric), part in rows.groupby(["arm", "metric"], sort=False):
        problems = part["set"] + "/" + part["problem"]
        mean, *ends = np.clip(estimate(part["verdict"], problems), least, greatest).tolist()
        table.append({"arm": arm, "metric": metric, "n": len(part), "mean": mean, "ci95": ends or None})
        if part["lengths"].notna().all():
            lengths = [own - other for own, other in part["lengths"]]
            mean, *ends = np.clip(estimate(part["verdict"], problems, lengths), least, greatest).tolist()
            table[-1] |= {"at_equal_length": mean, "at_equal_length_ci95": ends or None}
    return table


def _rate(flags: Sequence[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None
