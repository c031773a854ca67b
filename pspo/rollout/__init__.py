"""How completions come to be: samplers, and what a step collects."""

from pspo.rollout.collect import answered, collect, rewards, rollout_metrics, training
from pspo.rollout.sample import Completion, RolloutConfig, Sampler
from pspo.rollout.samplers.own import OwnSampler

__all__ = [
    "Completion", "OwnSampler", "RolloutConfig", "Sampler", "answered", "collect", "rewards", "rollout_metrics",
    "training",
]  # fmt: skip
