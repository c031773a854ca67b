r"""The answer in a completion, and when two answers are equal. Nothing that a model writes is ever evaluated.

Which answer. The asked format is a line ``#### <answer>``. The first such line with a number counts: what a base model
writes after its final answer is another conversation, and headings such as ``#### Step 1: add`` hold no number. Where
none does, the completion's last line counts if it is ``#### <any text>``. Else the flexible rule: the last
``\boxed{...}``; what follows the last "answer is" or "answer:" on its line, of which a first number is taken out unless
it is a part of something else (``5\pi``, ``3:30``, ``x^2``); the last number of the text.

Numbers may carry thousands commas, a sign, decimals, an exponent, a fraction (``3/4``, ``1 1/2``, ``\frac{3}{4}``),
a currency sign and a unit; a percent sign is a unit, so 25% equals 25 and not 0.25; a ratio 3:4 is no number. Numbers
are equal within 1e-6, relative or absolute. All else (names, LaTeX) is compared in the form that ``normal`` gives,
lists item by item: ``(a, b)`` and ``a; b`` in order, a bare ``a, b`` or ``\{a, b\}`` in any.
"""

import functools
import re
from collections import deque
from decimal import Decimal
from fractions import Fraction

TOLERANCE = Fraction(1, 10**6)
MAX_LENGTH = 100
"""A longer number is none: Python refuses to convert thousands of digits, and arithmetic on them is slow."""

# Patterns meet model output: each repeats without bound only what the next piece cannot match, so time stays linear.
_DECIMAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}])[-+])?(?:"  # the minus of 5-3 is no sign
    r"(?P<whole>[0-9]{0,20}) {0,2}\\frac ?(?:\{(?P<top>-?[0-9]{1,30})\}|(?P<t>[0-9]))"
    r" ?(?:\{(?P<bottom>[0-9]{1,30})\}|(?P<b>[0-9]))"
    r"|(?P<mixed>[0-9]{1,20}) {1,2}(?P<over>[0-9]{1,20})/(?P<under>[0-9]{1,20})(?![0-9])"
    rf"|(?P<left>{_DECIMAL})(?: ?/ ?(?P<right>{_DECIMAL}))?"
    r")"
)
_UNIT = re.compile(  # what may follow a number without changing it: "%", " apples", " (apples)", "cm^2", "th"
    r"(?:%| *\(|(?:[cmk]m|[mk]g|ml|min|hrs?|lbs?|oz|ft|in|mph|st|[nr]d|th|[ap]\.?m)(?![^\W_])"
    r"| +(?!(?:hundred|thousand|[mbtr]+illion|dozen|and|or|to|times|plus|minus|over|pi|sqrt)\b)"
    r"(?:[^\W\d_]{2}|[mgslh]\b|[ap]\.m))"
    r"(?:[^\W\d_]|[ ()/.'’%-]|\^\{?[23]\}?)*",
    re.IGNORECASE,
)
_SAID = re.compile(r"\banswer(?: *(?:is|:|=))+", re.IGNORECASE)
_GOES_ON = re.compile(r" ?[-+*/×] ?[0-9(\\]|[:,][0-9]|[\^_][\w{]| ?\\[A-Za-z]|[^\W\d_]\b")  # 5\pi, 3:30, 2 + 3, 5x
_LINE = re.compile(r"^[ \t]*####(?!#)[ \t]*(.*)", re.MULTILINE)
_NAME = re.compile(r"^ *[A-Za-z] *(?:=|\\in(?![a-z]))")
_WORDS = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox) ?\{([^{}]*)\}")
_NOISE = re.compile(
    r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\! ?|\\[,;:()\[\]$]|\^\{\\circ\}|\^?\\circ(?![A-Za-z])|[$£€¥₹°]"
)
_SPELLINGS = {
    **{"\\\\": ";", "\\%": "%", "\\{": "{", "\\}": "}", "{,}": ",", "\\ ": " ", "**": " "},
    **{"\\dfrac": "\\frac", "\\tfrac": "\\frac", "−": "-", "–": "-", "\u00a0": " ", "\u202f": " "},
}


def extract(text: str) -> str | None:
    """The answer that a completion gives, in the asked format or by the flexible rule above, or None."""
    clean = _clean(text)
    numbers = deque(_NUMBER.finditer(clean), maxlen=1)
    return asked(text) or _boxed(clean) or _said(clean) or (numbers[0][0] if numbers else None)


def asked(text: str) -> str | None:
    """The answer that a completion gives on a line ``#### <answer>``, as asked, or None."""
    text = _clean(text).rstrip()
    line = None
    for line in _LINE.finditer(text):
        answer = _boxed(line[1]) or line[1].strip()
        if number(answer) is not None:
            return answer
    if line is None or line.end() < len(text) or _SAID.search(line[1]):
        return None
    return _boxed(line[1]) or line[1].strip() or None


def same(answer: str, gold: str) -> bool:
    """Whether two answers are equal: as numbers, else as lists item by item, else in their normal form."""
    golds = [gold] if number(gold) is not None else _items(gold)
    if len(golds) == 1:
        return _same_item(answer, gold)
    answers = _items(answer)
    if len(answers) != len(golds):
        return False
    if golds[0] not in ("(", "[") and ";" not in _clean(gold):
        answers, golds = sorted(answers, key=_rank), sorted(golds, key=_rank)
    return all(_same_item(a, g) for a, g in zip(answers, golds, strict=True))


@functools.lru_cache(1024)  # a group's completions give few answers, and all have one gold answer
def number(text: str) -> Fraction | None:
    """The value of a text that is a number with, at most, a name or sum before (``x = 5``) and a unit behind it."""
    text = _clean(text).strip().rstrip(".!?,;: ")
    if text[:1] + text[-1:] == "<>":  # <18>, copied from the prompt's <answer>
        text = text[1:-1]
    name, equals, value = text.rpartition("=")
    if equals and (name.replace(" ", "").isalpha() or not re.search(r"[^\W\d_]", name)):
        text = value.strip()
    text = re.sub(r"^([-+]?) ?(?:\(([^()]*)\)$)?", r"\1\2", text)  # -(1/3), - 7
    found = _NUMBER.match(text)
    if not found or len(found[0]) > MAX_LENGTH:
        return None
    rest = text[found.end() :]
    heading = found[0].endswith(".") and rest  # "1. Count the eggs"
    return _value(found) if not heading and (not rest or _UNIT.fullmatch(rest)) else None


def normal(text: str) -> str:
    r"""The text without spaces, case, full stops, ``x =`` or ``x \in`` before it, and braces around one character.

    Before that, ``\left``, ``\right``, ``\!``, ``\,``, ``$``, degrees and ``\text{...}`` go, ``\dfrac`` is ``\frac``.
    """
    text = _NAME.sub("", _clean(text))
    text = re.sub(r"\.(?![0-9])", "", "".join(text.split()))
    return re.sub(r"\{([^{}\\])\}", r"\1", text).casefold()


def _clean(text: str) -> str:
    for old, new in _SPELLINGS.items():
        text = text.replace(old, new)
    return _NOISE.sub("", _WORDS.sub(r" \1 ", text))


def _boxed(text: str) -> str | None:
    r"""What the last ``\boxed{...}`` holds; None without one."""
    _, box, rest = text.rpartition("\\boxed{")
    depth = 1
    for brace in re.finditer(r"[{}]", rest if box else ""):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return rest[: brace.start()].strip() or None
    return None


def _said(text: str) -> str | None:
    said = deque(_SAID.finditer(text), maxlen=1)
    if not said:
        return None
    line = text[said[0].end() :].partition("\n")[0].strip()
    inside = None if number(line) is not None or line.startswith(("(", "[")) else _NUMBER.search(line)
    if inside and not _GOES_ON.match(line, inside.end()) and line[: inside.start()][-1:] not in tuple("^_{/:"):
        return inside[0]
    return line.rstrip(".") or None


def _value(found: re.Match[str]) -> Fraction | None:
    part = {name: (digits or "").replace(",", "") for name, digits in found.groupdict().items()}
    if part["left"]:
        top, bottom = (Fraction(Decimal(part[side] or 1)) for side in ("left", "right"))
    else:
        top = Fraction(int(part["top"] or part["t"] or part["over"]))
        bottom = Fraction(int(part["bottom"] or part["b"] or part["under"]))
    if bottom == 0:
        return None
    value = int(part["whole"] or part["mixed"] or 0) + top / bottom
    return -value if part["sign"] == "-" else value


def _items(answer: str) -> list[str]:
    """The items of a list; round and square brackets are items too, as the order in them counts and their kind."""
    answer = _NAME.sub("", _clean(answer)).strip().rstrip(".")
    ends = answer[:1] + answer[-1:]
    enclosed = len(answer) > 1 and ends in ("()", "[]", "(]", "[)", "{}")
    inner = answer[1:-1] if enclosed else answer
    items, depth, start = [], 0, 0
    for mark in re.finditer(r"[(\[{}\]),;]", inner):
        depth += (mark[0] in "([{") - (mark[0] in ")]}")
        if depth == 0 and mark[0] in ",;":
            items.append(inner[start : mark.start()])
            start = mark.end()
    items.append(inner[start:])
    return [ends[0], *items, ends[1]] if enclosed and ends != "{}" else items


def _same_item(answer: str, gold: str) -> bool:
    given, wanted = number(answer), number(gold)
    if given is None or wanted is None:
        return normal(answer) == normal(gold)
    return abs(given - wanted) <= TOLERANCE * max(Fraction(1), abs(wanted))


def _rank(item: str) -> tuple[bool, Fraction, str]:
    value = number(item)
    return value is None, value or Fraction(0), normal(item)
