"""The process in which ``reward=math`` compares LaTeX answers: the part that meets model output is killed if it hangs.

``serve`` answers each line on standard input, the arguments of ``decide`` in JSON, with one line, its verdicts. Forks
of the process compare, as a fork takes milliseconds and a start with math-verify seconds. Nothing of this package is
imported, so that the process has one thread, as a fork wants it.
"""

import functools
import json
import logging
import math
import mmap
import os
import resource
import signal
import sys
from collections.abc import Sequence
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify
from sympy import Derivative, Limit, MatrixBase, Pow, binomial, exp, factorial, factorial2
from sympy.concrete.expr_with_limits import ExprWithLimits

MAX_FORK_BYTES = 2**31  # of address space; beyond it Linux refuses memory, and the answers count as different
MAX_TERMS = 2000  # digits and terms up to which an expression is compared: x^{2000} is, 9^{9^9} is not
WAITING, BEGUN, DIFFERENT, EQUAL = range(4)  # the states of a pair
WARM_UP = (  # teach the parser its grammar, once for all forks: the first expression of a kind takes 100 ms
    r"\frac{1}{2}", r"\left( 3, \frac{\pi}{2} \right)", r"\begin{pmatrix} -1/3 \\ 2 \end{pmatrix}", r"x \in [-2, 7)",
    r"\{1 \pm \sqrt{5}, -2\}", r"\text{Evelyn}", r"x^3 + 3x - 6 = 0", r"(-\infty, 2) \cup (3, \infty)", r"2^{n} - 1",
    r"\sin^2 x + 3 - 4i", r"3\sqrt[3]{13}", r"50\%", r"1, 2 \text{ and } 3", r"x \le 5", r"\log_2 x - (4!)! + e^{2^3}",
)  # fmt: skip


@functools.lru_cache(256)
def parsed(text: str) -> list[Any]:
    """The expression between the dollar signs of a text, [] for none or for one that costs too much.

    By math-verify's LaTeX parser alone, which builds what its grammar knows; its other parser is Python's ``eval``.
    """
    expressions = parse(text, [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
    return [expression for expression in expressions if num_terms(expression) <= MAX_TERMS]


def num_terms(expression: Any) -> float:
    """A coarse upper bound of the digits and terms of an expression once it is evaluated."""
    inner = 1 + sum(map(num_terms, expression.flat() if isinstance(expression, MatrixBase) else expression.args))
    if isinstance(expression, ExprWithLimits | Limit | Derivative):  # integrals, sums, products
        return math.inf
    if inner < MAX_TERMS and isinstance(expression, Pow | exp | factorial | factorial2 | binomial):
        factor = abs(expression.args[-1].evalf(5))  # such as the exponent
        return inner * max(1.0, float(factor)) if factor.is_number else inner
    return inner


def equal(gold: str, answer: str) -> bool:
    """Whether two texts hold the same expression; a text that holds none equals nothing, not even itself."""
    return bool(verify(parsed(gold), parsed(answer), timeout_seconds=None))


def serve() -> None:
    """Answer requests until standard input ends."""
    logging.disable()  # math-verify warns that its own alarms are off
    for expression in WARM_UP:
        for gold in (expression, WARM_UP[0]):
            equal(f"${gold}$", f"${expression}$")
    for line in sys.stdin:
        sys.stdout.write(json.dumps(decide(*json.loads(line))) + "\n")
        sys.stdout.flush()


def decide(pairs: Sequence[Sequence[str]], timeout_s: float, num_forks: int) -> list[bool | None]:
    """Whether each pair is equal, compared by forks; None for a pair that took too long or ended its fork."""
    states, parent = mmap.mmap(-1, len(pairs)), os.getppid()  # a byte for each pair, shared with the forks
    parts: list[Sequence[int]] = [range(place, len(pairs), num_forks) for place in range(num_forks)]
    forks: dict[int, Sequence[int]] = {}
    while parts or forks:
        for part in parts:
            states[part[0]] = BEGUN  # so that a fork that cannot even begin costs a pair
            forks[_fork(pairs, part, timeout_s, states)] = part
        ended = forks.pop(os.wait()[0])
        rest = [number for number in ended if states[number] == WAITING]
        parts = [rest] if rest and os.getppid() == parent else []  # else nobody waits for the verdicts
    return [{DIFFERENT: False, EQUAL: True}.get(state) for state in states[:]]


def _fork(pairs: Sequence[Sequence[str]], part: Sequence[int], timeout_s: float, states: mmap.mmap) -> int:
    """Compare the pairs numbered ``part`` in a fork, whose process id is returned; the kernel's alarm ends it."""
    if child := os.fork():
        return child
    try:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for standard in range(3):
            os.dup2(nowhere, standard)
        if sys.platform == "linux":
            resource.setrlimit(resource.RLIMIT_AS, (MAX_FORK_BYTES, MAX_FORK_BYTES))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        for number in part:
            signal.setitimer(signal.ITIMER_REAL, timeout_s)
            states[number] = BEGUN
            states[number] = EQUAL if equal(*pairs[number]) else DIFFERENT
    finally:
        os._exit(0)
