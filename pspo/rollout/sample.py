"""What every sampler promises: completions of prompts, each from random numbers of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pspo.dataset import Problem, Prompt
from pspo.model import Policy
from pspo.reward import Score


@dataclass(frozen=True)
class Completion:
    """One sampled answer.

    Attributes:
        prompt: the prompt that the completion answers.
        sample: index of the completion in its group.
        token_ids: tokens of the completion, the stop token included.
        logprobs: log π of each token under the temperature-scaled, untruncated policy, in nats.
        finished: whether the completion ended with a stop token; else it was truncated at ``max_new_tokens``.
        text: the decoded tokens, without special tokens.
        score: what the reward says of the completion, once it was asked.
    """

    prompt: Prompt
    sample: int
    token_ids: list[int]
    logprobs: list[float]
    finished: bool
    text: str
    score: Score | None = None

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

        The random numbers of a completion depend on (``seed``, problem, place, sample index) alone: neither on the
        other prompts of the call nor on their order. ``greedy`` takes the most probable token. Raises Interrupted, and
        NoRoomError where memory does not suffice.
        """

    def refresh(self, policy: Policy) -> None:
        """Sample with this policy's weights from now on; called once per rollout."""
