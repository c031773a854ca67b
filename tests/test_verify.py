"""reward=math: expressions compared by math-verify in a process that hostile answers can neither hang nor use."""

import collections
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_reward import PLAIN, problem, problems, real

from pspo.base.schema import build
from pspo.config import compose
from pspo.reward import Attempt, RewardError, verify
from pspo.reward.answer import number

MATH = compose(["reward=math"]).reward
PATIENT = build(type(MATH), {"name": "math", "format_bonus": 0.05, "timeout_s": 600})
"""For verdicts that must not depend on how busy the machine is."""


def grade(*pairs):
    return PATIENT([Attempt(text, problem(gold)) for text, gold in pairs])


# --- equal and different


EQUAL = [
    *[("\\frac12", "0.5"), ("0.5", "\\frac{1}{2}"), ("\\dfrac{\\sqrt{3}}{2}", "\\frac{1}{2}\\sqrt3")],
    *[("3\\sqrt{13}", "\\sqrt{117}"), ("\\frac{1}{\\sqrt{2}}", "\\frac{\\sqrt{2}}{2}"), ("\\pi/6", "\\frac{\\pi}{6}")],
    *[("(x-3)(x+3)", "x^2-9"), ("x^2 + 2x + 1", "(x+1)^2"), ("3R^2", "3R^{2}"), ("-2 + 7i", "7i - 2")],
    *[("\\left( 3, \\frac{\\pi}{2} \\right)", "(3, \\pi/2)"), ("(-1/3, 0.5)", "\\left(-\\frac13, \\frac12\\right)")],
    *[("\\{2, \\sqrt{4}+1\\}", "\\{3, 2\\}"), ("3, 1, 2", "1,2,3"), ("1 \\pm \\sqrt{2}", "1+\\sqrt{2}, 1-\\sqrt{2}")],
    *[("[\\frac{4}{2}, 7)", "[2,7)"), ("(-\\infty, 2) \\cup (3, \\infty)", "(3, \\infty) \\cup (-\\infty, 2)")],
    *[("x \\in [-2,7]", "[-2,7]"), ("y = 2x + 3", "y = 3 + 2x"), ("2x - 2y + 6 = 0", "x - y + 3 = 0")],
    *[("3\\pi \\text{ cm}^2", "3\\pi"), ("12\\sqrt{2} \\text{ units}", "12\\sqrt2")],
    *[("50\\%", "50"), ("1{,}000", "1000"), ("2π", "2\\pi")],
    *[("\\begin{pmatrix} 0.2 \\\\ -3.6 \\end{pmatrix}", "\\begin{pmatrix} 1/5 \\\\ -18/5 \\end{pmatrix}")],
    *[("\\text{Evelyn}", "\\text{evelyn}"), ("\\text{(C)}", "\\text{C}"), ("52_8", "52_{8}")],
]  # fmt: skip
DIFFERENT = [
    *[("\\frac13", "0.5"), ("\\sqrt{3}", "\\sqrt{2}"), ("3\\pi", "3"), ("\\pi", "3.14"), ("x^2-9", "x^2+9")],
    *[("(2, 3)", "(3, 2)"), ("[2, 3)", "(2, 3)"), ("\\{1, 2\\}", "\\{1, 2, 3\\}"), ("1, 2", "1, 2, 3")],
    *[("50\\%", "0.5"), ("y = 2x + 3", "y = 2x - 3"), ("(-\\infty, 2)", "(-\\infty, 2]"), ("6+9i", "6-9i")],
    *[("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 2 \\\\ 1 \\end{pmatrix}"), ("52_9", "52_8")],
    *[("", "\\pi"), ("\\frac{", "\\frac{1}{2}"), ("\\sum_{n=1}^{3} n", "\\sqrt{36}")],
    *[("2^{10}\\pi", "\\pi"), ("\\text{odd}", "\\text{even}")],
]  # fmt: skip


def test_expressions_are_equal_and_different():
    scores = grade(*((f"so \\boxed{{{answer}}}", gold) for answer, gold in EQUAL + DIFFERENT))
    found = {pair: score.correct for pair, score in zip(EQUAL + DIFFERENT, scores, strict=True)}
    assert found == dict.fromkeys(EQUAL, True) | dict.fromkeys(DIFFERENT, False)


@real
def test_the_gold_answers_of_math500():
    golds = problems("math500")
    assert PATIENT.ungradable(golds) == []
    for form in ("#### {}", "$\\boxed{{{}}}$", "The answer is ${}$."):
        scores = PATIENT([Attempt(form.format(p.answer), p) for p in golds])
        assert [p.answer for p, score in zip(golds, scores, strict=True) if not score.correct] == []
    others = PATIENT([Attempt(f"#### {q.answer}", p) for p, q in zip(golds, golds[1:] + golds[:1], strict=True)])
    plain = PLAIN([Attempt(f"#### {q.answer}", p) for p, q in zip(golds, golds[1:] + golds[:1], strict=True)])
    assert [s.correct for s in others] == [s.correct for s in plain]  # the few equal neighbours, such as 2 and 2


@real
def test_plain_numbers_are_graded_as_by_the_plain_reward():
    numbers = [p for p in problems("math500") if number(p.answer) is not None]
    draw = random.Random(0)
    texts = [
        draw.choice(["#### {}\nHuman: next\n#### 9", "it is {}", "\\boxed{{{}}}"]).format(p.answer) for p in numbers
    ]
    texts = [text.replace("1", "2") if draw.random() < 0.3 else text for text in texts]
    attempts = [Attempt(text, p) for text, p in zip(texts, numbers, strict=True)]
    assert [s.correct for s in PATIENT(attempts)] == [s.correct for s in PLAIN(attempts)]


@pytest.mark.parametrize(
    ("text", "gold", "answer", "in_format"),
    [
        ("#### \\sqrt{2}\nor rather\n#### \\sqrt{3}", "\\pi", "\\sqrt{3}", True),  # the last line as asked
        ("\\boxed{2\\pi}, so\n#### \\pi", "\\pi", "\\pi", True),  # before a box
        ("#### $\\boxed{\\frac{\\pi}{2}}$", "\\pi", "\\frac{\\pi}{2}", True),
        ("\\boxed{1}, then \\boxed{\\{1, 2\\}}.", "\\pi", "\\{1, 2\\}", True),
        ("The answer is $3\\pi$, where $\\pi$ is a number.", "\\pi", "3\\pi", False),
        ("we get \\(x = 2\\) and \\[x^2 = \\pi\\] so", "\\pi", "x^2 = \\pi", False),
        ("The answer is Evelyn.", "\\text{Evelyn}", "Evelyn", False),
        ("#### 8\nHuman: next\n#### 9", "7", "8", True),  # a plain number: by the plain reward's rule
        ("no idea", "\\pi", "", False),
    ],
)
def test_which_answer_a_completion_gives(text, gold, answer, in_format):
    assert verify.answer_of(text, gold) == (answer, in_format)


def test_strict_and_flexible_side_by_side():
    right, loose, wrong, none = grade(
        ("\\boxed{\\frac{\\pi}{2}}", "\\frac{1}{2}\\pi"), ("The answer is $\\pi/2$", "\\frac{1}{2}\\pi"),
        ("#### \\pi", "\\frac{1}{2}\\pi"), ("", "\\frac{1}{2}\\pi"),
    )  # fmt: skip
    assert (right.reward, right.correct, right.strict, right.parsed) == (1.05, True, True, True)
    assert (loose.reward, loose.correct, loose.strict, loose.parsed) == (1.0, True, False, True)
    assert (wrong.reward, wrong.correct, wrong.strict, wrong.parsed) == (0.05, False, False, True)
    assert (none.reward, none.correct, none.strict, none.parsed) == (0.0, False, False, False)
    assert not any(score.timed_out for score in (right, loose, wrong, none))


def test_gold_answers_that_cannot_be_graded_are_counted_and_not_refused(caplog):
    golds = [problem("\\frac{1}{2}"), problem("\\frac{", id="q2"), problem("5"), problem("\\sum_{n=1}^{9} n", id="q4")]
    assert [p.id for p in PATIENT.ungradable(golds)] == ["q2", "q4"]
    PATIENT.check_gold(golds)
    assert "problem q2: the gold answer" in caplog.text
    assert "there are 2 such problems" in caplog.text
    assert [s.correct for s in grade(("\\boxed{\\frac{}", "\\frac{"), ("#### \\frac{", "\\frac{"))] == [False, True]


# --- what hangs, dies or attacks


FAKE = """
import os, sys, time
sys.path.append(sys.argv[1])
import math_process
def equal(gold, answer):
    if answer == "hang": time.sleep(10**6)
    if answer == "die": os._exit(1)
    if answer == "kill": os.kill(os.getpid(), 9)
    if answer == "raise": raise MemoryError
    if answer == "print": print("[true]")
    return gold == answer
math_process.equal = equal
math_process.WARM_UP = ("same",)
math_process.serve()
"""


def fake(answers, timeout_s):
    command = [sys.executable, "-P", "-c", FAKE, str(Path(verify.__file__).parent)]
    pairs = [("same", answer) for answer in answers.split()]
    requests = [json.dumps([part, timeout_s, 2]) + "\n" for part in (pairs[:3], pairs[3:])]
    done = subprocess.run(command, input="".join(requests), capture_output=True, text=True, check=True)
    return list(itertools.chain.from_iterable(map(json.loads, done.stdout.splitlines())))


def test_a_forked_process_that_dies_costs_the_pair_that_it_was_at():
    verdicts = [True, None, True, None, None, False, False, True]
    assert fake("same die same kill raise other print same", 600) == verdicts


def test_a_forked_process_that_hangs_is_killed():
    assert fake("hang hang hang hang hang", 0.01) == [None] * 5


def test_an_answer_that_hangs_scores_nothing_and_is_counted_and_the_next_is_graded():
    hurried = build(type(MATH), {"name": "math", "format_bonus": 0.05, "timeout_s": 1e-4})
    (score,) = hurried([Attempt("\\boxed{\\sin^{99} x + \\cos^{99} x}", problem("\\frac{\\pi}{2}"))])
    assert (score.reward, score.correct, score.strict, score.parsed, score.timed_out) == (0.0, False, False, True, True)
    assert grade(("#### \\frac12\\pi", "\\frac{\\pi}{2}"))[0].correct


def test_a_grading_process_that_is_gone_is_told_and_another_takes_its_place():
    grade(("#### \\frac12\\pi", "\\frac{\\pi}{2}"))
    process = verify._process(os.getpid())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(RewardError, match="ended with status -9"):
        grade(("#### \\frac12\\pi", "\\frac{\\pi}{2}"))
    assert grade(("#### \\frac12\\pi", "\\frac{\\pi}{2}"))[0].correct


@pytest.mark.process
@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), 9)"])
def test_a_grading_process_ends_with_the_process_that_it_grades_for(end):
    code = f"import os\nfrom pspo.reward import verify\nprint(verify.compare([('x', 'x')], 600))\n{end}"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, error = process.communicate()  # ends when nobody holds standard error any more, grading processes included
    assert error == ""
    assert out == "[True]\n" or end  # what is printed before a kill may be lost


def hostile(draw, sentinel):
    """A text of one of the kinds that break graders, never twice the same."""
    n, m, k = draw.randint(2, 10**6), draw.randint(2, 99), draw.randint(2, 300)
    letter = draw.choice("abcxyz")
    touch = f"open('{sentinel}', 'w')"
    bad = "".join(draw.choices("\0\ud800\u202e½²٣∫√𝟗{}$\\^_&#%~ \n", k=k))
    deep = draw.choice(
        ["{", "(", "[", "\\frac{1}{", "\\sqrt{", "\\left(", "|", "\\overline{", "-", "\\text{", "\\boxed{"]
    )
    close = draw.choice(["", "}", ")"])
    answers = [deep * k + str(n) + close * draw.choice([0, k]), f"{n}^{{{m}^{{{m}^{n}}}}}", f"{m}^{n}^{m}^{n}"]
    answers += [f"{letter}^{{{n}^{{{m}}}}}", f"{n}!", f"({m}!)!", f"(({m}!)!)!", f"{n}^{n}!", f"\\binom{{{n}}}{{{m}}}"]
    answers += [
        f"\\int_0^{{{n}}} " * (1 + k % 9) + f"{letter}^{{{letter}^{n}}} dx",
        f"\\int {letter}^{letter} d{letter}",
    ]
    answers += [f"\\sum_{{n=1}}^{{{n}}} n^{n}", f"\\prod_{{k=1}}^{{10^{m}}} k", f"\\lim_{{x \\to {n}}} x^{{x^x}}"]
    answers += [
        f"({letter}+{n})^{{{n}}}",
        f"0.{n}^{{10^{{{m}}}}}",
        f"\\log_{{{m}^{{{n}^{m}}}}} {n}",
        f"e^{{e^{{{n}}}}}",
    ]
    answers += [
        f"__import__('os').system('touch {sentinel}') + {n}",
        f"\\text{{{touch}}} + {n}",
        f"lambda: {touch}, {n}",
    ]
    answers += [f"exec({touch!r}) * {n}", f"[{touch} for _ in range({n})]", f"x.__class__.{letter}{n}"]
    answers += [
        f"{letter}{bad}{n}",
        bad,
        "9" * k + f"^{{{n}}}",
        f"{n}," * k,
        f"{letter}+" * k + str(n),
        f"\\{letter}" * k,
    ]
    answers += ["\\begin{pmatrix}" + f"{n} & " * k + "1\\end{pmatrix}", f"\\{{{n}" * (k // 9), "&" * k + str(n)]
    answer = draw.choice(answers)
    if draw.random() < 1e-3:  # passes all that is cheap, and would simplify for hours
        answer = f"\\sin^{{{m}}} {letter} + \\cos^{{{m}}} {letter}"
    form = draw.choice(["\\boxed{%s}", "#### %s", "The answer is $%s$.", "$$%s$$", "%s", "\\[%s", "\\boxed{%s"])
    text = form.replace("%s", answer)
    return text * (10**6 // len(text)) if draw.random() < 1e-3 else text


GOLDS = ["\\frac{\\pi}{2}", "x^2 - 9", "\\left( 3, \\frac{\\pi}{2} \\right)", "\\{1\\pm\\sqrt{5},-2\\}", "-7/3"]


def grade_hostile(count, sentinel):
    """Grade hostile texts a step's batch at a time; returns the seconds and the counts of outcomes."""
    draw, outcomes, begun = random.Random(0), collections.Counter(), time.monotonic()
    for start in range(0, count, 500):
        batch = [Attempt(hostile(draw, sentinel), problem(draw.choice(GOLDS))) for _ in range(min(500, count - start))]
        scores = MATH([*batch, Attempt("\\boxed{\\frac12\\pi}", problem("\\frac{\\pi}{2}"))])
        assert scores.pop().correct or scores[-1].timed_out
        assert all(score.reward <= 0.05 and not score.correct for score in scores)
        outcomes += collections.Counter("timed out" if score.timed_out else "wrong" for score in scores)
    assert not sentinel.exists()
    return time.monotonic() - begun, outcomes


def test_hostile_answers_neither_hang_nor_run(tmp_path):
    _, outcomes = grade_hostile(300, tmp_path / "sentinel")
    assert outcomes.total() == 300


@pytest.mark.slow
def test_a_hundred_thousand_hostile_answers(tmp_path):
    """Ten minutes are allowed; LOG has how many they took, as a busy machine takes longer."""
    seconds, outcomes = grade_hostile(100_000, tmp_path / "sentinel")
    print(f"{seconds:.0f} s, {dict(outcomes)}")
    assert outcomes.total() == 100_000
    assert outcomes["timed out"] < 1000
