"""Target policy optimisation: the completions of a group are pulled toward a distribution, not along an advantage."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pspo.base.schema import key
from pspo.objective.base import Objective, ObjectiveInput


@dataclass(frozen=True, kw_only=True)
class TPO(Objective):
    """Target policy optimisation: minimise the cross-entropy CE(q, p) over the completions y_i of every group.

    p = softmax_i(log π(y_i)), of the current log-probs of whole completions; q_i ∝ p_i^old e^(u_i / η), with u the
    group's rewards whitened by their population standard deviation: any advantage of a group is u up to shift and
    scale. Source: Kaddour 2026 (arXiv 2604.06159), η = 1. The gradient is −(q_i − p_i) ∇log π(y_i): the coefficient
    stands in place of A w, vanishes at the target, and pulls back to p^old where all rewards are equal (u = 0). At
    loss.aggregation=sequence_sum it is that of the mean of CE over groups, divided by the size of a group.
    """

    token_only = "it weighs whole completions by itself; set loss.importance=token"
    whole_completions: ClassVar[bool] = True
    needs_batch: ClassVar[bool] = True
    eta: float = key("η: temperature of the target; small follows the best completion alone", within="(0, inf)")

    def __call__(self, x: ObjectiveInput) -> Tensor:
        assert x.target_BT is not None
        return -x.target_BT * x.logprob_BT

    def target(self, x: ObjectiveInput, group_B: Tensor) -> Tensor:
        """q_i − p_i at every token of completion i: (B, T)."""
        new_B, old_B = (x.sequence_sum(values_BT)[:, 0] for values_BT in (x.logprob_BT, x.old_logprob_BT))
        advantage_B, target_B = x.advantage_BT[:, 0], torch.zeros_like(new_B)
        for group in set(group_B.tolist()):
            own_B = group_B == group
            a_G = advantage_B[own_B]
            spread = a_G.std(correction=0)
            u_G = torch.where(a_G.amax() == a_G.amin(), 0.0, (a_G - a_G.mean()) / spread)
            q_G = (old_B[own_B].log_softmax(0) + u_G / self.eta).softmax(0)
            target_B[own_B] = q_G - new_B[own_B].softmax(0)
        return target_B[:, None].expand_as(x.logprob_BT)
