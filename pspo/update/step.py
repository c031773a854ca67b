"""The updates of one step: epochs over a rollout, minibatches, micro-batches, optimizer steps."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pspo.base.statistics import Statistics
from pspo.diagnostics import ROWS_PER_PROBE_ROW, Record, counterfactual, kl_after, sample_coordinates, update_norm
from pspo.host import ranks
from pspo.host.memory import halving
from pspo.loss import batch_loss, coefficients
from pspo.model.logprob import predicting_states, token_logprobs
from pspo.objective import Objective, ObjectiveInput
from pspo.update.rows import GAP, GAP_MAX, Learner, Row, column, micro_batches, score, with_batch_statistics

MEMORY_ADVICE = "or set model.gradient_checkpointing=true, model.autocast=true, or a smaller model"

MAX_GAP_NATS = {False: 1e-3, True: 0.15}
"""Bound of the mean |log π_trainer − log π_sampler| of fresh rows, without and with ``autocast`` to bfloat16."""


class UpdateError(RuntimeError):
    """An optimizer step cannot be trusted."""


class NonFiniteError(UpdateError):
    """A loss, gradient, log-probability or weight is NaN or infinite."""


class SamplerGapError(UpdateError):
    """Sampler and trainer disagree about the log-probabilities of fresh completions."""


def update(
    learner: Learner,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[Row],
    learning_rates: Sequence[float],
    random: np.random.Generator,
    statistics: Statistics,
    failure: Path,
    record: Record | None = None,
) -> int:
    """``num_epochs`` passes over ``rows``, each an optimizer step per minibatch, rows shuffled in each pass.

    An objective that ``needs_batch`` has the rows of one group in one minibatch.

    ``learning_rates`` has one for each optimizer step. Returns the number of optimizer steps taken: none for a
    minibatch without rows. Raises SamplerGapError, and NonFiniteError after saving the offending minibatch at
    ``failure``: before an optimizer step that cannot be trusted, and after one that left weights that are not finite.
    """
    taken, parameters, config = 0, learner.parameters(), learner.update
    max_tokens, by_unit = config.max_tokens, dict[int, list[Row]]()
    for i, row in enumerate(rows):
        by_unit.setdefault(row.group if learner.objective.needs_batch else i, []).append(row)
    units = list(by_unit.values())
    for number in range(config.steps):
        epoch, place = divmod(number, config.num_minibatches)
        if place == 0:
            parts = np.array_split(random.permutation(len(units)), config.num_minibatches)
        minibatch = [row for n in parts[place] for row in units[n]]
        if not minibatch:
            continue
        attempt = partial(accumulate, learner, minibatch, statistics, record, taken == 0)
        loss, max_tokens = halving("update.max_tokens", max_tokens, MEMORY_ADVICE, attempt)
        norms = [torch.nn.utils.clip_grad_norm_(group, learner.max_grad_norm) for group in parameters]
        if not (loss.isfinite() and all(norm.isfinite() for norm in norms)):
            reason = f"loss {loss.item()}, gradient norm {norms[0].item()}: the optimizer step was not taken"
            raise _non_finite(reason, minibatch, failure)
        if taken == 0:
            check_gap(statistics.result().get(GAP, 0.0), learner.policy.autocast)
        statistics.mean("optimizer/grad_norm_mean", norms[0], torch.ones_like(norms[0], dtype=torch.bool))
        for group in optimizer.param_groups:
            group["lr"] = learning_rates[number] * group.get("lr_factor", 1.0)
        if record is not None and record.others and number + 1 == config.steps:
            record.probe = counterfactual(
                partial(_gradient, learner, minibatch, max_tokens), learner.objective, record.others
            )
        before = sample_coordinates(parameters[0]) if record is not None else []
        optimizer.step()
        taken += 1
        if not all(torch.nn.utils.get_total_norm(group).isfinite() for group in parameters):
            reason = f"learning rate {optimizer.param_groups[0]['lr']:g} made weights that are not finite"
            raise _non_finite(reason, minibatch, failure)
        if record is not None:
            about = {"epoch": epoch, "minibatch": place, "optimizer/grad_norm": norms[0].item()}
            about["optimizer/grad_norm_clipped"] = min(norms[0].item(), learner.max_grad_norm)
            record.end_inner_step(about | {"optimizer/update_norm_estimate": update_norm(before, parameters[0])})
    if record is not None and record.rows:
        probe = rows[::ROWS_PER_PROBE_ROW]
        logprobs, _ = score(learner.policy, probe, learner.rollout.temperature, max_tokens, None)
        record.rows[-1] |= kl_after(logprobs, [row.old_logprobs for row in probe])
    optimizer.zero_grad(set_to_none=True)
    return taken


def check_gap(gap: float, autocast: bool) -> None:
    """Refuse a mean |log π_trainer − log π_sampler|, in nats, beyond rounding. Raises SamplerGapError."""
    if not gap <= MAX_GAP_NATS[autocast]:  # also where the gap is NaN
        raise SamplerGapError(
            f"the trainer's log-probabilities of fresh completions differ from the sampler's by {gap:.2g} nats on "
            f"average, more than the {MAX_GAP_NATS[autocast]:g} of rounding in {'bfloat16' if autocast else 'float32'}:"
            " they do not run the same policy, so every ratio would be wrong; nothing was learned; try "
            "model.attention=eager, model.lora.rank=0 or model.autocast=false"
        )


def accumulate(
    learner: Learner,
    rows: Sequence[Row],
    statistics: Statistics,
    record: Record | None = None,
    fresh: bool = False,
    max_tokens: int | None = None,
) -> Tensor:
    """Make the gradient of one optimizer batch; returns its loss, NaN if a log-probability is not finite.

    Neither depends on ``max_tokens``, by default the learner's, nor on the number of ranks, beyond rounding: each rank
    takes its share of the rows, and every micro-batch divides by the whole batch's counts. ``fresh`` says that the
    weights still are the ones that sampled the rows, so that the difference of log-probabilities is the gap of
    ``check_gap``. An attempt that runs out of memory leaves nothing in ``statistics``.
    """
    for parameter in chain(*learner.parameters()):
        parameter.grad = None
    if record is not None:
        record.tokens.clear()
    lengths = [len(row.token_ids) for row in rows]
    coefficient_N = coefficients(learner.loss.aggregation, lengths, learner.rollout.max_new_tokens)
    rows = with_batch_statistics(learner, rows, max_tokens or learner.update.max_tokens)
    places = range(len(rows))
    work = partial(_backward, learner, rows, coefficient_N, sum(lengths), record, fresh, max_tokens)
    parts = ranks.gather(lambda: work(ranks.share(places)))
    all_seen, losses, learned, all_tokens = zip(*parts, strict=True)
    for seen in all_seen:
        statistics.add(seen)
    if record is not None:
        record.tokens[:] = chain(*all_tokens)
    gradients = []
    for parameter, *has_gradient in zip(chain(*learner.parameters()), *learned, strict=True):
        if any(has_gradient):
            if parameter.grad is None:  # of a rank without rows
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    ranks.total(gradients)
    return torch.stack(losses).sum()


def _backward(
    learner: Learner,
    rows: Sequence[Row],
    coefficient_N: Sequence[float],
    num_tokens: int,
    record: Record | None,
    fresh: bool,
    max_tokens: int | None,
    own: Sequence[int],
) -> tuple[Statistics, Tensor, list[bool], list[Tensor]]:
    """Add the gradient of some rows of an optimizer batch, ``own`` by index, to that of the parameters.

    Returns on the CPU their statistics, loss, whether each parameter has a gradient, and the record's tokens.
    """
    policy, critic, config, objective = learner.policy, learner.critic, learner.loss, learner.objective
    seen, total = Statistics(), torch.zeros((), dtype=torch.float64, device=policy.device)
    own_reference = config.kl != "none" and config.reference == "start"
    optional = {"reference_logprobs": own_reference, "target": objective.needs_batch, "kept": config.drop == "m2"}
    with policy.recomputing():
        for places, batch in micro_batches([rows[i] for i in own], policy, max_tokens or learner.update.max_tokens):
            micro, mask_BT = [rows[own[i]] for i in places], batch.mask_BT
            hidden_NH = predicting_states(policy.model.get_decoder(), batch, policy.autocast)
            logprob_BT, entropy_BT = token_logprobs(
                policy.model, batch, hidden_NH, learner.rollout.temperature, policy.autocast, config.entropy_weight > 0
            )
            old_logprob_BT, advantage_BT = (column(micro, name, logprob_BT) for name in ("old_logprobs", "advantages"))
            tokens = ObjectiveInput.at_tokens(logprob_BT, old_logprob_BT, advantage_BT, mask_BT)
            reference_BT, target_BT, kept_BT = (
                column(micro, name, logprob_BT) if used else None for name, used in optional.items()
            )
            tokens = replace(tokens, target_BT=target_BT)
            coefficient_B1 = logprob_BT.new_tensor([[coefficient_N[own[i]]] for i in places])
            correction_BT = column(micro, "corrections", logprob_BT) if rows[0].corrections is not None else None
            loss, x, gradient_BT, whole_BT = batch_loss(
                config, objective, tokens, entropy_BT, reference_BT, coefficient_B1, seen, correction_BT,
                None if kept_BT is None else kept_BT > 0,
            )  # fmt: skip
            if critic is not None:
                value_BT = critic(batch, hidden_NH, policy.autocast)
                old_value_BT, return_BT = (column(micro, name, value_BT) for name in ("values", "returns"))
                error_BT = critic.loss(value_BT, old_value_BT, return_BT)
                seen.mean("critic/loss_mean", error_BT, mask_BT)
                loss = loss + torch.where(mask_BT, error_BT, 0.0).sum() / num_tokens
            loss.backward()  # type: ignore[no-untyped-call]
            padding_RS = batch.owner_RS < 0
            seen.mean("update/padding_rate", padding_RS.double(), torch.ones_like(padding_RS))
            if record is not None:
                record.add(x, gradient_BT, whole_BT, entropy_BT)
            if fresh:
                seen.mean(GAP, gap_BT := (logprob_BT - old_logprob_BT).abs(), mask_BT)
                seen.max(GAP_MAX, gap_BT, mask_BT)
            finite = (logprob_BT.isfinite() & old_logprob_BT.isfinite()).all()
            total += torch.where(finite, loss.detach().double(), torch.nan)
    has_gradient = [parameter.grad is not None for parameter in chain(*learner.parameters())]
    return seen.cpu(), total.cpu(), has_gradient, [] if record is None else [t.cpu() for t in record.tokens]


def _gradient(learner: Learner, rows: Sequence[Row], max_tokens: int, objective: Objective) -> Tensor:
    """The gradient of an objective alone, without the other terms of the loss; the parameters keep their own."""
    parameters = learner.parameters()[0]
    own = [parameter.grad for parameter in parameters]
    bare = replace(learner.loss, kl="none", kl_weight=0.0, kl_target=None, entropy_weight=0.0)
    alone = replace(learner, objective=objective, loss=bare, critic=None)
    accumulate(alone, rows, Statistics(), max_tokens=max_tokens)
    gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for parameter, grad in zip(parameters, own, strict=True):
        parameter.grad = grad
    return torch.cat([grad.flatten() for grad in gradient])


def _non_finite(reason: str, minibatch: Sequence[Row], failure: Path) -> NonFiniteError:
    torch.save([vars(row) for row in minibatch], failure)
    return NonFiniteError(
        f"{reason}; nothing of this step is saved, so that the last checkpoint is good; lower optimizer.lr or "
        f"optimizer.max_grad_norm; the minibatch is in {failure} (torch.load)"
    )
