"""Settings of a rollout, and the interface of every sampler: completions of prompts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pspo.base.schema import Schema, key
from pspo.dataset import Problem, Prompt
from pspo.model import Policy
from pspo.reward import Score


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

    def __post_init__(self) -> None:
        super().__post_init__()
        if "" in self.stop:
            raise self.refuse("stop", "every text holds the empty string; leave it out, [] is for no stop strings")

    def overlong_penalty(self, length: int) -> float:
        """((L_max − b) − length) / b, at most 0, with b = share · L_max tokens (DAPO, arXiv 2503.14476, eq. 13)."""
        buffer = self.overlong_share * self.max_new_tokens
        return min(0.0, (self.max_new_tokens - buffer - length) / buffer) if buffer else 0.0


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


class Sampler(Protocol):
    """Writes completions with the current weights of a policy."""

    def sample(
        self, prompts: Sequence[Prompt], group_size: int, seed: Sequence[int], *, greedy: bool = False
    ) -> list[Completion]:
        """``group_size`` completions of every prompt, group by group in the order of ``prompts``.

        The random numbers of a completion depend on (``seed``, problem, place, sample index) alone, not on the other
        prompts. ``greedy`` takes the most probable token. Raises Interrupted, and NoRoomError for too little memory.
        """

    def refresh(self, policy: Policy) -> None:
        """Sample with this policy's weights from now on; called once per rollout."""
