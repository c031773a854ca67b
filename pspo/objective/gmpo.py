"""Geometric means: one ratio for a completion, from its tokens' clipped log-ratios."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pspo.base.schema import key
from pspo.objective.base import SEQUENCE_LEVELS, Objective, ObjectiveInput


@dataclass(frozen=True, kw_only=True)
class GMPO(Objective):
    """Geometric-mean policy optimisation: maximise A exp(mean_t c_t), each token's log-ratio clipped by itself.

    c_t = min(log r_t, ε) if A > 0, max(log r_t, −ε) if A < 0. Source: Zhao et al. 2025 (arXiv 2507.20673), with
    ε = 0.4. Every token of a completion has the same loss. Gradient weight, for a completion of one token: w(r) = r
    inside the band or on the corrective side, else 0.
    """

    not_at: ClassVar[dict[str, str]] = dict.fromkeys(
        SEQUENCE_LEVELS, "it takes the geometric mean over a completion by itself; set loss.importance=token"
    )
    whole_completions: ClassVar[bool] = True
    eps: float = key("ε: how far a token's log-ratio may move from 0", within="(0, inf)")

    def __call__(self, x: ObjectiveInput) -> Tensor:
        clipped_BT = torch.where(
            x.advantage_BT > 0, x.log_ratio_BT.clamp(max=self.eps), x.log_ratio_BT.clamp(min=-self.eps)
        )
        return -x.advantage_BT * x.sequence_mean(clipped_BT).exp()
