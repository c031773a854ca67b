"""The importance-sampled policy gradient and its clipped forms."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pspo.base.schema import key
from pspo.objective.base import Objective, ObjectiveInput

BISECTIONS = 60
"""Halvings of [0, 1] in search of a bound of the KL band: more than float64 has digits."""


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

    ``band`` gives bounds that depend on p = π_old in place of 1 − ε_low and 1 + ε_high. Of divergences of the Bernoulli
    distributions "this token or another one" up to δ: ``tv``, 1 ± δ / p, and ``kl``, where KL(p‖r p) = δ, which are the
    masks of DPPO (2602.04879); ``chi2``, 1 ± √(δ (1 − p) / p) (2603.04918). ``dcpo`` (2509.02333): from
    ½ (1 + √max(0, 1 − 4ε_low / p)) to ½ (1 + √(1 + 4ε_high / p)), at most 10.
    """

    eps_low: float = key("ε_low: how far the ratio may fall below 1", within="(0, 1]")
    eps_high: float = key("ε_high: how far the ratio may rise above 1", within="(0, inf)")
    dual: float | None = key("c: where A < 0 the loss is bounded by -c A; null for no bound", within="(1, inf)")
    two_sided: float | None = key("δ: the unclipped ratio is bounded by it; null for no bound", within="(1, inf)")
    band: Literal["ratio", "tv", "kl", "chi2", "dcpo"] = key(
        "bounds of the ratio: by eps alone, or from the old probability by delta (tv, kl, chi2) or eps (dcpo)",
        before="ratio",
    )
    delta: float = key("δ: largest divergence inside of the band tv, kl or chi2", within="(0, inf)", before=0.05)

    @property
    def token_only(self) -> str:
        return "" if self.band == "ratio" else f"objective.band={self.band} depends on a single token's old probability"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dual is not None and self.two_sided is not None:
            raise self.refuse("two_sided", f"and objective.dual={self.dual!r} bound the same side; set one to null")
        if self.two_sided is not None and self.band == "ratio" and self.two_sided <= 1 + self.eps_high:
            raise self.refuse("two_sided", f"must be above 1 + objective.eps_high = {1 + self.eps_high:g}")

    def __call__(self, x: ObjectiveInput) -> Tensor:
        ratio_BT = x.ratio_BT if self.two_sided is None else x.ratio_BT.clamp(max=self.two_sided)
        clipped_BT = x.ratio_BT.clamp(*self.bounds(x.old_logprob_BT))
        surrogate_BT = torch.minimum(ratio_BT * x.advantage_BT, clipped_BT * x.advantage_BT)
        if self.dual is not None:
            bounded_BT = torch.maximum(surrogate_BT, self.dual * x.advantage_BT)
            surrogate_BT = torch.where(x.advantage_BT < 0, bounded_BT, surrogate_BT)
        return -surrogate_BT

    @torch.no_grad()
    def bounds(self, old_logprob_BT: Tensor) -> tuple[Any, Any]:
        """The least and the greatest ratio inside of the band: numbers, or (B, T) where they depend on π_old."""
        if self.band == "ratio":
            return 1 - self.eps_low, 1 + self.eps_high
        old_BT = old_logprob_BT.clamp(max=0).exp()
        if self.band == "tv":
            return 1 - self.delta / old_BT, 1 + self.delta / old_BT
        if self.band == "chi2":
            width_BT = (self.delta * (1 - old_BT) / old_BT).sqrt()
            return 1 - width_BT, 1 + width_BT
        if self.band == "dcpo":
            low_BT = (1 + (1 - 4 * self.eps_low / old_BT).clamp(min=0).sqrt()) / 2
            return low_BT, ((1 + (1 + 4 * self.eps_high / old_BT).sqrt()) / 2).clamp(max=10)
        # π = p (1 − s) below, and 1 − π = (1 − p) (1 − s) above: both divergences rise from 0 with s in [0, 1].
        rest_BT = -old_logprob_BT.clamp(max=0).expm1()
        below_BT, above_BT = self._share(old_BT, rest_BT), self._share(rest_BT, old_BT)
        return 1 - below_BT, 1 + above_BT * rest_BT / old_BT

    def _share(self, this_BT: Tensor, other_BT: Tensor) -> Tensor:
        """The s at which −q log(1 − s) − q' log(1 + s q / q'), a KL, is δ; q and q' = 1 − q are probabilities."""
        low_BT, high_BT = torch.zeros_like(this_BT), torch.ones_like(this_BT)
        for _ in range(BISECTIONS):
            middle_BT = (low_BT + high_BT) / 2
            kl_BT = -this_BT * (-middle_BT).log1p() - torch.xlogy(other_BT, 1 + middle_BT * this_BT / other_BT)
            inside_BT = kl_BT <= self.delta
            low_BT, high_BT = torch.where(inside_BT, middle_BT, low_BT), torch.where(inside_BT, high_BT, middle_BT)
        return low_BT


@dataclass(frozen=True, kw_only=True)
class GPPO(Objective):
    """Gradient-preserving clip: as ``clip``, but a clipped token keeps the weight β of its bound in place of 0.

    Maximise β₂ (1 + ε_high) r / sg[r] A where A > 0 and r > 1 + ε_high, β₁ (1 − ε_low) r / sg[r] A where A < 0 and
    r < 1 − ε_low, r A elsewhere. Source: Klear-Reasoner's GPPO (arXiv 2508.07629), β 1 and 1; CE-GPPO (2509.20712),
    β₁ 0.5 to 0.75 and β₂ 1. Gradient weight w(r) = r, and where clipped β₂ (1 + ε_high) or β₁ (1 − ε_low), not 0.
    """

    eps_low: float = key("ε_low: how far the ratio may fall below 1", within="(0, 1]")
    eps_high: float = key("ε_high: how far the ratio may rise above 1", within="(0, inf)")
    beta_low: float = key("β₁: share of the weight 1 - eps_low that a token clipped below keeps", within="[0, inf)")
    beta_high: float = key("β₂: share of the weight 1 + eps_high that a token clipped above keeps", within="[0, inf)")

    def __call__(self, x: ObjectiveInput) -> Tensor:
        ratio_BT, low, high = x.ratio_BT, 1 - self.eps_low, 1 + self.eps_high
        kept_BT = ratio_BT / ratio_BT.detach()  # 1, with the gradient of log r
        above_BT, below_BT = (x.advantage_BT > 0) & (ratio_BT > high), (x.advantage_BT < 0) & (ratio_BT < low)
        smooth_BT = torch.where(above_BT, self.beta_high * high * kept_BT, ratio_BT)
        return -torch.where(below_BT, self.beta_low * low * kept_BT, smooth_BT) * x.advantage_BT


@dataclass(frozen=True, kw_only=True)
class GMPO(Objective):
    """Geometric-mean policy optimisation: maximise A exp(mean_t c_t), each token's log-ratio clipped by itself.

    c_t = min(log r_t, ε) if A > 0, max(log r_t, −ε) if A < 0. Source: Zhao et al. 2025 (arXiv 2507.20673), with
    ε = 0.4. Every token of a completion has the same loss. Gradient weight, for a completion of one token: w(r) = r
    inside the band or on the corrective side, else 0.
    """

    token_only = "it takes the geometric mean over a completion by itself; set loss.importance=token"
    whole_completions: ClassVar[bool] = True
    eps: float = key("ε: how far a token's log-ratio may move from 0", within="(0, inf)")

    def __call__(self, x: ObjectiveInput) -> Tensor:
        above_BT, below_BT = x.log_ratio_BT.clamp(max=self.eps), x.log_ratio_BT.clamp(min=-self.eps)
        clipped_BT = torch.where(x.advantage_BT > 0, above_BT, below_BT)
        return -x.advantage_BT * x.sequence_mean(clipped_BT).exp()
