"""From an objective's loss per token to the loss of an optimizer batch, and the diagnostics beside it."""

import torch
from torch import Tensor

from pspo.logprob import LOG_RATIO_CLAMP, log_ratio
from pspo.objective import Objective, ObjectiveInput
from pspo.statistics import Statistics


def batch_loss(
    objective: Objective,
    logprob_BT: Tensor,
    old_logprob_BT: Tensor,
    advantage_B: Tensor,
    mask_BT: Tensor,
    num_tokens: int,
    statistics: Statistics,
) -> Tensor:
    """This micro-batch's share of the token-level mean: Σ loss·mask / tokens of the whole optimizer batch.

    ``num_tokens`` counts the completion tokens of all micro-batches that make one optimizer step, so their gradients
    add up to that of one large batch. Masked positions have a gradient of exactly zero. KL(old‖new) is the k3
    estimate on sampled tokens, E_old[r − 1 − log r] (Schulman, "Approximating KL divergence", 2020).
    """
    old_logprob_BT = torch.where(mask_BT, old_logprob_BT, logprob_BT.detach())
    log_ratio_BT = log_ratio(logprob_BT, old_logprob_BT)
    x = ObjectiveInput(
        logprob_BT=logprob_BT,
        old_logprob_BT=old_logprob_BT,
        log_ratio_BT=log_ratio_BT,
        advantage_BT=advantage_B[:, None].expand_as(logprob_BT).to(logprob_BT.dtype),
        mask_BT=mask_BT,
    )
    loss_BT = objective(x)
    with torch.no_grad():
        ratio_BT = log_ratio_BT.exp()
        statistics.mean("loss/mean", loss_BT, mask_BT)
        statistics.mean("policy/kl_old_new_k3", ratio_BT - 1 - log_ratio_BT, mask_BT)
        statistics.max("policy/ratio_max", ratio_BT, mask_BT)
        statistics.mean("policy/ratio_clamped_rate", (log_ratio_BT.abs() >= LOG_RATIO_CLAMP).double(), mask_BT)
    return torch.where(mask_BT, loss_BT, 0.0).sum() / num_tokens
