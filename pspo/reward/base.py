"""The interface of every reward.

A reward is a dataclass that one can call: its fields are its configuration, and ``reward(completions)`` gives one score
for each completion, a batch at a time.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, cast

from pspo.base.schema import ConfigError, Schema, key, unknown
from pspo.dataset import Problem


class RewardError(Exception):
    """A user's reward that raises or returns no score, told in one sentence with its name and the problem's id."""


class Answered(Protocol):
    """What a reward sees of a completion: its text, and the problem that it answers."""

    @property
    def text(self) -> str: ...

    @property
    def problem(self) -> Problem: ...


@dataclass(frozen=True)
class Attempt:
    """A text that answers a problem, by itself: no model wrote it."""

    text: str
    problem: Problem


@dataclass(frozen=True)
class Score:
    """What one completion is worth; ``components`` are logged by name, ``parsed`` says that an answer was found."""

    reward: float
    correct: bool
    components: dict[str, float]
    parsed: bool


@dataclass(frozen=True, kw_only=True)
class Reward(Schema, ABC, block="reward"):
    """Base of all rewards: ``reward(completions)`` is one ``Score`` for each completion, in their order."""

    name: str = key("plain: 0/1 and a format bonus; paper: as published; custom: yours")

    @classmethod
    def select(cls, values: Mapping[str, Any]) -> type[Self]:
        """The class that ``reward.name`` names. Raises ConfigError with the list of rewards."""
        from pspo.reward import REWARDS  # the table imports the classes that import this module

        if cls is not Reward:  # a user's own class, by itself
            return cls
        if values.get("name") not in REWARDS:
            raise unknown(str(values.get("name")), REWARDS, "reward")
        return cast(type[Self], REWARDS[values["name"]])

    @abstractmethod
    def __call__(self, completions: Sequence[Answered]) -> list[Score]:
        """One score for each completion."""

    def check(self) -> None:
        """Refuse what can be seen before anything is loaded. Raises ConfigError."""

    def check_gold(self, problems: Sequence[Problem]) -> None:
        """Grade every gold answer against itself: a reward that fails it would train on noise. Raises ConfigError."""
        scores = self([Attempt(f"#### {problem.answer}", problem) for problem in problems])
        for problem, score in zip(problems, scores, strict=True):
            if not score.correct:
                told = f"the gold answer {problem.answer!r}, written as '#### <answer>', is not correct under reward="
                raise ConfigError(f"problem {problem.id}: {told}{self.name}; mend the data or set reward=custom")

    def source_files(self) -> list[Path]:
        """The user's own files that decide what a completion is worth, for the digest in a run's identity."""
        return []
