import ast
import functools
import gc
import itertools
import json
import os
import random
import re
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from pspo.base.schema import ConfigError, build
from pspo.dataset import Problem, sources
from pspo.reward import RewardConfig, answer, asked, check_gold, extract, make_reward, normal, number, same

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("PSPO_DATA", ROOT.parent / "shared" / "data"))
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data at {DATA}; set PSPO_DATA")
SETS = {"gsm8k": ("gsm8k", 8792), "svamp": ("svamp/SVAMP.json", 1000)}
SETS |= {"asdiv": ("asdiv/ASDiv.xml", 2305), "math500": ("math500", 500)}
NAMES = sorted(file.stem for file in (ROOT / "conf" / "reward").glob("*.yaml"))


def config(name, **changes):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        values = OmegaConf.to_container(compose(f"reward/{name}")["reward"])
    return build(RewardConfig, values | changes)


def problem(answer, id="p1"):
    return Problem(id, "How many?", answer, "")


plain = make_reward(config("plain"))
paper = make_reward(config("paper"))


# --- which answer


@pytest.mark.parametrize(
    ("text", "answer", "in_format"),
    [
        ("2+2=4\n#### 4", "4", True),
        ("#### 8", "8", True),  # the published pattern wanted one character more
        ("#### -7", "-7", True),
        ("####4", "4", True),
        ("  #### 4  \n", "4", True),
        ("**#### 4**", "4", True),
        ("#### $1,234.50", "1,234.50", True),
        ("#### \\boxed{4}", "4", True),
        ("#### 18 dollars", "18 dollars", True),
        ("#### 3 + 4 = 7", "3 + 4 = 7", True),
        ("#### 4\n\nHuman: what is 2+3?\n#### 5", "4", True),  # the first: the rest is another conversation
        ("#### Step 1: add\n2+2=4\n#### 4", "4", True),  # a heading
        ("#### 1. Add the 2 eggs\n2+2=4\n#### 4", "4", True),
        ("#### Step 1\n2+2 = 4 eggs.", "4", False),
        ("he is right\n#### Yes", "Yes", True),
        ("#### No\n#### Yes", "Yes", True),
        ("#### Yes\nthat is 3", "3", False),  # text counts on the last line only
        ("#### The answer is 4", "4", False),
        ("so #### 4", "4", False),  # no line of its own
        ("##### 4", "4", False),
        ("#### ", None, False),
        ("####\n4", "4", False),
        ("3 eggs: \\boxed{\\frac{1}{2}} of 7", "\\frac{1}{2}", False),
        ("\\boxed{1} or \\boxed{x=2}", "x=2", False),
        ("\\boxed{1} and \\boxed{2", "2", False),  # cut off: the last number
        ("The answer is 18. It was 3 before.", "18.", False),
        ("the answer is therefore $18, not 3", "18", False),
        ("The answer is 3 + 4 = 7.", "3 + 4 = 7", False),
        ("Final Answer: (3, \\pi)\n2", "(3, \\pi)", False),
        ("**Answer:** 12 eggs", "12 eggs", False),
        ("The answer is Yes.", "Yes", False),
        ("The answer is:\n18", "18", False),
        ("16-3-4=9 and 9*2=18 eggs", "18", False),
        ("from 5-10", "10", False),  # no sign
        ("it fell to -10 degrees", "-10", False),
        ("<<48/2=24>>24 clips", "24", False),
        ("I do not know", None, False),
        ("", None, False),
        ("٣ and ²", None, False),
    ],
)
def test_which_answer_a_completion_gives(text, answer, in_format):
    assert extract(text) == answer
    assert (asked(text) is not None) == in_format


# --- numbers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("18", 18), ("-7", -7), ("+7", 7), ("- 7", -7), ("−7", -7), ("–7", -7), ("007", 7)],
        *[("1,234", 1234), ("1,234,567.5", "1234567.5"), ("10,\\!080", 10080), ("10{,}000", 10000), ("1\\,000", 1000)],
        *[(".5", "1/2"), ("3.", 3), ("18.", 18), ("18.00", 18), ("-.25", "-1/4"), ("1e3", 1000), ("2.5E-3", "1/400")],
        *[("3/4", "3/4"), ("3 / 4", "3/4"), ("-3/4", "-3/4"), ("-(1/3)", "-1/3"), ("1 1/2", "3/2"), ("-1 1/2", "-3/2")],
        *[("\\frac{3}{4}", "3/4"), ("\\dfrac34", "3/4"), ("\\frac 59", "5/9"), ("\\frac9{19}", "9/19")],
        *[
            ("-\\frac{3}{4}", "-3/4"),
            ("\\frac{-3}{4}", "-3/4"),
            ("1\\frac{1}{2}", "3/2"),
            ("137 \\frac{1}{2}", "275/2"),
        ],
        *[("$18", 18), ("-$18", -18), ("$-18", -18), ("\\$18.90", "18.9"), ("£3", 3), ("€ 3", 3), ("$18$", 18)],
        *[("25%", 25), ("25\\%", 25), ("25 percent", 25), ("0.25", "1/4"), ("25% off", 25)],
        *[("18 dollars", 18), ("9 (apples)", 9), ("5cm", 5), ("5 m", 5), ("15\\mbox{ cm}^2", 15), ("90^\\circ", 90)],
        *[("90^{\\circ}", 90), ("3rd", 3), ("60 km/h", 60), ("5.4 \\text{ cents}", "5.4"), ("5 p.m.", 5)],
        *[("x = 5", 5), ("x=5", 5), ("total cost = 5 dollars", 5), ("3 + 4 = 7", 7), ("**7**", 7), ("(7)", 7)],
    ],
)
def test_texts_that_are_numbers(text, value):
    assert number(text) == Fraction(value)


@pytest.mark.parametrize(
    "text",
    [
        *["", "Yes", "February 3rd", "-", ".", "$", "%", "/", "x", "x = y", "٣", "²", "5²"],
        *["5x", "5 x", "5i", "5\\pi", "3\\sqrt{2}", "x^2", "5^2", "52_8", "5 pi", "2x = 4 = y", "y = 2x"],
        *[
            "10:30",
            "3:4",
            "3/4/2020",
            "1.2.3",
            "1,2",
            "(1,2)",
            "5; 6",
            "3 + 4",
            "10 - 3",
            "1. Add",
            "1/0",
            "\\frac{1}{0}",
        ],
        *[
            "18 million",
            "3 dozen",
            "18 or 20",
            "18 and 20",
            "6 feet 2 inches",
            "5 to 6",
            "18k",
            "1e1000",
            "1e999999999",
        ],
        *["1" * 101, "1" * 16000, "1," * 8000, "\\frac{" + "1" * 31 + "}{2}"],
    ],
)
def test_texts_that_are_no_numbers(text):
    assert number(text) is None


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        *[("18.0000009", "18"), ("0.0000009", "0"), ("1000000.9", "1000000"), ("0.5", "1/2"), ("50", "50%")],
        *[("yes.", "Yes"), ("3:30 pm", "3:30 p.m."), ("FEBRUARY 3rd", "February 3rd"), ("1 : 2", "1:2")],
        *[("(3,\\frac\\pi2)", "( 3, \\frac\\pi2 )"), ("(3, \\dfrac{\\pi}{2})", "\\left( 3, \\frac{\\pi}{2} \\right)")],
        *[("(1.5, -13)", "\\left( \\frac{3}{2}, -13 \\right)"), ("7, 3, 5", "3, 5, 7"), ("1, 10, 9", "10, 9, 1.0")],
        *[("2, -1 , 1/2", "\\{ 0.5, -1, 2 \\}"), ("5, 15", "5; 15"), ("[-2, 7]", "x \\in [-2,7]")],
        *[
            ("2x+3", "y = 2x + 3"),
            ("x^{2}", "x^2"),
            ("C", "\\text{C}"),
            ("$\\sqrt{51}$", "\\sqrt{51}"),
            ("52_{8}", "52_8"),
        ],
        ("\\begin{pmatrix}-1/3\\\\0.5\\\\5/3\\end{pmatrix}", "\\begin{pmatrix} -1/3 \\\\ 1/2 \\\\ 5/3 \\end{pmatrix}"),
    ],
)
def test_equal_answers(answer, gold):
    assert same(answer, gold)
    assert same(gold, answer)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        *[
            ("18.0001", "18"),
            ("0.00001", "0"),
            ("0.333", "1/3"),
            ("0.25", "25%"),
            ("-7", "7"),
            ("3/4", "3:4"),
            ("", "18"),
        ],
        *[
            ("2", "\\left( 3, \\frac{\\pi}{2} \\right)"),
            ("3", "February 3rd"),
            ("No", "Yes"),
            ("5", "5\\pi"),
            ("5", "52_8"),
        ],
        *[
            ("(4,3)", "(3,4)"),
            ("[3,4)", "(3,4)"),
            ("3,4", "(3,4)"),
            ("3,5", "3,5,7"),
            ("3,5,5", "3,3,5"),
            ("15; 5", "5; 15"),
        ],
        *[("\\frac{\\pi}{12}", "\\frac{\\pi1}{2}"), ("1.5", "1; 5"), ("200,1", "1,200"), ("18 or 20", "18")],
        *[("1" * 16000, "1"), ("1e999999999", "1"), ("a" * 16000, "5"), ("x" * 16000, "x")],
    ],
)
def test_different_answers(answer, gold):
    assert not same(answer, gold)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("\\left( 3, \\dfrac{\\pi}{2} \\right)", "(3,\\frac{\\pi}2)"),
        ("x \\in [-2,7]", "[-2,7]"),
        ("\\text{The Answer}.", "theanswer"),
        ("\\infty", "\\infty"),
        ("11:45 p.m.", "11:45pm"),
        ("3.5x", "3.5x"),
    ],
)
def test_the_normal_form(text, form):
    assert normal(text) == form


# --- right or wrong: completion, gold answer, is it correct, is it in the asked format


BY_HAND = [
    # the asked format
    *[("#### 8", "8", True, True), ("#### -7", "-7", True, True), ("#### 9", "8", False, True)],
    *[("#### 7", "-7", False, True), ("#### -7", "7", False, True), ("#### 1/0", "0", False, True)],
    *[("#### 8\nHuman: next\n#### 9", gold, gold == "8", True) for gold in ("8", "9")],  # the first counts
    *[("#### <8>", "8", True, True), ("#### \\boxed{8}", "8", True, True), ("#### 8.", "8", True, True)],
    *[("####", "8", False, False), ("#### \n8", "8", True, False)],
    # commas, signs, decimals
    *[
        ("#### 1,000", "1000", True, True),
        ("#### 1000", "1,000", True, True),
        ("#### 1,000,000", "1000000", True, True),
    ],
    *[("#### 1,00", "100", False, True), ("#### 1,00", "1", False, True), ("#### 12,34,567", "1234567", False, True)],
    *[("#### −7", "-7", True, True), ("#### – 7", "-7", True, True), ("#### +7", "7", True, True)],
    *[("#### .5", "0.5", True, True), ("#### -.5", "-1/2", True, True), ("#### 3.", "3", True, True)],
    *[("#### 1.80", "1.8", True, True), ("#### 18.00", "18", True, True), ("#### 1.08", "1.8", False, True)],
    *[("#### 1e3", "1000", True, True), ("#### 3 \\times 10^5", "3", False, True), ("#### 2^3", "2", False, True)],
    *[("#### ٣", "3", False, True), ("#### 8²", "8", False, True)],
    # fractions
    *[("#### 3/4", "0.75", True, True), ("#### 1 1/2", "1.5", True, True), ("#### -1 1/2", "-1.5", True, True)],
    *[("#### \\frac{3}{4}", "3/4", True, True), ("#### \\frac34", "0.75", True, True)],
    *[("#### -\\frac{1}{2}", "-0.5", True, True), ("#### 2\\frac{1}{4}", "9/4", True, True)],
    *[("#### 3/4", "3", False, True), ("#### \\frac{1}{2}", "1/3", False, True), ("#### 1 1/2", "1", False, True)],
    *[("#### 0.3333333", "1/3", True, True), ("#### 0.333", "1/3", False, True)],
    *[("#### 5/9", "\\frac 59", True, True), ("#### 270/7", "\\frac{270}7\\text{ degrees}", True, True)],
    # percents, currency, units
    *[("#### 25%", "25", True, True), ("#### 25\\%", "25", True, True), ("#### 25%", "0.25", False, True)],
    *[("#### $18", "18", True, True), ("#### -$5", "-5", True, True), ("#### 5€", "5", True, True)],
    *[("#### 32348", "\\$32,\\!348", True, True), ("#### 11111111100", "11,\\! 111,\\! 111,\\! 100", True, True)],
    *[("#### 18 dollars.", "18", True, True), ("#### 15 cm^2", "15\\mbox{ cm}^2", True, True)],
    *[("#### 60 km/h", "60", True, True), ("#### 30°", "30^\\circ", True, True), ("#### 3rd", "3", True, True)],
    *[("#### 2 million", "2", False, True), ("#### 6 feet 2 inches", "6", False, True)],
    # what holds a number and is none
    *[("#### 5\\pi", "5", False, True), ("#### 5π", "5", False, True), ("#### 5x", "5", False, True)],
    *[("#### 3:30", "3", False, True), ("#### 3:30", "30", False, True), ("#### 3:30", "3:30", True, True)],
    *[("#### 2+3", "2", False, True), ("#### 2+3", "3", False, True), ("#### 2 + 3 = 5", "5", True, True)],
    *[("#### February 3rd", "3", False, True), ("#### February 3rd", "February 3rd", True, True)],
    *[("#### (3, \\frac{\\pi}{2})", gold, False, True) for gold in ("2", "3")],
    ("#### (3, \\frac{\\pi}{2})", "\\left( 3, \\frac{\\pi}{2} \\right)", True, True),
    *[("#### 5 or 6", "5", False, True), ("#### 5 or 6", "6", False, True), ("#### y = 2x", "2", False, True)],
    *[("#### Yes", "Yes", True, True), ("#### no", "Yes", False, True), ("#### -2, 1", "1,-2", True, True)],
    # the flexible rule
    *[("it is \\boxed{8} of 9", "8", True, False), ("\\boxed{7}, no, \\boxed{8}", "8", True, False)],
    *[("\\boxed{90^\\circ} by rule 3", "90", True, False), ("\\boxed{8", "8", True, False)],
    *[("The answer is $8. He had 3.", "8", True, False), ("İİİ the answer is 8 of 9", "8", True, False)],
    *[("The answer is 8, not 9", "8", True, False), ("The answer is 3, no, the answer is 8", "3", False, False)],
    *[("The answer is 5\\pi.", gold, gold != "5", False) for gold in ("5", "5\\pi")],
    *[("The answer is 3:30.", gold, gold == "3:30", False) for gold in ("3", "30", "3:30")],
    *[("The answer is 2 + 3", "2", False, False), ("The answer is 2 + 3 = 5.", "5", True, False)],
    *[("The answer is x^2 + 1", "2", False, False), ("The answer is 1,00", "1", False, False)],
    *[("he had 3 and then 8 eggs", "8", True, False), ("8 eggs of 9", "8", False, False), ("10-8", "8", True, False)],
    *[("no idea", "8", False, False), ("", "8", False, False)],
]


@pytest.mark.parametrize(("completion", "gold", "correct", "in_format"), BY_HAND)
def test_right_and_wrong_by_hand(completion, gold, correct, in_format):
    score = plain(completion, problem(gold))
    assert score.correct == correct
    assert score.components["format"] == (0.05 if in_format else 0)


# --- properties


def formats(n):
    """Ways to write a whole number."""
    comma = f"{n:,}"
    return [
        str(n),
        comma,
        f"${n}",
        f"${comma}",
        f"{comma} dollars",
        f"{n}.00",
        f"{n} (apples)",
        f"\\boxed{{{n}}}",
        f"{n}%",
    ]


@given(n=st.integers(-(10**15), 10**15), way=st.integers(0, 8), off=st.integers(1, 10**6))
def test_the_writing_of_a_number_does_not_matter_and_its_value_does(n, way, off):
    score = plain(f"so we have\n#### {formats(n)[way]}", problem(str(n)))
    assert score.correct
    assert score.components == {"correct": 1.0, "format": 0.05}
    wrong = n + off * max(1, abs(n) // 10**5)
    assert not plain(f"#### {formats(wrong)[way]}", problem(str(n))).correct


@given(gold=st.floats(-1e9, 1e9).map(lambda x: Fraction(repr(round(x, 3)))), part=st.floats(-3, 3))
def test_numbers_are_equal_within_a_millionth_relative_or_absolute(gold, part):
    given_ = gold + Fraction(repr(round(part, 3))) / 10**6 * max(1, abs(gold))
    near = abs(given_ - gold) <= Fraction(1, 10**6) * max(1, abs(gold))
    assert same(f"{given_.numerator}/{given_.denominator}", f"{gold.numerator}/{gold.denominator}") == near


@given(gold=st.text(max_size=20) | st.text("0123456789,.;/-+()[]{}\\$% x=", max_size=20))
def test_every_answer_equals_itself(gold):
    assert same(gold, gold)


@given(value=st.decimals(-(10**6), 10**6, places=4))
def test_decimals_are_read_back(value):
    assert number(str(value)) == number(f"{value:,}") == Fraction(value)


@given(value=st.fractions(-1000, 1000, max_denominator=1000))
def test_fractions_are_read_back(value):
    top, bottom = abs(value.numerator), value.denominator
    sign, whole, rest = "-" if value < 0 else "", top // bottom, top % bottom
    ways = [
        f"{top}/{bottom}",
        f"\\frac{{{top}}}{{{bottom}}}",
        f"{whole} {rest}/{bottom}",
        f"{whole}\\frac{{{rest}}}{{{bottom}}}",
    ]
    assert {number(sign + way) for way in ways} == {value}


# --- rewards


@pytest.mark.parametrize(
    ("completion", "gold", "plain_reward", "paper_reward", "paper_components", "parsed"),
    [
        ("#### 18", "18", 1.05, 1.0, {"correct": 1, "format": 0.05, "missing": 0}, True),
        ("it is 18", "18", 1.0, 1.0, {"correct": 1, "format": 0, "missing": 0}, True),
        ("#### 17", "18", 0.05, 0.05, {"correct": 0, "format": 0.05, "missing": 0}, True),
        ("it is 17", "18", 0.0, 0.0, {"correct": 0, "format": 0, "missing": 0}, True),
        ("who knows", "18", 0.0, 0.0, {"correct": 0, "format": 0, "missing": -0.2}, False),
        ("", "18", 0.0, 0.0, {"correct": 0, "format": 0, "missing": -0.2}, False),
    ],
)
def test_the_rewards_by_hand(completion, gold, plain_reward, paper_reward, paper_components, parsed):
    for reward, expected in ((plain, plain_reward), (paper, paper_reward)):
        score = reward(completion, problem(gold))
        assert score.reward == pytest.approx(expected, abs=1e-12)
        assert score.correct == bool(paper_components["correct"])
        assert score.parsed == parsed
    assert paper(completion, problem(gold)).components == paper_components


def test_the_format_bonus_is_the_key():
    assert make_reward(config("plain", format_bonus=0.3))("#### 17", problem("18")).reward == 0.3
    assert make_reward(config("plain", format_bonus=0))("#### 18", problem("18")).reward == 1


@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_file_makes_a_reward(name, tmp_path):
    (tmp_path / "mine.py").write_text("def f(completion, problem): return 1")
    changes = {"function": f"{tmp_path}/mine.py:f"} if name == "custom" else {}
    assert make_reward(config(name, **changes))("#### 18", problem("18")).correct


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"name": "best"}, "reward.name must be one of plain, paper, custom, got 'best'"),
        ({"name": "plain", "format_bonus": 2.0}, r"reward.format_bonus must be in \[0, 1\], got 2.0"),
        ({"name": "paper", "format_bonus": 0.05}, "unknown key reward.format_bonus"),
        ({"name": "plain", "format_bonus": 0.05, "function": "a:b"}, "unknown key reward.function"),
        ({"name": "custom"}, "reward.function has no value"),
    ],
)
def test_a_wrong_configuration_is_refused(values, told):
    with pytest.raises(ConfigError, match=told):
        build(RewardConfig, values)


# --- a user's own function


OWN = """
from __future__ import annotations
from dataclasses import dataclass
import numpy as np
from pspo.reward import Score

@dataclass
class Kept:
    x: int

def length(completion, problem): return len(completion) / 10
def scored(completion, problem): return Score(-3.0, completion == problem.answer, {"mine": 2.0}, False)
def flag(completion, problem): return completion == problem.answer
def numpy32(completion, problem): return np.float32(0.5)
def numpy64(completion, problem): return np.float64(0.5)
def nothing(completion, problem): return None
def infinite(completion, problem): return float("inf")
def undefined(completion, problem): return Score(float("nan"), True, {}, True)
number = 3
"""


@pytest.fixture
def own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    return lambda name: make_reward(config("custom", function=f"{file}:{name}"))


def test_a_number_of_ones_own_is_correct_from_one_on(own):
    assert own("length")("12345", problem("5")).reward == 0.5
    assert not own("length")("12345", problem("5")).correct
    score = own("length")("1234567890", problem("5"))
    assert (score.reward, score.correct, score.components, score.parsed) == (1.0, True, {"custom": 1.0}, True)
    assert own("flag")("5", problem("5")).reward == 1.0


@pytest.mark.parametrize("name", ["numpy32", "numpy64"])
def test_a_number_of_numpy_becomes_a_float(own, name):
    score = own(name)("5", problem("5"))
    assert (type(score.reward), score.reward, score.correct) == (float, 0.5, False)


def test_a_score_of_ones_own_is_kept(own):
    score = own("scored")("5", problem("5"))
    assert (score.reward, score.correct, score.components, score.parsed) == (-3.0, True, {"mine": 2.0}, False)


def test_a_function_in_a_package():
    assert make_reward(config("custom", function="pspo.reward:paper"))("#### 5", problem("5")).reward == 1


@pytest.mark.parametrize("name", ["nothing", "infinite", "undefined"])
def test_a_result_that_is_no_finite_number_is_refused(own, name):
    with pytest.raises(ValueError, match=rf"mine.py:{name} must return a finite number .* got .* on problem p1"):
        own(name)("5", problem("5"))


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("{}/none.py:f", "there is no file .*none.py"),
        ("{}/mine.py:missing", ".*mine.py has no function missing"),
        ("{}/mine.py:number", ".*mine.py has no function number"),
        ("{}/mine.py:", ".*mine.py has no function"),
        ("{}/broken.py:f", "cannot be imported: .*"),
        ("{}/needy.py:f", "cannot be imported: No module named 'no_such_module'"),
        ("no_such_package.module:f", "cannot be imported: No module named 'no_such_package'"),
        ("pspo.reward:missing", "pspo.reward has no function missing"),
        ("length", "must be path/to/file.py:function or package.module:function"),
        (".reward:f", "must be path/to/file.py:function or package.module:function"),
    ],
)
def test_a_function_that_cannot_be_had_is_refused_in_one_sentence(own, tmp_path, function, told):
    (tmp_path / "broken.py").write_text("def f(:")
    (tmp_path / "needy.py").write_text("import no_such_module")
    with pytest.raises(ConfigError, match=rf"^reward.function='.*': {told}") as caught:
        make_reward(config("custom", function=function.format(tmp_path)))
    assert "\n" not in str(caught.value)


# --- gold answers


def test_a_gold_answer_that_is_not_correct_is_told_with_its_problem():
    with pytest.raises(ConfigError, match=r"problem q7: the gold answer '' is not correct under reward=plain; mend"):
        check_gold(plain, config("plain"), [problem("18"), problem("", id="q7")])


def test_a_custom_reward_may_be_about_something_else(own, caplog):
    check_gold(own("length"), config("custom", function="mine.py:length"), [problem("5", id="q7")])
    assert "problem q7" in caplog.text


def problems(name):
    path, _ = SETS[name]
    located = sources.locate(name, str(DATA / path))
    return [p for src, splits in located for split, files in splits.items() for p in sources.read(src, split, files)]


@pytest.fixture
def remembered(monkeypatch):
    """What is read of a text is read once: thousands of gold answers meet here again and again."""
    for name in ("_clean", "number", "normal"):
        monkeypatch.setattr(answer, name, functools.cache(getattr(answer, name)))


@real
@pytest.mark.parametrize("name", SETS)
def test_every_real_gold_answer_equals_itself(name, remembered):
    golds = problems(name)
    assert len(golds) == SETS[name][1]
    for reward in (plain, paper):
        check_gold(reward, config("plain"), golds)
    for p in golds:
        for text in (f"\\boxed{{{p.answer}}}", p.solution or f"#### {p.answer}"):
            assert plain(text, p).correct, p


@real
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_untouched_texts_of_gsm8k_are_correct(split):
    for line in (DATA / "gsm8k" / f"{split}.jsonl").read_text().splitlines():
        text = json.loads(line)["answer"]
        score = plain(text, problem(text.rpartition("#### ")[2]))
        assert (score.reward, score.parsed) == (1.05, True), text


@real
def test_the_untouched_answers_of_asdiv_are_correct():
    answers = re.findall(r"<Answer>(.*?)</Answer>", (DATA / "asdiv" / "ASDiv.xml").read_text())
    assert len(answers) == 2305
    for raw, p in zip(answers, problems("asdiv"), strict=True):
        assert plain(f"#### {raw}", problem(raw)).correct, raw
        assert ";" in raw or plain(f"#### {raw}", p).correct, raw


@real
@pytest.mark.parametrize(("name", "count"), [("gsm8k", 0), ("svamp", 0), ("asdiv", 210), ("math500", 99)])
def test_gold_answers_that_are_no_numbers_do_not_become_their_last_digits(name, count):
    golds = [p for p in problems(name) if number(p.answer) is None]
    assert len(golds) == count
    for p in golds:
        for digits in re.findall(r"\d+", p.answer):
            assert not plain(f"#### {digits}", p).correct, p


@real
def test_distinct_gold_answers_of_math500_are_equal_only_where_meant(remembered):
    golds = sorted({p.answer for p in problems("math500")})
    equal = {frozenset(pair) for pair in itertools.combinations(golds, 2) if same(*pair)}
    groups = [
        *[["-2,1", "1,-2"], ["10,\\!080", "10080"], ["2 \\sqrt{5}", "2\\sqrt{5}"], ["\\frac14", "\\frac{1}{4}"]],
        *[["120", "120^\\circ"], ["30", "30^\\circ"], ["36", "36^\\circ", "\\$36"], ["90", "90^\\circ"]],
        *[["15", "15\\mbox{ cm}^2"], ["5", "x=5"]],
    ]
    assert equal == {frozenset(pair) for group in groups for pair in itertools.combinations(group, 2)}
    assert all(same(*reversed(sorted(pair))) for pair in equal)


# --- hostile text


def test_nothing_evaluates_what_a_model_wrote():
    files = sorted((ROOT / "pspo" / "reward").glob("*.py"))
    assert files
    called = set()
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.Call):
            called.add(getattr(node.func, "id", getattr(node.func, "attr", "")))
        if isinstance(node, ast.Import | ast.ImportFrom):
            called |= {alias.name.partition(".")[0] for alias in node.names}
    evaluators = {"eval", "exec", "sympify", "parse_expr", "literal_eval", "__import__", "ast", "sympy", "pickle"}
    assert not called & (evaluators | {"parse_latex", "system", "run", "Popen"})


FRAGMENTS = [
    *[
        "####",
        "\n#### ",
        "\n####\n",
        "#### 1",
        "\n",
        " ",
        "\t",
        "\r",
        "\0",
        "\ud800",
        "\u202e",
        "\ufeff",
        "İ",
        "ſ",
        "٣",
        "²",
        "½",
    ],
    *[
        "1",
        "0",
        "9" * 50,
        "1,",
        "1,111",
        ",111",
        ",",
        ".",
        "..",
        "1.",
        "-",
        "--",
        "- ",
        "−",
        "+",
        "/",
        "1/",
        "1 1/",
        " /1",
        "e",
        "1e9",
    ],
    *[
        "1e999999999",
        "=",
        "x=",
        "answer is ",
        "answer:",
        "answer  ",
        "The answer is 1. ",
        "Ａ",
        "a",
        "apples ",
        " (",
        ")",
        "%",
        "$",
        "\\$",
    ],
    *[
        "\\frac{",
        "\\frac",
        "\\frac{1}{0}",
        "1\\frac",
        "\\frac{1}{",
        "\\boxed{",
        "\\boxed{1}",
        "\\text{",
        "\\text",
        "\\circ",
        "^\\circ",
    ],
    *[
        "{",
        "}",
        "{}",
        "[",
        "]",
        "(",
        "\\",
        "\\\\",
        "\\left",
        "\\right",
        "\\!",
        "\\,",
        "\\{",
        "\\}",
        "**",
        ";",
        "^2",
        "^{2",
        "°",
        "\\in",
    ],
]
GOLDS = [
    "18",
    "1/2",
    "Yes",
    "5; 15",
    "1,-2",
    "\\left( 3, \\frac{\\pi}{2} \\right)",
    "x \\in [-2,7]",
    "\\{1\\pm\\sqrt{5},-2\\}",
    "",
    "}",
]


@st.composite
def hostile(draw):
    """Fragments in a row, the row repeated, up to 16,000 characters."""
    piece = st.sampled_from(FRAGMENTS) | st.text(max_size=5)
    length = draw(st.sampled_from([1, 1, 10, 10, 100, 100, 1000, 1000, 1000, 16000]))
    head, body, tail = draw(piece), draw(st.lists(piece, max_size=4).map("".join)) or "x", draw(piece)
    return (head + (body * (length // len(body) + 1))[:length] + tail)[:16000]


def never_raises(text, gold):
    assert 0 <= paper(text, problem(gold)).reward <= 1  # it scores as plain does, then clips
    assert not same(text, "18") or number(text) is not None
    same(gold, text)


@settings(max_examples=400)  # and 100,000 in `make slow`
@given(text=hostile(), gold=st.sampled_from(GOLDS))
def test_hostile_text_never_raises(text, gold):
    never_raises(text, gold)


@pytest.mark.slow
def test_a_hundred_thousand_hostile_texts_never_raise():
    draw = random.Random(0)
    for _ in range(100_000):
        head, body, tail = ("".join(draw.choices(FRAGMENTS, k=draw.randint(1, 6))) for _ in range(3))
        length = draw.choice([1, 10, 100, 1000, 16000] if draw.random() < 0.1 else [1, 10, 100, 1000])
        never_raises((head + (body * (length // len(body) + 1))[:length] + tail)[:16000], draw.choice(GOLDS))


FAMILIES = {
    **{f"line of {piece!r}": ("#### ", piece, "") for piece in FRAGMENTS},
    "digits and a letter": ("", "1" * 100, "x"),
    "thousands cut short": ("1", ",111", "1"),
    "lines of text": ("", "\n#### a", ""),
    "lines of numbers that are none": ("", "\n#### 1x", ""),
    "deep boxes": ("\\boxed", "{", "}" * 4000),
    "units": ("#### 1 ", "ab ", "1"),
    "spaces before an equals sign": ("#### x", " ", "= 1"),
    "sums": ("#### ", "1+1=", ""),
    "list": ("#### (", "1,", "1)"),
    "answers": ("", "answer is: ", "x"),
    "answer and spaces": ("", "answer" + " " * 50, ""),
    "answer and a run of spaces": ("answer", " ", "x"),
    "digits and a run of spaces": ("1", " ", "/"),
    "words": ("", "\\text{a", "}"),
    "fractions": ("", "1\\frac{1}{", ""),
    "mixed": ("", "1 1/", ""),
}


def seconds(text, best_of=3):
    target = problem("\\{1\\pm\\sqrt{5},-2\\}")
    times = []
    for _ in range(best_of):
        begun = time.process_time_ns()
        plain(text, target)
        times.append(time.process_time_ns() - begun)
    return min(times) / 1e9


@pytest.mark.parametrize("family", FAMILIES)
def test_time_grows_at_most_linearly(family):
    head, body, tail = FAMILIES[family]

    def text(length):
        return head + body * (length // len(body)) + tail

    gc.disable()
    try:
        for _ in range(5):  # a busy machine gets another try; a quadratic rule fails them all
            ratio = seconds(text(16_000)) / (seconds(text(8_000)) + 5e-5)
            if ratio <= 3:
                return
    finally:
        gc.enable()
    pytest.fail(f"twice the text took {ratio:.1f} times as long")
