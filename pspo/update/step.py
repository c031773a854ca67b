"""The updates of one step: epochs over a rollout, minibatches, micro-batches, optimizer steps."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pspo.advantage.critic import Critic
from pspo.base.schema import Schema, key
from pspo.base.statistics import Statistics
from pspo.diagnostics import PROBE, Distance, InnerStep, Record, compare, kl_after
from pspo.host.memory import halving
from pspo.loss import Batch, Loss, Size, batch_loss
from pspo.model import Policy
from pspo.model.logprob import token_logprobs
from pspo.objective import Objective
from pspo.rollout.experience import Row, batch_of, column, pack, score

ROOM = "or set model.gradient_checkpointing=true, model.autocast=true, or a smaller model"


@dataclass(frozen=True, kw_only=True)
class Update(Schema, block="update"):
    """How often and in what pieces a rollout is learned from; updates per rollout = epochs x minibatches."""

    num_epochs: int = key("passes over a rollout", within="[1, inf)")
    num_minibatches: int = key("optimizer steps of one pass", within="[1, inf)")
    max_tokens: int = key(
        "tokens of one micro-batch, padding included; bounds memory and changes nothing else", within="[1, inf)"
    )
    old_logprobs: Literal["sampler", "recompute"] = key(
        "log π_old: as the sampler found it, or from one more pass, where the gap between the two is too wide"
    )

    @property
    def steps(self) -> int:
        """Optimizer steps of one rollout."""
        return self.num_epochs * self.num_minibatches


class NonFiniteError(RuntimeError):
    """A loss, gradient or log-probability is NaN or infinite; the step was not taken."""


@dataclass(frozen=True)
class Learner:
    """What learns, and from which loss: the same through a run but for the objective's alpha.

    Attributes:
        policy: the model that is trained.
        critic: its value model, where the advantage needs one.
        objective: the trust region.
        loss: what is orthogonal to it.
        temperature: that of the sampling.
        max_length: the longest completion, in tokens.
        max_tokens: of one micro-batch, padded.
        max_grad_norm: gradients are scaled down to it, the policy's and the value model's each by themselves.
    """

    policy: Policy
    critic: Critic | None
    objective: Objective
    loss: Loss
    temperature: float
    max_length: int
    max_tokens: int
    max_grad_norm: float

    def parameters(self) -> list[list[torch.nn.Parameter]]:
        """The policy's, then the value model's own."""
        own = [] if self.critic is None else [list(self.critic.parameters())]
        return [list(self.policy.trainable().values()), *own]


def update(
    learner: Learner,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[Row],
    *,
    config: Update,
    learning_rates: Sequence[float],
    random: np.random.Generator,
    statistics: Statistics,
    record: Record | None = None,
    failure: Path,
) -> int:
    """``num_epochs`` passes over ``rows``, each an optimizer step per minibatch, rows shuffled in each pass.

    ``learning_rates`` has one for each optimizer step of this rollout. Returns how many were taken: none for a
    minibatch without rows. Raises NonFiniteError, after saving the offending minibatch at ``failure``, before a step is
    taken that cannot be trusted.
    """
    number, taken, parameters = 0, 0, learner.parameters()
    distance = Distance(parameters[0]) if record is not None else None
    for epoch in range(config.num_epochs):
        for place, chosen in enumerate(np.array_split(random.permutation(len(rows)), config.num_minibatches)):
            number += 1
            if len(chosen) == 0:
                continue
            minibatch = [rows[i] for i in chosen]
            attempt = partial(_attempt, learner, minibatch, optimizer, record is not None, number == 1)
            (loss, seen, inner), max_tokens = halving("update.max_tokens", learner.max_tokens, ROOM, attempt)
            learner = replace(learner, max_tokens=max_tokens)
            statistics.add(seen)
            norms = [torch.nn.utils.clip_grad_norm_(group, learner.max_grad_norm) for group in parameters]
            if not (loss.isfinite() and all(norm.isfinite() for norm in norms)):
                torch.save([vars(row) for row in minibatch], failure)
                raise NonFiniteError(
                    f"loss {loss.item()}, gradient norm {norms[0].item()}: the optimizer step was not taken and the "
                    f"weights are as before; its batch is saved in {failure} (torch.load)"
                )
            one = torch.ones((), dtype=torch.bool, device=loss.device)
            statistics.mean("optimizer/grad_norm_mean", norms[0], one)
            for group in optimizer.param_groups:
                group["lr"] = learning_rates[number - 1] * group.get("lr_factor", 1.0)
            if record is not None and record.others and number == config.steps:
                record.probe = compare(partial(_gradient, learner, minibatch), learner.objective, record.others)
            optimizer.step()
            taken += 1
            if record is not None and inner is not None and distance is not None:
                norm, told = norms[0].item(), inner.result()
                if record.rows:
                    record.rows[-1] |= {f"kl/after_{k}": told[f"kl/before_{k}"] for k in ("k1", "k3")}
                record.rows.append(
                    {"epoch": epoch, "minibatch": place}
                    | told
                    | {
                        "optimizer/grad_norm": norm,
                        "optimizer/grad_norm_clipped": min(norm, learner.max_grad_norm),
                        "optimizer/update_norm": distance.result(),
                    }
                )
    if record is not None and record.rows:
        probe = rows[::PROBE]
        logprobs, _ = score(learner.policy, probe, learner.temperature, learner.max_tokens, None)
        record.rows[-1] |= kl_after(logprobs, [row.old_logprobs for row in probe])
    optimizer.zero_grad(set_to_none=True)
    return taken


def _attempt(
    learner: Learner,
    minibatch: Sequence[Row],
    optimizer: torch.optim.Optimizer,
    recorded: bool,
    first: bool,
    max_tokens: int,
) -> tuple[Tensor, Statistics, InnerStep | None]:
    statistics, inner = Statistics(), InnerStep() if recorded else None
    optimizer.zero_grad(set_to_none=True)
    loss = accumulate(replace(learner, max_tokens=max_tokens), minibatch, statistics, inner, first)
    return loss, statistics, inner


def accumulate(
    learner: Learner,
    rows: Sequence[Row],
    statistics: Statistics,
    inner: InnerStep | None = None,
    first: bool = False,
) -> Tensor:
    """Add the gradient of one optimizer batch to the parameters; its loss, NaN if a log-probability is not finite.

    Neither depends on ``max_tokens`` beyond rounding: every micro-batch divides by the whole batch's counts. ``first``
    says that the weights are still those that sampled the rows: then the difference of log-probabilities is the
    numerical gap between sampler and trainer.
    """
    policy, size = learner.policy, Size(sum(len(row.token_ids) for row in rows), len(rows), learner.max_length)
    total = torch.zeros((), dtype=torch.float64, device=policy.device)
    if policy.lanes is None or learner.critic is not None:
        found = [_part(learner, rows, size, inner is not None, first)]
    else:
        dealt = deal(rows, policy.lanes.count)
        smaller = replace(learner, max_tokens=-(-learner.max_tokens // len(dealt)))
        found = policy.lanes.each(_part, [(smaller, part, size, inner is not None, first) for part in dealt])
    for loss, seen, told in found:
        total += loss
        statistics.add(seen)
        if inner is not None and told is not None:
            inner.join(told)
    return total


def deal(rows: Sequence[Row], count: int) -> list[list[Row]]:
    """At most ``count`` parts of about as many tokens; rows of one prompt stay together, but where two parts meet."""
    first: dict[tuple[int, ...], int] = {}
    for row in rows:
        first.setdefault(tuple(row.prompt_ids), len(first))
    rows = sorted(rows, key=lambda row: first[tuple(row.prompt_ids)])
    new = [n == 0 or row.prompt_ids != rows[n - 1].prompt_ids for n, row in enumerate(rows)]
    cost = np.array([len(row.token_ids) + len(row.prompt_ids) * begins for row, begins in zip(rows, new, strict=True)])
    middle = np.cumsum(cost) - cost / 2
    part = (middle * count // cost.sum()).tolist()
    return [[row for row, p in zip(rows, part, strict=True) if p == number] for number in sorted(set(part))]


def _part(
    learner: Learner, rows: Sequence[Row], size: Size, recorded: bool, first: bool
) -> tuple[Tensor, Statistics, InnerStep | None]:
    """Add the gradient of some rows of an optimizer batch of that size."""
    policy, critic, statistics, inner = learner.policy, learner.critic, Statistics(), InnerStep() if recorded else None
    if policy.gradient_checkpointing:
        policy.model.train()  # the library recomputes activations in training mode only
        for module in policy.model.modules():
            if isinstance(module, torch.nn.Dropout):  # noise would make the ratio of fresh weights differ from 1
                module.eval()
    total = torch.zeros((), dtype=torch.float64, device=policy.device)
    for cut in pack(rows, learner.max_tokens, policy):
        micro, tokens = [rows[i] for i in cut.rows], batch_of(rows, policy, cut)
        scored = token_logprobs(
            policy.model, tokens, learner.temperature, policy.autocast, learner.loss.entropy_weight > 0
        )
        logprob_BT = scored.logprob_BT
        batch = Batch(
            old_logprob_BT=column(micro, "old_logprobs", logprob_BT),
            advantage_BT=column(micro, "advantages", logprob_BT, torch.float64),
            mask_BT=tokens.mask_BT,
            reference_BT=column(micro, "reference_logprobs", logprob_BT) if learner.loss.has_reference else None,
        )
        weighed = batch_loss(learner.loss, learner.objective, logprob_BT, scored.entropy_BT, batch, size, statistics)
        loss = weighed.loss
        if critic is not None:
            value_BT = critic(tokens, scored.hidden_NH, policy.autocast)
            old_value_BT, return_BT = (column(micro, name, value_BT) for name in ("values", "returns"))
            error_BT = critic.loss(value_BT, old_value_BT, return_BT)
            statistics.mean("critic/loss_mean", error_BT, tokens.mask_BT)
            loss = loss + torch.where(tokens.mask_BT, error_BT, 0.0).sum() / size.num_tokens
        loss.backward()  # type: ignore[no-untyped-call]
        positions = torch.zeros(tokens.num_padded, dtype=torch.float64)
        positions[tokens.num_tokens :] = 1
        statistics.mean("update/padding_rate", positions, torch.ones_like(positions, dtype=torch.bool))
        if inner is not None:
            inner.add(weighed, batch.advantage_BT, scored.entropy_BT, tokens.mask_BT)
        if first:
            gap_BT = (logprob_BT - batch.old_logprob_BT).abs()
            statistics.mean("policy/sampler_gap_mean", gap_BT, tokens.mask_BT)
        finite = (logprob_BT.isfinite() & batch.old_logprob_BT.isfinite()).all()
        total += torch.where(finite, loss.detach().double(), torch.nan)
    if policy.gradient_checkpointing:
        policy.model.eval()
    return total, statistics, inner


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
