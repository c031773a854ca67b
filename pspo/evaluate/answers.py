"""Answers to held-out problems as rows of a file, and their numbers: accuracy, pass@k, majority vote, lengths."""

import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import Any

from pspo.base.console import log, track
from pspo.base.schema import Schema, key
from pspo.base.statistics import pass_at_k, wilson_interval
from pspo.checkpoint import random_state_kept
from pspo.dataset import Problem, Prompt
from pspo.reward import Reward
from pspo.reward.answer import asked, extract, same
from pspo.rollout import Completion, Sampler, answered

SETTINGS = "settings.json"  # in a folder of answers: how the answers were sampled and graded
KS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Values of k in pass@k, up to the number of answers to each problem."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Schema, block="evaluate"):
    """Answers to held-out problems, in a training run and by ``python -m pspo.evaluate`` alike."""

    name: str = key("folder of the answers, evaluation/<when>/<name>; other settings need another name")
    every: int = key("steps from one validation to the next, on held-out training problems", within="[1, inf)")
    sets: list[str] | None = key(
        "test sets: data sets by name, validation (held-out training problems), or paths of files as dataset=jsonl has "
        "them; null takes the test sets of dataset"
    )
    path: str | None = key(
        "folder that holds a folder for each data set of evaluate.sets; null asks the hub", path=True
    )
    temperatures: list[float] = key(
        "sampling temperatures, each at least 0; 0 is greedy; before training the first alone is answered"
    )
    samples: int = key("answers to each problem at temperatures above 0; one at 0", within="[1, inf)")
    top_p: float = key("sample from the smallest set of tokens that holds this much probability", within="(0, 1]")
    max_new_tokens: int | None = key("tokens after which an answer is truncated; null: as rollouts", within="[1, inf)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"\w[\w.+-]*", self.name):
            raise self.refuse("name", "names a directory; use letters, digits, _ . + -")
        if not _distinct(self.temperatures) or not all(0 <= t < 100 for t in self.temperatures):
            raise self.refuse("temperatures", "give one number or more, different ones, each from 0 to 100")
        if self.sets is not None and not _distinct(self.sets):
            raise self.refuse("sets", "give one set or more, different ones, or null for the test sets of dataset")


def _distinct(items: Sequence[object]) -> bool:
    return 0 < len(set(items)) == len(items)


def answer(
    sampler: Sampler, prompts: Sequence[Prompt], reward: Reward, *, samples: int, seed: Sequence[int], greedy: bool
) -> list[dict[str, Any]]:
    """``samples`` scored completions of each prompt as rows for a file, decoded and graded in one batch."""
    return [completion_row(c) for c in answered(sampler, prompts, reward, samples, seed, greedy)]


def completion_row(completion: Completion) -> dict[str, Any]:
    """A scored completion as one line of a file."""
    about = described(completion.problem) | {"completion": completion.text, "sample": completion.sample}
    return about | vars(completion.score) | {"tokens": len(completion.token_ids), "truncated": not completion.finished}


def described(problem: Problem) -> dict[str, str]:
    """The part of ``completion_row`` that describes the problem."""
    return {"problem": problem.id, "question": problem.question, "answer": problem.answer}


def validate(
    sampler: Sampler, prompts: Sequence[Prompt], reward: Reward, seed: Sequence[int], max_rows: int
) -> dict[str, float]:
    """Greedy and sampled answers to held-out training problems as metrics; the global generators stay as they were.

    At most ``max_rows`` prompts, of like length, are answered at a time, so that the phase counts them.
    """
    begun, metrics = time.perf_counter(), dict[str, float]()
    by_length = sorted(prompts, key=lambda prompt: len(prompt.token_ids))
    parts = [by_length[start : start + max_rows] for start in range(0, len(prompts), max_rows)]
    with random_state_kept():
        for how, names in (("greedy", ["accuracy"]), ("sampled", ["accuracy", "reward_mean"])):
            chunks = track(parts, f"validation, {how}", len(prompts), "problems")
            rows = [answer(sampler, part, reward, samples=1, seed=seed, greedy=how == "greedy") for part in chunks]
            numbers = summarize(chain.from_iterable(rows))
            metrics |= {f"validation/{how}_{name}": numbers[name] for name in (*names, "length_mean")}
    accuracies = [100 * metrics[f"validation/{how}_accuracy"] for how in ("greedy", "sampled")]
    text = "step %d: validation accuracy %.1f %% greedy, %.1f %% sampled, %.1f tokens"
    log.info(text, seed[-1], *accuracies, metrics["validation/sampled_length_mean"])
    return metrics | {"time/validation_s": time.perf_counter() - begun}


def summarize(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of one test set at one temperature; n problems with the same number of answers each.

    ``accuracy`` is the share of correct answers, avg@k of k answers. Its 95 % interval is Wilson's over the n problems,
    too wide rather than too narrow where several answers were given. pass@k and maj@k are for several answers only.
    """
    problems: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        problems.setdefault(row["problem"], []).append(row)
    groups = list(problems.values())
    answers, samples = list(chain(*groups)), min(map(len, groups))

    def share(name: str) -> float:
        return fmean(float(row[name]) for row in answers)

    accuracy = share("correct")
    low, high = wilson_interval(accuracy * len(groups), len(groups))
    numbers = {"accuracy": accuracy, "ci95_low": low, "ci95_high": high, "n": len(groups)}
    numbers |= {"reward_mean": share("reward"), "length_mean": share("tokens"), "truncated_rate": share("truncated")}
    numbers |= {"unparsed_rate": 1 - share("parsed"), "samples": samples}
    if all(row.get("strict") is not None for row in answers):
        numbers |= {"strict_accuracy": share("strict")}
    numbers |= {"timed_out": sum(row.get("timed_out", False) for row in answers)}
    if samples > 1:
        for k in (k for k in KS if k <= samples):
            passed = (pass_at_k(len(group), sum(row["correct"] for row in group), k) for group in groups)
            numbers[f"pass@{k}"] = fmean(passed)
        numbers[f"maj@{samples}"] = fmean(map(majority, groups))
    return numbers


def majority(group: Sequence[dict[str, Any]]) -> float:
    """Whether the answer that most completions of a problem give is correct; answers that tie share the vote."""
    classes: list[tuple[str, list[bool]]] = []
    for row in group:
        final = asked(row["completion"]) or extract(row["completion"])
        if final is not None:
            votes = next((votes for known, votes in classes if same(final, known)), None)
            if votes is None:
                classes.append((final, votes := []))
            votes.append(row["correct"])
    most = max((len(votes) for _, votes in classes), default=0)
    tied = [any(votes) for _, votes in classes if len(votes) == most]
    return fmean(tied) if tied else 0.0
