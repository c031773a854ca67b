import ast
import builtins
import functools
import gc
import itertools
import json
import os
import random
import re
import statistics
import time
import unicodedata
from dataclasses import asdict, replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from pspo.base.schema import ConfigError, build
from pspo.dataset import Problem, sources
from pspo.reward import Attempt, Reward, RewardError, answer
from pspo.reward.answer import asked, extract, normal, number, same

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("PSPO_DATA", ROOT.parent / "shared" / "data"))
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data at {DATA}; set PSPO_DATA")
SETS = {"gsm8k": ("gsm8k", 8792), "svamp": ("svamp/SVAMP.json", 1000)}
SETS |= {"asdiv": ("asdiv/ASDiv.xml", 2305), "math500": ("math500", 500)}
NAMES = sorted(file.stem for file in (ROOT / "conf" / "reward").glob("*.yaml"))


def config(name, **changes):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        values = OmegaConf.to_container(compose(f"reward/{name}")["reward"])
    return build(Reward, values | changes)


def problem(answer, id="p1"):
    return Problem(id, "How many?", answer, "")


def one(reward, text, target):
    (score,) = reward([Attempt(text, target)])
    return score


PLAIN, PAPER = config("plain"), config("paper")


def plain(text, target):
    return one(PLAIN, text, target)


def paper(text, target):
    return one(PAPER, text, target)


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
        ("from 5-10", None, False),  # neither a sign nor a number by itself
        ("it fell to -10 degrees", "-10", False),
        ("<<48/2=24>>24 clips", "24", False),
        ("I do not know", None, False),
        ("", None, False),
        ("٣ and ²", None, False),  # the last number decides, and it is an exponent
        ("so x = 3 \\times 10^{8}", "3 \\times 10^{8}", False),
        ("that is 2½ cups", "2\\frac{1}{2}", False),
        ("\\fbox{18} of 5", "18", False),
        ("\\boxed{5} or \\fbox{\\frac{1}{2}}", "\\frac{1}{2}", False),
        ("<answer>18</answer> of 5", "18", False),
        ("<answer>3</answer>, no: <Answer>\n\\boxed{18}\n</Answer> or \\boxed{5}", "18", False),
        ("<answer>The total is 18 eggs</answer>", "18", False),
        ("<answer>5\\pi</answer>", "5\\pi", False),
        ("<answer>5</answer>\n#### 18", "18", True),
        ("#### <answer>18</answer>", "18", True),
        ("<answer>18", "18", False),
        ("\\text{Answer: } 18 and the 5", "18", False),
        ("\\text{answer} = 18", "18", False),
        ("__Answer:__ 18\n5", "18", False),
        ("<b>Answer:</b> 18\n5", "18", False),
        ("答案是18个", "18", False),
        ("it fell to -$18", "-18", False),
        ("= 18 \\end{aligned}", "18", False),
        ("it is 980 cm³, or cm^2", "980", False),
        ("- 18 eggs", "18", False),
        ("the total – 18", "18", False),
        ("the total is *18* eggs", "18", False),
        ("5-year-old", "5", False),
    ],
)
def test_which_answer_a_completion_gives(text, answer, in_format):
    assert extract(text) == answer
    assert (asked(text) is not None) == in_format


# --- numbers


SIGNIFICAND = [
    "3 \\times ",
    "3\\times",
    "3 \\cdot ",
    "3×",
    "3 × ",
    "3·",
    "3 ⋅ ",
    "3*",
    "3 * ",
    "3 x ",
    "3x",
    "3 X ",
    "3.0 ∗ ",
]
EIGHT = ["10^8", "10^{8}", "10^{ 8 }", "10^+8", "10^{+8}", "10 ^ 8", "10^(8)", "10⁸", "10**8", "10^8 ", "10^８"]
DEGREES = [
    "°",
    " °",
    "°C",
    " °C",
    "° F",
    "℃",
    "º",
    "^\\circ",
    "^{\\circ}",
    "^{ \\circ }",
    "{^\\circ}",
    "^\\circ C",
    "\\circ",
]
DEGREES += [
    "^\\circ\\text{C}",
    "^\\circ \\mathrm{F}",
    "\\degree",
    "^\\degree",
    "^{\\degree}",
    "\\textdegree",
    " degrees",
    "deg",
]
MONEY = [
    "$18",
    "\\$18",
    "$18$",
    "18$",
    "18 $",
    "18\\$",
    "US$18",
    "US\\$18",
    "A$18",
    "USD 18",
    "USD18",
    "18 USD",
    "€18",
    "18€",
]
MONEY += [
    "18 €",
    "EUR 18",
    "£18",
    "₹18",
    "Rs. 18",
    "¢18",
    "18¢",
    "18 cents",
    "\\pounds18",
    "18 \\text{ dollars}",
    "（18）",
]


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
        *[(f"{times}{exponent}", 3 * 10**8) for times in SIGNIFICAND for exponent in EIGHT],
        *[("3e8", 3 * 10**8), ("3E+8", 3 * 10**8), ("10^8", 10**8), ("10⁻³", "1/1000"), ("-10^{3}", -1000)],
        *[("-2.5 \\cdot 10^{-3}", "-1/400"), ("1/2 × 10^2", 50), ("\\frac{3}{4} \\times 10^{2}", 75), ("1e3%", 1000)],
        *[("3 \\times 10^8\\,\\mathrm{m/s}", 3 * 10**8), ("$3·10⁸$ m·s⁻¹", 3 * 10**8), ("v = 3e8 m/s", 3 * 10**8)],
        *[("2½", "5/2"), ("1 ¾", "7/4"), ("½", "1/2"), ("-2½ cups", "-5/2"), ("⅔ of the eggs", "2/3"), ("1⁄2", "1/2")],
        *[(f"25{degrees}", 25) for degrees in DEGREES],
        *[(money, 18) for money in MONEY],
        *[
            ("１８", 18),
            ("١٨", 18),
            ("१८", 18),
            ("１，０００", 1000),
            ("1\u202f000\u202f000", 10**6),
            ("1\\,000\\,000", 10**6),
        ],
        *[
            ("25 %", 25),
            ("18/hour", 18),
            ("5~cm", 5),
            ("2 \\times 3 = 6", 6),
            ("<answer>18</answer>", 18),
            ("5 m^{-2}", 5),
        ],
        *[("x = 5", 5), ("x=5", 5), ("total cost = 5 dollars", 5), ("3 + 4 = 7", 7), ("**7**", 7), ("(7)", 7)],
    ],
)
def test_texts_that_are_numbers(text, value):
    assert number(text) == Fraction(value)


@pytest.mark.parametrize(
    "text",
    [
        *["", "Yes", "February 3rd", "-", ".", "$", "%", "/", "x", "x = y", "²", "5²"],
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
        *["3 \\times 10^{8.5}", "3 \\times 10^{n}", "3 \\times 10", "3 \\times 10^{1000}", "10^{1000}", "2 10^8"],
        *["3 \\times 10^8 + 2", "3 × 10^8 × 2", "3 × 10 8", "2^3", "1,5 × 10^3", "2√3", "2 \\sqrt{3}", "5π", "5pi"],
        *["30°15", "5€6", "$5$$6$", "5\\,6", "3\\;4", "1 000", "1.234,56", "12,34,567", "52₈", "x½", "½x", "2.5½"],
        *["18 millions", "5 squared", "2 thirds", "5 more than x", "5 bn", "18‰", "±5", "≥ 5", "5'", "5m", "5 K"],
        *["1" * 101, "1" * 16000, "1," * 8000, "\\frac{" + "1" * 31 + "}{2}"],
    ],
)
def test_texts_that_are_no_numbers(text):
    assert number(text) is None


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        *[("18.0000009", "18"), ("0.000300001", "3e-4"), ("1000000.9", "1000000"), ("0.5", "1/2"), ("50", "50%")],
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
            ("3e-8", "5e-8"),
            ("0.0000001", "2 \\times 10^{-7}"),
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
    *[
        ("#### 1e3", "1000", True, True),
        ("#### 3 \\times 10^5", "3", False, True),
        ("#### 3 × 10⁵", "300000", True, True),
        ("#### 2^3", "2", False, True),
    ],
    *[("#### ٣", "3", True, True), ("#### 8²", "8", False, True), ("3 \\times 10^{8}", "8", False, False)],
    *[("#### 2½", "2.5", True, True), ("#### 2½", "2", False, True), ("2½", "2.5", True, False)],
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
    *[("The answer is $8. He had 3.", "8", True, False), ("İİİ the answer is 8, not 9", "8", True, False)],
    *[("The answer is 8, not 9", "8", True, False), ("The answer is 3, no, the answer is 8", "3", False, False)],
    *[("The answer is 5\\pi.", gold, gold != "5", False) for gold in ("5", "5\\pi")],
    *[("The answer is 3:30.", gold, gold == "3:30", False) for gold in ("3", "30", "3:30")],
    *[("The answer is 2 + 3", "2", False, False), ("The answer is 2 + 3 = 5.", "5", True, False)],
    *[("The answer is x^2 + 1", "2", False, False), ("The answer is 1,00", "1", False, False)],
    *[("he had 3 and then 8 eggs", "8", True, False), ("8 eggs of 9", "8", False, False), ("10-8", "8", False, False)],
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


SUPERSCRIPTS = str.maketrans("0123456789+-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻")
SCRIPTS = [str.maketrans("0123456789", "".join(chr(zero + i) for i in range(10))) for zero in (0x660, 0x966, 0xFF10)]
UNITS = [
    "",
    "%",
    " %",
    "°",
    "°C",
    "^\\circ",
    " cm",
    "\\text{ cm}^2",
    " m/s",
    " apples",
    "\\,\\mathrm{kg}",
    " (eggs)",
    "€",
    "¢",
]
MARKS = ["", "$", "\\$", "€", "US$", "US$ ", "US $", "€ ", "$ ", "USD ", "\\pounds"]
CONTEXTS = [
    *["#### {}", "**#### {}**", "#### \\boxed{{{}}}", "#### <answer>{}</answer>", "#### x = {}"],
    *["so it is \\boxed{{{}}} of 7", "7 and \\fbox{{{}}}", "<answer>{}</answer> after 7", "<answer>it is {}</answer>"],
    *["The answer is {}.\n7", "**Answer:** {}\n7", "\\text{{answer}} = {}\n7", "in 7 days it is {}", "7\nTotal: {}."],
]


def spelled(draw, digits, exponent):
    """The number digits · 10^exponent in any spelling; the part after the sign."""
    integer, scale = str(digits), max(0, -exponent)
    plain = str(Decimal(digits).scaleb(exponent)) if exponent < 0 else str(digits * 10**exponent)
    ways = [plain, f"{integer}e{exponent}", f"{integer}E{exponent:+d}"]
    if "E" not in plain and "." not in plain:
        grouped = f"{int(plain):,}"
        ways += [grouped, *(grouped.replace(",", mark) for mark in ("{,}", ",\\!", "\\,", "\u202f", "\u00a0"))]
    times = draw(st.sampled_from([" \\times ", "\\cdot", "×", " · ", "*", " x "]))
    power = draw(
        st.sampled_from([f"^{{{exponent}}}", f"^{exponent}", str(exponent).translate(SUPERSCRIPTS), f"**{exponent}"])
    )
    ways += [f"{integer}{times}10{power}", f"{integer[0]}.{integer[1:]}0{times}10^{{{exponent + len(integer) - 1}}}"]
    if exponent < 0:
        ways += [
            f"{integer}/{10**scale}",
            f"\\frac{{{integer}}}{{{10**scale}}}",
            f"\\dfrac{{{integer}}}{{{10**scale}}}",
        ]
    way = draw(st.sampled_from(ways))
    return way if "*" in way else way.translate(draw(st.sampled_from([{}, *SCRIPTS])))


@st.composite
def two_numbers(draw):
    """A number in two spellings, and a spelling of another number, a hundredth, sign or power away."""
    digits, exponent = draw(st.integers(1, 99999)), draw(st.integers(-9, 9))
    sign = draw(st.sampled_from(["", "-", "−"]))
    change = draw(st.sampled_from(["digit", "sign", "power"]))
    other = (digits + (change == "digit") * (1 + digits // 100), exponent + (change == "power"))
    other_sign = ("" if sign else "-") if change == "sign" else sign

    def dressed(sign, number):
        mark, unit = draw(st.sampled_from(MARKS)), draw(st.sampled_from(UNITS))
        return f"{sign}{mark}{spelled(draw, *number)}{unit}"

    gold, same_number, another = ((sign, (digits, exponent)),) * 2 + ((other_sign, other),)
    return dressed(*gold), dressed(*same_number), dressed(*another)


@settings(max_examples=500)
@given(numbers=two_numbers(), context=st.sampled_from(CONTEXTS))
def test_no_spelling_of_a_number_changes_the_verdict(numbers, context):
    gold, same_number, another = numbers
    assert plain(context.format(same_number), problem(gold)).correct
    assert not plain(context.format(another), problem(gold)).correct


def test_a_fraction_in_latex_stands_alone_behind_a_word():
    for text in ("it is \\frac{3}{4}", "it is 1\\frac{3}{4} cups", "<answer>it is \\frac{3}{4}</answer>"):
        assert plain(text, problem("1.75" if "cups" in text else "0.75")).correct
    assert not plain("x \\frac{3}{4}x", problem("0.75")).correct


@pytest.mark.parametrize("fraction", "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞")
def test_unicode_fractions_are_read(fraction):
    top, bottom = map(int, unicodedata.normalize("NFKC", fraction).split("⁄"))
    assert number(fraction) == Fraction(top, bottom)
    assert number(f"-12{fraction} cups") == number(f"-12 {fraction}") == -12 - Fraction(top, bottom)


PARTS = [
    *[
        "{}\\pi",
        "{}π",
        "{}\\sqrt{{3}}",
        "{}√3",
        "x^{{{}}}",
        "x^{}",
        "x_{}",
        "x_{{{}}}",
        "3:{}",
        "{}:30",
        "{}^2",
        "{}²",
        "\\sqrt{{{}}}",
    ],
    *[
        "\\frac{{\\pi}}{{{}}}",
        "{} \\times 10^{{n}}",
        "3 \\times 10^{{{}.5}}",
        "3^{{{}}}",
        "2 + {}",
        "{} + 2",
        "3-{}",
        "from {} to 8",
    ],
    *[
        "from 3 to {}",
        "{} or 8",
        "1/2 of {}",
        "{} million",
        "{} thirds",
        "f({})",
        "{}(2)",
        "COVID-{}",
        "H{}O",
        "{}x",
        "{} x 3",
        "3 x {}",
        "3 \\times {}",
        "x > {}",
    ],
    *[
        "±{}",
        "\\pm {}",
        "{},5",
        "8,{}",
        "3, {}",
        "0x{}",
        "{}/3/2020",
        "1.2.{}",
        "{}‰",
        "30°{}",
        "\\log {}",
        "log {}",
        "{}_8",
        "({})^2",
    ],
    *["-+{}", "+-{}", "-({})", "-\\$ {}", "-~{}", "minus {}", "negative {}", "-US $ {}"],
    *["February {}", "≥ {}", "{}e", "{}k", "3^{{{}}}", "{} \\cdot y"],
]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "context", ["{}", "it is {}", "The answer is {}.", "<answer>{}</answer>", "#### {}", "\\boxed{{{}}}"]
)
def test_a_part_of_what_is_not_understood_is_no_answer(part, context):
    assert not plain(context.format(part.format(7)), problem("7")).correct


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
        assert score.strict == (score.correct and "####" in completion)
        assert score.parsed == parsed
    assert paper(completion, problem(gold)).components == paper_components


def test_the_format_bonus_is_the_key():
    assert one(config("plain", format_bonus=0.3), "#### 17", problem("18")).reward == 0.3
    assert one(config("plain", format_bonus=0), "#### 18", problem("18")).reward == 1


@pytest.mark.parametrize("reward", [PLAIN, PAPER])
def test_a_batch_has_the_scores_of_its_completions_one_by_one(reward):
    batch = [Attempt(text, problem(gold)) for text in ("#### 18", "it is 17", "") for gold in ("18", "17")]
    assert reward(batch) == [one(reward, completion.text, completion.problem) for completion in batch]
    assert reward([]) == []


@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_file_is_a_reward(name, tmp_path):
    (tmp_path / "mine.py").write_text("def f(text, problem): return 1")
    reward = config(name, **({"function": f"{tmp_path}/mine.py:f"} if name == "custom" else {}))
    reward.check()
    assert one(reward, "18" if name == "exact" else "#### 18", problem("18")).correct
    assert reward.source_files() == ([tmp_path / "mine.py"] if name == "custom" else [])


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"name": "best"}, "unknown reward best; known: plain, paper, math, exact, custom"),
        ({"name": "plain", "format_bonus": 2.0}, r"reward.format_bonus must be in \[0, 1\], got 2.0"),
        ({"name": "paper", "format_bonus": 0.05}, "unknown key reward.format_bonus"),
        ({"name": "plain", "format_bonus": 0.05, "function": "a:b"}, "unknown key reward.function"),
        ({"name": "custom"}, "reward.function has no value"),
    ],
)
def test_a_wrong_configuration_is_refused(values, told):
    with pytest.raises(ConfigError, match=told):
        build(Reward, values)


# --- a user's own code


OWN = """
from __future__ import annotations
from dataclasses import dataclass
import numpy as np
from pspo.base.schema import key
from pspo.reward import Reward, Score

IMPORTS.append(1)

@dataclass
class Kept:
    x: int

def length(text, problem): return len(text) / 10
def scored(text, problem): return Score(-3.0, text == problem.answer, {"mine": 2.0}, False)
def flag(text, problem): return text == problem.answer
def flags(text, problem):
    true = np.bool_(True)
    return Score(np.float32(1), true, {"a": np.int64(2)}, np.bool_(False), true)
def numpy32(text, problem): return np.float32(0.5)
def numpy64(text, problem): return np.float64(0.5)
def level(text, problem): return problem.extra["level"]
def weighted(text, problem, *, weight=1.0): return weight * len(text)
def nothing(text, problem): return None
def infinite(text, problem): return float("inf")
def huge(text, problem): return 10**400
def words(text, problem): return "1"
def undefined(text, problem): return Score(float("nan"), True, {}, True)
def broken(text, problem): return Score(1.0, True, {"part": None}, True)
def bare(text, problem): return Score(1.0, True, None, True)
def raising(text, problem): raise KeyError("no\\nkey")
def stopping(text, problem): return next(iter(()))
def one_argument(text): return 1
async def later(text, problem): return 1
number = 3

@dataclass(frozen=True, kw_only=True)
class Batched(Reward):
    weight: float = key("weight of a character", within="[0, 9]")
    bonus: float = 1.0
    def __call__(self, completions):
        return [Score(self.weight * len(c.text) + self.bonus, True, {}, True) for c in completions]

class Rank(Reward):
    def __call__(self, completions): return [float(i) for i, _ in enumerate(completions)]
class Short(Reward):
    def __call__(self, completions): return [1.0]
class Wrong(Reward):
    def __call__(self, completions): return [None for _ in completions]
class NoList(Reward):
    def __call__(self, completions): return 1.0
class Raising(Reward):
    def __call__(self, completions): raise KeyError("no key")
class Abstract(Reward):
    pass
class Unmade(Reward):
    def __post_init__(self): raise OSError("no model")
    def __call__(self, completions): return []
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    monkeypatch.setattr(builtins, "IMPORTS", imports := [], raising=False)

    def reward(name, **options):
        return config("custom", function=f"{file}:{name}", options=options)

    reward.imports = imports
    return reward


def test_a_number_of_ones_own_is_correct_from_one_on(own):
    score = one(own("length"), "12345", problem("5"))
    assert (score.reward, score.correct) == (0.5, False)
    score = one(own("length"), "1234567890", problem("5"))
    assert (score.reward, score.correct, score.components, score.parsed) == (1.0, True, {"custom": 1.0}, True)
    assert one(own("flag"), "5", problem("5")).reward == 1.0


@pytest.mark.parametrize("name", ["numpy32", "numpy64"])
def test_a_number_of_numpy_becomes_a_float(own, name):
    score = one(own(name), "5", problem("5"))
    assert (type(score.reward), score.reward, score.correct) == (float, 0.5, False)


def test_a_score_of_ones_own_is_kept_and_its_numbers_become_json(own):
    score = one(own("scored"), "5", problem("5"))
    assert (score.reward, score.correct, score.components, score.parsed) == (-3.0, True, {"mine": 2.0}, False)
    score = one(own("flags"), "5", problem("5"))
    assert json.loads(json.dumps(asdict(score))) == {
        "reward": 1.0, "correct": True, "components": {"a": 2.0}, "parsed": False, "strict": True, "timed_out": False,
    }  # fmt: skip


def test_a_function_in_a_package():
    reward = config("custom", function="statistics:fmean")
    reward.check()
    assert reward.source_files() == [Path(statistics.__file__)]


def test_a_function_sees_every_further_column_and_its_options(own):
    assert one(own("level"), "5", replace(problem("5"), extra={"level": 3})).reward == 3
    assert one(own("weighted"), "12345", problem("5")).reward == 5
    assert one(own("weighted", weight=0.5), "12345", problem("5")).reward == 2.5


def test_a_class_is_a_reward_of_a_whole_batch_with_keys_of_its_own(own):
    completions = [Attempt("1" * i, problem("5", id=f"p{i}")) for i in range(3)]
    assert [score.reward for score in own("Batched", weight=2)(completions)] == [1, 3, 5]
    assert [score.reward for score in own("Batched", weight=2, bonus=0.0)(completions)] == [0, 2, 4]
    assert [score.correct for score in own("Rank")(completions)] == [False, True, True]
    assert own("Raising")([]) == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "reward.options.weight has no value; set it with reward.options.weight=<value>"),
        ({"weight": 10.0}, r"reward.options.weight must be in \[0, 9\], got 10.0"),
        ({"weight": "a"}, "reward.options.weight must be a number, got 'a'"),
        ({"wieght": 1.0}, r"unknown key reward.options.wieght \(did you mean reward.options.weight\?\)"),
    ],
)
def test_the_options_of_a_class_are_its_keys(own, options, told):
    with pytest.raises(ConfigError, match=told):
        own("Batched", **options).check()


def test_a_file_is_imported_once_per_process(own):
    for name in ("length", "flag", "Batched", "length"):
        reward = own(name, **({"weight": 1.0} if name == "Batched" else {}))
        reward.check()
        reward([Attempt("5", problem("5"))] * 3)
    assert own.imports == [1]


def test_two_files_of_one_name_are_two_modules(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(f"def reward(text, problem): return {ord(folder)}")
    scores = [one(config("custom", function=f"{tmp_path}/{f}/mine.py:reward"), "", problem("5")) for f in "abab"]
    assert [score.reward for score in scores] == [97, 98, 97, 98]


RESULTS = ["nothing", "infinite", "huge", "words", "undefined", "broken", "bare", "later", "Wrong"]


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
@pytest.mark.parametrize("name", RESULTS)
def test_a_result_that_is_no_finite_number_is_told_with_its_problem(own, name):
    with pytest.raises(
        RewardError, match=rf"mine.py:{name} must return a finite number .*, got .* on problem p1; mend"
    ):
        own(name)([Attempt("5", problem("5")), Attempt("5", problem("5", id="p2"))])


@pytest.mark.parametrize(
    ("name", "told", "cause"),
    [
        ("raising", r"raised KeyError: 'no\\nkey' on problem p2", KeyError),
        ("stopping", "raised StopIteration: on problem p2", StopIteration),
        ("one_argument", r"raised TypeError: one_argument\(\) takes 1 .* on problem p2", TypeError),
        ("Raising", "raised KeyError: 'no key' on 2 completions, the first of problem p2", KeyError),
        ("Short", r"must return a list of 2 scores, got \[1.0\] on 2 completions, the first of problem p2", None),
        ("NoList", "must return a list of 2 scores, got 1.0 on 2 completions, the first of problem p2", None),
    ],
)
def test_a_reward_that_raises_is_told_with_its_problem_and_keeps_the_traceback(own, name, told, cause):
    with pytest.raises(RewardError, match=rf"^reward.function=.*mine.py:{name} {told}; mend") as caught:
        own(name)([Attempt("5", problem("5", id="p2")), Attempt("5", problem("5"))])
    assert type(caught.value.__cause__) is (cause or type(None))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("{}/none.py:f", "there is no file .*none.py"),
        ("{}/mine.py:missing", ".*mine.py has no function or class missing"),
        ("{}/mine.py:number", ".*mine.py has no function or class number"),
        ("{}/mine.py:", ".*mine.py has no function or class "),
        ("{}/mine.py:Kept", "a class must be a subclass of pspo.reward.Reward"),
        ("{}/mine.py:Abstract", "cannot be made: TypeError: Can't instantiate abstract class Abstract"),
        ("{}/mine.py:Unmade", "cannot be made: OSError: no model"),
        ("{}/broken.py:f", "cannot be imported: SyntaxError: .*"),
        ("{}/raising.py:f", "cannot be imported: ZeroDivisionError: division by zero"),
        ("{}/needy.py:f", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("no_such_package.module:f", "cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"),
        ("pspo.reward:missing", "pspo.reward has no function or class missing"),
        ("length", "must be path/to/file.py:function or package.module:function"),
        (".reward:f", "must be path/to/file.py:function or package.module:function"),
    ],
)
def test_a_function_that_cannot_be_had_is_refused_in_one_sentence(own, tmp_path, function, told):
    (tmp_path / "broken.py").write_text("def f(:")
    (tmp_path / "needy.py").write_text("import no_such_module")
    (tmp_path / "raising.py").write_text("1 / 0")
    with pytest.raises(ConfigError, match=rf"^reward.function='.*': {told}") as caught:
        config("custom", function=function.format(tmp_path)).check()
    assert "\n" not in str(caught.value)


def test_the_file_of_a_module_is_known_without_an_import(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine_too").mkdir()
    for name in ("__init__", "rewards"):
        (tmp_path / "mine_too" / f"{name}.py").write_text("1 / 0")
    for module, file in {"mine_too": "__init__", "mine_too.rewards": "rewards"}.items():
        found = config("custom", function=f"{module}:f").source_files()
        assert found == [tmp_path / "mine_too" / f"{file}.py"]
    for nothing in ("mine_too.missing:f", "nothing.py:f", "f"):
        assert config("custom", function=nothing).source_files() == []


# --- gold answers


def test_a_gold_answer_that_is_not_correct_is_told_with_its_problem():
    with pytest.raises(
        ConfigError, match=r"problem q7: the gold answer '', .* is not correct under reward=plain; mend"
    ):
        PLAIN.check_gold([problem("18"), problem("", id="q7")])


def test_a_custom_reward_may_be_about_something_else(own, caplog):
    reward = own("length")
    reward.check_gold([problem("5", id="q7")])
    assert "problem q7" in caplog.text
    assert len(reward.ungradable([problem("5", id=str(i)) for i in range(100)])) == 16  # it may be slow


def problems(name):
    path, _ = SETS[name]
    return [p for located in sources.locate(name, str(DATA / path)) for p in sources.read(*located)]


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
    for reward in (PLAIN, PAPER):
        reward.check_gold(golds)
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
    evaluators = {"eval", "exec", "sympify", "parse_expr", "literal_eval", "__import__", "ast", "sympy", "pickle"}
    evaluators |= {"parse_latex", "ExprExtractionConfig", "system", "run", "Popen"}
    for file in files:
        called = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                called.add(getattr(node.func, "id", getattr(node.func, "attr", "")))
            if isinstance(node, ast.Import | ast.ImportFrom):
                called |= {alias.name.partition(".")[0] for alias in node.names}
        # math_process is what runs in the process that verify starts, which tests/test_verify.py attacks
        assert called & evaluators == {"verify": {"Popen"}}.get(file.stem, set()), file


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
    *[
        "\\fbox{",
        "<answer>",
        "</answer>",
        "10^",
        "10^{8}",
        " \\times ",
        "3 × 10⁸",
        "¹",
        "₈",
        "2½",
        "~",
        "\\,",
        "1\\,111",
        "１",
        "US$",
    ],
    *["\\degree", "^{\\circ}", "°C", "\u202f111", "10**8", " million", " of 1", "^2 ", "cm^2", "Rs.", "$$"],
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
    "powers": ("1", " x 10^1", ""),
    "tags": ("", "<answer>1", "</answer>"),
    "groups of thousands": ("1", "\\,111", "1"),
    "no-break groups": ("1", "\u00a0111", "1"),
    "dollars": ("1", "$", "x"),
    "superscripts": ("10", "⁸", "½"),
    "spaces before a sign": ("1", " ", "° ~ $"),
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
