"""The interface of every reward, which is called with a batch of completions, and the rewards of plain answers."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Protocol

from pspo.base.schema import ConfigError, Schema, key
from pspo.dataset import Problem
from pspo.reward.answer import asked, extract, same

log = logging.getLogger(__name__)


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


def score_of(verdict: bool | None, parsed: bool, in_format: bool, format_bonus: float) -> Score:
    """1 for a correct answer plus the bonus for the asked format; 0 for the verdict None, of a grader out of time."""
    correct = bool(verdict)
    components = {"correct": float(correct), "format": format_bonus if in_format and verdict is not None else 0.0}
    return Score(sum(components.values()), correct, components, parsed, correct and in_format, verdict is None)


@dataclass(frozen=True, kw_only=True)
class Reward(Schema, ABC, block="reward"):
    """Base of all rewards: ``reward(completions)`` is one ``Score`` for each completion, in their order."""

    refuses_wrong_golds: ClassVar[bool] = True

    name: str = key(
        "plain: 0/1 and a format bonus; paper: as published; math: plain for LaTeX; exact: the same text; custom: yours"
    )

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
        """Raise ConfigError for a gold answer that is not correct, as a policy would train on noise; or warn of it."""
        if wrong := self.ungradable(problems):
            reason = f"the gold answer {wrong[0].answer!r}, written as '#### <answer>', is not correct under reward="
            sentence = f"problem {wrong[0].id}: {reason}{self.name}"
            if self.refuses_wrong_golds:
                raise ConfigError(f"{sentence}; mend the data or set reward=custom")
            log.warning("%s; there are %d such problems", sentence, len(wrong))

    def source_files(self) -> list[Path]:
        """The user's own files that decide rewards, for the digest in a run's identity."""
        return []


@dataclass(frozen=True, kw_only=True)
class Plain(Reward):
    """1 for a correct answer, plus ``format_bonus`` for a line ``#### <answer>``, even where the answer is wrong."""

    format_bonus: float = key("added when the completion has the asked format", within="[0, 1]")

    def __call__(self, completions: Sequence[Answered]) -> list[Score]:
        return [_grade(completion, self.format_bonus) for completion in completions]


@dataclass(frozen=True, kw_only=True)
class Paper(Reward):
    """The published shaping: 1 if correct, + 0.05 for the format, − 0.2 without an answer, clipped to [0, 1].

    Source: arXiv 2509.21282. As published, the bonus never helps a correct answer, and in a group that is all wrong it
    is normalised to the weight of correctness. Two slips of the published code are mended: no bonus for one character
    after ``####``, and the first ``####`` taken though it be a heading.
    """

    def __call__(self, completions: Sequence[Answered]) -> list[Score]:
        return [_shaped(_grade(completion, 0.05)) for completion in completions]


class Exact(Reward):
    """1 for a completion whose whole text is the gold answer, else 0."""

    def __call__(self, completions: Sequence[Answered]) -> list[Score]:
        right = [completion.text == completion.problem.answer for completion in completions]
        return [Score(float(correct), correct, {}, parsed=True) for correct in right]

    def ungradable(self, problems: Sequence[Problem]) -> list[Problem]:
        return []


def _grade(completion: Answered, format_bonus: float) -> Score:
    line = asked(completion.text)
    answer = line or extract(completion.text)
    correct = answer is not None and same(answer, completion.problem.answer)
    return score_of(correct, answer is not None, line is not None, format_bonus)


def _shaped(score: Score) -> Score:
    components = score.components | {"missing": 0.0 if score.parsed else -0.2}
    return replace(score, reward=min(1.0, max(0.0, sum(components.values()))), components=components)
