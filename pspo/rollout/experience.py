"""From problems to what the update learns from: completions, their rewards, and one row for each.

Shape suffixes: P prompts, G completions of each, B rows of a micro-batch, T token positions.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pspo import fused
from pspo.advantage import GAE, Advantage, has_spread
from pspo.advantage.critic import Critic
from pspo.base.stream import Stream
from pspo.dataset import Prompt, order
from pspo.model import Policy
from pspo.model.batch import Batch, make_batch, pad_to
from pspo.model.logprob import token_logprobs
from pspo.reward import Reward, Score
from pspo.rollout import Completion, Rollout, sample

PART = {"cpu": 128, "cuda": 4096}
"""What one more part costs beside its positions, in positions: a tiny policy's on a CPU, a guess on a GPU."""

READERS = 16
"""Completions behind one copy of a prompt, end to end: each has the prompt's keys laid out once more."""


@dataclass(frozen=True)
class Row:
    """One completion as the update sees it; every list but the prompt has one number for each of its tokens.

    Attributes:
        prompt_ids: the tokens before it.
        token_ids: its tokens.
        old_logprobs: log π_old of each.
        advantages: A of each.
        reference_logprobs: log π_ref of each, where there is a KL penalty.
        values: V of each at the start of the step, where there is a value model.
        returns: what V is fitted to.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    old_logprobs: list[float]
    advantages: list[float]
    reference_logprobs: list[float] | None = None
    values: list[float] | None = None
    returns: list[float] | None = None


class Cut(NamedTuple):
    """Rows, by index, that make one micro-batch; the rest as in ``make_batch``."""

    rows: list[int]
    sizes: list[int] | None
    end_to_end: bool


@dataclass(frozen=True)
class Collected:
    """What one step sampled.

    Attributes:
        completions: of all prompts drawn, group by group.
        scores: of each.
        reward_PG: what the advantage sees: the reward and the over-long penalty.
        used_P: which groups train.
    """

    completions: list[Completion]
    scores: list[Score]
    reward_PG: Tensor
    used_P: Tensor

    def training(self) -> tuple[list[Completion], Tensor]:
        """The completions and rewards (P, G) of the groups that train."""
        size = self.reward_PG.shape[1]
        groups = self.used_P.nonzero().flatten().tolist()
        return [self.completions[p * size + g] for p in groups for g in range(size)], self.reward_PG[self.used_P]

    def metrics(self) -> dict[str, float]:
        """What was sampled and what it was worth; a component that a score lacks counts as 0."""
        completions, scores = self.completions, self.scores
        names = sorted({name for score in scores for name in score.components})
        return {
            "reward/mean": self.reward_PG.mean().item(),
            "reward/std": self.reward_PG.std().item(),
            **{f"reward/{name}_mean": _mean(s.components.get(name, 0.0) for s in scores) for name in names},
            "reward/correct_mean": _mean(s.correct for s in scores),
            "reward/unparsed_rate": _mean(not s.parsed for s in scores),
            "reward/zero_spread_rate": 1 - has_spread(self.reward_PG).double().mean().item(),
            "completion/length_mean": _mean(len(c.token_ids) for c in completions),
            "completion/truncated_rate": _mean(not c.finished for c in completions),
        }


def collect(
    policy: Policy, train: Sequence[Prompt], reward: Reward, rollout: Rollout, *, seed: int, step: int, start: int
) -> Collected:
    """Sample one step's completions, from problem number ``start`` of the data order on.

    Under dynamic sampling (DAPO, arXiv 2503.14476, section 3.2) groups whose rewards are all equal do not train, and as
    many prompts are drawn again, ``max_redraws`` times at the most.
    """
    completions: list[Completion] = []
    scores: list[Score] = []
    missing = rollout.prompts
    for _ in range(rollout.max_redraws + 1):
        drawn = len(completions) // rollout.group_size
        chosen = [train[i] for i in order(len(train), seed, start + drawn, missing)]
        completions += sample(
            policy,
            chosen,
            seed=[seed, Stream.TRAIN, step],
            group_size=rollout.group_size,
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            max_rows=rollout.max_rows,
        )
        new = completions[len(scores) :]
        for completion, score in zip(new, reward(new), strict=True):
            if rollout.overlong_share:
                penalty = rollout.overlong_penalty(len(completion.token_ids))
                components = score.components | {"overlong": penalty}
                scores.append(replace(score, reward=score.reward + penalty, components=components))
            else:
                scores.append(score)
        reward_PG = torch.tensor([s.reward for s in scores], dtype=torch.float64).view(-1, rollout.group_size)
        used_P = has_spread(reward_PG) if rollout.max_redraws else torch.ones(len(reward_PG), dtype=torch.bool)
        missing = rollout.prompts - int(used_P.sum())
        if missing == 0:
            break
    return Collected(completions, scores, reward_PG, used_P)


def make_rows(
    completions: Sequence[Completion],
    reward_PG: Tensor,
    advantage: Advantage,
    policy: Policy,
    *,
    reference: Policy | None,
    critic: Critic | None,
    temperature: float,
    max_tokens: int,
    mask_truncated: bool,
    recompute: bool = False,
) -> tuple[list[Row], dict[str, float]]:
    """The rows that train, and metrics of the value model and of the gap between sampler and trainer.

    Truncated completions, where they are masked, count in the mean of their group and do not train. ``recompute`` takes
    log π_old from a pass of the trainer in place of the sampler.
    """
    if not completions:
        return [], {}
    blank = [Row(c.prompt.token_ids, c.token_ids, c.logprobs, [0.0] * len(c.token_ids)) for c in completions]
    metrics: dict[str, float] = {}
    if critic is not None or recompute:
        logprobs, values = score(policy, blank, temperature, max_tokens, critic)
    if recompute:
        metrics["policy/sampler_gap_mean"] = float(
            np.abs(_flat(logprobs) - _flat(c.logprobs for c in completions)).mean()
        )
        blank = [replace(row, old_logprobs=found) for row, found in zip(blank, logprobs, strict=True)]
    if critic is not None and isinstance(advantage, GAE):
        advantages, returns = advantage.estimate(reward_PG.flatten().tolist(), values)
        rows = [
            replace(row, advantages=a, values=v, returns=r)
            for row, a, v, r in zip(blank, advantages, values, returns, strict=True)
        ]
        metrics["critic/explained_variance"] = _explained_variance(values, returns)
    else:
        advantage_N = advantage(reward_PG).flatten().tolist()
        rows = [replace(row, advantages=[a] * len(row.token_ids)) for row, a in zip(blank, advantage_N, strict=True)]
    if mask_truncated:
        rows = [row for row, completion in zip(rows, completions, strict=True) if completion.finished]
    if reference is not None:
        logprobs, _ = score(reference, rows, temperature, max_tokens, None)
        rows = [replace(row, reference_logprobs=values) for row, values in zip(rows, logprobs, strict=True)]
    return rows, metrics


@torch.no_grad()
def score(
    policy: Policy, rows: Sequence[Row], temperature: float, max_tokens: int, critic: Critic | None
) -> tuple[list[list[float]], list[list[float]]]:
    """Log-probabilities of every row's tokens, and their values where there is a critic, without gradient."""
    logprobs: list[list[float]] = [[] for _ in rows]
    values: list[list[float]] = [[] for _ in rows]
    for cut in pack(rows, max_tokens, policy):
        batch = batch_of(rows, policy, cut)
        scored = token_logprobs(policy.model, batch, temperature, policy.autocast)
        pairs = [(logprobs, scored.logprob_BT)]
        if critic is not None:
            pairs.append((values, critic(batch, scored.hidden_NH, policy.autocast)))
        for found, values_BT in pairs:
            for i, row in zip(cut.rows, values_BT.tolist(), strict=True):
                found[i] = row[: len(rows[i].token_ids)]
    return logprobs, values


def batch_of(rows: Sequence[Row], policy: Policy, cut: Cut) -> Batch:
    """The tokens of the rows of a cut."""
    prompts, completions = [rows[i].prompt_ids for i in cut.rows], [rows[i].token_ids for i in cut.rows]
    return make_batch(prompts, completions, policy.pad_id, policy.device, cut.sizes, cut.end_to_end)


def column(rows: Sequence[Row], name: str, like_BT: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """One of the rows' lists, padded with zeros to (B, T)."""
    return pad_to([getattr(row, name) for row in rows], like_BT, dtype or like_BT.dtype)


def pack(rows: Sequence[Row], max_tokens: int, policy: Policy) -> list[Cut]:
    """Cut rows into micro-batches of at most ``max_tokens`` padded positions, or of one row of the decoder.

    Of all ways to cut the rows of the decoder, sorted by length, it takes the one with the fewest padded positions, a
    part counting for some. Where tokens are run end to end, a part takes as many as there is room for.
    """
    end_to_end = fused.trains(policy.model.get_decoder(), policy.autocast, policy.gradient_checkpointing)
    made = _bundles(rows, policy, max_tokens if end_to_end else None)
    bundles = sorted(made, key=lambda bundle: _length([rows[i] for i in bundle]))
    lengths = [_length([rows[i] for i in bundle]) for bundle in bundles]
    cut = _filled(lengths, max_tokens) if end_to_end else _least_padded(lengths, max_tokens, policy.device.type)
    parts = [bundles[part] for part in cut]
    sizes = [[len(bundle) for bundle in part] if policy.shares_prompts else None for part in parts]
    return [Cut([i for b in part for i in b], size, end_to_end) for part, size in zip(parts, sizes, strict=True)]


def _filled(lengths: Sequence[int], max_tokens: int) -> list[slice]:
    starts, room = [], 0
    for n, length in enumerate(lengths):
        if length > room:
            starts.append(n)
            room = max_tokens
        room -= length
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(lengths)], strict=False)]


def _least_padded(lengths: Sequence[int], max_tokens: int, device: str) -> list[slice]:
    cost, start = [0.0], [0]  # of the first so many, and where their last part starts
    for end in range(1, len(lengths) + 1):
        starts = [s for s in range(end) if (end - s) * lengths[end - 1] <= max_tokens or s == end - 1]
        start.append(min(starts, key=lambda s: cost[s] + (end - s) * lengths[end - 1]))
        cost.append(cost[start[-1]] + (end - start[-1]) * lengths[end - 1] + PART[device])
    parts: list[slice] = []
    end = len(lengths)
    while end:
        parts.insert(0, slice(start[end], end))
        end = start[end]
    return parts


def _bundles(rows: Sequence[Row], policy: Policy, room: int | None) -> list[list[int]]:
    """Rows, by index, that stand behind one copy of their prompt: as many as there is room for, where it is given.

    Else k completions of C tokens behind a prompt of P are S = P + kC positions. With a hidden size d, a position costs
    a layer about 6 d + S units: its products, and its attention to all S. Per completion that is least,
    (P + kC)(6 d + P + kC) / k, where kC = √(P (6 d + P)).
    """
    if not policy.shares_prompts:
        return [[i] for i in range(len(rows))]
    width = 6 * policy.model.config.get_text_config().hidden_size
    bundles: list[list[int]] = []
    last: dict[tuple[int, ...], tuple[list[int], int]] = {}  # of each prompt, its last bundle and that one's tokens
    for i, row in enumerate(rows):
        prompt, own = tuple(row.prompt_ids), len(row.token_ids) - 1
        most = (len(prompt) * (width + len(prompt))) ** 0.5 if room is None else room - len(prompt)
        bundle, tokens = last.get(prompt, ([], 0))
        if not bundle or tokens + own > most or (room is not None and len(bundle) == READERS):
            bundle, tokens = [], 0
            bundles.append(bundle)
        bundle.append(i)
        last[prompt] = bundle, tokens + own
    return bundles


def _length(rows: Sequence[Row]) -> int:
    return len(rows[0].prompt_ids) + sum(len(row.token_ids) - 1 for row in rows)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _flat(rows: Iterable[list[float]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.concatenate([np.asarray(row) for row in rows])


def _explained_variance(values: list[list[float]], returns: list[list[float]]) -> float:
    """1 − Var(R − V) / Var(R): 1 for perfect values, 0 for a constant, below 0 for worse."""
    value, target = _flat(values), _flat(returns)
    return float(1 - np.var(target - value) / max(float(np.var(target)), 1e-12))
