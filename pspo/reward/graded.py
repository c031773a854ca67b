"""Rewards that compare a completion's answer with the gold answer."""

from collections.abc import Sequence
from dataclasses import dataclass

from pspo.base.schema import key
from pspo.reward.answer import asked, extract, same
from pspo.reward.base import Answered, Reward, Score


@dataclass(frozen=True, kw_only=True)
class Plain(Reward):
    """1 for a correct answer, plus ``format_bonus`` for a line ``#### <answer>``, even where the answer is wrong."""

    format_bonus: float = key("added when the completion has the asked format", within="[0, 1]")

    def __call__(self, completions: Sequence[Answered]) -> list[Score]:
        return [_grade(completion, self.format_bonus) for completion in completions]


@dataclass(frozen=True, kw_only=True)
class Paper(Reward):
    """The published shaping: 1 if correct, + 0.05 for the format, − 0.2 without an answer, clipped to [0, 1].

    Source: arXiv 2509.21282. So the bonus never helps a correct answer, the − 0.2 never shows, and in a group that is
    all wrong the bonus alone is normalised to the weight of correctness, as in the published reward. Two slips of the
    published code are mended: no bonus for one character after ``####`` (``#### 8``), and the first ``####`` taken
    though it be a heading.
    """

    def __call__(self, completions: Sequence[Answered]) -> list[Score]:
        return [_grade(completion, 0.05, published=True) for completion in completions]


def _grade(completion: Answered, format_bonus: float, published: bool = False) -> Score:
    line = asked(completion.text)
    answer = line or extract(completion.text)
    correct = answer is not None and same(answer, completion.problem.answer)
    components = {"correct": float(correct), "format": 0.0 if line is None else format_bonus}
    if published:
        components["missing"] = -0.2 if answer is None else 0.0
    reward = sum(components.values())
    reward = min(1.0, max(0.0, reward)) if published else reward
    return Score(reward, correct, components, answer is not None, strict=correct and line is not None)
