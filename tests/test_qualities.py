"""Measures of completions that need no judge: each one by hand."""

import math

import pytest

from pspo.config import compose
from pspo.report.qualities import MEASURES, measure

PROMPT = compose(["dataset=gsm8k", "model=hf", "model.hub_id=a/b"]).dataset.system_prompt


def one(name, text, correct=True, system_prompt=PROMPT):
    return measure({"completion": text, "correct": correct, "tokens": 7, "truncated": False}, system_prompt)[name]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("leakage", "I think it through, one step at a time.", 0),
        ("leakage", "think through the problem one STEP, at a time", 1),  # six words of the prompt, and more
        ("leakage", "think through the problem one", 0),  # five
        ("leakage", "#### 4<|im_end|>\n", 1),
        ("leakage", "#### 4\n\nHuman: what is 2+3?", 1),
        ("leakage", "The user: nobody. A human: everybody.", 0),  # no turn begins within a line
        ("repetition", "a b c d", 0),
        ("repetition", "a b c", 0),  # no 4-gram at all
        ("repetition", "a b c d a b c d", 1 - 4 / 5),  # abcd bcda cdab dabc abcd
        ("repetition", "a " * 103, 1 - 1 / 100),
        ("format", "2+2=4\n#### 4\n", 1),
        ("format", "2+2=4, so #### 4", 0),
        ("format", "####\n4", 0),
        ("format", "#### 4\nas 2+2=4", 0),
        ("format", "#### 4\n#### 4", 0),
        ("foreign_letters", "abc π = 3", 0),
        ("foreign_letters", "ab 答案", 0.5),
        ("foreign_letters", "𝑥 é ß ｘ 5 + ²", 0),  # letters of mathematics, accents, full width; digits are none
        ("foreign_letters", "да да ab", 4 / 6),
        ("foreign_letters", "123", 0),
        ("length_right", "", 7),
        ("length_wrong", "", math.nan),
    ],
)
def test_each_measure_by_hand(name, text, value):
    assert one(name, text) == pytest.approx(value, nan_ok=True)


def test_a_wrong_completion_counts_among_the_wrong_ones():
    assert one("length_wrong", "", correct=False) == 7
    assert math.isnan(one("length_right", "", correct=False))


def test_nothing_leaks_without_a_system_prompt():
    assert one("leakage", "", system_prompt="") == one("leakage", "short", system_prompt="short") == 0


@pytest.mark.parametrize(
    "text", ["\0\ud800\u202e" * 9, "#### " * 40_000, "<|" * 100_000, "a " * 100_000, "答" * 10**5, ""]
)
def test_hostile_text_is_measured(text):
    values = measure({"completion": text, "correct": False, "tokens": 0, "truncated": True}, PROMPT)
    assert values.keys() == MEASURES.keys()
    assert all(0 <= value <= 1 for name, value in values.items() if name != "length_right")
