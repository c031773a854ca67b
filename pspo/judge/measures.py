"""What verdicts say of the arms, with intervals clustered by problem, and what they say of the judge."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special, stats

LENGTH_PENALTY = 1.0
"""Ridge on φ, the effect of length in log-odds: a normal prior of variance 1, as no length explains every verdict."""
NEWTON_STEPS = 30
Row = dict[str, Any]
About = tuple[str | None, ...]


def estimate(
    values: Sequence[float], clusters: Sequence[Hashable], *, share: bool = False,
    lengths: Sequence[float] | None = None,
) -> tuple[float, list[float] | None]:  # fmt: skip
    """The mean, or the ``share`` of comparisons won (ties count half), and its 95 % interval clustered by problem.

    A mean is θ in y_i = θ + e_i, a share is σ(θ) in P(win_i) = σ(θ), so that its interval stays between 0 and 1. With
    ``lengths``, the differences Δ in tokens, P(win_i) = σ(θ + φ tanh(Δ_i / sd(Δ))), and σ(θ) is the win rate at equal
    lengths of AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475, section 3) for two models, without its difficulty of
    an instruction, which takes many models to estimate; φ has a ridge.

    θ has the sandwich variance over G clusters, times G / (G − 1) (Liang and Zeger 1986, Biometrika 73:13), and
    Student's t with G − 1 degrees of freedom. The interval is None for one cluster, or where all values are equal. It
    tells of these runs on other problems, not of other seeds.
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
    number = {cluster: n for n, cluster in enumerate(dict.fromkeys(clusters))}
    sums, free, half = np.zeros((len(number), len(b))), len(number) - 1, 0.0
    np.add.at(sums, [number[cluster] for cluster in clusters], x * (y - fitted)[:, None])
    if free:
        half = stats.t.ppf(0.975, free) * np.sqrt((bread @ sums.T @ sums @ bread)[0, 0] * len(number) / free)
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


def summarize(rows: Sequence[Row], people: Mapping[About, float]) -> Row:
    """The numbers of summary.json: by arm and metric, by pair and metric, and of the judge itself.

    ``people`` gives a person's verdict by what it is about. Ties of equal answers count in the win rates and in
    ``equal_answers``, not in the judge's own rates.
    """
    asked = [row for row in rows if row["requests"]]
    failures = Counter(row["error"].partition(":")[0] for row in asked if row["error"])
    parts: dict[tuple[str, ...], list[Row]] = {}  # the verdicts of a kind, by arm or pair and metric
    judged: dict[str, dict[About, float]] = {"score": {}, "repeat": {}, "pair": {}}
    for row in rows:
        if row["error"] is None:
            parts.setdefault((row["kind"], row["arm"], row.get("against", ""), row["metric"]), []).append(row)
            judged[row["kind"]][about(row)] = row["verdict"]
    again = [judged["score"].get(name) == verdict for name, verdict in judged["repeat"].items()]
    human = {}
    for kind in ("score", "pair"):
        if both := [(judged[kind][name], verdict) for name, verdict in people.items() if name in judged[kind]]:
            human[kind] = {"n": len(both), "kappa": kappa(*zip(*both, strict=True), quadratic=kind == "score")}
    return {
        "scores": [_numbers(kind, part) for (kind, *_), part in parts.items() if kind == "score"],
        "pairs": [_numbers(kind, part) for (kind, *_), part in parts.items() if kind == "pair"],
        "failures": dict(failures),
        "failure_rate": failures.total() / len(asked) if asked else None,
        "self_agreement": {"n": len(again), "equal_rate": _rate(again)},
        "human": human,
    }


def about(row: Row) -> About:
    """What a verdict is about: the fields that a person's verdict shares with the judge's. Raises KeyError."""
    return (row["metric"], row["set"], row["problem"], row["run"], row.get("against_run"))


def _numbers(kind: str, part: Sequence[Row]) -> Row:
    """What the verdicts of a kind on one arm or one pair, by one metric, say."""
    outcomes, problems = [row["verdict"] for row in part], [(row["set"], row["problem"]) for row in part]
    mean, interval = estimate(outcomes, problems, share=kind == "pair")
    numbers = {"n": len(part), "win_rate" if kind == "pair" else "mean": mean, "ci95": interval}
    if kind == "pair":
        lengths = [row["tokens"] - row["against_tokens"] for row in part]
        equal, interval = estimate(outcomes, problems, share=True, lengths=lengths)
        orders = [row["orders"] for row in part if row["orders"]]
        numbers |= {"length_controlled": equal, "length_controlled_ci95": interval}
        numbers |= {"tie_rate": _rate([first != second or first == 0.5 for first, second in orders])}
        numbers |= {"position_consistency": _rate([first == second for first, second in orders])}
        numbers |= {"equal_answers": len(part) - len(orders)}
    return {name: part[0][name] for name in ("arm", "against", "metric") if name in part[0]} | numbers


def _rate(flags: Sequence[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None
