"""Objectives whose ratio is a constant weight on A log π: no gradient flows through the ratio itself."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pspo.base.schema import key
from pspo.objective.base import Objective, ObjectiveInput


@dataclass(frozen=True, kw_only=True)
class CISPO(Objective):
    """Clipped importance-sampling weights: maximise sg[clip(r, f, c)] A log π, so every token keeps a gradient.

    Source: MiniMax-M1 (arXiv 2506.13585), which has no lower bound (f = 0); c = 5 is ScaleRL's (2510.13786).
    Gradient weight w(r) = clip(r, f, c).
    """

    floor: float = key("f: smallest weight of a token", within="[0, 1]", before=0.0)
    cap: float = key("c: largest weight of a token", within="[1, inf)")

    def __call__(self, x: ObjectiveInput) -> Tensor:
        return -x.ratio_BT.detach().clamp(self.floor, self.cap) * x.advantage_BT * x.logprob_BT


@dataclass(frozen=True, kw_only=True)
class DPPO(Objective):
    """Divergence proximal policy optimisation: maximise sg[min(r, C)] A M log π, masked by a divergence, not a ratio.

    Both divergences compare the Bernoulli distributions "the sampled token or another one" under π_old and π.
    ``tv``: M = 0 where A > 0 and π − π_old > δ, or A < 0 and π − π_old < −δ. ``kl``: M = 0 where KL(π_old‖π) > δ and
    the policy moves away (A > 0 and r > 1, or A < 0 and r < 1). Source: arXiv 2602.04879 (appendix C: δ 0.15 for TV,
    0.05 for KL; C = 20 is the value of verl's code, the paper's own is 5 or none). Gradient weight w(r) = min(r, C) M.

    ``symmetric``: M = 0 beyond δ whichever way the token has moved. With δ 0.1 and a penalty of 1e-3 (log r)² beside
    it, ``log_ratio_weight``, that is prime-rl's IPO (August 2026); the penalty adds −2e-3 log r / A to w, and its
    gradient does not vanish where A = 0.
    """

    token_only = "its mask compares the two policies' probabilities of a single token"
    divergence: Literal["tv", "kl"] = key("binary total variation or binary KL(old‖new)")
    delta: float = key("δ: largest divergence at which a token keeps its gradient", within="(0, inf)")
    cap: float = key("C: largest weight of a token", within="[1, inf)")
    symmetric: bool = key("mask beyond delta also the tokens that have moved against the sign of A", before=False)
    log_ratio_weight: float = key("weight of (log r)^2, added to the loss", within="[0, inf)", before=0.0)

    def __call__(self, x: ObjectiveInput) -> Tensor:
        with torch.no_grad():
            # Rounding may leave log π just above 0. 1 − π is −expm1(log π), as π itself may be rounded to 1.
            new_logprob_BT, old_logprob_BT = x.logprob_BT.clamp(max=0), x.old_logprob_BT.clamp(max=0)
            new_BT, old_BT = new_logprob_BT.exp(), old_logprob_BT.exp()
            moved_BT = x.advantage_BT.sign() * x.log_ratio_BT > 0
            if self.divergence == "tv":
                beyond_BT = (new_BT - old_BT).abs() > self.delta
            else:
                shift_BT = (old_logprob_BT - new_logprob_BT).clamp(-1e30, 1e30)
                new_rest_BT, old_rest_BT = -new_logprob_BT.expm1(), -old_logprob_BT.expm1()
                rest_BT = torch.xlogy(old_rest_BT, old_rest_BT) - torch.xlogy(old_rest_BT, new_rest_BT)
                beyond_BT = old_BT * shift_BT + rest_BT > self.delta
            masked_BT = beyond_BT if self.symmetric else beyond_BT & moved_BT
            weight_BT = torch.where(masked_BT, 0.0, x.ratio_BT.clamp(max=self.cap))
        loss_BT = -weight_BT * x.advantage_BT * x.logprob_BT
        return loss_BT + self.log_ratio_weight * x.log_ratio_BT.square() if self.log_ratio_weight else loss_BT


@dataclass(frozen=True, kw_only=True)
class ASPO(Objective):
    """Asymmetric importance sampling: where A > 0 the ratio is turned over, so that unlikely right tokens gain most.

    Maximise sg[w] A log π: where A > 0, w = min(1 / r, c), and 0 above 1 + ε_high; where A < 0, w = min(r, c), and 0
    below 1 − ε_low. Source: arXiv 2510.06062 (ε 0.2, c 3). That is the gradient weight w(r).
    """

    eps_low: float = key("ε_low: how far the ratio may fall below 1", within="(0, 1]")
    eps_high: float = key("ε_high: how far the ratio may rise above 1", within="(0, inf)")
    cap: float = key("c: largest weight of a token", within="[1, inf)")

    def __call__(self, x: ObjectiveInput) -> Tensor:
        with torch.no_grad():
            gain_BT, ratio_BT = x.advantage_BT > 0, x.ratio_BT
            out_BT = torch.where(gain_BT, ratio_BT > 1 + self.eps_high, ratio_BT < 1 - self.eps_low)
            weight_BT = torch.where(gain_BT, 1 / ratio_BT, ratio_BT).clamp(max=self.cap).masked_fill(out_BT, 0.0)
        return -weight_BT * x.advantage_BT * x.logprob_BT


@dataclass(frozen=True, kw_only=True)
class TOPR(Objective):
    """Tapered off-policy REINFORCE: maximise A log π where A > 0, sg[min(W, 1)] A log π elsewhere, with W = Π_t r_t.

    Source: Le Roux et al. 2025 (arXiv 2503.14286): right completions are imitated whatever the old policy
    thought of them, wrong ones are unlearned as far as the policy still writes them. Gradient weight 1 or min(W, 1).
    """

    token_only = "it weighs whole completions by itself; set loss.importance=token"
    whole_completions: ClassVar[bool] = True

    def __call__(self, x: ObjectiveInput) -> Tensor:
        with torch.no_grad():
            tapered_BT = x.sequence_sum(x.log_ratio_BT).clamp(max=0).exp()
            weight_BT = torch.where(x.advantage_BT > 0, 1.0, tapered_BT)
        return -weight_BT * x.advantage_BT * x.logprob_BT


@dataclass(frozen=True, kw_only=True)
class VESPO(Objective):
    """Variational sequence-level soft policy optimisation: maximise sg[φ(W)] A log π, with W = Π_t r_t.

    φ(W) = e^λ W^k e^(−λW), with log W clamped to [log 1e-8, 20]. Source: arXiv 2602.10693. Gradient weight φ(W): 1 at
    W = 1, 0 for W → 0 and W → ∞; k and λ where A ≥ 0 differ from k and λ where A < 0.
    """

    token_only = "it weighs whole completions by itself; set loss.importance=token"
    whole_completions: ClassVar[bool] = True
    k_positive: float = key("k where A >= 0: how fast the weight of unlikely completions falls", within="(0, inf)")
    lambda_positive: float = key("λ where A >= 0: how fast the weight of likely completions falls", within="(0, inf)")
    k_negative: float = key("k where A < 0", within="(0, inf)")
    lambda_negative: float = key("λ where A < 0", within="(0, inf)")

    def __call__(self, x: ObjectiveInput) -> Tensor:
        with torch.no_grad():
            log_w_BT = x.sequence_sum(x.log_ratio_BT).clamp(math.log(1e-8), 20)
            gain = x.advantage_BT >= 0
            k_BT = torch.full_like(log_w_BT, self.k_negative).masked_fill(gain, self.k_positive)
            lambda_BT = torch.full_like(log_w_BT, self.lambda_negative).masked_fill(gain, self.lambda_positive)
            weight_BT = (lambda_BT + k_BT * log_w_BT - lambda_BT * log_w_BT.exp()).exp()
        return -weight_BT * x.advantage_BT * x.logprob_BT
