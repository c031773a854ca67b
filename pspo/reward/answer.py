r"""The answer in a completion, and when two answers are equal. Nothing that a model writes is ever evaluated.

Which answer. The asked format is a line ``#### <answer>``. The first such line with a number counts: what a base model
writes after its final answer is another conversation. Where none has a number, the completion's last line counts if it
is ``#### <any text>``. Else the flexible rule: the last ``<answer>...</answer>``; the last ``\boxed{...}`` or
``\fbox{...}``; what follows the last "answer is" or "answer:" on its line; the text's last number. Of a tag or a line
the first number is taken out, but never one that is a part of something else (``5\pi``, ``3:30``, ``5 to 6``).

Numbers may carry thousands separators, a sign, decimals, an exponent (``3e8``, ``3 \times 10^{8}``, ``3·10⁸``,
``10**8``), a fraction (``3/4``, ``1 1/2``, ``1½``, ``\frac{3}{4}``), a currency or degree sign and a unit, in any
script's digits; a percent sign is a unit, so 25% equals 25 and not 0.25; a ratio 3:4 is no number. All else (names,
LaTeX) is compared in the form that ``normal`` gives, lists item by item: ``(a, b)`` and ``a; b`` in order, a bare
``a, b`` or ``\{a, b\}`` in any.
"""

import functools
import re
import unicodedata
from fractions import Fraction

from pspo.dataset.problem import boxed

TOLERANCE = Fraction(1, 10**6)  # of the gold answer, absolute below 1
TOLERANCE_BELOW_A_THOUSANDTH = Fraction(1, 1000)  # of such a gold answer: ``TOLERANCE`` would make 3e-8 and 5e-8 equal
MAX_NUMBER_CHARACTERS = 100  # arithmetic on thousands of digits is slow

# Patterns meet model output: each repeats without bound only what the next piece cannot match, so time stays linear.
_DECIMAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
_EXPONENT = r"\{ ?[-+]?[0-9]{1,3} ?\}|\( ?[-+]?[0-9]{1,3} ?\)|[-+]?[0-9]{1,3}(?![0-9])"
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]}}])[-+])?(?:10 ?\^ ?(?P<ten>{_EXPONENT})|(?:"  # the minus of 5-3 is no sign
    r"(?:(?P<whole>[0-9]{1,20}) {0,2})?\\frac ?(?:\{(?P<top>-?[0-9]{1,30})\}|(?P<t>[0-9]))"
    r" ?(?:\{(?P<bottom>[0-9]{1,30})\}|(?P<b>[0-9]))"
    r"|(?P<mixed>[0-9]{1,20}) {1,2}(?P<over>[0-9]{1,20})/(?P<under>[0-9]{1,20})(?![0-9])"
    rf"|(?P<left>{_DECIMAL})(?: ?/ ?(?P<right>{_DECIMAL}))?)"
    rf"(?: {{0,2}}(?:\\times|\\cdot|[×·⋅*xX]) {{0,2}}10 ?\^ ?(?P<power>{_EXPONENT}))?)"
)
_LETTER = r"[A-Za-z\u00c0-\u024f\u0370-\u052f]"  # of alphabets: in other scripts words touch the numbers between them
_ABBREVIATED = r"(?:[cmk]m|[mk]g|ml|min|hrs?|lbs?|oz|ft|in|[ghl]|mph|deg|st|[nr]d|th|[ap]\.?m)(?![^\W_])"
_SCALE = r"(?:(?:hundred|thousand|[mbtr]+illion|dozen)s?|lakh|crore|mil|[mbt]n|squared|cubed|(?:third|halve)s)\b"
_JOINED = r"(?:and|or|to|times|plus|minus|over|by|through)"
_UNIT = re.compile(  # what may follow a number without changing it: "%", " apples", " (apples)", "cm^2", "th"
    rf"(?: ?%| *\(|/(?!(?:pi|sqrt)\b)(?=[^\W\d_]{{2}})|{_ABBREVIATED}"
    rf"| +(?!{_SCALE}|(?:{_JOINED}|pi|sqrt|(?:more|less|fewer|greater) than)\b)"
    r"(?:[^\W\d_]{2}|[mgslh]\b|(?-i:[NJWV])\b|[ap]\.m))"
    r"(?:[^\W\d_]|[ ()/.'’%·⋅-]|\^(?:[23]|-[123]|\{-?[123]\}))*",
    re.IGNORECASE,
)
_UNIT_POWER = re.compile(r"(?<![^\W\d_])([cmk]?m|ft|in|s|[a-z]{4,}) ?\^(?:[23]|-[123]|\{-?[123]\})", re.IGNORECASE)
_SAID = re.compile(r"(?<![^\W_])answer(?: *(?:is|:|=))+", re.IGNORECASE)
_COMMAND = (  # any LaTeX command that makes a number beside it a part of something else
    r"\\(?!(?:boxed|fbox|approx|q?quad|implies|iff|to|therefore|(?:Long)?rightarrow|begin|end|(?:black)?square|checkmark|"
    r"hline|item)(?![A-Za-z]))[A-Za-z]+"
)
_FOLLOWED = re.compile(
    rf"(?: ?[-+*/×·⋅÷~]| x) ?(?:[0-9(\\√]|{_LETTER}(?![^\W\d_]))|[:,.]+[0-9]| : ?[0-9]|[,;] ?-?[0-9]|\^ ?[\w{{(\\-]"
    rf"|_[\w{{]| ?{_COMMAND}| ?[√∛∞±∓‰°]|\((?:[-0-9\\]|{_LETTER}\b)|(?!{_ABBREVIATED}){_LETTER}"
    rf"| {{1,3}}(?:{_SCALE}|(?:pi|sqrt)\b)| (?:of|{_JOINED}) -?[0-9]",
    re.IGNORECASE,
)
_PRECEDED = re.compile(
    rf"(?:{_LETTER}[(/-]?|[0-9][:,./(]?|[0-9] : ?|[)\]}}|]|[\w}}]_\{{?(?:\w\}}? )?|[\^√∛±∓≥≤≠°][ {{(]?"
    rf"|(?<!\\boxed)(?<!\\fbox)\{{ ?|(?:[0-9)\]}}%]|\b{_LETTER})(?: ?[-+*/×·⋅÷~]| x) ?-?|[=:(] ?- | [<>]=? |[0-9][,;] "
    rf"|\+ ?-|- ?\+|-[(~#]"
    rf"|{_COMMAND} ?[({{]?-?|[0-9] (?:of|{_JOINED}) "
    r"|\b(?:minus|negative|log|ln|sin|cos|tan|sqrt|[a-z]+uary|march|april|june|july"
    r"|august|[a-z]+[ctv]ember|october) )\Z",
    re.IGNORECASE,
)
_CHARACTERS_BEFORE = 24  # characters before a number that _PRECEDED looks at
_LINE = re.compile(r"^[ \t]*####(?!#)[ \t]*(.*)", re.MULTILINE)
_TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.IGNORECASE | re.DOTALL)
_OPERATORS = re.compile(r"\\(?:times|cdot|div|frac)(?![A-Za-z])")
_NAME = re.compile(r"^ *[A-Za-z] *(?:=|\\in(?![a-z]))")
_WORDS = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox) ?\{([^{}]*)\}")
_GROUPS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:(?:\\,|[\u00a0\u2009\u202f])[0-9]{3})+(?![0-9])")
_RAISED = re.compile("([⁰¹²³⁴-⁹⁺⁻]+)|[₀-₉]+")
_CODE = re.compile(
    r"\b(?:(?:US|AU?|CA?|NZ|HK|S) ?\\?(?=\$ ?(?:[0-9.]|\\frac))|(?:USD|EUR|GBP|INR|Rs\.?) ?(?=-?(?:\\?[$0-9.]|\\frac)))"
)
_GAPS = re.compile(  # between 5 and 6 these must not leave 56
    r"\*\*|\\[,;:]|~(?! ?[0-9])|(?<=[\w.)}\]])(?:[$¢£¥\u20a0-\u20cf]|\\[()\[\]$])+(?=\.?[\w(\\])|</?answer>",
    re.IGNORECASE,
)
_NOISE = re.compile(
    r"(?<=-)(?:\\\$|[$¢£¥\u20a0-\u20cf]) "
    r"|\\(?:left|right|displaystyle|text(?:dollar|euro)|pounds|euro)(?![A-Za-z])|\\! ?|\\[()\[\]$]|[$¢£¥\u20a0-\u20cf]"
    r"|(?:\^ ?\{ ?\\(?:circ|degree) ?\}|\{ ?\^ ?\\circ ?\}|(?:\^ ?\\(?:circ|degree)|\\(?:text)?degree)(?![A-Za-z])"
    r"|°)(?: {0,2}[CFK](?![A-Za-z]))?(?! ?[0-9])|\\circ(?![A-Za-z])(?! ?[0-9])"  # 30°15 is not 3015
)
_SPELLINGS = {"\\\\": ";", "\\%": "%", "\\{": "{", "\\}": "}", "{,}": ",", "\\ ": " "}
_SPELLINGS |= {"\\dfrac": "\\frac", "\\tfrac": "\\frac"}
_CHARACTERS: dict[int, str] = {
    **{0xFF01 + i: chr(0x21 + i) for i in range(94)},  # full width
    **dict.fromkeys(map(ord, "\u00a0\u2002\u2003\u2007\u2009\u200a\u202f\u3000"), " "),
    **dict.fromkeys(map(ord, "\u200b\u200e\u200f\u2060\ufeff"), ""),
    **dict.fromkeys(map(ord, "‐‑‒–−﹣"), "-"),
    **dict(zip(map(ord, "⁄∕∗∙✕٫٬٪º˚"), "//*·×.,%°°", strict=True)),
    **dict(zip(map(ord, "π∞℃℉"), ("\\pi", "\\infty", "°C", "°F"), strict=True)),
    **{ord(f): "\\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", f).split("⁄")) for f in "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"},
}
_LOWERED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻₀₁₂₃₄₅₆₇₈₉", "0123456789+-0123456789")


def extract(text: str) -> str | None:
    """The answer that a completion gives, in the asked format or by the flexible rule above, or None."""
    clean = _clean(text)
    searches = [(_TAG, text), (_SAID, clean), (_NUMBER, _UNIT_POWER.sub(r"\1", clean))]
    tag, said, last = (next(reversed([*pattern.finditer(where)]), None) for pattern, where in searches)
    return (
        asked(text)
        or (_stated(_clean(tag[1])) if tag else None)
        or boxed(clean)
        or (_stated(clean[said.end() :].partition("\n")[0]) if said else None)
        or (last[0] if last and _stands_alone(last) else None)
    )


def asked(text: str) -> str | None:
    """The answer that a completion gives on a line ``#### <answer>``, as asked, or None."""
    text = _clean(text).rstrip()
    line, answer = None, ""
    for line in _LINE.finditer(text):
        answer = boxed(line[1]) or line[1].strip()
        if number(answer) is not None:
            return answer
    return answer or None if line and line.end() == len(text) and not _SAID.search(line[1]) else None


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
    if equals and (name.replace(" ", "").isalpha() or not re.search(r"[^\W\d_]", _OPERATORS.sub("", name))):
        text = value.strip()
    text = re.sub(r"^([-+]?) {0,3}(?:\(([^()]*)\)$)?", r"\1\2", text)  # -(1/3), - 7
    match = _NUMBER.match(text)
    if not match or len(match[0]) > MAX_NUMBER_CHARACTERS:
        return None
    rest = text[match.end() :]
    heading = match[0].endswith(".") and rest  # "1. Count the eggs"
    return _value(match) if not heading and (not rest or _UNIT.fullmatch(rest)) else None


def normal(text: str) -> str:
    r"""The text without spaces, case, full stops, ``x =`` or ``x \in`` before it, and braces around one character."""
    text = _NAME.sub("", _clean(text))
    text = re.sub(r"\.(?![0-9])", "", "".join(text.split()))
    return re.sub(r"\{([^{}\\])\}", r"\1", text).casefold()


def _clean(text: str) -> str:
    if not text.isascii():
        text = _RAISED.sub(lambda match: f"{'^' if match[1] else '_'}{{{match[0].translate(_LOWERED)}}}", text)
        text = re.sub(r"(?![0-9])\d", lambda digit: str(int(digit[0])), text)
    text = _GROUPS.sub(lambda match: re.sub(r"[^0-9]", "", match[0]), text).translate(_CHARACTERS)
    for old, new in _SPELLINGS.items():
        text = text.replace(old, new)
    text = re.sub(r"(?<![0-9.])10\*\*(?=[-+]?[0-9])", "10^", _WORDS.sub(r" \1 ", text))
    return _NOISE.sub("", _GAPS.sub(" ", _CODE.sub("", text)))


def _stated(text: str) -> str | None:
    """The answer in a text that gives one: its first number, or all of it where that is a part of something else."""
    text = boxed(text) or text.strip()
    first = None if number(text) is not None or text.startswith(("(", "[")) else _NUMBER.search(text)
    return first[0] if first and _stands_alone(first) else text.rstrip(".") or None


def _stands_alone(match: re.Match[str]) -> bool:
    r"""Whether a number is no part of something else, as 5 is of ``5\pi`` and 30 of ``3:30``."""
    start = match.start() + len(match["sign"] or "")
    before = match.string[max(0, start - _CHARACTERS_BEFORE) : start]
    return not _FOLLOWED.match(match.string, match.end()) and not _PRECEDED.search(before)


def _value(match: re.Match[str]) -> Fraction | None:
    part = {name: (digits or "").replace(",", "") for name, digits in match.groupdict().items()}
    top = Fraction(part["left"] or part["top"] or part["t"] or part["over"] or 1)
    bottom = Fraction(part["right"] or part["bottom"] or part["b"] or part["under"] or 1)
    if bottom == 0:
        return None
    exponent = int((part["ten"] or part["power"]).strip("{() }") or 0)
    value = (int(part["whole"] or part["mixed"] or 0) + top / bottom) * Fraction(10) ** exponent
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
    value, right = number(answer), number(gold)
    if value is None or right is None:
        return normal(answer) == normal(gold)
    tolerance = TOLERANCE * max(Fraction(1), abs(right))
    return abs(value - right) <= (min(tolerance, abs(right) * TOLERANCE_BELOW_A_THOUSANDTH) if right else tolerance)


def _rank(item: str) -> tuple[bool, Fraction, str]:
    value = number(item)
    return value is None, value or Fraction(0), normal(item)
