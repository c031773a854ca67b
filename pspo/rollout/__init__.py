"""How completions come to be: samplers, and what a step collects."""

from pspo.rollout.collect import collect, rewards, rollout_metrics, training
from pspo.rollout.sample import Completion, RolloutConfig, Sampler
from pspo.rollout.samplers.own import OwnSampler

__all__ = ["Completion", "OwnSampler", "RolloutConfig", "Sampler", "collect", "rewards", "rollout_metrics", "training"]
