"""What can be counted, without a judge, of the qualities that arXiv 2509.21282 had judged in completions."""

import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

LEAKED_WORDS, REPEATED_WORDS = 6, 4
"""Words in a row, without case and marks, of the system prompt that are a leak; of which repetition is counted."""

MEASURES = {
    "leakage": "share of completions with 6 words in a row of the system prompt, or with a marker of chat turns",
    "repetition": "share of 4-grams of words that the completion has had before: 1 - distinct / all (arXiv 1908.04319)",
    "format": "share of completions whose last line, and no other line, is '#### <answer>'",
    "foreign_letters": "share of letters that are neither Latin nor, as in formulas, Greek",
    "length_right": "tokens of a correct completion",
    "length_wrong": "tokens of a wrong completion",
    "truncated": "share of completions cut at the largest number of tokens",
}
"""Measure -> its definition."""

_LINE = re.compile(r"^[ \t]*####(?!#)[ \t]*\S", re.MULTILINE)
_MARKER = re.compile(
    r"<\|[a-z_]{2,32}\|>|</?(?:s|start_of_turn|end_of_turn)>|\[/?INST\]|<</?SYS>>"
    r"|^[ \t*#]*(?:human|user|assistant|system)[ \t*]*:",
    re.IGNORECASE | re.MULTILINE,
)


def measure(row: Mapping[str, Any], system_prompt: str = "") -> dict[str, float]:
    """The ``MEASURES`` of one answer, a row with ``completion``, ``correct``, ``tokens`` and ``truncated``.

    ``length_right`` of a wrong completion and ``length_wrong`` of a correct one are NaN, which means leave out.
    """
    text, tokens = str(row["completion"]), float(row["tokens"])
    grams, leakable = _grams(text, REPEATED_WORDS), _grams(system_prompt, LEAKED_WORDS)
    lines = [match.start() for match in _LINE.finditer(text)]
    letters = [letter for letter in unicodedata.normalize("NFKC", text) if letter.isalpha()]
    scripts = [unicodedata.name(letter, "").partition(" ")[0] for letter in letters if not letter.isascii()]
    return {
        "leakage": float(bool(_MARKER.search(text)) or not set(leakable).isdisjoint(_grams(text, LEAKED_WORDS))),
        "repetition": 1 - len(set(grams)) / len(grams) if grams else 0.0,
        "format": float(len(lines) == 1 and "\n" not in text[lines[0] :].strip()),
        "foreign_letters": sum(script not in ("LATIN", "GREEK") for script in scripts) / max(1, len(letters)),
        "length_right": tokens if row["correct"] else math.nan,
        "length_wrong": math.nan if row["correct"] else tokens,
        "truncated": float(row["truncated"]),
    }


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    """Every ``n`` words in a row, without case and marks."""
    words = re.findall(r"\w+", text.casefold())
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
