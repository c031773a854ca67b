"""Numbers of a test set from its answers: accuracy with its interval, pass@k, majority vote, lengths, truncation."""

from collections.abc import Iterable, Sequence
from statistics import fmean, variance
from typing import Any

from pspo.base.statistics import pass_at_k, wilson_interval
from pspo.reward.answer import asked, extract, same

KS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Values of k in pass@k, up to the number of answers to each problem."""


def summarize(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of one test set at one temperature; n problems with the same number of answers each.

    ``accuracy`` is the share of correct answers, avg@k of k answers. Its 95 % interval is Wilson's over problems: with
    several answers to a problem, p and n = p (1 − p) / Var(mean over problems), the effective sample size (Korn and
    Graubard 1998, Survey Methodology 24:193). pass@k and maj@k are for several answers only.
    """
    problems: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        problems.setdefault(row["problem"], []).append(row)
    answers = [row for group in problems.values() for row in group]
    samples = min(map(len, problems.values()))

    def share(name: str) -> float:
        return fmean(float(row[name]) for row in answers)

    accuracy = share("correct")
    means = [fmean(row["correct"] for row in group) for group in problems.values()]
    n = effective_sample_size(means)
    low, high = wilson_interval(accuracy * n, n)
    numbers = {"accuracy": accuracy, "ci95_low": low, "ci95_high": high, "n": len(problems)}
    numbers |= {"reward_mean": share("reward"), "length_mean": share("tokens"), "truncated_rate": share("truncated")}
    numbers |= {"unparsed_rate": 1 - share("parsed"), "samples": samples}
    if all(row.get("strict") is not None for row in answers):
        numbers |= {"strict_accuracy": share("strict")}
    numbers |= {"timed_out": sum(row.get("timed_out", False) for row in answers)}
    if samples > 1:
        for k in (k for k in KS if k <= samples):
            passed = (pass_at_k(len(group), sum(row["correct"] for row in group), k) for group in problems.values())
            numbers[f"pass@{k}"] = fmean(passed)
        numbers[f"maj@{samples}"] = fmean(map(majority, problems.values()))
    return numbers


def effective_sample_size(means: Sequence[float]) -> float:
    """The n of p (1 − p) / n = Var(p), for the mean p of independent problems' means; at least their number."""
    p, n = fmean(means), len(means)
    if n < 2 or not 0 < p < 1 or (spread := variance(means)) == 0:
        return n
    return max(float(n), p * (1 - p) / (spread / n))


def majority(group: Sequence[dict[str, Any]]) -> float:
    """Whether the answer that most completions of one problem give is correct; answers that tie share the vote.

    Two completions give one answer where the answers are equal, as in grading. A completion without an answer has no
    vote.
    """
    classes: list[tuple[str, list[bool]]] = []
    for row in group:
        answer = asked(row["completion"]) or extract(row["completion"])
        if answer is not None:
            votes = next((votes for known, votes in classes if same(answer, known)), None)
            if votes is None:
                classes.append((answer, votes := []))
            votes.append(row["correct"])
    most = max((len(votes) for _, votes in classes), default=0)
    tied = [any(votes) for _, votes in classes if len(votes) == most]
    return fmean(tied) if tied else 0.0
