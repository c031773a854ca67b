"""What verdicts say of the arms, with intervals clustered by problem, and what they say of the judge."""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import special, stats

LENGTH_PENALTY = 1.0
"""Ridge on φ, the effect of length in log-odds: a normal prior of variance 1, as no length explains every verdict."""
NEWTON_STEPS = 30
NAMES = ["metric", "set", "problem", "run", "against_run"]
"""What a verdict is about: the fields that a person's verdict shares with the judge's."""

Estimate = tuple[float, list[float] | None]


def estimate(
    values: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    share: bool = False,
    lengths: Sequence[float] | None = None,
) -> Estimate:
    """The mean, or the ``share`` of comparisons won (ties count half), and its 95 % interval clustered by problem.

    A mean is θ in y_i = θ + e_i, a share is σ(θ) in P(win_i) = σ(θ), so that its interval stays between 0 and 1. With
    ``lengths``, the differences Δ in tokens, P(win_i) = σ(θ + φ tanh(Δ_i / sd(Δ))), and σ(θ) is the win rate at equal
    lengths of AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475, section 3) for two models, without its difficulty of
    an instruction, which takes many models to estimate; φ has a ridge.

    θ has the sandwich variance over G clusters, times G / (G − 1) (Liang and Zeger 1986, Biometrika 73:13), and
    Student's t with G − 1 degrees of freedom. The interval is None for one cluster, or where all values are equal. It is
    about these runs' answers to other problems, not about other seeds.
    """
    y, x = np.asarray(values, float), np.ones((len(values), 1))
    if np.ptp(y) == 0:
        return float(y[0]), None
    if lengths is not None and np.std(lengths) > 0:
        x = np.column_stack([x, np.tanh(np.asarray(lengths) / np.std(lengths))])
    b, ridge = np.zeros(x.shape[1]), np.diag([0.0, LENGTH_PENALTY][: x.shape[1]])
    for _ in range(NEWTON_STEPS):
        fitted = special.expit(x @ b) if share else x @ b
        slope = fitted * (1 - fitted) if share else np.ones(len(y))
        bread = np.linalg.inv(x.T @ (slope[:, None] * x) + ridge)
        b += bread @ (x.T @ (y - fitted) - ridge @ b)
    cluster, names = pd.factorize(pd.Series(list(clusters), dtype=object))
    sums, free, half = np.zeros((len(names), len(b))), len(names) - 1, 0.0
    np.add.at(sums, cluster, x * (y - fitted)[:, None])
    if free:
        half = stats.t.ppf(0.975, free) * np.sqrt((bread @ sums.T @ sums @ bread)[0, 0] * len(names) / free)
    value, low, high = (float(special.expit(at) if share else at) for at in (b[0], b[0] - half, b[0] + half))
    return value, [low, high] if free else None


def kappa(first: Sequence[float], second: Sequence[float], *, quadratic: bool = False) -> float | None:
    """Cohen's κ = 1 − Σ w_ij o_ij / Σ w_ij e_ij of two raters; None where both always give one and the same value.

    w_ij = [i ≠ j], or (i − j)² where ``quadratic``; o are the observed shares of the values i and j, e the products of
    each rater's own shares (Cohen 1960, Educ. Psychol. Meas. 20:37; 1968, Psychol. Bull. 70:213).
    """
    difference = np.subtract.outer(np.asarray(first, float), np.asarray(second, float))
    weight = difference**2 if quadratic else (difference != 0).astype(float)
    expected = weight.mean()
    return float(1 - np.diag(weight).mean() / expected) if expected else None


def summarize(rows: Sequence[dict[str, Any]], labels: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """The numbers of summary.json: by arm and metric, by pair and metric, and of the judge itself.

    Ties of equal answers count in the win rates and in ``equal_answers``, not in the judge's own rates.
    """
    table = pd.DataFrame(rows, columns=["kind", *NAMES, "arm", "against", "tokens", "against_tokens", "requests", "verdict", "orders", "error"])  # fmt: skip
    asked = table[table["requests"].map(len) > 0]
    valid = table[table["error"].isna()]
    score, pair, repeat = (valid[valid["kind"] == kind] for kind in ("score", "pair", "repeat"))
    people = pd.DataFrame(labels, columns=[*NAMES, "verdict"])
    twice = score.merge(repeat, on=NAMES, suffixes=("", "_2"))
    human = {
        name: part.merge(people, on=NAMES, suffixes=("", "_2")) for name, part in (("score", score), ("pair", pair))
    }
    return {
        "scores": [_score(part) for _, part in score.groupby(["arm", "metric"], sort=False)],
        "pairs": [_pair(part) for _, part in pair.groupby(["arm", "against", "metric"], sort=False)],
        "failures": dict(Counter(asked["error"].dropna().str.partition(":")[0])) if len(asked) else {},
        "failure_rate": _share(asked["error"].notna()),
        "self_agreement": {"n": len(twice), "equal_rate": _share(twice["verdict"] == twice["verdict_2"])},
        "human": {
            name: {"n": len(both), "kappa": kappa(both["verdict"], both["verdict_2"], quadratic=name == "score")}
            for name, both in human.items()
            if len(both)
        },
    }


def _score(part: pd.DataFrame) -> dict[str, Any]:
    mean, interval = estimate(part["verdict"], _problems(part))
    return {
        "arm": part["arm"].iloc[0],
        "metric": part["metric"].iloc[0],
        "n": len(part),
        "mean": mean,
        "ci95": interval,
    }


def _pair(part: pd.DataFrame) -> dict[str, Any]:
    asked = part[part["requests"].map(len) > 0]
    rate, interval = estimate(part["verdict"], _problems(part), share=True)
    lengths = part["tokens"] - part["against_tokens"]
    equal, equal_interval = estimate(part["verdict"], _problems(part), share=True, lengths=lengths)
    return {
        **{name: part[name].iloc[0] for name in ("arm", "against", "metric")},
        **{"n": len(part), "equal_answers": len(part) - len(asked), "win_rate": rate, "ci95": interval},
        **{"length_controlled": equal, "length_controlled_ci95": equal_interval},
        "tie_rate": _share(asked["verdict"] == 0.5),
        "position_consistency": _share(asked["orders"].map(lambda points: points[0] == points[1])),
    }


def _problems(part: pd.DataFrame) -> list[tuple[str, str]]:
    return list(zip(part["set"], part["problem"], strict=True))


def _share(flags: "pd.Series[bool]") -> float | None:
    return float(flags.mean()) if len(flags) else None
