"""One step's completions with their rewards, and what they say of the step.

Shape suffixes: P prompts, G completions of each.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pspo.advantage import has_spread
from pspo.base.stream import Stream
from pspo.dataset import Prompt, order
from pspo.reward import Reward, Score
from pspo.rollout.sample import Completion, RolloutConfig, Sampler


def collect(
    sampler: Sampler, train: Sequence[Prompt], reward: Reward, config: RolloutConfig, *, seed: int, step: int,
    start: int,
) -> list[Completion]:  # fmt: skip
    """Sample and score one step's completions, group by group, from place ``start`` of the data order on.

    The place is part of a prompt's random key, so that a problem drawn twice in a step gets other completions. Under
    dynamic sampling (DAPO, arXiv 2503.14476, section 3.2) groups whose rewards are all equal do not train, and as many
    prompts are drawn again, ``max_redraws`` times at the most.
    """
    completions: list[Completion] = []
    missing = config.prompts
    for _ in range(config.max_redraws + 1):
        place = start + len(completions) // config.group_size
        drawn = enumerate(order(len(train), seed, place, missing), start=place)
        prompts = [replace(train[index], place=place) for place, index in drawn]
        sampled = sampler.sample(prompts, config.group_size, [seed, Stream.TRAIN, step])
        scores = reward(sampled)
        completions += [_scored(config, *pair) for pair in zip(sampled, scores, strict=True)]
        missing = config.prompts - int(trains(config, completions).sum())
        if missing == 0:
            break
    return completions


def trains(config: RolloutConfig, completions: Sequence[Completion]) -> Tensor:
    """Which groups (P,) train: all, or under dynamic sampling the groups whose rewards differ."""
    reward_PG = rewards(config, completions)
    return has_spread(reward_PG) if config.max_redraws else torch.ones(len(reward_PG), dtype=torch.bool)


def training(config: RolloutConfig, completions: Sequence[Completion]) -> list[Completion]:
    """The completions of the groups that train."""
    used_P = trains(config, completions).tolist()
    return [completion for n, completion in enumerate(completions) if used_P[n // config.group_size]]


def rewards(config: RolloutConfig, completions: Sequence[Completion]) -> Tensor:
    """The rewards (P, G) in float64, over-long penalties included."""
    return torch.tensor([_score(c).reward for c in completions], dtype=torch.float64).view(-1, config.group_size)


def rollout_metrics(config: RolloutConfig, completions: Sequence[Completion]) -> dict[str, float]:
    """Rewards, lengths and truncation of a step; a component that a score lacks counts as 0."""
    scores, reward_PG = [_score(c) for c in completions], rewards(config, completions)
    names = sorted({name for score in scores for name in score.components})
    return {
        "reward/mean": reward_PG.mean().item(),
        "reward/std": reward_PG.std().item(),
        **{f"reward/{name}_mean": _mean(s.components.get(name, 0.0) for s in scores) for name in names},
        "reward/correct_mean": _mean(s.correct for s in scores),
        "reward/unparsed_rate": _mean(not s.parsed for s in scores),
        "reward/timed_out_rate": _mean(s.timed_out for s in scores),
        "reward/zero_spread_rate": 1 - has_spread(reward_PG).double().mean().item(),
        "completion/length_mean": _mean(len(c.token_ids) for c in completions),
        "completion/truncated_rate": _mean(not c.finished for c in completions),
    }


def _scored(config: RolloutConfig, completion: Completion, score: Score) -> Completion:
    if config.overlong_share:
        penalty = config.overlong_penalty(len(completion.token_ids))
        components = score.components | {"overlong": penalty}
        score = replace(score, reward=score.reward + penalty, components=components)
    return replace(completion, score=score)


def _score(completion: Completion) -> Score:
    assert completion.score is not None
    return completion.score


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
