"""The value model of PPO: what a completion is expected to be worth, at each of its tokens.

Shape suffixes: B completions, T token positions, N completion tokens laid end to end, H hidden size.
"""

import copy
from typing import Any

import torch
from torch import Tensor

from pspo.advantage import GAE, Advantage
from pspo.model import Policy
from pspo.model.batch import Batch, scatter
from pspo.model.logprob import autocast_to_bfloat16, predicting_states


class Critic(torch.nn.Module):
    """V(s_t) from the hidden state that predicts token t, by one linear layer that begins at 0.

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
