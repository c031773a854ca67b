"""Validation and tests: one completion for each held-out problem, and their accuracy with its interval."""

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
    sampler: Sampler, prompts: Sequence[Prompt], reward: Reward, rollout: RolloutConfig, *,
    seed: Sequence[int], greedy: bool,
) -> Iterator[list[dict[str, Any]]]:  # fmt: skip
    """One scored completion per prompt as rows for a file, ``max_rows`` at a time, sampled as in training or greedy."""
    for start in range(0, len(prompts), rollout.max_rows):
        completions = sampler.sample(prompts[start : start + rollout.max_rows], 1, seed, greedy=greedy)
        scores = reward(completions)
        yield [completion_row(replace(c, score=score)) for c, score in zip(completions, scores, strict=True)]


def answer_into(
    path: Path, sampler: Sampler, prompts: Sequence[Prompt], reward: Reward, rollout: RolloutConfig, *,
    seed: int, title: str, check_owner: Callable[[], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """Greedy answers to a test set in a file, one line per problem in their order; returns the lines.

    After every ``max_rows`` answers the file is flushed, and a later process resumes there. Its batches and the state
    of the global generators, from which a user's reward may draw, are those of an unbroken process, and so are the
    file's bytes.
    """
    lines, size = JsonLines(path), rollout.max_rows
    pairs = zip(lines.rows(), prompts, strict=False)
    valid = sum(1 for _ in takewhile(lambda pair: asked_of(pair[1].problem).items() <= pair[0].items(), pairs))
    first = valid if valid == len(prompts) else valid - valid % size  # the other lines answer other data
    lines.cut(first)
    parts = [prompts[start : start + size] for start in range(first, len(prompts), size)]
    with random_state_kept():
        for part in track(parts, title, len(prompts) - first):
            seed_global_generators(int(generator(seed, Stream.TEST, lines.num_rows()).integers(2**32)))
            (rows,) = answer(sampler, part, reward, rollout, seed=[seed, Stream.TEST], greedy=True)
            check_owner()
            for row in rows:
                lines.append(row)
            lines.sync()
            interrupt.check()
    return lines.rows()


def validate(
    sampler: Sampler, prompts: Sequence[Prompt], reward: Reward, rollout: RolloutConfig, *, seed: int, step: int
) -> dict[str, float]:
    """Greedy and sampled answers to held-out training problems as metrics; the global generators stay as they were."""
    begun, seeds, metrics = time.perf_counter(), [seed, Stream.VALIDATION, step], dict[str, float]()
    with random_state_kept():
        for how, names in (("greedy", ["accuracy"]), ("sampled", ["accuracy", "reward_mean"])):
            parts = answer(sampler, prompts, reward, rollout, seed=seeds, greedy=how == "greedy")
            summary = summarize(list(chain(*track(parts, "validation", len(prompts), "problems"))))
            metrics |= {f"validation/{how}_{name}": summary[name] for name in (*names, "length_mean")}
    text = "step %d: validation accuracy %.1f %% greedy, %.1f %% sampled, %.1f tokens"
    greedy_accuracy, sampled_accuracy = (100 * metrics[f"validation/{how}_accuracy"] for how in ("greedy", "sampled"))
    log.info(text, step, greedy_accuracy, sampled_accuracy, metrics["validation/sampled_length_mean"])
    return metrics | {"time/validation_s": time.perf_counter() - begun}


def completion_row(completion: Completion) -> dict[str, Any]:
    """A scored completion as one line of a file."""
    about = {"completion": completion.text, "sample": completion.sample}
    length = {"tokens": len(completion.token_ids), "truncated": not completion.finished}
    assert completion.score is not None
    return asked_of(completion.problem) | about | vars(completion.score) | length


def asked_of(problem: Problem) -> dict[str, str]:
    """The part of ``completion_row`` that describes the problem."""
    return {"problem": problem.id, "question": problem.question, "answer": problem.answer}


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Accuracy with its Wilson 95 % interval over problems, mean length in tokens, truncated and unparsable shares."""
    correct, reward, tokens, truncated, parsed = (
        sum(row[name] for row in rows) for name in ("correct", "reward", "tokens", "truncated", "parsed")
    )
    n = len(rows)
    low, high = wilson_interval(correct, n)
    means = {"reward_mean": reward / n, "length_mean": tokens / n, "truncated_rate": truncated / n}
    accuracy = {"accuracy": correct / n, "ci95_low": low, "ci95_high": high, "n": n}
    return accuracy | means | {"unparsed_rate": (n - parsed) / n}
