"""The embedded task: two-step word problems in GSM8K's form, written by this module, so that a run needs no download.

A problem is a tale, which is a story family with three numbers of 2 to 10, and the words that the story is told in. A
hash assigns each tale to one split for ever, so that the test set is the same for every seed and every size of the
training set. A hash of the problem's id draws its person, things and container.
"""

import functools
import hashlib
import itertools
from dataclasses import dataclass

from pspo.dataset.problem import Problem, worked


@dataclass(frozen=True)
class Family:
    """A story, its two steps over the numbers a, b, c and the first result x, and the noun that each step counts."""

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
LARGEST_RESULT = 100  # so that a policy has few sums and products to learn, and the warm start is short
TEST_SHARE, VALIDATION_SHARE = 1 / 8, 1 / 16  # of all tales; the rest is for training

Tale = tuple[str, int, int, int]  # family, a, b, c
TALE_NAME = "{}/{}-{}-{}"


def load(split: str, num: int | None = None) -> list[Problem]:
    """The first ``num`` problems, or all, of a split; after its last tale the first one comes again in other words."""
    dealt = tales()[split]
    return [make(dealt[i % len(dealt)], i // len(dealt)) for i in range(len(dealt) if num is None else num)]


def make(tale: Tale, variant: int) -> Problem:
    """The problem with id ``embedded/<family>/<a>-<b>-<c>/<variant>``."""
    family, values, name = FAMILIES[tale[0]], _solve(tale), f"embedded/{TALE_NAME.format(*tale)}/{variant}"
    dice = hashlib.sha256(name.encode()).digest()
    person, things, bag = (words[dice[i] % len(words)] for i, words in enumerate((NAMES, THINGS, BAGS)))
    words = {"name": person, "things": things, "bag": bag, "bags": f"{bag}s"}
    first, second = (
        f"{values[step[0]]}{step[1]}{values[step[2]]}={values[result]} {counted.format(**words)}."
        for step, result, counted in zip((family.first, family.second), "xy", family.counts, strict=True)
    )
    question, answer = family.story.format(**values, **words), str(values["y"])
    return Problem(name, question, answer, worked(answer, f"First, {first} Then {second}"))


@functools.cache
def tales() -> dict[str, list[Tale]]:
    """The tales of the splits "train", "validation" and "test"."""
    every = itertools.product(FAMILIES, NUMBERS, NUMBERS, NUMBERS)
    usable = [tale for tale in every if all(1 <= _solve(tale)[result] <= LARGEST_RESULT for result in "xy")]
    usable.sort(key=lambda tale: hashlib.sha256(TALE_NAME.format(*tale).encode()).digest())
    test = int(TEST_SHARE * len(usable))
    held_out = test + int(VALIDATION_SHARE * len(usable))
    return {"test": usable[:test], "validation": usable[test:held_out], "train": usable[held_out:]}


def _solve(tale: Tale) -> dict[str, int]:
    """A tale's numbers a, b and c with the results x and y of its two steps; 0 where a division leaves a remainder."""
    family, values = FAMILIES[tale[0]], dict(zip("abc", tale[1:], strict=True))
    for result, step in (("x", family.first), ("y", family.second)):
        m, n = values[step[0]], values[step[2]]
        values[result] = {"+": m + n, "-": m - n, "*": m * n, "/": 0 if m % n else m // n}[step[1]]
    return values
