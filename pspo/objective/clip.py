"""The importance-sampled policy gradient and its clipped forms."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pspo.base.schema import key
from pspo.objective.base import Objective, ObjectiveInput


@dataclass(frozen=True, kw_only=True)
class NoClip(Objective):
    """Importance-sampled policy gradient without a trust region: maximise r A. Gradient weight w(r) = r."""

    linear: ClassVar[bool] = True

    def __call__(self, x: ObjectiveInput) -> Tensor:
        return -x.ratio_BT * x.advantage_BT


@dataclass(frozen=True, kw_only=True)
class Clip(Objective):
    """PPO's clipped surrogate: maximise min(r A, clip(r, 1 − ε_low, 1 + ε_high) A).

    Source: Schulman et al. 2017 (arXiv 1707.06347, eq. 7); in GRPO, Shao et al. 2024 (2402.03300, eq. 3); unequal
    ε_low and ε_high are DAPO's clip-higher (2503.14476). Gradient weight w(r) = r inside the band or on the corrective
    side, else 0: for A < 0 and r ≫ 1 it is unbounded. Two bounds on that side, one at most:

    - ``dual``, c: where A < 0, max(min(r A, clip(r) A), c A) (Ye et al. 2020, 1912.09729).
    - ``two_sided``, δ: min(min(r, δ) A, clip(r) A) (INTELLECT-2, 2505.07291).
    """

    eps_low: float = key("ε_low: how far the ratio may fall below 1", within="(0, 1]")
    eps_high: float = key("ε_high: how far the ratio may rise above 1", within="(0, inf)")
    dual: float | None = key("c: where A < 0 the loss is bounded by -c A; null for no bound", within="(1, inf)")
    two_sided: float | None = key("δ: the unclipped ratio is bounded by it; null for no bound", within="(1, inf)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dual is not None and self.two_sided is not None:
            raise self.refuse("two_sided", f"and objective.dual={self.dual!r} bound the same side; set one to null")
        if self.two_sided is not None and self.two_sided <= 1 + self.eps_high:
            raise self.refuse("two_sided", f"must be above 1 + objective.eps_high = {1 + self.eps_high:g}")

    def __call__(self, x: ObjectiveInput) -> Tensor:
        ratio_BT = x.ratio_BT if self.two_sided is None else x.ratio_BT.clamp(max=self.two_sided)
        clipped_BT = x.ratio_BT.clamp(1 - self.eps_low, 1 + self.eps_high)
        surrogate_BT = torch.minimum(ratio_BT * x.advantage_BT, clipped_BT * x.advantage_BT)
        if self.dual is not None:
            bounded_BT = torch.maximum(surrogate_BT, self.dual * x.advantage_BT)
            surrogate_BT = torch.where(x.advantage_BT < 0, bounded_BT, surrogate_BT)
        return -surrogate_BT


@dataclass(frozen=True, kw_only=True)
class GMPO(Objective):
    """Geometric-mean policy optimisation: maximise A exp(mean_t c_t), each token's log-ratio clipped by itself.

    c_t = min(log r_t, ε) if A > 0, max(log r_t, −ε) if A < 0. Source: Zhao et al. 2025 (arXiv 2507.20673), with
    ε = 0.4. Every token of a completion has the same loss. Gradient weight, for a completion of one token: w(r) = r
    inside the band or on the corrective side, else 0.
    """

    token_only: ClassVar[str] = "it takes the geometric mean over a completion by itself; set loss.importance=token"
    whole_completions: ClassVar[bool] = True
    eps: float = key("ε: how far a token's log-ratio may move from 0", within="(0, inf)")

    def __call__(self, x: ObjectiveInput) -> Tensor:
        above_BT, below_BT = x.log_ratio_BT.clamp(max=self.eps), x.log_ratio_BT.clamp(min=-self.eps)
        clipped_BT = torch.where(x.advantage_BT > 0, above_BT, below_BT)
        return -x.advantage_BT * x.sequence_mean(clipped_BT).exp()
