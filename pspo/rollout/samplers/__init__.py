"""Ways to write completions, each behind the interface ``Sampler``."""

from pspo.model import Policy
from pspo.rollout.sample import RolloutConfig, Sampler
from pspo.rollout.samplers.own import OwnSampler


def make_sampler(policy: Policy, config: RolloutConfig) -> Sampler:
    """The sampler ``rollout.sampler``, with the policy's weights."""
    if config.sampler == "own":
        return OwnSampler(policy, config)
    from pspo.rollout.samplers.vllm import VllmSampler  # which imports vLLM, 10 s

    return VllmSampler(policy, config)
