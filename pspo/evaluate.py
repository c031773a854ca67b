"""Held-out problems: one answer each, and the interval that their accuracy carries."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

from pspo.base.console import log, track
from pspo.base.files import JsonLines
from pspo.base.schema import Schema, key
from pspo.base.statistics import wilson_interval
from pspo.base.stream import Stream, generator
from pspo.checkpoint import random_state_kept, seed_global_generators
from pspo.dataset import Problem, Prompt
from pspo.host import interrupt
from pspo.reward import Reward
from pspo.rollout import Completion, RolloutConfig, Sampler


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Schema, block="evaluate"):
    """When and how held-out problems are answered."""

    every: int = key("steps from one validation to the next, on held-out training problems", within="[1, inf)")


def answer(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    reward: Reward,
    rollout: RolloutConfig,
    *,
    seed: Sequence[int],
    greedy: bool,
) -> Iterator[list[dict[str, Any]]]:
    """One completion for each prompt with its score, as rows for a file, ``max_rows`` prompts at a time.

    They are sampled as in training unless ``greedy``.
    """
    for start in range(0, len(prompts), rollout.max_rows):
        completions = sampler.sample(prompts[start : start + rollout.max_rows], 1, seed, greedy=greedy)
        scores = reward(completions)
        yield [completion_row(replace(c, score=score)) for c, score in zip(completions, scores, strict=True)]


def answer_into(
    path: Path,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    reward: Reward,
    rollout: RolloutConfig,
    *,
    seed: int,
    title: str,
    check_owner: Callable[[], None],
) -> list[dict[str, Any]]:
    """Greedy answers to a test set in a file, one line for each problem in their order; returns the lines.

    ``max_rows`` answers at a time are flushed to the disk, where a later process finds them and goes on. Its batches
    and its state of the global generators, from which a user's reward may draw, are those of an unbroken process, so
    that the file has the same bytes.
    """
    lines, size = JsonLines(path), rollout.max_rows
    answered = zip(lines.rows(), prompts, strict=False)
    same = takewhile(lambda pair: asked_of(pair[1].problem).items() <= pair[0].items(), answered)  # else of other data
    kept = len(list(same))
    first = kept if kept == len(prompts) else kept - kept % size
    lines.cut(first)
    with random_state_kept():
        parts = [prompts[start : start + size] for start in range(first, len(prompts), size)]
        for part in track(parts, title, len(prompts) - first):
            seed_global_generators(int(generator(seed, Stream.TEST, lines.num_rows()).integers(2**32)))
            batches = list(answer(sampler, part, reward, rollout, seed=[seed, Stream.TEST], greedy=True))
            check_owner()
            for row in chain(*batches):
                lines.append(row)
            lines.sync()
            interrupt.check()
    return lines.rows()


def validate(
    sampler: Sampler, prompts: Sequence[Prompt], reward: Reward, rollout: RolloutConfig, *, seed: int, step: int
) -> dict[str, float]:
    """Greedy and sampled answers to held-out training problems as metrics; the global generators stay as they were."""
    begun = time.perf_counter()
    seeds = [seed, Stream.VALIDATION, step]
    with random_state_kept():
        greedy, sampled = (
            summarize([row for chunk in track(chunks, "validation", len(prompts), "problems") for row in chunk])
            for chunks in (
                answer(sampler, prompts, reward, rollout, seed=seeds, greedy=greedy) for greedy in (True, False)
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


def completion_row(completion: Completion) -> dict[str, Any]:
    """A scored completion as one line of a file."""
    score = completion.score
    assert score is not None
    return {
        **asked_of(completion.problem),
        "completion": completion.text,
        "sample": completion.sample,
        "reward": score.reward,
        "correct": score.correct,
        "parsed": score.parsed,
        "components": score.components,
        "tokens": len(completion.token_ids),
        "truncated": not completion.finished,
    }


def asked_of(problem: Problem) -> dict[str, str]:
    """The part of ``completion_row`` that names the problem."""
    return {"problem": problem.id, "question": problem.question, "answer": problem.answer}


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
