"""Advantages: completions compared with the others of their group, or with the expectation of a value model (PPO).

Shape suffixes: P prompts of G completions; B completions of T positions; N tokens laid end to end; H hidden size.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pspo.base.schema import Schema, key
from pspo.model import Policy
from pspo.model.batch import Batch, scatter
from pspo.model.logprob import autocast_to_bfloat16, predicting_states

TokenNumbers = list[list[float]]
"""One list for each completion, one number for each of its tokens."""


@dataclass(frozen=True, kw_only=True)
class Advantage(Schema, ABC, block="advantage"):
    """Base of all estimators of advantages."""

    name: str
    per_token: ClassVar[bool] = False
    """Whether the estimate differs between the tokens of a completion, and needs a value model."""

    @abstractmethod
    def estimate(
        self, reward_PG: Tensor, lengths: Sequence[int], values: TokenNumbers | None = None
    ) -> tuple[TokenNumbers, TokenNumbers]:
        """Rewards (P, G) -> advantages of every completion's tokens, and the returns that a value model is fitted to.

        ``lengths`` are the P·G completions' tokens, ``values`` V of each token where ``per_token``.
        """


class GroupRelative(Advantage):
    """One advantage for a whole completion, exactly 0 where all rewards of its group are equal; no returns."""

    def estimate(
        self, reward_PG: Tensor, lengths: Sequence[int], values: TokenNumbers | None = None
    ) -> tuple[TokenNumbers, TokenNumbers]:
        advantages = self(reward_PG).flatten().tolist()
        return [[a] * length for a, length in zip(advantages, lengths, strict=True)], []

    @abstractmethod
    def __call__(self, reward_PG: Tensor) -> Tensor:
        """Rewards (P, G) -> advantages (P, G), in float64."""


@dataclass(frozen=True, kw_only=True)
class Group(GroupRelative):
    """A_pg = (R_pg − mean_g R_p) / (std_g R_p + eps) (GRPO, arXiv 2402.03300, section 4.1)."""

    ddof: int = key("degrees of freedom taken off the standard deviation: PSPO's paper has 1", within="[0, 1]")
    eps: float = key("added to the standard deviation", within="[0, inf)")

    def __call__(self, reward_PG: Tensor) -> Tensor:
        std_P1 = reward_PG.double().std(dim=1, correction=self.ddof, keepdim=True)
        # Equal rewards may leave a rounding error over eps, or 0 / 0 when eps is 0.
        return torch.where(has_spread(reward_PG)[:, None], _centred(reward_PG) / (std_P1 + self.eps), 0.0)


@dataclass(frozen=True, kw_only=True)
class Mean(GroupRelative):
    """A_pg = R_pg − mean_g R_p: without the division that weighs easy and hard problems up (Dr. GRPO, 2503.20783)."""

    def __call__(self, reward_PG: Tensor) -> Tensor:
        return _centred(reward_PG)


@dataclass(frozen=True, kw_only=True)
class LeaveOneOut(GroupRelative):
    """A_pg = R_pg − mean over the others of the group = G / (G − 1) · (R_pg − mean_g R_p) (RLOO, arXiv 2402.14740)."""

    def __call__(self, reward_PG: Tensor) -> Tensor:
        return _centred(reward_PG) * (reward_PG.shape[1] / (reward_PG.shape[1] - 1))


@dataclass(frozen=True, kw_only=True)
class GAE(Advantage):
    """Generalised advantage estimation from a value model, per token (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

    δ_t = r_t + γ V_{t+1} − V_t; A_t = Σ_k (γλ)^k δ_{t+k}; returns A_t + V_t. The reward stands at the last token, after
    which V = 0, also where the completion was truncated: it is judged as it stands. ``Critic`` is the value model.
    """

    per_token: ClassVar[bool] = True
    gamma: float = key("γ: discount of a token", within="[0, 1]")
    lam: float = key("GAE's λ: 1 is the Monte Carlo return minus the value, 0 the one-step TD error", within="[0, 1]")
    normalize: bool = key("advantages of a step are brought to mean 0 and standard deviation 1")
    critic: Literal["trunk", "separate"] = key("a value head on the policy's trunk, or a model of its own")
    value_lr: float = key("highest learning rate of the value model's own weights", within="(0, inf)")
    value_weight: float = key("weight of the value loss", within="(0, inf)")
    value_clip: float | None = key("how far a value may move in a step; null for no bound", within="(0, inf)")

    def estimate(
        self, reward_PG: Tensor, lengths: Sequence[int], values: TokenNumbers | None = None
    ) -> tuple[TokenNumbers, TokenNumbers]:
        assert values is not None
        advantages = []
        for reward, value in zip(reward_PG.flatten().tolist(), values, strict=True):
            following_advantage, target, advantage = 0.0, reward, []  # target: r_t + γ V_{t+1}
            for v in reversed(value):
                following_advantage = target - v + self.gamma * self.lam * following_advantage
                target = self.gamma * v
                advantage.append(following_advantage)
            advantages.append(advantage[::-1])
        returns = [[a + v for a, v in zip(*pair, strict=True)] for pair in zip(advantages, values, strict=True)]
        if self.normalize:
            flat = torch.tensor([a for advantage in advantages for a in advantage], dtype=torch.float64)
            mean, std = flat.mean().item(), flat.std(correction=0).item()
            advantages = [[(a - mean) / (std + 1e-8) for a in advantage] for advantage in advantages]
        return advantages, returns


ADVANTAGES: dict[str, type[Advantage]] = {"group": Group, "mean": Mean, "leave_one_out": LeaveOneOut, "gae": GAE}
Advantage.kinds = ADVANTAGES


def has_spread(reward_PG: Tensor) -> Tensor:
    """Which groups (P,) have rewards that differ, so that they carry a gradient."""
    return reward_PG.amax(dim=1) != reward_PG.amin(dim=1)  # not `>`: a NaN must reach the update, which stops at it


def _centred(reward_PG: Tensor) -> Tensor:
    reward_PG = reward_PG.double()
    return torch.where(has_spread(reward_PG)[:, None], reward_PG - reward_PG.mean(dim=1, keepdim=True), 0.0)


class Critic(torch.nn.Module):
    """The value model of PPO: V(s_t) from the hidden state that predicts token t, by a linear layer that begins at 0.

    On the policy's trunk the value loss reaches the policy's weights as well; a separate critic begins as a copy of
    the policy's trunk and leaves the policy alone.
    """

    def __init__(self, config: GAE, policy: Policy) -> None:
        super().__init__()
        self.config = config
        decoder = policy.model.get_decoder()
        self.decoder: Any = copy.deepcopy(decoder) if config.critic == "separate" else None
        self.head = torch.nn.Linear(decoder.config.hidden_size, 1, device=policy.device, dtype=policy.model.dtype)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, batch: Batch, hidden_NH: Tensor, autocast: bool) -> Tensor:
        """Values (B, T), 0 where masked; ``hidden_NH`` are the policy's states, for a critic on its trunk."""
        if self.decoder is not None:
            hidden_NH = predicting_states(self.decoder, batch, autocast)
        with autocast_to_bfloat16(batch.mask_BT.device, autocast):
            value_N = self.head(hidden_NH).squeeze(-1)
        return scatter(batch.mask_BT, value_N.to(self.head.weight.dtype))

    def loss(self, value_BT: Tensor, old_value_BT: Tensor, return_BT: Tensor) -> Tensor:
        """Value loss per token, weighted: w/2 · (V − R)², with a bound c on the move, w/2 · max((V − R)², (V' − R)²).

        V' = V_old + clip(V − V_old, −c, c): the value clipping of OpenAI's PPO2 (Huang et al. 2022, "The 37
        implementation details of PPO", detail 9).
        """
        error_BT = (value_BT - return_BT).square()
        if self.config.value_clip is not None:
            bound = self.config.value_clip
            near_BT = old_value_BT + (value_BT - old_value_BT).clamp(-bound, bound)
            error_BT = torch.maximum(error_BT, (near_BT - return_BT).square())
        return self.config.value_weight / 2 * error_BT


def make_critic(advantage: Advantage, policy: Policy) -> Critic | None:
    """The value model that the advantage needs, or None."""
    return Critic(advantage, policy) if isinstance(advantage, GAE) else None
