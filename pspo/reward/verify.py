r"""MATH's answers, compared as expressions by math-verify, in a process that is killed where an answer hangs it.

Which answer. Where the gold answer is a plain number, the answer is the one that ``reward=plain`` takes. Else the asked
format is the last line ``#### <answer>`` or, without such a line, the last ``\boxed{...}``; the flexible rule takes the
first formula behind the last "answer", or the last formula, or what ``reward=plain`` takes. Two plain numbers are
compared by ``pspo/reward/answer.py`` alone; all else is equal where ``answer.same`` or math-verify says so.
"""

import atexit
import contextlib
import functools
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pspo.base.schema import key
from pspo.dataset import Problem
from pspo.dataset.problem import boxed
from pspo.host.environment import choose_threads
from pspo.reward.answer import extract, number, same
from pspo.reward.base import Answered, Reward, RewardError, Score, score_of

MAX_TEXT_CHARACTERS = 2**15  # at the end of a completion that are read
MAX_EXTRA_CHARACTERS = 100  # of an answer that is parsed, above twice the gold answer's
MAX_ANSWER_DEPTH = 5  # brackets within brackets, as each may double the time; MATH-500's golds have 2
MIN_PAIRS_PER_FORK = 16  # that pay for another fork of the grading process
_LINE = re.compile(r"^[ \t]*####(?!#)[ \t]*(\S.*)", re.MULTILINE)
_SAID = re.compile("answer", re.IGNORECASE)
_FORMULA = re.compile(r"(?<!\\)\$([^$]+)\$|\\\(((?:(?!\\\)).)+)|\\\[((?:(?!\\\]).)+)", re.DOTALL)
_BASE = re.compile(r"[0-9] ?_ ?\{? ?([0-9]+)")
_STRANGE = re.compile(r"[^ -~\n\u03c0]|[\"'#@`?]|\\(?:[io]*int|sum|prod|lim)(?![A-Za-z])|\\[dt]?binom\D*[0-9]{4}")
"""What no answer has unless its gold answer has it: other characters than mathematics in LaTeX has (and π), and work
left to the grader, as an integral, a sum, a product, a limit and a large binomial are."""


@dataclass(frozen=True, kw_only=True)
class Math(Reward):
    r"""1 for a correct answer, in LaTeX too, plus ``format_bonus`` for a line ``#### <answer>`` or ``\boxed{...}``."""

    refuses_wrong_golds = False  # some of MATH's are no expressions to math-verify; there the same text is correct

    format_bonus: float = key("added when the completion has the asked format", within="[0, 1]")
    timeout_s: float = key(
        "wall-clock time in which one answer must be compared, seconds; else it scores 0 and is counted",
        within="(0, 3600]",
    )

    def __call__(self, completions: Sequence[Answered]) -> list[Score]:
        answers = [answer_of(c.text[-MAX_TEXT_CHARACTERS:], c.problem.answer) for c in completions]
        pairs = [(c.problem.answer, answer) for c, (answer, _) in zip(completions, answers, strict=True)]
        verdicts = {pair: by_rule(*pair) for pair in pairs}
        undecided = [pair for pair, verdict in verdicts.items() if verdict is None]
        verdicts |= dict(zip(undecided, compare(undecided, self.timeout_s), strict=True))
        graded = zip(pairs, answers, strict=True)
        return [score_of(verdicts[pair], bool(answer), strict, self.format_bonus) for pair, (answer, strict) in graded]

    def ungradable(self, problems: Sequence[Problem]) -> list[Problem]:
        """The problems whose gold answer is no plain number and, to math-verify, no expression equal to itself."""
        golds = list(dict.fromkeys(p.answer for p in problems if number(p.answer) is None))
        verdicts = dict(zip(golds, compare([(gold, gold) for gold in golds], self.timeout_s), strict=True))
        return [problem for problem in problems if not verdicts.get(problem.answer, True)]


def answer_of(text: str, gold: str) -> tuple[str, bool]:
    """The answer that a completion gives to a problem of this gold answer, "" for none, and whether in the format."""
    lines, plain = _LINE.findall(text), extract(text) or ""
    formatted = boxed(lines[-1]) or lines[-1].strip() if lines else boxed(text)
    if number(gold) is not None and number(plain) is not None:
        return plain, bool(formatted)
    if formatted:
        return formatted, True
    said = [match.end() for match in _SAID.finditer(text)][-1:]
    formulas = [*_FORMULA.finditer(text)]
    chosen = [formula for formula in formulas if said and formula.start() >= said[0]][:1] or formulas[-1:]
    return next(("".join(filter(None, formula.groups())).strip() for formula in chosen), plain), False


def by_rule(gold: str, answer: str) -> bool | None:
    """Whether two answers are equal, as far as ``pspo/reward/answer.py`` can say; None where it cannot."""
    if not answer or (number(answer) is not None and number(gold) is not None):
        return bool(answer) and same(answer, gold)
    if same(answer, gold):
        return True
    depths = itertools.accumulate((mark in "({[") - (mark in ")}]") for mark in answer)
    too_long = len(answer) > MAX_EXTRA_CHARACTERS + 2 * len(gold) or max(depths) > MAX_ANSWER_DEPTH
    strange = set(_STRANGE.findall(answer)) - set(_STRANGE.findall(gold))
    bases = [set(_BASE.findall(text)) for text in (answer, gold)]  # math-verify takes 52_8 for 52
    return False if too_long or strange or (all(bases) and bases[0] != bases[1]) else None


def compare(pairs: Sequence[tuple[str, str]], timeout_s: float) -> list[bool | None]:
    """Whether math-verify finds each pair of gold and answer equal; None where it took too long. Raises RewardError."""
    if not pairs:
        return []
    formulas = [[f"${' '.join(text.replace('$', '').split())}$" for text in pair] for pair in pairs]
    num_forks = min(choose_threads(None), math.ceil(len(pairs) / MIN_PAIRS_PER_FORK))
    process = _process(os.getpid())
    assert process.stdin
    assert process.stdout
    try:
        with contextlib.suppress(BrokenPipeError):  # the process has ended, and writes nothing either
            process.stdin.write(json.dumps([formulas, timeout_s, num_forks]) + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
    except BaseException:  # Ctrl-C, too: the next line that the process writes would answer this request
        _stop(process)
        raise
    if not line:
        _process.cache_clear()
        remedy = "mend what it wrote above, or give this job more memory, and run the same command again"
        raise RewardError(f"the process that grades for reward=math ended with status {process.wait()}: {remedy}")
    return list(json.loads(line))


@functools.cache
def _process(owner: int) -> subprocess.Popen[str]:
    """The grading process of the process with the id ``owner``; a fork of that one needs its own."""
    code = "import sys; sys.path.append(sys.argv[1]); import math_process; math_process.serve()"
    command = [sys.executable, "-P", "-c", code, str(Path(__file__).parent)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    atexit.register(_stop, child)
    return child


def _stop(process: subprocess.Popen[str]) -> None:
    """Kill a grading process and its forks."""
    _process.cache_clear()
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
