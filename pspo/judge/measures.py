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

    A pair's verdict is 1 where its arm wins in both orders, 0 where it loses in both, else 0.5: a tie. Ties of equal
    answers count in the win rates, not in the judge's own rates. ``labels`` are people's verdicts.
    """
    rows = pd.DataFrame(verdicts, columns=["kind", "arm", *ABOUT, "lengths", "request", "verdict", "error"])
    kinds = {
        kind: rows[(rows["kind"] == kind) & rows["error"].isna()] for kind in ("score", "again", "first", "second")
    }
    others = {kind: part[[*ABOUT, "verdict"]] for kind, part in kinds.items()}
    again = kinds["score"].merge(others["again"], on=ABOUT)
    pairs = kinds["first"].merge(others["second"], on=ABOUT).rename(columns={"verdict_x": "verdict"})
    consistent, requested = pairs["verdict"] == pairs["verdict_y"], pairs["request"].notna()
    pairs["verdict"] = pairs["verdict"].where(consistent, 0.5)
    errors = [row["error"] for row in verdicts if row["error"]]
    human = {}
    for kind, judged in {"score": kinds["score"], "pair": pairs}.items():
        both = judged.merge(labels.rename(columns={"verdict": "label"}), on=ABOUT)
        human[kind] = {"n": len(both), "kappa": kappa(both["verdict"], both["label"])}
    return {
        "scores": _table(kinds["score"], 1, 5),
        "pairs": _table(pairs, 0, 1),
        "failures": dict(Counter(error.partition(":")[0] for error in errors)),
        "failure_rate": len(errors) / max(1, rows["request"].notna().sum()),
        "tie_rate": _rate(pairs["verdict"][requested] == 0.5),
        "position_consistency": _rate(consistent[requested]),
        "self_agreement": {"n": len(again), "equal_rate": _rate(again["verdict_x"] == again["verdict_y"])},
        "human": human,
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


def _rate(flags: pd.Series) -> float | None:
    return float(flags.mean()) if len(flags) else None
