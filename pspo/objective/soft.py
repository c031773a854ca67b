"""Soft trust regions: smooth functions of the ratio instead of a clip."""

from collections.abc import Mapping
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

    ``mass``: ε becomes ε / π_old, so w(r) = r (1 − sgn(A) (π − π_old) / ε): DRPO (arXiv 2606.09821). At its published
    ε = 12.5 the factor on noclip's weight stays in [0.92, 1.08], as |π − π_old| ≤ 1.
    """

    eps: float = key("ε: distance from 1 at which the gradient changes sign", within="(0, inf)")
    mass: bool = key("the distance is that of the probabilities: eps is divided by the old probability", before=False)

    @property
    def token_only(self) -> str:
        return "objective.mass=true depends on a single token's old probability" if self.mass else ""

    def __call__(self, x: ObjectiveInput) -> Tensor:
        penalty_BT = x.advantage_BT.abs() * (x.ratio_BT - 1).square() / (2 * self.eps)
        if self.mass:
            penalty_BT = penalty_BT * x.old_logprob_BT.clamp(max=0).exp()
        return penalty_BT - x.ratio_BT * x.advantage_BT


@dataclass(frozen=True, kw_only=True)
class R2VPO(Objective):
    """Ratio-variance regularisation: maximise r A − λ (r − 1)².

    Source: arXiv 2601.03320. Gradient weight w(r) = r (1 − 2λ (r − 1) / A): as ``cfpo`` with ε = |A| / 2λ, and where
    A = 0 the gradient is 2λ r (r − 1), a pull back to r = 1. With ``delta`` λ rises between steps while the variance of
    the ratio, E_old[(r − 1)²], is above δ, and falls while it is below: the source's dual ascent, here in log λ.
    """

    steered: ClassVar[Mapping[str, tuple[str, str]]] = {"lam": ("delta", "policy/ratio_variance")}
    lam: float = key(
        "λ: weight of the squared distance of the ratio from 1, at first where delta is set", within="(0, inf)"
    )
    delta: float | None = key(
        "δ: variance of the ratio to hold by steering lam; null for a constant lam", within="(0, inf)"
    )

    def __call__(self, x: ObjectiveInput) -> Tensor:
        return self.lam * (x.ratio_BT - 1).square() - x.ratio_BT * x.advantage_BT


@dataclass(frozen=True, kw_only=True)
class DRO(Objective):
    """Direct reward optimisation, or mirror descent on sampled completions: maximise A log r − β/2 (log r)².

    Source: Richemond et al. 2024 (arXiv 2405.19107); with the group's mean reward as baseline, Kimi k1.5 (2501.12599).
    Gradient weight w(r) = 1 − (β / A) log r: symmetric in log r, negative beyond log r = A / β; where A = 0 the
    gradient is β log r, a pull back to r = 1 that no A scales.
    """

    beta: float = key("β: weight of the squared log-ratio", within="(0, inf)")

    def __call__(self, x: ObjectiveInput) -> Tensor:
        return self.beta / 2 * x.log_ratio_BT.square() - x.advantage_BT * x.log_ratio_BT


@dataclass(frozen=True, kw_only=True)
class MASPO(Objective):
    """Mass-adaptive soft policy optimisation: maximise sg[F] r A, with a Gaussian F where the policy moves away.

    F = exp(−(r − 1)² / 2σ²) where A > 0 and r > 1 (σ₊) or A < 0 and r < 1 (σ₋), else 1;
    σ₊ = clamp(σ π_old^−a, σ, 10) · clamp(1 + βA, 0.1, 10), σ₋ = clamp(σ π_old^−a, σ, 10) · clamp(1 / (1 − βA), 0.1,
    10): the Gaussian is wider for rare tokens and for large A. Source: arXiv 2602.17550. Gradient weight w(r) = r F.
    """

    token_only = "its width depends on the old probability of a single token"
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
