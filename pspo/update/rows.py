"""From completions to the rows that an update learns from, and the log-probabilities of rows without gradient."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pspo.advantage import Advantage
from pspo.advantage.critic import Critic
from pspo.model import Policy
from pspo.model.batch import Batch, make_batch, scatter
from pspo.model.logprob import predicting_states, token_logprobs
from pspo.rollout import Completion
from pspo.update.learner import Learner
from pspo.update.pack import Bundles, pack


@dataclass(frozen=True)
class Row:
    """One completion as the update sees it; every list but the prompt has one number for each of its tokens."""

    prompt_ids: list[int]
    token_ids: list[int]
    old_logprobs: list[float]  # log π_old, in nats
    advantages: list[float]  # A
    reference_logprobs: list[float] | None = None  # log π_ref, in nats, where there is a KL penalty
    values: list[float] | None = None  # V at the start of the step, where there is a value model
    returns: list[float] | None = None  # the targets of V


def make_rows(
    completions: Sequence[Completion],
    reward_PG: Tensor,
    advantage: Advantage,
    learner: Learner,
    *,
    reference: Policy | None = None,
    recompute: bool = False,
) -> tuple[list[Row], dict[str, float]]:
    """The rows that train, and metrics of the value model and of the gap between sampler and trainer.

    ``reward_PG`` (P, G) are the completions' rewards. Truncated completions, where the loss masks them, count in the
    mean of their group and do not train. ``recompute`` takes log π_old from the trainer in place of the sampler.
    """
    if not completions:
        return [], {}
    rows = [Row(c.prompt.token_ids, c.token_ids, c.logprobs, []) for c in completions]
    critic, metrics, values = learner.critic, dict[str, float](), None
    if critic is not None or recompute:
        logprobs, values = score(learner.policy, rows, learner.temperature, learner.max_tokens, critic)
    if recompute:
        gap_N = _flat(logprobs) - _flat(c.logprobs for c in completions)
        metrics["policy/sampler_gap_mean"] = float(np.abs(gap_N).mean())
        rows = [replace(row, old_logprobs=new) for row, new in zip(rows, logprobs, strict=True)]
    advantages, returns = advantage.estimate(reward_PG, [len(c.token_ids) for c in completions], values)
    rows = [replace(row, advantages=a) for row, a in zip(rows, advantages, strict=True)]
    if critic is not None and values is not None:
        rows = [replace(row, values=v, returns=r) for row, v, r in zip(rows, values, returns, strict=True)]
        value_N, return_N = _flat(values), _flat(returns)  # explained: 1 for perfect values, 0 for a constant
        metrics["critic/explained_variance"] = float(1 - np.var(return_N - value_N) / max(np.var(return_N), 1e-12))
    if learner.loss.mask_truncated:
        rows = [row for row, completion in zip(rows, completions, strict=True) if completion.finished]
    if reference is not None:
        logprobs, _ = score(reference, rows, learner.temperature, learner.max_tokens, None)
        rows = [replace(row, reference_logprobs=fixed) for row, fixed in zip(rows, logprobs, strict=True)]
    return rows, metrics


@torch.no_grad()
def score(
    policy: Policy, rows: Sequence[Row], temperature: float, max_tokens: int, critic: Critic | None
) -> tuple[list[list[float]], list[list[float]]]:
    """Log-probabilities, in nats, of every row's tokens, and their values where there is a critic; no gradient."""
    logprobs: list[list[float]] = [[] for _ in rows]
    values: list[list[float]] = [[] for _ in rows]
    for places, batch in micro_batches(rows, policy, max_tokens):
        hidden_NH = predicting_states(policy.model.get_decoder(), batch, policy.autocast)
        columns = [(logprobs, token_logprobs(policy.model, batch, hidden_NH, temperature, policy.autocast)[0])]
        if critic is not None:
            columns.append((values, critic(batch, hidden_NH, policy.autocast)))
        for numbers, number_BT in columns:
            for i, padded in zip(places, number_BT.tolist(), strict=True):
                numbers[i] = padded[: len(rows[i].token_ids)]
    return logprobs, values


def micro_batches(rows: Sequence[Row], policy: Policy, max_tokens: int) -> Iterator[tuple[list[int], Batch]]:
    """The micro-batches of ``pack``, each with the indices of its rows, in the order of its completions."""
    for bundles in pack([(row.prompt_ids, len(row.token_ids)) for row in rows], max_tokens, policy):
        yield [i for bundle in bundles for i in bundle], batch_of(rows, policy, bundles)


def batch_of(rows: Sequence[Row], policy: Policy, bundles: Bundles) -> Batch:
    """The tokens of one micro-batch of rows."""
    texts = [(rows[bundle[0]].prompt_ids, [rows[i].token_ids for i in bundle]) for bundle in bundles]
    return make_batch(texts, policy.pad_id, policy.device)


def column(rows: Sequence[Row], name: str, like_BT: Tensor) -> Tensor:
    """One of the rows' lists, padded with zeros to the shape, dtype and device of ``like_BT``."""
    value_N = like_BT.new_tensor([value for row in rows for value in getattr(row, name)])
    length_B1 = torch.tensor([[len(row.token_ids)] for row in rows], device=like_BT.device)
    return scatter(torch.arange(like_BT.shape[1], device=like_BT.device) < length_B1, value_N)


def _flat(rows: Iterable[list[float]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.concatenate([np.asarray(row) for row in rows])
