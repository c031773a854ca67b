"""Held-out problems: one answer each, and the interval that their accuracy carries."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pspo.dataset import Prompt
from pspo.model import Policy
from pspo.reward import Reward, Score
from pspo.rollout import Completion, Rollout, sample
from pspo.schema import Schema, key
from pspo.statistics import wilson_interval


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
        yield [completion_row(c, reward(c.text, c.prompt.problem)) for c in completions]


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
