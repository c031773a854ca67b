"""The process in which ``reward=math`` compares LaTeX answers: the part that meets model output is killed if it hangs.

``serve`` answers each line on standard input, JSON ``{"timeout_s": ..., "pairs": [[gold, answer], ...]}``, with one
line, the list of verdicts. A fork of the process compares the pairs; where a pair takes the fork longer than the limit
or ends it, the verdict is null, and another fork goes on behind that pair. A fork takes milliseconds, a start with
math-verify seconds. Nothing of this package is imported, so that the process has one thread, as a fork wants it.
"""

import contextlib
import functools
import json
import logging
import math
import multiprocessing
import os
import resource
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify
from sympy import Derivative, Limit, MatrixBase, Pow, binomial, exp, factorial, factorial2
from sympy.concrete.expr_with_limits import ExprWithLimits

MEMORY_BYTES = 2**31
"""Address space of a forked process; beyond it Linux refuses memory, and the answers count as different."""
MAX_COST = 2000
"""Digits and terms, by ``cost``, up to which an expression is compared: x^{2000} is, 9^{9^9} is not."""
WARM_UP = (
    r"\frac{1}{2}", r"\left( 3, \frac{\pi}{2} \right)", r"\begin{pmatrix} -1/3 \\ 2 \end{pmatrix}", r"x \in [-2, 7)",
    r"\{1 \pm \sqrt{5}, -2\}", r"\text{Evelyn}", r"x^3 + 3x - 6 = 0", r"(-\infty, 2) \cup (3, \infty)", r"2^{n} - 1",
    r"\sin^2 x + 3 - 4i", r"3\sqrt[3]{13}", r"50\%", r"1, 2 \text{ and } 3", r"x \le 5", r"\log_2 x - (4!)! + e^{2^3}",
)  # fmt: skip
"""Expressions that teach the parser its grammar, once for all forks: the first expression of a kind takes 100 ms."""


@functools.lru_cache(256)
def parsed(text: str) -> list[Any]:
    """The expression between the dollar signs of a text, [] for none or for one that costs too much.

    By math-verify's LaTeX parser alone, which builds what its grammar knows; its other parser is Python's ``eval``.
    """
    found: list[Any] = parse(text, [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
    return [expression for expression in found if cost(expression) <= MAX_COST]


def cost(expression: Any) -> float:
    """A coarse upper bound of the digits and terms of an expression once it is evaluated."""
    inner = 1 + sum(map(cost, expression.flat() if isinstance(expression, MatrixBase) else expression.args))
    if isinstance(expression, ExprWithLimits | Limit | Derivative):  # integrals, sums, products
        return math.inf
    if inner < MAX_COST and isinstance(expression, Pow | exp | factorial | factorial2 | binomial):
        factor = abs(expression.args[-1].evalf(5))  # such as the exponent
        return inner * max(1.0, float(factor)) if factor.is_number else inner
    return inner


def equal(gold: str, answer: str) -> bool:
    """Whether two texts hold the same expression; a text that holds none equals nothing, not even itself."""
    return bool(verify(parsed(gold), parsed(answer), timeout_seconds=None))


def serve() -> None:
    """Answer requests until standard input ends."""
    logging.disable()  # math-verify warns that its own alarms are off
    parent, fork = os.getppid(), None
    for expression in WARM_UP:
        for gold in (expression, WARM_UP[0]):
            equal(f"${gold}$", f"${expression}$")
    for line in sys.stdin:
        request = json.loads(line)
        pairs, verdicts = request["pairs"], list[bool | None]()
        while len(verdicts) < len(pairs) and os.getppid() == parent:  # else nobody waits for the verdicts
            fork = fork or Fork()  # one that has compared much is faster
            verdicts += fork.compare(pairs[len(verdicts) :], request["timeout_s"])
            if verdicts[-1] is None:
                fork.process.kill()
                fork.process.join()
                fork = None
        sys.stdout.write(json.dumps(verdicts) + "\n")
        sys.stdout.flush()


class Fork:
    """A fork of this process that compares the pairs that come through its pipe."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, self.pipe), daemon=True)
        self.process.start()
        other.close()  # so that the pipe ends with the fork

    def compare(self, pairs: Sequence[Sequence[str]], timeout_s: float) -> list[bool | None]:
        """The verdicts of pairs up to the first, None, that takes more than ``timeout_s`` or ends the fork."""
        verdicts = list[bool | None]()
        with contextlib.suppress(EOFError, ConnectionError):
            self.pipe.send(pairs)
            while len(verdicts) < len(pairs) and self.pipe.poll(timeout_s):
                verdicts.append(self.pipe.recv_bytes() == b"1")
        return verdicts if len(verdicts) == len(pairs) else [*verdicts, None]


def _work(pipe: Connection, other: Connection) -> None:
    other.close()  # so that the fork ends with this process
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nowhere, standard)
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    while True:
        for gold, answer in pipe.recv():
            pipe.send_bytes(b"1" if equal(gold, answer) else b"0")
