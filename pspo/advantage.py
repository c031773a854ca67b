"""How good a completion is beside the others of its group."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pspo.schema import Schema, key


@dataclass(frozen=True, kw_only=True)
class Advantage(Schema, block="advantage"):
    """Group-relative advantage: A_pg = (R_pg − mean_g R_p) / (std_g R_p + eps) (GRPO, arXiv 2402.03300, section 4.1).

    P prompts, G completions each. A group whose rewards are all equal has advantage exactly 0.
    """

    ddof: int = key("degrees of freedom taken off the standard deviation: the paper's is 1", within="[0, 1]")
    eps: float = key("added to the standard deviation", within="[0, inf)")

    def __call__(self, reward_PG: Tensor) -> Tensor:
        """Rewards (P, G) -> advantages (P, G), in float64."""
        reward_PG = reward_PG.double()
        centred_PG = reward_PG - reward_PG.mean(dim=1, keepdim=True)
        std_P1 = reward_PG.std(dim=1, correction=self.ddof, keepdim=True)
        # Equal rewards may leave a rounding error over eps, or 0 / 0 when eps is 0.
        return torch.where(has_spread(reward_PG)[:, None], centred_PG / (std_P1 + self.eps), 0.0)


def has_spread(reward_PG: Tensor) -> Tensor:
    """Which groups (P,) have rewards that differ, so that they carry a gradient."""
    return reward_PG.amax(dim=1) != reward_PG.amin(dim=1)  # not `>`: a NaN must reach the update, which stops at it
