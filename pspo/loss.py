"""From an objective's loss per token (B, T) to that of an optimizer batch: importance, gate, drop, KL, aggregation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from pspo.advantage import Advantage
from pspo.base.schema import ConfigError, Schema, key
from pspo.base.statistics import Statistics
from pspo.objective import LOG_RATIO_CLAMP, Objective, ObjectiveInput, log_ratio


@dataclass(frozen=True, kw_only=True)
class LossConfig(Schema, block="loss"):
    """Importance level, aggregation, and the terms added to the objective, each a choice of its own."""

    importance: Literal["token", "sequence", "sequence_token", "product"] = key(
        "ratio of a token, of a completion (geometric mean), the same with its token's gradient, or their product"
    )
    aggregation: Literal["token", "sequence", "sequence_sum", "constant"] = key(
        "mean of tokens, of completion means, of completion sums, or of sums over rollout.max_new_tokens"
    )
    kl: Literal["none", "k1", "k2", "k3"] = key("estimator of KL(policy‖reference), at the level of loss.importance")
    kl_weight: float = key("β: weight of that KL in the loss, at first where kl_target is set", within="[0, inf)")
    kl_target: float | None = key(
        "KL(policy‖reference), nats, to hold by steering kl_weight; or null", within="(0, inf)", before=None
    )
    reference: Literal["start", "rollout"] = key(
        "the policy before training, or the one that sampled the rollout", before="start"
    )
    gate: Literal["none", "delight"] = key(
        "factor on the objective's loss of a token: sigmoid(-A log pi / gate_eta)", before="none"
    )
    gate_eta: float = key("η: temperature of the gate", within="(0, inf)", before=1.0)
    drop: Literal["none", "opsm", "m2"] = key(
        "the objective skips wrong completions far from the old policy, or the tokens of the largest (log r)^2",
        before="none",
    )
    drop_limit: float | None = key(
        "largest mean of -log r over a wrong completion (published: 1e-4), or of (log r)^2 (0.04)",
        within="(0, inf)",
        before=None,
    )
    entropy_weight: float = key("weight of the policy's entropy, taken off the loss", within="[0, inf)")
    mask_truncated: bool = key("completions cut at rollout.max_new_tokens do not train")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_weight and self.kl == "none":
            raise self.refuse("kl_weight", "needs an estimator; set loss.kl to k1, k2 or k3")
        if self.kl_target is not None and not self.kl_weight:
            raise self.refuse("kl_target", "steers a weight above 0; set loss.kl and loss.kl_weight")
        if self.drop != "none" and self.drop_limit is None:
            raise self.refuse("drop", f"needs loss.drop_limit={PUBLISHED_DROP_LIMITS[self.drop]:g} or another limit")

    def check(self, objective: Objective, advantage: Advantage) -> None:
        """Refuse choices that make no sense together. Raises ConfigError."""
        if self.importance != "token" and objective.token_only:
            pair = f"loss.importance={self.importance} does not go with objective={objective.name}"
            raise ConfigError(f"{pair}: {objective.token_only}")
        if advantage.per_token and (objective.whole_completions or self.importance in ("sequence", "product")):
            level = f"loss.importance={self.importance}"
            which = f"objective={objective.name}" if objective.whole_completions else level
            lack = f"which advantage={advantage.name} does not give; choose advantage=group, mean or leave_one_out"
            raise ConfigError(f"{which} has one advantage for a completion, {lack}")


def batch_loss(
    config: LossConfig,
    objective: Objective,
    tokens: ObjectiveInput,
    entropy_BT: Tensor,
    reference_BT: Tensor | None,
    coefficient_B1: Tensor,
    statistics: Statistics,
    correction_BT: Tensor | None = None,
    kept_BT: Tensor | None = None,
) -> tuple[Tensor, ObjectiveInput, Tensor, Tensor]:
    """Σ c_i (correction · gate · kept · objective + β KL − weight · entropy) over a micro-batch's tokens.

    c_i are the ``coefficients`` of its completions.

    The coefficients count all micro-batches that make one optimizer step, so their gradients add up to that of one
    large batch. Masked positions have a gradient of exactly zero. The objective is differentiated by the
    log-probabilities once, here, and the result passed on to the model: the diagnostics read the gradient itself.
    KL(old‖new) is the k3 estimate on sampled tokens, E_old[r − 1 − log r] (see ``kl``). ``kept_BT`` and
    ``tokens.target_BT`` are those of ``batch_statistics``, where they take a whole optimizer batch.

    Returns the micro-batch's share of the optimizer batch's loss, with gradient; the objective's input; ∂(Σ gate · kept
    · objective)/∂logprob (B, T) before aggregation and correction, so that a token's gradient weight is w = −gradient /
    A, whatever the sampler; and that of the sum with correction and β KL.
    """
    mask_BT, leaf_BT = tokens.mask_BT, tokens.logprob_BT.detach().requires_grad_()
    leaves = replace(tokens, logprob_BT=leaf_BT, log_ratio_BT=log_ratio(leaf_BT, tokens.old_logprob_BT))
    objective_BT = objective(x := at_level(config.importance, leaves))
    if config.gate == "delight":
        gate_BT = (-x.advantage_BT * leaf_BT.detach() / config.gate_eta).sigmoid()
        statistics.mean("loss/gate_mean", gate_BT, mask_BT)
        objective_BT = objective_BT * gate_BT
    if config.drop != "none":
        kept_BT = kept(config, leaves) if kept_BT is None else kept_BT
        statistics.mean("loss/dropped_rate", (~kept_BT).double(), mask_BT)
        objective_BT = torch.where(kept_BT, objective_BT, 0.0)
    (gradient_BT,) = torch.autograd.grad(_sum(objective_BT, mask_BT), leaf_BT, retain_graph=True)
    learned_BT, corrected_BT = gradient_BT, objective_BT
    if correction_BT is not None:
        corrected_BT = objective_BT * correction_BT
        (learned_BT,) = torch.autograd.grad(_sum(corrected_BT, mask_BT), leaf_BT)
    total_BT, whole_BT = _with_gradient(corrected_BT.detach(), learned_BT, tokens.logprob_BT), learned_BT
    if config.kl != "none":
        fixed_BT = tokens.old_logprob_BT if config.reference == "rollout" else reference_BT
        assert fixed_BT is not None
        d_BT = log_ratio(leaf_BT, torch.where(mask_BT, fixed_BT, leaf_BT.detach()))
        kl_BT = kl(config.kl, at_level(config.importance, replace(leaves, log_ratio_BT=d_BT)).log_ratio_BT)
        (kl_gradient_BT,) = torch.autograd.grad(_sum(kl_BT, mask_BT), leaf_BT)
        statistics.mean("policy/kl_reference", kl_BT, mask_BT)
        whole_BT = learned_BT + config.kl_weight * kl_gradient_BT
        total_BT = total_BT + config.kl_weight * _with_gradient(kl_BT.detach(), kl_gradient_BT, tokens.logprob_BT)
    if config.entropy_weight:
        total_BT = total_BT - config.entropy_weight * entropy_BT
    loss = _sum(coefficient_B1.to(leaf_BT.dtype) * total_BT, mask_BT)
    with torch.no_grad():
        ratio_BT, log_ratio_BT = leaves.ratio_BT, leaves.log_ratio_BT
        statistics.mean("loss/mean", objective_BT, mask_BT)
        statistics.mean("policy/entropy_mean", entropy_BT, mask_BT)
        statistics.mean("policy/kl_old_new_k3", ratio_BT - 1 - log_ratio_BT, mask_BT)
        statistics.mean("policy/ratio_variance", (x.ratio_BT - 1).square(), mask_BT)
        statistics.max("policy/ratio_max", ratio_BT, mask_BT)
        statistics.mean("policy/ratio_clamped_rate", (log_ratio_BT.abs() >= LOG_RATIO_CLAMP).double(), mask_BT)
    return loss, x, gradient_BT, whole_BT


PUBLISHED_DROP_LIMITS = {"opsm": 1e-4, "m2": 0.04}


@torch.no_grad()
def kept(config: LossConfig, x: ObjectiveInput) -> Tensor:
    """The tokens (B, T) whose objective counts under ``loss.drop``; what it leaves out stays in the denominators.

    ``opsm`` leaves out completions of A < 0 and 1/L Σ_t (log π_old − log π) > δ (DeepSeek-V3.2, arXiv 2512.02556).
    ``m2`` leaves out tokens, of a whole optimizer batch: of those that have moved away (A > 0 and r > 1, or A < 0 and
    r < 1), the ones of the largest (log r)², until the mean over the rest is below τ (M2PO, 2510.01161).
    """
    assert config.drop_limit is not None
    if config.drop == "opsm":
        return (x.advantage_BT >= 0) | (x.sequence_mean(-x.log_ratio_BT) <= config.drop_limit)
    away_BT, square_BT = x.mask_BT & (x.advantage_BT * x.log_ratio_BT > 0), x.log_ratio_BT.double().square()
    ascending_N = square_BT[away_BT].sort().values
    mean_N = ascending_N.cumsum(0) / torch.arange(1, len(ascending_N) + 1, device=ascending_N.device)
    number = int((mean_N < config.drop_limit).sum())  # the means of ascending numbers ascend
    return ~away_BT | (square_BT < (ascending_N[number] if number < len(ascending_N) else math.inf))


@torch.no_grad()
def batch_statistics(
    config: LossConfig, objective: Objective, x: ObjectiveInput, group_B: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """What takes a whole optimizer batch, x with its groups: the objective's ``target_BT`` and ``kept_BT``, or None."""
    target_BT = objective.target(x, group_B) if objective.needs_batch else None
    return target_BT, kept(config, x) if config.drop == "m2" else None


def at_level(importance: str, x: ObjectiveInput) -> ObjectiveInput:
    """The same input with its ratio at another level.

    ``sequence``: s = exp(1/L Σ_t log r_t) at every token (GSPO, arXiv 2507.18071v2, eq. 7); ``sequence_token``:
    sg[s] π_t / sg[π_t], which has the value of s and the gradient of its own token alone (ibid., eq. 14); ``product``:
    W = Π_t r_t, the importance weight of the whole completion, at every token, its logarithm clamped.
    """
    if importance == "token":
        return x
    if importance == "product":
        log_w_BT = x.sequence_sum(x.log_ratio_BT)
        return replace(x, log_ratio_BT=log_w_BT.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP))
    mean_BT = x.sequence_mean(x.log_ratio_BT)
    if importance == "sequence_token":
        mean_BT = _with_gradient(mean_BT.detach(), torch.ones_like(mean_BT), x.logprob_BT)
    return replace(x, log_ratio_BT=mean_BT)


def coefficients(aggregation: str, lengths: Sequence[int], max_length: int) -> list[float]:
    """c_i, the factor on the losses of completion i's L_i tokens, for the completions of one optimizer batch.

    ``token``: 1 / tokens; ``sequence``: 1 / (L_i · rows); ``sequence_sum``: 1 / rows; ``constant``: 1 / (rows ·
    max_length), Dr. GRPO's (arXiv 2503.20783). Tokens and rows are counted over the whole optimizer batch.
    """
    num_tokens, num_rows = sum(lengths), len(lengths)
    constant = {"token": num_tokens, "sequence_sum": num_rows, "constant": num_rows * max_length}
    return [1 / constant.get(aggregation, max(length, 1) * num_rows) for length in lengths]


def kl(estimator: str, d_BT: Tensor) -> Tensor:
    """Estimates of KL(policy‖reference) from d = log π − log π_ref (Schulman, "Approximating KL divergence", 2020).

    k1 = d, k2 = d² / 2, k3 = e^−d + d − 1. As a loss on the policy's own samples, k2 has the gradient of the KL; that
    of k1 is zero in expectation; k3's is biased, and GRPO's choice.
    """
    return {"k1": d_BT, "k2": d_BT.square() / 2, "k3": (-d_BT).exp() + d_BT - 1}[estimator]


def _sum(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return torch.where(mask_BT, values_BT, 0.0).sum()


def _with_gradient(value_BT: Tensor, gradient_BT: Tensor, by_BT: Tensor) -> Tensor:
    """``value_BT``, whose derivative by ``by_BT`` is ``gradient_BT``."""
    return value_BT + gradient_BT * (by_BT - by_BT.detach())
