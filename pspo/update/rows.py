"""From completions to the rows that an update learns from, and the log-probabilities of rows without gradient."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pspo.advantage import Advantage
from pspo.advantage.critic import Critic
from pspo.model import Policy
from pspo.model.batch import Batch, make_batch, pad_to
from pspo.model.logprob import autocast_to_bfloat16, predicting_states, token_logprobs
from pspo.rollout import Completion
from pspo.update.pack import Bundles, pack


@dataclass(frozen=True)
class Row:
    """One completion as the update sees it; every list but the prompt has one number for each of its tokens.

    Attributes:
        prompt_ids: tokens of the prompt.
        token_ids: tokens of the completion.
        old_logprobs: log π_old of each token, in nats.
        advantages: A of each token.
        reference_logprobs: log π_ref of each token, where there is a KL penalty.
        values: V of each token at the start of the step, where there is a value model.
        returns: what V is fitted to.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    old_logprobs: list[float]
    advantages: list[float]
    reference_logprobs: list[float] | None = None
    values: list[float] | None = None
    returns: list[float] | None = None


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

    ``reward_PG`` (P, G) are the completions' rewards. Truncated completions, where they are masked, count in the mean
    of their group and do not train. ``recompute`` takes log π_old from a pass of the trainer in place of the sampler.
    """
    if not completions:
        return [], {}
    rows = [Row(c.prompt.token_ids, c.token_ids, c.logprobs, []) for c in completions]
    metrics: dict[str, float] = {}
    values = None
    if critic is not None or recompute:
        logprobs, values = score(policy, rows, temperature, max_tokens, critic)
    if recompute:
        gap_N = np.abs(_flat(logprobs) - _flat(c.logprobs for c in completions))
        metrics["policy/sampler_gap_mean"] = float(gap_N.mean())
        rows = [replace(row, old_logprobs=found) for row, found in zip(rows, logprobs, strict=True)]
    advantages, returns = advantage.estimate(reward_PG, [len(c.token_ids) for c in completions], values)
    rows = [replace(row, advantages=a) for row, a in zip(rows, advantages, strict=True)]
    if critic is not None and values is not None:
        rows = [replace(row, values=v, returns=r) for row, v, r in zip(rows, values, returns, strict=True)]
        metrics["critic/explained_variance"] = _explained_variance(values, returns)
    if mask_truncated:
        rows = [row for row, completion in zip(rows, completions, strict=True) if completion.finished]
    if reference is not None:
        logprobs, _ = score(reference, rows, temperature, max_tokens, None)
        rows = [replace(row, reference_logprobs=found) for row, found in zip(rows, logprobs, strict=True)]
    return rows, metrics


@torch.no_grad()
def score(
    policy: Policy, rows: Sequence[Row], temperature: float, max_tokens: int, critic: Critic | None
) -> tuple[list[list[float]], list[list[float]]]:
    """Log-probabilities, in nats, of every row's tokens, and their values where there is a critic; no gradient."""
    logprobs: list[list[float]] = [[] for _ in rows]
    values: list[list[float]] = [[] for _ in rows]
    for bundles in pack([(row.prompt_ids, len(row.token_ids)) for row in rows], max_tokens, policy):
        batch, places = batch_of(rows, policy, bundles), [i for bundle in bundles for i in bundle]
        hidden_NH = states(policy, batch)
        columns = [(logprobs, token_logprobs(policy.model, batch, hidden_NH, temperature, policy.autocast)[0])]
        if critic is not None:
            columns.append((values, critic(batch, hidden_NH, policy.autocast)))
        for found, found_BT in columns:
            for i, row in zip(places, found_BT.tolist(), strict=True):
                found[i] = row[: len(rows[i].token_ids)]
    return logprobs, values


def states(policy: Policy, batch: Batch) -> Tensor:
    """The policy's hidden states (N, H) that predict the batch's completion tokens."""
    with autocast_to_bfloat16(policy.device, policy.autocast):
        return predicting_states(policy.model.get_decoder(), batch)


def batch_of(rows: Sequence[Row], policy: Policy, bundles: Bundles) -> Batch:
    """The tokens of one micro-batch of rows."""
    made = [(rows[bundle[0]].prompt_ids, [rows[i].token_ids for i in bundle]) for bundle in bundles]
    return make_batch(made, policy.pad_id, policy.device)


def column(rows: Sequence[Row], name: str, like_BT: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """One of the rows' lists, padded with zeros to (B, T)."""
    return pad_to([getattr(row, name) for row in rows], like_BT, dtype or like_BT.dtype)


def _flat(rows: Iterable[list[float]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.concatenate([np.asarray(row) for row in rows])


def _explained_variance(values: list[list[float]], returns: list[list[float]]) -> float:
    """1 − Var(R − V) / Var(R): 1 for perfect values, 0 for a constant, below 0 for worse."""
    value, target = _flat(values), _flat(returns)
    return float(1 - np.var(target - value) / max(float(np.var(target)), 1e-12))
