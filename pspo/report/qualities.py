"""What can be counted in completions of the qualities that arXiv 2509.21282 had judged: no judge, no model, pure text.

Each measure is a number for one completion and a mean over completions for an arm; shares are 0 to 1.
"""

import functools
import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

import pandas as pd

LEAKED_WORDS = 6
"""Words in a row, without case and marks, that a completion has from the system prompt where it leaks instructions."""
REPEATED_WORDS = 4
"""Words of the n-grams of which ``repetition`` counts the repeated ones."""
LOOP_TIMES, MAX_LOOP_WORDS = 4, 50
"""A loop is a unit of at most so many words that stands at least so many times in a row at the completion's end."""

MEASURES = {
    "leakage": "share of completions with 6 words in a row of the system prompt, or with a marker of chat turns",
    "repetition": "share of 4-grams of words that the completion has had before: 1 - distinct / all (arXiv 1908.04319)",
    "loop": "share of completions that end in one unit, of at most 50 words, at least 4 times in a row",
    "format_line": "share of completions with a line '#### <answer>'",
    "format_last": "share of completions whose last line, and no other line, is '#### <answer>'",
    "foreign_letters": "share of letters that are neither Latin nor, as in formulas, Greek",
    "cjk": "share of completions with a Chinese, Japanese or Korean letter",
    "length": "tokens of a completion",
    "length_right": "tokens of a correct completion",
    "length_wrong": "tokens of a wrong completion",
    "truncated": "share of completions cut at the largest number of tokens",
}
"""Measure -> its definition."""

GROUP = ["run", "when", "evaluation", "set", "temperature"]
"""Columns of answers that say which answers have a mean of their own."""

_WORD = re.compile(r"\w+")
_LINE = re.compile(r"^[ \t]*####(?!#)[ \t]*\S", re.MULTILINE)
_MARKER = re.compile(
    r"<\|[a-z_]{2,32}\|>|</?(?:s|start_of_turn|end_of_turn)>|\[/?INST\]|<</?SYS>>"
    r"|^[ \t*#]*(?:human|user|assistant|system)[ \t*]*:",
    re.IGNORECASE | re.MULTILINE,
)
_CJK = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "IDEOGRAPHIC")


def measure(row: Mapping[str, Any], system_prompt: str = "") -> dict[str, float]:
    """The ``MEASURES`` of one answer, a row with ``completion``, ``correct``, ``tokens`` and ``truncated``.

    ``length_right`` of a wrong completion and ``length_wrong`` of a correct one are NaN, which means leave out.
    """
    text, tokens = str(row["completion"]), float(row["tokens"])
    words, leakable = _words(text), _prompt_grams(system_prompt)
    grams = _grams(words, REPEATED_WORDS)
    lines = [match.start() for match in _LINE.finditer(text)]
    letters = [letter for letter in unicodedata.normalize("NFKC", text) if letter.isalpha()]
    scripts = [unicodedata.name(letter, "").partition(" ")[0] for letter in letters if not letter.isascii()]
    return {
        "leakage": float(bool(_MARKER.search(text)) or not leakable.isdisjoint(_grams(words, LEAKED_WORDS))),
        "repetition": 1 - len(set(grams)) / len(grams) if grams else 0.0,
        "loop": float(_loops(text.split())),
        "format_line": float(bool(lines)),
        "format_last": float(len(lines) == 1 and "\n" not in text[lines[0] :].strip()),
        "foreign_letters": sum(script not in ("LATIN", "GREEK") for script in scripts) / max(1, len(letters)),
        "cjk": float(any(script.startswith(_CJK) for script in scripts)),
        "length": tokens,
        "length_right": tokens if row["correct"] else math.nan,
        "length_wrong": math.nan if row["correct"] else tokens,
        "truncated": float(row["truncated"]),
    }


def measures(answers: pd.DataFrame, system_prompts: Mapping[str, str]) -> pd.DataFrame:
    """The mean of each measure for every ``GROUP`` of answers, a row each; ``system_prompts`` is by run.

    An arm's mean is the mean over its runs. A mean of no completions, such as the length of wrong ones where all are
    right, is NaN.
    """
    rows = [measure(row, system_prompts.get(row["run"], "")) for row in answers.to_dict("records")]
    frame = pd.DataFrame(rows, columns=list(MEASURES), index=answers.index, dtype=float)
    return pd.concat([answers[GROUP], frame], axis=1).groupby(GROUP, sort=False, as_index=False).mean()


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _grams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


@functools.lru_cache(64)
def _prompt_grams(system_prompt: str) -> frozenset[tuple[str, ...]]:
    return frozenset(_grams(_words(system_prompt), LEAKED_WORDS))


def _loops(words: list[str]) -> bool:
    """Whether the last words are one unit several times in a row."""
    units = range(1, min(MAX_LOOP_WORDS, len(words) // LOOP_TIMES) + 1)
    return any(words[-LOOP_TIMES * n :] == words[-n:] * LOOP_TIMES for n in units)
