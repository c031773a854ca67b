"""What a completion is worth. How its answer is found and compared is told in ``pspo/reward/answer.py``."""

import importlib
import importlib.util
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal, Self, cast

from pspo.base.schema import ConfigError, Schema, key
from pspo.dataset import Problem
from pspo.reward.answer import asked, extract, normal, number, same

__all__ = [
    "Reward",
    "RewardConfig",
    "Score",
    "asked",
    "check_gold",
    "extract",
    "make_reward",
    "normal",
    "number",
    "paper",
    "plain",
    "same",
]

log = logging.getLogger(__name__)

CUSTOM_SAMPLE = 16
"""Gold answers shown to a user's own reward at the start, which may be slow."""


@dataclass(frozen=True)
class Score:
    """What one completion is worth; ``components`` are logged by name, ``parsed`` says that an answer was found."""

    reward: float
    correct: bool
    components: dict[str, float]
    parsed: bool


Reward = Callable[[Sequence[Any]], list[Score]]


@dataclass(frozen=True, kw_only=True)
class RewardConfig(Schema, block="reward"):
    """Which reward; ``paper`` has no keys of its own."""

    name: Literal["plain", "paper", "custom"] = key("plain: 0/1 and a format bonus; paper: as published; custom: yours")

    @classmethod
    def select(cls, values: Mapping[str, Any]) -> type[Self]:
        """Each reward has keys of its own."""
        kinds: dict[Any, type[RewardConfig]] = {"plain": PlainConfig, "custom": CustomConfig}
        return cast(type[Self], kinds.get(values.get("name"), cls))

    def source_files(self) -> list[Path]:
        """The user's own files that decide what a completion is worth."""
        return []


@dataclass(frozen=True, kw_only=True)
class PlainConfig(RewardConfig):
    """Reward = 1 if the answer is correct, plus ``format_bonus`` if it stands on a line ``#### <answer>``."""

    format_bonus: float = key("added when the completion has the asked format", within="[0, 1]")


@dataclass(frozen=True, kw_only=True)
class CustomConfig(RewardConfig):
    """A user's own function of (completion, problem), returning a number or a ``Score``."""

    function: str = key("path/to/file.py:function or package.module:function", path=True)

    def source_files(self) -> list[Path]:
        """The file of the function, where it is named by its file."""
        place = Path(self.function.rpartition(":")[0])
        return [place] if place.suffix == ".py" and place.is_file() else []


def make_reward(config: RewardConfig) -> Reward:
    """The reward that the configuration names. Raises ConfigError where a custom function cannot be had."""
    if isinstance(config, PlainConfig):
        return lambda cs: [plain(c.text, c.problem, config.format_bonus) for c in cs]
    if isinstance(config, CustomConfig):
        function = _find(config)
        return lambda cs: [_custom(function, config.function, c.text, c.problem) for c in cs]
    return lambda cs: [paper(c.text, c.problem) for c in cs]


def plain(completion: str, problem: Problem, format_bonus: float) -> Score:
    """1 if correct, plus the bonus for the format, which so tells even two correct completions apart."""
    line = asked(completion)
    answer = line or extract(completion)
    correct = answer is not None and same(answer, problem.answer)
    components = {"correct": float(correct), "format": 0.0 if line is None else format_bonus}
    return Score(sum(components.values()), correct, components, answer is not None)


def paper(completion: str, problem: Problem) -> Score:
    """The published shaping: 1 if correct, + 0.05 for the format, − 0.2 without an answer, clipped to [0, 1].

    Source: arXiv 2509.21282. So the bonus never helps a correct answer, the − 0.2 never shows, and in a group that is
    all wrong the bonus alone is normalised to the weight of correctness. That is kept, as it is the published reward.
    Not kept are two slips of the published code: no bonus for one character after ``####`` (``#### 8``), and the first
    ``####`` taken though it be a heading.
    """
    raw = plain(completion, problem, 0.05)
    components = {**raw.components, "missing": 0.0 if raw.parsed else -0.2}
    return Score(min(1.0, max(0.0, sum(components.values()))), raw.correct, components, raw.parsed)


def check_gold(reward: Reward, config: RewardConfig, problems: Sequence[Problem]) -> None:
    """Grade every gold answer against itself: a grader that fails it would train on noise. Raises ConfigError.

    A custom reward may be about something else than the gold answer, so it is told in a warning only.
    """
    for problem in problems[:CUSTOM_SAMPLE] if isinstance(config, CustomConfig) else problems:
        if not reward([SimpleNamespace(text=f"#### {problem.answer}", problem=problem)])[0].correct:
            told = f"problem {problem.id}: the gold answer {problem.answer!r} is not correct under reward={config.name}"
            if not isinstance(config, CustomConfig):
                raise ConfigError(f"{told}; mend the data or give a reward of your own (reward=custom)")
            log.warning("%s, when written as '#### <answer>'", told)
            return


def _find(config: CustomConfig) -> Callable[[str, Problem], Any]:
    place, _, name = config.function.rpartition(":")
    is_file = place.endswith(".py")
    if is_file and not Path(place).is_file():
        raise config.refuse("function", f"there is no file {place}")
    if not is_file and not all(part.isidentifier() for part in place.split(".")):
        raise config.refuse("function", "must be path/to/file.py:function or package.module:function")
    try:
        module = _load(Path(place)) if is_file else importlib.import_module(place)
    except (ImportError, SyntaxError) as error:
        raise config.refuse("function", f"cannot be imported: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise config.refuse("function", f"{place} has no function {name}")
    return cast(Callable[[str, Problem], Any], function)


def _load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"pspo_reward_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass in the file looks itself up there
    spec.loader.exec_module(module)
    return module


def _custom(function: Callable[[str, Problem], Any], name: str, completion: str, problem: Problem) -> Score:
    """A number becomes a score that is correct from 1 on. Raises ValueError for what is no finite number."""
    result = function(completion, problem)
    given = result.components if isinstance(result, Score) else {"custom": result}
    reward = result.reward if isinstance(result, Score) else result
    for value in (reward, *given.values()):
        if not isinstance(value, Real) or not math.isfinite(value):
            told = f"reward.function={name} must return a finite number or a Score of finite numbers, got {result!r}"
            raise ValueError(f"{told} on problem {problem.id}")
    components = {component: float(value) for component, value in given.items()}  # NumPy's own types are no JSON
    if isinstance(result, Score):
        return Score(float(reward), bool(result.correct), components, bool(result.parsed))
    return Score(float(reward), float(reward) >= 1, components, True)
