"""The importance-sampled policy gradient and its clipped form."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pspo.objective.base import Objective, ObjectiveInput
from pspo.schema import key


@dataclass(frozen=True, kw_only=True)
class NoClip(Objective):
    """Importance-sampled policy gradient without a trust region: maximise r A. Gradient weight w(r) = r."""

    def __call__(self, x: ObjectiveInput) -> Tensor:
        return -x.ratio_BT * x.advantage_BT


@dataclass(frozen=True, kw_only=True)
class Clip(Objective):
    """PPO's clipped surrogate: maximise min(r A, clip(r, 1 − ε_low, 1 + ε_high) A).

    Source: Schulman et al. 2017 (arXiv 1707.06347, eq. 7); in GRPO, Shao et al. 2024 (2402.03300, eq. 3); unequal
    ε_low and ε_high are DAPO's clip-higher (2503.14476). Gradient weight w(r) = r inside the band or on the corrective
    side, else 0.
    """

    eps_low: float = key("ε_low: how far the ratio may fall below 1", within="(0, 1]")
    eps_high: float = key("ε_high: how far the ratio may rise above 1", within="(0, inf)")

    def __call__(self, x: ObjectiveInput) -> Tensor:
        clipped_BT = x.ratio_BT.clamp(1 - self.eps_low, 1 + self.eps_high)
        return -torch.minimum(x.ratio_BT * x.advantage_BT, clipped_BT * x.advantage_BT)
