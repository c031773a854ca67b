"""Corrections for a sampler that is not quite the trainer's policy: a factor on the loss of every token.

k = π_trainer / π_sampler is taken once, before the first update of a rollout; where sampler and trainer agree k is 1,
and so is every factor, exactly. The objective's own ratio has the trainer's π_old in its denominator.
"""

from collections.abc import Sequence

import numpy as np

from pspo.rollout import RolloutConfig


def corrections(
    config: RolloutConfig, trainer: Sequence[Sequence[float]], sampler: Sequence[Sequence[float]]
) -> tuple[list[list[float]], float]:
    """The factors c of every completion's tokens, and the share of tokens whose k is out of bounds.

    With the bounds l and h, from the two log-probabilities of every token in nats:
    ``truncate``: c = min(k, h), truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly
    brings you off-policy RL training"); ``band``: c = k in [l, h], else 0, IcePop (Ling Team 2025, arXiv 2510.18855);
    ``sequence_band``: c = 1 where exp(mean log k) of the completion is in [l, h], else 0 for all of its tokens.
    """
    factors, outside = list[list[float]](), list[bool]()
    low, beyond = (0.0, config.correction_high) if config.correction == "truncate" else (config.correction_low, 0.0)
    for new, old in zip(trainer, sampler, strict=True):
        log_k_T = np.subtract(new, old)
        if config.correction == "sequence_band":
            log_k_T = np.full_like(log_k_T, log_k_T.mean())
        with np.errstate(over="ignore"):
            k_T = np.exp(log_k_T)
        is_outside_T = (k_T < low) | (k_T > config.correction_high)
        inside_T = 1.0 if config.correction == "sequence_band" else k_T
        factors.append(np.where(is_outside_T, beyond, inside_T).tolist())
        outside += is_outside_T.tolist()
    return factors, float(np.mean(outside))
