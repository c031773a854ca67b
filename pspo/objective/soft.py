"""Soft trust regions: smooth functions of the ratio instead of a clip."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pspo.base.schema import key
from pspo.objective.base import Objective, ObjectiveInput


@dataclass(frozen=True, kw_only=True)
class SAPO(Objective):
    """Soft adaptive policy optimisation: maximise (4/τ) σ(τ (r − 1)) A, with τ₊ where A > 0 and τ₋ elsewhere.

    Source: Gao et al. 2025 (arXiv 2511.20347). Gradient weight w(r) = r sech²(τ (r − 1) / 2): 1 at r = 1, and
    0 far from it on either side, for either sign of A.
    """

    tau_positive: float = key("τ₊: sharpness where A > 0", within="(0, inf)")
    tau_negative: float = key("τ₋: sharpness elsewhere", within="(0, inf)")

    def __call__(self, x: ObjectiveInput) -> Tensor:
        negative_BT = torch.full_like(x.advantage_BT, self.tau_negative)  # where() of two numbers would be float32
        tau_BT = negative_BT.masked_fill(x.advantage_BT > 0, self.tau_positive)
        return -(4 / tau_BT) * torch.sigmoid(tau_BT * (x.ratio_BT - 1)) * x.advantage_BT


@dataclass(frozen=True, kw_only=True)
class CFPO(Objective):
    """Clipping-free policy optimisation: maximise r A − |A| (r − 1)² / (2ε).

    Source: arXiv 2601.22801; the same function as SPO's (Xie et al. 2024, 2401.16025). Gradient weight w(r) =
    r (1 − sgn(A) (r − 1) / ε): beyond the band of ``clip`` it changes sign and pulls the ratio back.
    """

    eps: float = key("ε: distance from 1 at which the gradient changes sign", within="(0, inf)")

    def __call__(self, x: ObjectiveInput) -> Tensor:
        penalty_BT = x.advantage_BT.abs() * (x.ratio_BT - 1).square() / (2 * self.eps)
        return penalty_BT - x.ratio_BT * x.advantage_BT


@dataclass(frozen=True, kw_only=True)
class MASPO(Objective):
    """Mass-adaptive soft policy optimisation: maximise sg[F] r A, with a Gaussian F where the policy moves away.

    F = exp(−(r − 1)² / 2σ²) where A > 0 and r > 1 (σ₊) or A < 0 and r < 1 (σ₋), else 1;
    σ₊ = clamp(σ π_old^−a, σ, 10) · clamp(1 + βA, 0.1, 10), σ₋ = clamp(σ π_old^−a, σ, 10) · clamp(1 / (1 − βA), 0.1,
    10): the Gaussian is wider for rare tokens and for large A. Source: arXiv 2602.17550. Gradient weight w(r) = r F.
    """

    token_only: ClassVar[str] = "its width depends on the old probability of a single token"
    sigma: float = key("σ: smallest width of the Gaussian", within="(0, 10]")
    mass: float = key("a: how much wider the Gaussian is for tokens of little probability", within="[0, inf)")
    risk: float = key("β: how much wider the Gaussian is for large A (narrower for A below 0)", within="[0, inf)")

    def __call__(self, x: ObjectiveInput) -> Tensor:
        with torch.no_grad():
            ratio_BT, sign_BT = x.ratio_BT, x.advantage_BT.sign()
            mass_BT = (self.sigma * (-self.mass * x.old_logprob_BT).exp()).clamp(self.sigma, 10)
            risk_BT = self.risk * x.advantage_BT
            trust_BT = torch.where(sign_BT > 0, 1 + risk_BT, 1 / (1 - risk_BT)).clamp(0.1, 10)
            gaussian_BT = (-(ratio_BT - 1).square() / (2 * (mass_BT * trust_BT).square())).exp()
            factor_BT = torch.where(sign_BT * (ratio_BT - 1) > 0, gaussian_BT, 1.0)
        return -factor_BT * x.ratio_BT * x.advantage_BT
