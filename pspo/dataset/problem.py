"""The records that every data set is read into, and the notation of their answers."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Problem:
    """One question with its gold answer; ``id`` is unique and stable, the sampler's random numbers are keyed by it."""

    id: str
    question: str
    answer: str  # the final answer only: "18"
    solution: str = ""  # gold working that ends in "#### 18"; "" where the source has none
    extra: Mapping[str, object] = field(default_factory=dict, hash=False)  # every further column of its row, by name


Problems = Sequence[Problem]


@dataclass(frozen=True)
class Splits:
    """A data set's problems by use: ``validation`` is held out of training, ``test``, by set, is for the end only."""

    train: list[Problem]
    validation: list[Problem]
    test: dict[str, list[Problem]]
    shots: list[Problem] = field(default_factory=list)  # training problems shown, solved, in every prompt


def worked(answer: str, working: str = "") -> str:
    """A gold solution: the working, if any, and the line ``#### <answer>`` that the reward looks for."""
    return f"{working.strip()}\n#### {answer}".lstrip()


def boxed(text: str) -> str:
    r"""The content of the last ``\boxed{...}`` or ``\fbox{...}`` of a LaTeX text, "" for none that is closed."""
    start = depth = 0
    for opening in re.finditer(r"\\(?:boxed|fbox) ?\{", text):
        start = opening.end()
    for brace in re.finditer(r"[{}]", text[start:]) if start else ():
        depth += 1 if brace[0] == "{" else -1
        if depth < 0:
            return text[start : start + brace.start()].strip()
    return ""
