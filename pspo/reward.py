r"""Answer extraction and scoring. Model output is only ever read as text: nothing in it is evaluated.

The asked format is a line ``#### <answer>``. The first such line counts: what a model writes after its final answer
is another conversation, and nobody hedges by writing several. Where none can be read, the flexible rule takes the last
``\boxed{...}``, else the first number behind the last "answer is" or "answer:", else the last number of the text.

Numbers may carry thousands commas, a sign, decimals, a fraction (``3/4``, ``1 1/2``, ``\frac{3}{4}``), a currency sign,
and a unit; a percent sign is a unit, so 25% equals 25 and not 0.25. They are equal within 1e-6, relative or absolute.
Other answers (names, LaTeX) are compared as text without spaces, case and decoration, lists item by item.
"""

import collections
import importlib
import importlib.util
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Self, cast

from pspo.dataset import Problem
from pspo.schema import ConfigError, Schema, key

log = logging.getLogger("pspo")

MAX_DIGITS = 60
"""A longer run of digits is no number: Python's own limit on integers would raise on one of thousands."""

_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
_INTEGER = "[0-9]{1,20}"
_NUMBER = re.compile(
    r"(?P<sign>[-+]?) ?[$£€¥]?(?P<minus>-?)(?:"
    rf"(?P<whole>(?:{_INTEGER})?) {{0,2}}\\frac"
    rf"(?:\{{(?P<tex_top>-?{_INTEGER})\}}\{{(?P<tex_bottom>{_INTEGER})\}}|(?P<t>[0-9])(?P<b>[0-9]))"
    rf"|(?P<mixed>{_INTEGER}) {{1,2}}(?P<top>{_INTEGER})/(?P<bottom>{_INTEGER})(?![0-9])"
    rf"|(?P<left>{_DECIMAL})(?: ?/ ?(?P<right>{_DECIMAL}))?"
    r")"
)
"""Every quantifier is bounded or cannot match the same text in two ways, so a search takes linear time."""

_DROPPED = (
    *(
        "\\left",
        "\\right",
        "\\!",
        "\\,",
        "\\;",
        "\\(",
        "\\)",
        "\\[",
        "\\]",
        "**",
        "$",
        "^\\circ",
        "^{\\circ}",
        "\\circ",
    ),
    *("°", "\\text", "\\mathrm", "\\mbox", "{}"),
)
_DECORATION = (
    ("\\\\", ";"),  # rows of a matrix
    *((piece, "") for piece in _DROPPED),
    *(("\\dfrac", "\\frac"), ("\\tfrac", "\\frac"), ("\\%", "%"), ("{,}", ","), ("\\ ", " ")),
    *(("−", "-"), ("–", "-"), ("\u00a0", " "), ("\u202f", " ")),
)


@dataclass(frozen=True)
class Score:
    """What one completion is worth; ``components`` are logged by name, ``parsed`` says that an answer was found."""

    reward: float
    correct: bool
    components: dict[str, float]
    parsed: bool


Reward = Callable[[str, Problem], Score]


@dataclass(frozen=True, kw_only=True)
class RewardConfig(Schema, block="reward"):
    """Which reward; ``paper`` has no keys of its own."""

    name: Literal["plain", "paper", "custom"] = key("plain: 0/1 and a format bonus; paper: as published; custom: yours")

    @classmethod
    def select(cls, values: Mapping[str, Any]) -> type[Self]:
        """Each reward has keys of its own."""
        kinds: dict[Any, type[RewardConfig]] = {"plain": PlainConfig, "custom": CustomConfig}
        return cast(type[Self], kinds.get(values.get("name"), cls))


@dataclass(frozen=True, kw_only=True)
class PlainConfig(RewardConfig):
    """Reward = 1 if the answer is correct, plus ``format_bonus`` if it stands on a line ``#### <answer>``."""

    format_bonus: float = key("added when the completion has the asked format", within="[0, 1]")


@dataclass(frozen=True, kw_only=True)
class CustomConfig(RewardConfig):
    """A user's own function of (completion, problem), returning a number or a ``Score``."""

    function: str = key("path/to/file.py:function or package.module:function")


def make_reward(config: RewardConfig) -> Reward:
    """The reward that the configuration names. Raises ConfigError where a custom function cannot be had."""
    if isinstance(config, PlainConfig):
        return lambda completion, problem: plain(completion, problem, config.format_bonus)
    if isinstance(config, CustomConfig):
        function = _find(config)
        return lambda completion, problem: _custom(function, config.function, completion, problem)
    return paper


def plain(completion: str, problem: Problem, format_bonus: float) -> Score:
    """1 if correct, plus the bonus for the format, which so separates even two correct completions."""
    answer, strict = extract(completion)
    correct = answer is not None and same(answer, problem.answer)
    components = {"correct": float(correct), "format": format_bonus * strict}
    return Score(sum(components.values()), correct, components, answer is not None)


def paper(completion: str, problem: Problem) -> Score:
    """The published shaping: 1 if correct, + 0.05 for the format, − 0.2 without an answer, clipped to [0, 1].

    Source: arXiv 2509.21282. So the bonus never helps a correct answer and the − 0.2 never shows. The published pattern
    wanted a digit and one more character after ``####``, so that ``#### 8`` got no bonus; that is not repeated.
    """
    answer, strict = extract(completion)
    correct = answer is not None and same(answer, problem.answer)
    components = {"correct": float(correct), "format": 0.05 * strict, "missing": -0.2 * (answer is None)}
    return Score(min(1.0, max(0.0, sum(components.values()))), correct, components, answer is not None)


def check_gold(reward: Reward, config: RewardConfig, problems: Sequence[Problem]) -> None:
    """Grade every gold answer against itself: a grader that fails it would train on noise. Raises ConfigError.

    A custom reward may be about something else than the gold answer, so it is told in a warning only.
    """
    for problem in problems:
        if not reward(f"#### {problem.answer}", problem).correct:
            sentence = (
                f"problem {problem.id}: the gold answer {problem.answer!r} is not correct under reward={config.name}"
            )
            if not isinstance(config, CustomConfig):
                raise ConfigError(f"{sentence}; mend the data or give a reward of your own (reward=custom)")
            log.warning("%s, when written as '#### <answer>'", sentence)
            return


def extract(completion: str) -> tuple[str | None, bool]:
    """The answer that a completion gives, and whether it stands in the asked format; (None, False) without one."""
    text = _undecorate(completion)
    _, mark, rest = text.partition("####")
    if mark:
        line = rest.lstrip(" #:").partition("\n")[0].strip()
        if line:
            return line, True
    boxed = _boxed(text)
    if boxed:
        return boxed, False
    lowered = text.lower()
    said = max(lowered.rfind("answer is"), lowered.rfind("answer:"))
    if said >= 0:
        line = text[said:].partition("\n")[0][len("answer:") :].removeprefix("is").strip(" :")
        found = _NUMBER.search(line)
        if found:
            return found[0], False
    numbers = collections.deque(_NUMBER.finditer(text), maxlen=1)
    return (numbers[0][0].strip(), False) if numbers else (None, False)


def same(answer: str, gold: str) -> bool:
    """Whether an extracted answer equals the gold one: as numbers, else item by item, else as text."""
    answer, gold = _undecorate(answer), _undecorate(gold)
    wanted, given = number(gold), number(answer)
    if wanted is None and given is not None and _text(answer) == _text(gold):
        return True
    if wanted is not None:
        return given is not None and _equal(given, wanted)
    if given is not None:
        return False
    answers, golds = _items(answer), _items(gold)
    if len(answers) != len(golds) or len(golds) == 1:
        return _text(answer) == _text(gold)
    return all(_same_item(a, g) for a, g in zip(answers, golds, strict=True))


def number(text: str) -> Fraction | None:
    """The value of a text that is a number with, at most, a unit behind it; None for anything else."""
    text = _undecorate(text).strip().rstrip(".!?,;: ")
    name, equals, value = text.rpartition("=")
    if equals and (name.strip().isalpha() or not re.search(r"[^\W\d_]", name)):  # x = 5 and 3 + 4 = 7, no equation
        text = value.strip()
    found = _NUMBER.match(text)
    return _value(found) if found and _is_unit(text[found.end() :]) else None


def _value(found: re.Match[str]) -> Fraction | None:
    if found.end() - found.start() > MAX_DIGITS:
        return None
    part = found.groupdict()
    if part["left"] is not None:
        top, bottom = _fraction(part["left"]), _fraction(part["right"] or "1")
    elif part["mixed"] is not None:
        top, bottom = Fraction(int(part["top"])), Fraction(int(part["bottom"]))
    else:
        top, bottom = Fraction(int(part["tex_top"] or part["t"])), Fraction(int(part["tex_bottom"] or part["b"]))
    if bottom == 0:
        return None
    value = int(part["mixed"] or part["whole"] or 0) + top / bottom
    return -value if "-" in (part["sign"], part["minus"]) else value


def _fraction(decimal: str) -> Fraction:
    return Fraction(Decimal(decimal.replace(",", "").rstrip(".")))


def _is_unit(rest: str) -> bool:
    r"""``%``, ``" apples"``, ``" (apples)"``, ``cm^2``; not ``\pi``, ``x``, ``:30`` or ``+ 2``, which change it."""
    if not rest or rest[0] in "%°":
        return True
    if rest[0] == " ":
        return bool(re.match(r" +(?:[^\W\d_]{2}|[^\W\d_]\b(?! *[-+*/=0-9])|[(%{])", rest))
    return re.match(r"[^\W\d_]{2}|\{[^\W\d_]", rest) is not None


def _undecorate(text: str) -> str:
    for piece, plain_text in _DECORATION:
        text = text.replace(piece, plain_text)
    return text


def _text(answer: str) -> str:
    return "".join(answer.split()).rstrip(".").replace("{", "").replace("}", "").casefold()


def _items(answer: str) -> list[str]:
    """The items of ``(a, b)`` or ``[a, b)`` in order with their brackets, of a bare ``a, b`` or ``a; b`` sorted."""
    answer = answer.strip().rstrip(".")
    bracketed = answer[:1] in "([" and answer[-1:] in ")]" and len(answer) > 2
    inner = answer[1:-1] if bracketed else answer
    items, depth, start = [], 0, 0
    for i, letter in enumerate(inner):
        depth += (letter in "([{") - (letter in ")]}")
        if letter in ",;" and depth == 0:
            items.append(inner[start:i])
            start = i + 1
    items.append(inner[start:])
    return [answer[0], *items, answer[-1]] if bracketed else sorted(items, key=_text)


def _equal(a: Fraction, b: Fraction) -> bool:
    return abs(a - b) <= Fraction(1, 10**6) * max(Fraction(1), abs(b))


def _same_item(answer: str, gold: str) -> bool:
    given, wanted = number(answer), number(gold)
    if given is not None and wanted is not None:
        return _equal(given, wanted)
    return _text(answer) == _text(gold)


def _boxed(text: str) -> str:
    r"""What the last ``\boxed{...}`` holds; "" without one."""
    start = text.rfind("\\boxed{")
    depth = 0
    for i in range(start + len("\\boxed"), len(text) if start >= 0 else 0):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start + len("\\boxed{") : i].strip()
    return ""


def _find(config: CustomConfig) -> Callable[[str, Problem], Any]:
    place, _, name = config.function.rpartition(":")
    try:
        if place.endswith(".py"):
            if not Path(place).is_file():
                raise config.refuse("function", f"there is no file {place}")
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except (ImportError, SyntaxError) as error:
        reason = f"cannot be imported ({error}); give path/to/file.py:function or package.module:function"
        raise config.refuse("function", reason) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise config.refuse("function", f"{place} has no function {name}")
    return cast(Callable[[str, Problem], Any], function)


def _custom(function: Callable[[str, Problem], Any], name: str, completion: str, problem: Problem) -> Score:
    """A number becomes a score that is correct from 1 on. Raises ValueError for what is no finite number."""
    result = function(completion, problem)
    if isinstance(result, Score):
        return result
    if not isinstance(result, int | float) or not math.isfinite(result):
        raise ValueError(
            f"reward.function={name} must return a finite number or a Score, got {result!r} on {problem.id}"
        )
    return Score(float(result), result >= 1, {"custom": float(result)}, True)
