"""How completions come to be: samplers, and what a step collects."""

from pspo.rollout.collect import collect, rewards, rollout_metrics, training, trains
from pspo.rollout.config import RolloutConfig
from pspo.rollout.sample import Completion, Sampler
from pspo.rollout.samplers.own import OwnSampler

__all__ = [
    "Completion",
    "OwnSampler",
    "RolloutConfig",
    "Sampler",
    "collect",
    "rewards",
    "rollout_metrics",
    "training",
    "trains",
]
