"""How completions come to be: the sampler, and what a step collects."""

from pspo.rollout.sample import Completion, Rollout, sample

__all__ = ["Completion", "Rollout", "sample"]
