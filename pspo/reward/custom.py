"""A user's own reward."""

import functools
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any

from pspo.base import user_code
from pspo.base.schema import ConfigError, build, key
from pspo.dataset import Problem
from pspo.reward.base import Answered, Reward, RewardError, Score

MAX_GOLDS_GRADED = 16  # gold answers that are graded against themselves by a user's own reward, which may be slow


@dataclass(frozen=True, kw_only=True)
class Custom(Reward):
    """A user's function of (completion's text, problem), called for each, or a subclass of ``Reward``, for a batch.

    The function returns a number, which is correct from 1 on, or a ``Score``; all else is a RewardError.
    """

    refuses_wrong_golds = False  # a user's own reward may be about something else

    function: str = key("your function or Reward class: path/to/file.py:name or package.module:name", path=True)
    options: dict[str, Any] = key("further arguments of your function, or the keys of your class, by name")

    def __call__(self, completions: Sequence[Answered]) -> list[Score]:
        if not isinstance(self._own, Reward):
            results = [self._call(f"problem {c.problem.id}", c.text, c.problem) for c in completions]
        elif completions:
            batch = f"{len(completions)} completions, the first of problem {completions[0].problem.id}"
            results = self._call(batch, completions)
            if not isinstance(results, Sequence) or len(results) != len(completions):
                raise self._error(f"must return a list of {len(completions)} scores, got {results!r}", batch)
        return list(map(self._score, results, completions)) if completions else []

    def check(self) -> None:
        assert callable(self._own)

    def ungradable(self, problems: Sequence[Problem]) -> list[Problem]:
        return super().ungradable(problems[:MAX_GOLDS_GRADED])

    def source_files(self) -> list[Path]:
        return user_code.source_files(self.function)

    @functools.cached_property
    def _own(self) -> Callable[..., Any]:
        named = user_code.find(self, "function")
        if not isinstance(named, type):
            return functools.partial(named, **self.options)
        if not issubclass(named, Reward):
            raise self.refuse("function", "a class must be a subclass of pspo.reward.Reward")
        named.block = f"{self.block}.options"
        defaults = {field.name: field.default for field in fields(named) if field.default is not MISSING}
        try:
            return build(named, defaults | self.options | {"name": self.name})
        except ConfigError:
            raise
        except Exception as error:  # whatever the user's class raises
            reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
            raise self.refuse("function", f"cannot be made: {reason}") from error

    def _call(self, subject: str, *arguments: Any) -> Any:
        try:
            return self._own(*arguments)
        except Exception as error:  # whatever the user's code raises
            raise self._error(f"raised {type(error).__name__}: {error}", subject) from error

    def _score(self, result: Any, completion: Answered) -> Score:
        score = result if isinstance(result, Score) else Score(result, False, {"custom": result}, True)
        numbers = [score.reward, *score.components.values()] if isinstance(score.components, Mapping) else [None]
        if not all(isinstance(x, Real) and abs(x) <= sys.float_info.max for x in numbers):
            reason = f"must return a finite number or a Score of finite numbers, got {result!r}"
            raise self._error(reason, f"problem {completion.problem.id}")
        components = {str(name): float(value) for name, value in score.components.items()}  # NumPy's are no JSON
        correct = bool(score.correct) if isinstance(result, Score) else float(result) >= 1
        strict, timed_out = score.strict if score.strict is None else bool(score.strict), bool(score.timed_out)
        return Score(float(score.reward), correct, components, bool(score.parsed), strict, timed_out)

    def _error(self, reason: str, subject: str) -> RewardError:
        short = textwrap.shorten(reason, 200)
        return RewardError(f"reward.function={self.function} {short} on {subject}; mend it and run the command again")
