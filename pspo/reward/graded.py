"""Rewards that compare a completion's answer with the gold answer."""

from collections.abc import Sequence
from dataclasses import dataclass

from pspo.base.schema import key
from pspo.dataset import Problem
from pspo.reward.answer import asked, extract, same
from pspo.reward.base import Answered, Reward, Score


@dataclass(frozen=True, kw_only=True)
class Plain(Reward):
    """1 for a correct answer, plus ``format_bonus`` for a line ``#### <answer>``, even where the answer is wrong."""

    format_bonus: float = key("added when the completion has the asked format", within="[0, 1]")

    def __call__(self, completions: Sequence[Answered]) -> list[Score]:
        return [_grade(completion.text, completion.problem, self.format_bonus) for completion in completions]


@dataclass(frozen=True, kw_only=True)
class Paper(Reward):
    """The published shaping: 1 if correct, + 0.05 for the format, − 0.2 without an answer, clipped to [0, 1].

    Source: arXiv 2509.21282. So the bonus never helps a correct answer, the − 0.2 never shows, and in a group that is
    all wrong the bonus alone is normalised to the weight of correctness. That is kept, as it is the published reward.
    Not kept are two slips of the published code: no bonus for one character after ``####`` (``#### 8``), and the first
    ``####`` taken though it be a heading.
    """

    def __call__(self, completions: Sequence[Answered]) -> list[Score]:
        return [self._shaped(_grade(completion.text, completion.problem, 0.05)) for completion in completions]

    def _shaped(self, raw: Score) -> Score:
        components = {**raw.components, "missing": 0.0 if raw.parsed else -0.2}
        return Score(min(1.0, max(0.0, sum(components.values()))), raw.correct, components, raw.parsed)


def _grade(text: str, problem: Problem, format_bonus: float) -> Score:
    line = asked(text)
    answer = line or extract(text)
    correct = answer is not None and same(answer, problem.answer)
    components = {"correct": float(correct), "format": 0.0 if line is None else format_bonus}
    return Score(sum(components.values()), correct, components, answer is not None)
