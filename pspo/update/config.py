"""Settings of an update: how often and in what pieces a rollout is learned from."""

from dataclasses import dataclass
from typing import Literal

from pspo.base.schema import Schema, key


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
