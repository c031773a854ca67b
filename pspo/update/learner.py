"""What learns in an update, and how often a rollout is learned from."""

from dataclasses import dataclass
from typing import Literal

import torch

from pspo.advantage.critic import Critic
from pspo.base.schema import Schema, key
from pspo.loss import LossConfig
from pspo.model import Policy
from pspo.objective import Objective


@dataclass(frozen=True, kw_only=True)
class UpdateConfig(Schema, block="update"):
    """How often and in what pieces a rollout is learned from; updates per rollout = epochs x minibatches."""

    num_epochs: int = key("passes over a rollout", within="[1, inf)")
    num_minibatches: int = key("optimizer steps of one pass", within="[1, inf)")
    max_tokens: int = key(
        "positions of one micro-batch, padding included; bounds memory and changes results by rounding alone",
        within="[1, inf)",
    )
    old_logprobs: Literal["sampler", "recompute"] = key(
        "log π_old: the sampler's, or from one more pass of the trainer, which takes rounding out of the ratios"
    )

    @property
    def steps(self) -> int:
        """Optimizer steps of one rollout."""
        return self.num_epochs * self.num_minibatches


@dataclass(frozen=True)
class Learner:
    """The models that learn and their loss: the same through a run but for the objective's alpha."""

    policy: Policy
    critic: Critic | None  # the policy's value model, where the advantage needs one
    objective: Objective
    loss: LossConfig
    temperature: float  # of the sampling
    max_length: int  # tokens of the longest completion
    max_tokens: int  # padded positions of one micro-batch
    max_grad_norm: float  # of the policy's gradient and, by itself, of the value model's

    def parameters(self) -> list[list[torch.nn.Parameter]]:
        """The policy's trained parameters, then the value model's own."""
        own = [] if self.critic is None else [list(self.critic.parameters())]
        return [list(self.policy.trainable().values()), *own]
