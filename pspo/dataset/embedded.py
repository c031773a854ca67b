"""The embedded task: two-step word problems in GSM8K's form, made here, so that a run needs no download.

A problem is a story family, three numbers of 2 to 10, and words. Families and numbers are dealt to the splits once and
for all by a hash: no (family, numbers) stands in two splits, and the test set is the same for every seed and every size
of the training set. Names, things and containers are drawn by a hash of the problem's id.
"""

import functools
import hashlib
import itertools
import operator
from dataclasses import dataclass

from pspo.dataset.problem import Problem, worked


@dataclass(frozen=True)
class Family:
    """A story, its two steps over the numbers a, b, c and the first result x, and what each step counts."""

    first: str
    second: str
    story: str
    counts: tuple[str, str] = ("{things}", "{things}")


FAMILIES = {
    "gain": Family("a*b", "x+c",
        "{name} has {a} {bags} with {b} {things} each and {c} more {things}. How many {things} does {name} have?"),
    "sell": Family("a*b", "x-c",
        "{name} has {a} {bags} with {b} {things} each and sells {c} {things}. How many {things} are left?"),
    "fill": Family("a+b", "x*c",
        "{name} puts {a} red and {b} blue {things} in each of {c} {bags}. How many {things} are in the {bags}?"),
    "remove": Family("a-b", "x*c",
        "{name} has {c} {bags} with {a} {things} each and sells {b} from each. How many {things} are left?"),
    "share": Family("a*b", "x/c",
        "{name} has {a} {bags} with {b} {things} each for {c} friends. How many {things} does each friend get?"),
    "pack": Family("a+b", "x/c",
        "{name} has {a} red and {b} blue {things} and puts {c} in each {bag}. How many {bags} are there?",
        ("{things}", "{bags}")),
    "trade": Family("a+b", "x-c",
        "{name} has {a} {things}, gets {b} more and sells {c}. How many {things} are left?"),
    "join": Family("b*c", "a+x",
        "{name} has {a} {things} and gets {b} {bags} with {c} {things} each. How many {things} does {name} have?"),
}  # fmt: skip
NAMES = ("Tom", "Ann", "Ben", "Mia", "Sam", "Eva", "Max", "Zoe", "Leo", "Amy")
THINGS = ("pens", "books", "cards", "coins", "eggs", "nuts", "toys", "balls")
BAGS = ("bag", "jar", "tray", "tin", "crate", "pack")
NUMBERS = range(2, 11)
LARGEST = 100  # so that the facts to know are few, and the warm start short
SHARES = {"test": 1 / 8, "validation": 1 / 16}  # of all (family, numbers); the rest is for training
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}

Tale = tuple[str, int, int, int]  # family, a, b, c


def load(split: str, num: int) -> list[Problem]:
    """The first ``num`` problems of "train", "validation" or "test"; spent tales come again in other words."""
    tales = _deal()[split]
    return [make(tales[i % len(tales)], i // len(tales)) for i in range(num)]


def num_tales(split: str) -> int:
    """How many problems of a split have different (family, numbers)."""
    return len(_deal()[split])


def make(tale: Tale, variant: int) -> Problem:
    """The problem with id ``embedded/<family>/<a>-<b>-<c>/<variant>``."""
    kind, a, b, c = tale
    family = FAMILIES[kind]
    name = f"embedded/{kind}/{a}-{b}-{c}/{variant}"
    person, things, bag = (
        words[drawn % len(words)] for words, drawn in zip((NAMES, THINGS, BAGS), _digest(name), strict=False)
    )
    words = {"name": person, "things": things, "bag": bag, "bags": f"{bag}s"}
    first, second = results(tale)
    values = {"a": a, "b": b, "c": c, "x": first}
    steps = [
        f"{values[step[0]]}{step[1]}{values[step[2]]}={result} {counted.format(**words)}."
        for step, result, counted in zip((family.first, family.second), (first, second), family.counts, strict=True)
    ]
    question = family.story.format(a=a, b=b, c=c, **words)
    return Problem(name, question, str(second), worked(f"First, {steps[0]} Then {steps[1]}", str(second)))


def direct_solution(problem: Problem) -> str:
    """The bare answer, ``#### 90``: what a policy writes that answers without working."""
    return f"#### {problem.answer}"


def results(tale: Tale) -> tuple[int, int]:
    """What the two steps come to."""
    kind, a, b, c = tale
    values = {"a": a, "b": b, "c": c}
    first = _apply(FAMILIES[kind].first, values)
    return first, _apply(FAMILIES[kind].second, values | {"x": first})


def _apply(step: str, values: dict[str, int]) -> int:
    left, sign, right = step[0], step[1], step[2]
    if sign == "/" and values[left] % values[right]:
        return 0  # a remainder: not a result that a story can have
    return int(OPERATIONS[sign](values[left], values[right]))


@functools.cache
def _deal() -> dict[str, list[Tale]]:
    numbers = list(itertools.product(NUMBERS, NUMBERS, NUMBERS))
    tales: list[Tale] = [(kind, a, b, c) for kind in FAMILIES for a, b, c in numbers]
    usable = [tale for tale in tales if all(1 <= result <= LARGEST for result in results(tale))]
    usable.sort(key=lambda tale: _digest("{}/{}-{}-{}".format(*tale)))
    dealt: dict[str, list[Tale]] = {}
    start = 0
    for split, share in SHARES.items():
        stop = start + int(share * len(usable))
        dealt[split] = usable[start:stop]
        start = stop
    return dealt | {"train": usable[start:]}


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
