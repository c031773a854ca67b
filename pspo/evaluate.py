"""Held-out problems: one answer each, and the interval that their accuracy carries."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pspo.base.console import log, track
from pspo.base.schema import Schema, key
from pspo.base.statistics import wilson_interval
from pspo.base.stream import Stream
from pspo.checkpoint import random_state_kept
from pspo.dataset import Prompt
from pspo.model import Policy
from pspo.reward import Reward, Score
from pspo.rollout import Completion, Rollout, sample


@dataclass(frozen=True, kw_only=True)
class Evaluation(Schema, block="evaluation"):
    """When and how held-out problems are answered."""

    every: int = key("steps from one validation to the next, on held-out training problems", within="[1, inf)")


def answer(
    policy: Policy,
    prompts: Sequence[Prompt],
    reward: Reward,
    rollout: Rollout,
    *,
    seed: Sequence[int],
    greedy: bool,
) -> Iterator[list[dict[str, Any]]]:
    """One completion for each prompt with its score, as rows for a file, ``max_rows`` prompts at a time.

    They are sampled as in training unless ``greedy``.
    """
    for start in range(0, len(prompts), rollout.max_rows):
        completions = sample(
            policy,
            prompts[start : start + rollout.max_rows],
            seed=seed,
            group_size=1,
            max_new_tokens=rollout.max_new_tokens,
            temperature=0.0 if greedy else rollout.temperature,
            top_p=1.0 if greedy else rollout.top_p,
            max_rows=rollout.max_rows,
        )
        yield [completion_row(c, score) for c, score in zip(completions, reward(completions), strict=True)]


def validate(
    policy: Policy, prompts: Sequence[Prompt], reward: Reward, rollout: Rollout, *, seed: int, step: int
) -> dict[str, float]:
    """Greedy and sampled answers to held-out training problems as metrics; the global generators stay as they were."""
    begun = time.perf_counter()
    seeds = [seed, Stream.VALIDATION, step]
    with random_state_kept():
        greedy, sampled = (
            summarize([row for chunk in track(chunks, "validation", len(prompts)) for row in chunk])
            for chunks in (
                answer(policy, prompts, reward, rollout, seed=seeds, greedy=greedy) for greedy in (True, False)
            )
        )
    log.info(
        "step %d: validation accuracy %.1f %% greedy, %.1f %% sampled, %.1f tokens",
        step,
        100 * greedy["accuracy"],
        100 * sampled["accuracy"],
        sampled["length_mean"],
    )
    return {
        "validation/greedy_accuracy": greedy["accuracy"],
        "validation/greedy_length_mean": greedy["length_mean"],
        "validation/sampled_accuracy": sampled["accuracy"],
        "validation/sampled_reward_mean": sampled["reward_mean"],
        "validation/sampled_length_mean": sampled["length_mean"],
        "time/validation_s": time.perf_counter() - begun,
    }


def completion_row(completion: Completion, score: Score) -> dict[str, Any]:
    """A completion and its score as one line of a file."""
    problem = completion.prompt.problem
    return {
        "problem": problem.id,
        "question": problem.question,
        "answer": problem.answer,
        "completion": completion.text,
        "sample": completion.sample,
        "reward": score.reward,
        "correct": score.correct,
        "parsed": score.parsed,
        "components": score.components,
        "tokens": len(completion.token_ids),
        "truncated": not completion.finished,
    }


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Accuracy with its Wilson 95 % interval over problems, mean length in tokens, truncated and unparsable shares."""
    n = len(rows)
    correct = sum(row["correct"] for row in rows)
    low, high = wilson_interval(correct, n)
    return {
        "accuracy": correct / n,
        "ci95_low": low,
        "ci95_high": high,
        "n": n,
        "reward_mean": sum(row["reward"] for row in rows) / n,
        "length_mean": sum(row["tokens"] for row in rows) / n,
        "truncated_rate": sum(row["truncated"] for row in rows) / n,
        "unparsed_rate": sum(not row["parsed"] for row in rows) / n,
    }
