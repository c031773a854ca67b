"""The updates of one step: epochs over a rollout, minibatches, micro-batches, optimizer steps."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pspo.advantage.critic import Critic
from pspo.base.statistics import Statistics
from pspo.diagnostics import ROWS_PER_PROBE_ROW, Record, compare, kl_after, sample_coordinates, update_norm
from pspo.host.memory import halving
from pspo.loss import LossConfig, batch_loss, coefficients
from pspo.model import Policy
from pspo.model.logprob import token_logprobs
from pspo.objective import Objective
from pspo.update.config import UpdateConfig
from pspo.update.pack import Bundles, pack
from pspo.update.rows import Row, batch_of, column, score, states

MEMORY_ADVICE = "or set model.gradient_checkpointing=true, model.autocast=true, or a smaller model"

MAX_GAP_NATS = {False: 1e-3, True: 0.15}
"""Largest mean |log π_trainer − log π_sampler| of fresh rows, without and with bfloat16 products (``autocast``)."""


class UpdateError(RuntimeError):
    """An optimizer step cannot be trusted."""


class NonFiniteError(UpdateError):
    """A loss, gradient, log-probability or weight is NaN or infinite."""


class SamplerGapError(UpdateError):
    """Sampler and trainer disagree about the log-probabilities of fresh completions."""


@dataclass(frozen=True)
class Learner:
    """What learns, and from which loss: the same through a run but for the objective's alpha.

    Attributes:
        policy: the model that is trained.
        critic: its value model, where the advantage needs one.
        objective: the trust region.
        loss: what is orthogonal to the objective.
        temperature: that of the sampling.
        max_length: the longest completion, in tokens.
        max_tokens: padded positions of one micro-batch.
        max_grad_norm: gradients are scaled down to it, the policy's and the value model's each by themselves.
    """

    policy: Policy
    critic: Critic | None
    objective: Objective
    loss: LossConfig
    temperature: float
    max_length: int
    max_tokens: int
    max_grad_norm: float

    def parameters(self) -> list[list[torch.nn.Parameter]]:
        """The policy's trained parameters, then the value model's own."""
        own = [] if self.critic is None else [list(self.critic.parameters())]
        return [list(self.policy.trainable().values()), *own]


def update(
    learner: Learner,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[Row],
    *,
    config: UpdateConfig,
    learning_rates: Sequence[float],
    random: np.random.Generator,
    statistics: Statistics,
    record: Record | None = None,
    failure: Path,
) -> int:
    """``num_epochs`` passes over ``rows``, each an optimizer step per minibatch, rows shuffled in each pass.

    ``learning_rates`` has one for each optimizer step of this rollout. Returns how many were taken: none for a
    minibatch without rows. Raises SamplerGapError, and NonFiniteError after saving the offending minibatch at
    ``failure``: before an optimizer step that cannot be trusted, and after one that left weights that are not finite.
    """
    number, taken, parameters = 0, 0, learner.parameters()
    for epoch in range(config.num_epochs):
        for place, chosen in enumerate(np.array_split(random.permutation(len(rows)), config.num_minibatches)):
            number += 1
            if len(chosen) == 0:
                continue
            minibatch = [rows[i] for i in chosen]
            attempt = partial(_attempt, learner, minibatch, optimizer, record, taken == 0)
            (loss, seen), max_tokens = halving("update.max_tokens", learner.max_tokens, MEMORY_ADVICE, attempt)
            learner = replace(learner, max_tokens=max_tokens)
            norms = [torch.nn.utils.clip_grad_norm_(group, learner.max_grad_norm) for group in parameters]
            if not (loss.isfinite() and all(norm.isfinite() for norm in norms)):
                told = f"loss {loss.item()}, gradient norm {norms[0].item()}: the optimizer step was not taken"
                raise _non_finite(told, minibatch, failure)
            if taken == 0:
                check_gap(seen.result().get(GAP, 0.0), learner.policy.autocast)
            statistics.add(seen)
            one = torch.ones((), dtype=torch.bool, device=loss.device)
            statistics.mean("optimizer/grad_norm_mean", norms[0], one)
            for group in optimizer.param_groups:
                group["lr"] = learning_rates[number - 1] * group.get("lr_factor", 1.0)
            if record is not None and record.others and number == config.steps:
                record.probe = compare(partial(_gradient, learner, minibatch), learner.objective, record.others)
            before = sample_coordinates(parameters[0]) if record is not None else []
            optimizer.step()
            taken += 1
            if not all(torch.nn.utils.get_total_norm(group).isfinite() for group in parameters):
                told = f"learning rate {optimizer.param_groups[0]['lr']:g} made weights that are not finite"
                raise _non_finite(told, minibatch, failure)
            if record is not None:
                norm = norms[0].item()
                columns = {
                    "optimizer/grad_norm": norm,
                    "optimizer/grad_norm_clipped": min(norm, learner.max_grad_norm),
                    "optimizer/update_norm_estimate": update_norm(before, parameters[0]),
                }
                record.end_inner_step(epoch, place, columns)
    if record is not None and record.rows:
        probe = rows[::ROWS_PER_PROBE_ROW]
        logprobs, _ = score(learner.policy, probe, learner.temperature, learner.max_tokens, None)
        record.rows[-1] |= kl_after(logprobs, [row.old_logprobs for row in probe])
    optimizer.zero_grad(set_to_none=True)
    return taken


GAP = "policy/sampler_gap_mean"


def check_gap(gap: float, autocast: bool) -> None:
    """Refuse a mean |log π_trainer − log π_sampler|, in nats, beyond rounding. Raises SamplerGapError."""
    if not gap <= MAX_GAP_NATS[autocast]:  # a gap that is no number is none that is small
        raise SamplerGapError(
            f"the trainer's log-probabilities of fresh completions are {gap:.2g} nats from the sampler's on average, "
            f"more than the {MAX_GAP_NATS[autocast]:g} of rounding in {'bfloat16' if autocast else 'float32'}: "
            "they do not run the same policy, so every ratio would be wrong; nothing was learned; try "
            "model.attention=eager, model.lora.rank=0 or model.autocast=false"
        )


def accumulate(
    learner: Learner, rows: Sequence[Row], statistics: Statistics, record: Record | None = None, *, fresh: bool = False
) -> Tensor:
    """Add the gradient of one optimizer batch to the parameters; its loss, NaN if a log-probability is not finite.

    Neither depends on ``max_tokens`` beyond rounding: every micro-batch divides by the whole batch's counts. ``fresh``
    says that the weights are still those that sampled the rows: then the difference of log-probabilities is the
    numerical gap between sampler and trainer.
    """
    policy = learner.policy
    lengths = [len(row.token_ids) for row in rows]
    coefficient_N = coefficients(learner.loss.aggregation, lengths, learner.max_length)
    total = torch.zeros((), dtype=torch.float64, device=policy.device)
    with policy.recomputing():
        packed = pack([(row.prompt_ids, len(row.token_ids)) for row in rows], learner.max_tokens, policy)
        for bundles in packed:
            total += _micro_batch(learner, rows, bundles, coefficient_N, statistics, record, fresh)
    return total


def _micro_batch(
    learner: Learner,
    rows: Sequence[Row],
    bundles: Bundles,
    coefficient_N: Sequence[float],
    statistics: Statistics,
    record: Record | None,
    fresh: bool,
) -> Tensor:
    """Add the gradient of one micro-batch of an optimizer batch; returns its share of the loss."""
    policy, critic, config = learner.policy, learner.critic, learner.loss
    places = [i for bundle in bundles for i in bundle]
    micro, batch = [rows[i] for i in places], batch_of(rows, policy, bundles)
    mask_BT, hidden_NH = batch.mask_BT, states(policy, batch)
    logprob_BT, entropy_BT = token_logprobs(
        policy.model, batch, hidden_NH, learner.temperature, policy.autocast, config.entropy_weight > 0
    )
    old_logprob_BT = column(micro, "old_logprobs", logprob_BT)
    coefficient_B = torch.tensor([coefficient_N[i] for i in places], dtype=torch.float64, device=policy.device)
    loss, x, gradient_BT = batch_loss(
        config,
        learner.objective,
        logprob_BT,
        entropy_BT,
        old_logprob_BT=old_logprob_BT,
        advantage_BT=column(micro, "advantages", logprob_BT, torch.float64),
        mask_BT=mask_BT,
        reference_BT=column(micro, "reference_logprobs", logprob_BT) if config.has_reference else None,
        coefficient_B1=coefficient_B[:, None],
        statistics=statistics,
    )
    if critic is not None:
        value_BT = critic(batch, hidden_NH, policy.autocast)
        old_value_BT, return_BT = (column(micro, name, value_BT) for name in ("values", "returns"))
        error_BT = critic.loss(value_BT, old_value_BT, return_BT)
        statistics.mean("critic/loss_mean", error_BT, mask_BT)
        loss = loss + torch.where(mask_BT, error_BT, 0.0).sum() / sum(len(row.token_ids) for row in rows)
    loss.backward()  # type: ignore[no-untyped-call]
    padding_RS = batch.owner_RS < 0
    statistics.mean("update/padding_rate", padding_RS.double(), torch.ones_like(padding_RS))
    if record is not None:
        record.add(x, gradient_BT, entropy_BT)
    if fresh:
        statistics.mean(GAP, (logprob_BT - old_logprob_BT).abs(), mask_BT)
    finite = (logprob_BT.isfinite() & old_logprob_BT.isfinite()).all()
    return torch.where(finite, loss.detach().double(), torch.nan)


def _attempt(
    learner: Learner,
    minibatch: Sequence[Row],
    optimizer: torch.optim.Optimizer,
    record: Record | None,
    fresh: bool,
    max_tokens: int,
) -> tuple[Tensor, Statistics]:
    """The gradient of a minibatch, from nothing: an attempt that ran out of memory leaves a part of one."""
    statistics = Statistics()
    optimizer.zero_grad(set_to_none=True)
    if record is not None:
        record.tokens.clear()
    return accumulate(replace(learner, max_tokens=max_tokens), minibatch, statistics, record, fresh=fresh), statistics


def _gradient(learner: Learner, rows: Sequence[Row], objective: Objective) -> Tensor:
    """The gradient of an objective alone, without the terms beside it, on a batch; leaves the parameters' own alone."""
    parameters = learner.parameters()[0]
    kept = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    bare = replace(learner.loss, kl="none", kl_weight=0.0, entropy_weight=0.0)
    accumulate(replace(learner, objective=objective, loss=bare, critic=None), rows, Statistics())
    found = [parameter.grad if parameter.grad is not None else torch.zeros_like(parameter) for parameter in parameters]
    for parameter, gradient in zip(parameters, kept, strict=True):
        parameter.grad = gradient
    return torch.cat([gradient.flatten() for gradient in found])


def _non_finite(told: str, minibatch: Sequence[Row], failure: Path) -> NonFiniteError:
    torch.save([vars(row) for row in minibatch], failure)
    return NonFiniteError(
        f"{told}; nothing of this step is saved, so that the last checkpoint is good; lower optimizer.lr or "
        f"optimizer.max_grad_norm; the minibatch is in {failure} (torch.load)"
    )
