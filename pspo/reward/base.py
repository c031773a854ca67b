"""The interface of every reward: a dataclass whose fields are its configuration, called with a batch of completions."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pspo.base.schema import ConfigError, Schema, key
from pspo.dataset import Problem


class RewardError(Exception):
    """A user's reward raised or returned no score; one sentence with the reward's name and the problem's id."""


class Answered(Protocol):
    """The view that a reward has of a completion: its text, and the problem that it answers."""

    @property
    def text(self) -> str: ...

    @property
    def problem(self) -> Problem: ...


@dataclass(frozen=True)
class Attempt:
    """A text that answers a problem, without a model's completion around it."""

    text: str
    problem: Problem


@dataclass(frozen=True)
class Score:
    """The grade of one completion; ``components`` are logged by name, ``parsed`` says that it holds an answer."""

    reward: float
    correct: bool
    components: dict[str, float]
    parsed: bool
    strict: bool | None = None  # correct, and in the asked format; None where the reward asks for no format
    timed_out: bool = False  # whether grading took longer than the reward allows, so that the completion scores 0


@dataclass(frozen=True, kw_only=True)
class Reward(Schema, ABC, block="reward"):
    """Base of all rewards: ``reward(completions)`` is one ``Score`` for each completion, in their order."""

    name: str = key("plain: 0/1 and a format bonus; paper: as published; math: plain for LaTeX; custom: yours")

    @abstractmethod
    def __call__(self, completions: Sequence[Answered]) -> list[Score]:
        """One score for each completion."""

    def check(self) -> None:
        """Refuse a wrong configuration before anything is loaded. Raises ConfigError."""

    def ungradable(self, problems: Sequence[Problem]) -> list[Problem]:
        """The problems whose gold answer, written as asked, is not correct."""
        scores = self([Attempt(f"#### {problem.answer}", problem) for problem in problems])
        return [problem for problem, score in zip(problems, scores, strict=True) if not score.correct]

    def check_gold(self, problems: Sequence[Problem]) -> None:
        """Grade every gold answer against itself: a reward that fails it would train on noise. Raises ConfigError."""
        for problem in self.ungradable(problems):
            reason = f"the gold answer {problem.answer!r}, written as '#### <answer>', is not correct under reward="
            raise ConfigError(f"problem {problem.id}: {reason}{self.name}; mend the data or set reward=custom")

    def source_files(self) -> list[Path]:
        """The user's own files that decide rewards, for the digest in a run's identity."""
        return []
