"""Probability smoothing: the policy is mixed toward the old one before the ratio is taken."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pspo.base.schema import key
from pspo.objective.base import Objective, ObjectiveInput

WHY = "at 1 nothing of the new policy is left to learn, and below 0 it is pushed away from the old one, not toward it"


@dataclass(frozen=True, kw_only=True)
class PSPO(Objective):
    """Probability smoothing: π̃ = (1 − α) π_θ + α π_old, so r̃ = (1 − α) r + α; maximise r̃ A, with no min and no clip.

    Source: Dwyer et al. 2025 (arXiv 2509.21282); inside GRPO it is GR-PSPO. Gradient weight w(r) = (1 − α) r: the
    gradient is that of ``noclip`` times (1 − α), so under a scale-free optimiser such as Adam α acts only through
    gradient-norm clipping, Adam's eps and the relative weight of other loss terms.
    """

    linear: ClassVar[bool] = True
    alpha: float = key("α: weight of the old policy in the mixture", within="[0, 1)", why=WHY)

    def __call__(self, x: ObjectiveInput) -> Tensor:
        return -((1 - self.alpha) * x.ratio_BT + self.alpha) * x.advantage_BT


@dataclass(frozen=True, kw_only=True)
class PSPOGeometric(Objective):
    """Smoothing in log space: π̃ ∝ π_θ^(1−α) π_old^α, so r̃ = r^(1−α) (up to its normaliser); maximise r̃ A.

    Source: this project; the geometric counterpart of Dwyer et al. 2025 (arXiv 2509.21282). Gradient weight w(r) =
    (1 − α) r^(1−α): sub-linear, so it damps large ratios and lifts small ones, which no learning rate can undo.
    """

    alpha: float = key("α: exponent of the old policy in the mixture", within="[0, 1)", why=WHY)

    def __call__(self, x: ObjectiveInput) -> Tensor:
        return -((1 - self.alpha) * x.log_ratio_BT).exp() * x.advantage_BT


@dataclass(frozen=True, kw_only=True)
class PSPOClip(Objective):
    """Smoothing inside the clip: with r̃ = (1 − α) r + α, maximise min(r̃ A, clip(r̃, 1 − ε_low, 1 + ε_high) A).

    Source: this project. Gradient weight w(r) = (1 − α) r inside the band of r̃ or on the corrective side, else 0: as
    ``clip`` with the band widened to ε / (1 − α), times (1 − α).
    """

    alpha: float = key("α: weight of the old policy in the mixture", within="[0, 1)", why=WHY)
    eps_low: float = key("ε_low: how far the smoothed ratio may fall below 1", within="(0, 1]")
    eps_high: float = key("ε_high: how far the smoothed ratio may rise above 1", within="(0, inf)")

    def __call__(self, x: ObjectiveInput) -> Tensor:
        smoothed_BT = (1 - self.alpha) * x.ratio_BT + self.alpha
        clipped_BT = smoothed_BT.clamp(1 - self.eps_low, 1 + self.eps_high)
        return -torch.minimum(smoothed_BT * x.advantage_BT, clipped_BT * x.advantage_BT)


@dataclass(frozen=True, kw_only=True)
class PSPORelative(Objective):
    """The old policy smoothed toward the new: r̃ = r / ((1 − α) + α r), the relative density ratio; maximise r̃ A.

    Source: this project; the ratio is that of Yamada et al. 2013 (Neural Computation 25:1324), bounded by 1 / α.
    Gradient weight w(r) = (1 − α) r / ((1 − α) + α r)²: 1 − α at r = 1, 0 far from it, for either sign of A.
    """

    alpha: float = key("α: weight of the new policy in the denominator's mixture", within="[0, 1)", why=WHY)

    def __call__(self, x: ObjectiveInput) -> Tensor:
        return -x.ratio_BT / (1 - self.alpha + self.alpha * x.ratio_BT) * x.advantage_BT


@dataclass(frozen=True, kw_only=True)
class PSPOProportional(Objective):
    """Smoothing in proportion to the distance moved: maximise r̃ A, r̃ = (1 − α_t) r + α_t, with a token's own α_t.

    α_t = clamp(sgn(A) (r − 1) / δ, 0, α_max), not differentiated. Source: this project. Gradient weight w(r) =
    (1 − α_t) r: that of ``noclip`` on the corrective side, fading to 0 at the distance δ where the policy moves away,
    and with α_max > 1 a bounded pull back beyond it, (1 − α_max) r.
    """

    delta: float = key("δ: distance of the ratio from 1 at which the smoothing is whole", within="(0, inf)")
    alpha_max: float = key("α_max: largest smoothing of a token; above 1 the weight is reversed", within="(0, inf)")

    def __call__(self, x: ObjectiveInput) -> Tensor:
        away_BT = x.advantage_BT.sign() * (x.ratio_BT - 1).detach()
        alpha_BT = (away_BT / self.delta).clamp(0, self.alpha_max)
        return -((1 - alpha_BT) * x.ratio_BT + alpha_BT) * x.advantage_BT
