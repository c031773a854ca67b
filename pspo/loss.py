"""From an objective's loss per token (B, T) to that of an optimizer batch: importance, aggregation, KL, entropy."""

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

    importance: Literal["token", "sequence", "sequence_token"] = key(
        "ratio of a token, of a completion (geometric mean), or of a completion with its token's gradient"
    )
    aggregation: Literal["token", "sequence", "sequence_sum", "constant"] = key(
        "mean of tokens, of completion means, of completion sums, or of sums over rollout.max_new_tokens"
    )
    kl: Literal["none", "k1", "k2", "k3"] = key("estimator of KL(policy‖reference), the frozen policy before training")
    kl_weight: float = key("β: weight of that KL in the loss", within="[0, inf)")
    entropy_weight: float = key("weight of the policy's entropy, taken off the loss", within="[0, inf)")
    mask_truncated: bool = key("completions cut at rollout.max_new_tokens do not train")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_weight and self.kl == "none":
            raise self.refuse("kl_weight", "needs an estimator; set loss.kl to k1, k2 or k3")

    def check(self, objective: Objective, advantage: Advantage) -> None:
        """Refuse choices that make no sense together. Raises ConfigError."""
        if self.importance != "token" and objective.token_only:
            pair = f"loss.importance={self.importance} does not go with objective={objective.name}"
            raise ConfigError(f"{pair}: {objective.token_only}")
        if advantage.per_token and (objective.whole_completions or self.importance == "sequence"):
            which = f"objective={objective.name}" if objective.whole_completions else "loss.importance=sequence"
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
) -> tuple[Tensor, ObjectiveInput, Tensor]:
    """Σ c_i (correction · objective + β KL − weight · entropy) over a micro-batch's tokens, c_i of ``coefficients``.

    The coefficients count all micro-batches that make one optimizer step, so their gradients add up to that of one
    large batch. Masked positions have a gradient of exactly zero. The objective is differentiated by the
    log-probabilities once, here, and the result passed on to the model: the diagnostics read the gradient itself.
    KL(old‖new) is the k3 estimate on sampled tokens, E_old[r − 1 − log r] (see ``kl``).

    Returns the micro-batch's share of the optimizer batch's loss, with gradient; the objective's input; and
    ∂(Σ objective)/∂logprob (B, T) before aggregation and correction, so that a token's gradient weight is
    w = −gradient / A, whatever the sampler.
    """
    mask_BT, leaf_BT = tokens.mask_BT, tokens.logprob_BT.detach().requires_grad_()
    leaves = replace(tokens, logprob_BT=leaf_BT, log_ratio_BT=log_ratio(leaf_BT, tokens.old_logprob_BT))
    objective_BT = objective(x := at_level(config.importance, leaves))
    (gradient_BT,) = torch.autograd.grad(_sum(objective_BT, mask_BT), leaf_BT, retain_graph=True)
    learned_BT, corrected_BT = gradient_BT, objective_BT
    if correction_BT is not None:
        corrected_BT = objective_BT * correction_BT
        (learned_BT,) = torch.autograd.grad(_sum(corrected_BT, mask_BT), leaf_BT)
    total_BT = _with_gradient(corrected_BT.detach(), learned_BT, tokens.logprob_BT)
    if reference_BT is not None:
        kl_BT = kl(config.kl, tokens.logprob_BT, torch.where(mask_BT, reference_BT, leaf_BT.detach()))
        statistics.mean("policy/kl_reference", kl_BT, mask_BT)
        total_BT = total_BT + config.kl_weight * kl_BT
    if config.entropy_weight:
        total_BT = total_BT - config.entropy_weight * entropy_BT
    loss = _sum(coefficient_B1.to(leaf_BT.dtype) * total_BT, mask_BT)
    with torch.no_grad():
        ratio_BT, log_ratio_BT = leaves.ratio_BT, leaves.log_ratio_BT
        statistics.mean("loss/mean", objective_BT, mask_BT)
        statistics.mean("policy/entropy_mean", entropy_BT, mask_BT)
        statistics.mean("policy/kl_old_new_k3", ratio_BT - 1 - log_ratio_BT, mask_BT)
        statistics.max("policy/ratio_max", ratio_BT, mask_BT)
        statistics.mean("policy/ratio_clamped_rate", (log_ratio_BT.abs() >= LOG_RATIO_CLAMP).double(), mask_BT)
    return loss, x, gradient_BT


def at_level(importance: str, x: ObjectiveInput) -> ObjectiveInput:
    """The same input with its ratio at another level.

    ``sequence``: s = exp(1/L Σ_t log r_t) at every token (GSPO, arXiv 2507.18071v2, eq. 7); ``sequence_token``:
    sg[s] π_t / sg[π_t], which has the value of s and the gradient of its own token alone (ibid., eq. 14).
    """
    if importance == "token":
        return x
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


def kl(estimator: str, logprob_BT: Tensor, reference_BT: Tensor) -> Tensor:
    """Estimates of KL(policy‖reference) per token, with gradient (Schulman, "Approximating KL divergence", 2020).

    With d = log π − log π_ref: k1 = d, k2 = d² / 2, k3 = e^−d + d − 1. As a loss on the policy's own samples, k2 has
    the gradient of the KL; that of k1 is zero in expectation; k3's is biased, and GRPO's choice. d is clamped to ±20.
    """
    d_BT = log_ratio(logprob_BT, reference_BT)
    return {"k1": d_BT, "k2": d_BT.square() / 2, "k3": (-d_BT).exp() + d_BT - 1}[estimator]


def _sum(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return torch.where(mask_BT, values_BT, 0.0).sum()


def _with_gradient(value_BT: Tensor, gradient_BT: Tensor, by_BT: Tensor) -> Tensor:
    """``value_BT``, whose derivative by ``by_BT`` is ``gradient_BT``."""
    return value_BT + gradient_BT * (by_BT - by_BT.detach())
