"""Probability smoothing: the policy is mixed toward the old one before the ratio is taken."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pspo.objective.base import Objective, ObjectiveInput
from pspo.schema import key


@dataclass(frozen=True, kw_only=True)
class PSPO(Objective):
    """Probability smoothing: π̃ = (1 − α) π_θ + α π_old, so r̃ = (1 − α) r + α; maximise r̃ A, with no min and no clip.

    Source: Dwyer et al. 2025 (arXiv 2509.21282); inside GRPO it is GR-PSPO. Gradient weight w(r) = (1 − α) r: the
    gradient is that of ``noclip`` times (1 − α), so under a scale-free optimiser such as Adam α acts only through
    gradient-norm clipping, Adam's eps and the relative weight of other loss terms.
    """

    takes_alpha: ClassVar[bool] = True
    alpha: float = key("α: weight of the old policy in the mixture", within="[0, 1)")

    def __call__(self, x: ObjectiveInput) -> Tensor:
        return -((1 - self.alpha) * x.ratio_BT + self.alpha) * x.advantage_BT
