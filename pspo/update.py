"""The updates of one step: epochs over a rollout, minibatches, micro-batches, optimizer steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pspo.logprob import make_batch, pad_to, token_logprobs
from pspo.loss import batch_loss
from pspo.model import Policy
from pspo.objective import Objective
from pspo.rollout import Completion
from pspo.schema import Schema, key
from pspo.statistics import Statistics


@dataclass(frozen=True, kw_only=True)
class Update(Schema, block="update"):
    """How often and in what pieces a rollout is learned from; updates per rollout = epochs x minibatches."""

    num_epochs: int = key("passes over a rollout", within="[1, inf)")
    num_minibatches: int = key("optimizer steps of one pass", within="[1, inf)")
    max_tokens: int = key("padded tokens of one micro-batch; bounds memory and changes nothing else", within="[1, inf)")

    @property
    def steps(self) -> int:
        """Optimizer steps of one rollout."""
        return self.num_epochs * self.num_minibatches


class NonFiniteError(RuntimeError):
    """A loss, gradient or log-probability is NaN or infinite; the step was not taken."""


@dataclass(frozen=True)
class Row:
    """One completion as the update sees it."""

    prompt_ids: list[int]
    token_ids: list[int]
    old_logprobs: list[float]
    advantage: float


def make_rows(completions: Sequence[Completion], advantage_N: Tensor) -> list[Row]:
    """Completions with their advantages."""
    return [
        Row(c.prompt.token_ids, c.token_ids, c.logprobs, a)
        for c, a in zip(completions, advantage_N.tolist(), strict=True)
    ]


def update(
    policy: Policy,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    rows: list[Row],
    *,
    config: Update,
    temperature: float,
    max_grad_norm: float,
    learning_rates: Sequence[float],
    random: np.random.Generator,
    statistics: Statistics,
    failure: Path,
) -> None:
    """``num_epochs`` passes over ``rows``, each an optimizer step per minibatch, rows shuffled in each pass.

    ``learning_rates`` has one for each optimizer step of this rollout. Raises NonFiniteError, after saving the
    offending minibatch at ``failure``, before a step is taken that cannot be trusted.
    """
    number = 0
    for _ in range(config.num_epochs):
        for chosen in np.array_split(random.permutation(len(rows)), config.num_minibatches):
            minibatch = [rows[i] for i in chosen]
            optimizer.zero_grad(set_to_none=True)
            loss = accumulate(
                policy, objective, minibatch, config.max_tokens, temperature, statistics, first=number == 0
            )
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.trainable().values(), max_grad_norm)
            if not (loss.isfinite() and grad_norm.isfinite()):
                torch.save([vars(row) for row in minibatch], failure)
                raise NonFiniteError(
                    f"loss {loss.item()}, gradient norm {grad_norm.item()}: the optimizer step was not taken and the "
                    f"weights are as before; its batch is saved in {failure} (torch.load)"
                )
            one = torch.ones((), dtype=torch.bool, device=grad_norm.device)
            statistics.mean("optimizer/grad_norm_mean", grad_norm, one)
            for group in optimizer.param_groups:
                group["lr"] = learning_rates[number]
            optimizer.step()
            number += 1
    optimizer.zero_grad(set_to_none=True)


def accumulate(
    policy: Policy,
    objective: Objective,
    rows: list[Row],
    max_tokens: int,
    temperature: float,
    statistics: Statistics,
    first: bool = False,
) -> Tensor:
    """Add the gradient of one optimizer batch to the parameters; its loss, NaN if a log-probability is not finite.

    Neither depends on ``max_tokens`` beyond rounding: every micro-batch divides by the tokens of the whole batch.
    ``first`` says that the weights are still those that sampled the rows: then the difference of log-probabilities is
    the numerical gap between sampler and trainer.
    """
    policy.model.train(policy.gradient_checkpointing)  # the library recomputes activations in training mode only
    for module in policy.model.modules():
        if isinstance(module, torch.nn.Dropout):  # noise would make the ratio of fresh weights differ from 1
            module.eval()
    num_tokens = sum(len(row.token_ids) for row in rows)
    total = torch.zeros((), dtype=torch.float64, device=policy.device)
    for micro in pack(rows, max_tokens):
        batch = make_batch([r.prompt_ids for r in micro], [r.token_ids for r in micro], policy.pad_id, policy.device)
        logprob_BT, entropy_BT = token_logprobs(policy.model, batch, temperature, policy.autocast)
        old_logprob_BT = pad_to([r.old_logprobs for r in micro], logprob_BT, logprob_BT.dtype)
        advantage_B = torch.tensor([r.advantage for r in micro], dtype=torch.float64, device=policy.device)
        loss = batch_loss(objective, logprob_BT, old_logprob_BT, advantage_B, batch.mask_BT, num_tokens, statistics)
        loss.backward()  # type: ignore[no-untyped-call]
        statistics.mean("policy/entropy_mean", entropy_BT, batch.mask_BT)
        if first:
            statistics.mean("policy/sampler_gap_mean", (logprob_BT - old_logprob_BT).abs(), batch.mask_BT)
        finite = (logprob_BT.isfinite() & old_logprob_BT.isfinite()).all()
        total += torch.where(finite, loss.detach().double(), torch.nan)
    policy.model.eval()
    return total


def pack(rows: list[Row], max_tokens: int) -> list[list[Row]]:
    """Cut rows into micro-batches of like length, each of at most ``max_tokens`` with its padding (or of one row)."""
    micro_batches: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: len(row.prompt_ids) + len(row.token_ids)):
        length = len(row.prompt_ids) + len(row.token_ids)
        if micro_batches and (len(micro_batches[-1]) + 1) * length <= max_tokens:
            micro_batches[-1].append(row)
        else:
            micro_batches.append([row])
    return micro_batches
