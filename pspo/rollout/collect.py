"""One step's completions, G for each of P prompts, with their rewards, and the metrics that they give."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor

from pspo.advantage import has_spread
from pspo.base.stream import Stream
from pspo.dataset import Prompt, order
from pspo.host import ranks
from pspo.reward import Reward
from pspo.rollout.sample import Completion, RolloutConfig, Sampler


def collect(
    sampler: Sampler,
    train: Sequence[Prompt],
    reward: Reward,
    config: RolloutConfig,
    seed: int,
    step: int,
    start: int,
    replacement: bool = False,
) -> list[Completion]:
    """Sample and score one step's completions, group by group, from place ``start`` of the data ``order`` on.

    The place is part of a prompt's random key, so that a problem drawn twice gets other completions. Under dynamic
    sampling (DAPO, arXiv 2503.14476, section 3.2) groups whose rewards are all equal are replaced by other prompts.
    """
    completions: list[Completion] = []
    missing = config.prompts
    for _ in range(config.max_redraws + 1):
        place = start + len(completions) // config.group_size
        drawn = enumerate(order(len(train), seed, place, missing, replacement), start=place)
        prompts = [replace(train[index], place=place) for place, index in drawn]
        for completion in answered(sampler, prompts, reward, config.group_size, [seed, Stream.TRAIN, step]):
            score = completion.score
            penalty = config.overlong_penalty(len(completion.token_ids))
            components = score.components | ({"overlong": penalty} if config.overlong_share else {})
            graded = replace(score, reward=score.reward + penalty, components=components)
            completions.append(replace(completion, score=graded))
        missing = config.prompts - len(training(config, completions)) // config.group_size
        if missing == 0:
            break
    return completions


def answered(
    sampler: Sampler, prompts: Sequence[Prompt], reward: Reward, samples: int, seed: Sequence[int], greedy: bool = False
) -> list[Completion]:
    """Scored completions, ``samples`` of each prompt, prompt by prompt; each rank samples and scores its share."""

    def work(own: Sequence[Prompt]) -> list[Completion]:
        completions = sampler.sample(own, samples, seed, greedy=greedy) if own else []
        scores = reward(completions) if completions else []
        return [replace(completion, score=score) for completion, score in zip(completions, scores, strict=True)]

    return ranks.spread(prompts, work)


def training(config: RolloutConfig, completions: Sequence[Completion]) -> list[Completion]:
    """The completions of the groups that train: all, or under dynamic sampling the groups whose rewards differ."""
    if not config.max_redraws:
        return list(completions)
    differ_P = has_spread(rewards(config, completions)).tolist()
    return [completion for n, completion in enumerate(completions) if differ_P[n // config.group_size]]


def rewards(config: RolloutConfig, completions: Sequence[Completion]) -> Tensor:
    """The rewards (P, G) in float64, over-long penalties included."""
    return torch.tensor([c.score.reward for c in completions], dtype=torch.float64).view(-1, config.group_size)


def rollout_metrics(config: RolloutConfig, completions: Sequence[Completion]) -> dict[str, float]:
    """Rewards, lengths and truncation of a step; a component that a score lacks counts as 0."""
    scores, reward_PG = [c.score for c in completions], rewards(config, completions)
    names = sorted({name for score in scores for name in score.components})
    return {
        "reward/mean": reward_PG.mean().item(),
        "reward/std": reward_PG.std().item(),
        **{f"reward/{name}_mean": fmean(s.components.get(name, 0.0) for s in scores) for name in names},
        "reward/correct_mean": fmean(s.correct for s in scores),
        "reward/unparsed_rate": fmean(not s.parsed for s in scores),
        "reward/timed_out_rate": fmean(s.timed_out for s in scores),
        "reward/zero_spread_rate": 1 - has_spread(reward_PG).double().mean().item(),
        "completion/length_mean": fmean(len(c.token_ids) for c in completions),
        "completion/truncated_rate": fmean(not c.finished for c in completions),
    }
