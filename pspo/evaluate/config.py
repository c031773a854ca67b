"""The block ``evaluate`` of the configuration: which held-out problems are answered, how, and how often."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pspo.base.schema import Schema, key


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Schema, block="evaluate"):
    """Answers to held-out problems, in a training run and by ``python -m pspo.evaluate`` alike."""

    name: str = key("folder of the answers, evaluation/<when>/<name>; other settings need another name")
    every: int = key("steps from one validation to the next, on held-out training problems", within="[1, inf)")
    sets: list[str] | None = key(
        "test sets: data sets by name, validation (held-out training problems), or paths of files as dataset=jsonl has "
        "them; null takes the test sets of dataset"
    )
    path: str | None = key(
        "folder that holds a folder for each data set of evaluate.sets; null asks the hub", path=True
    )
    temperatures: list[float] = key(
        "sampling temperatures, each at least 0; 0 is greedy; before training the first alone is answered"
    )
    samples: int = key("answers to each problem at temperatures above 0; one at 0", within="[1, inf)")
    top_p: float = key("sample from the smallest set of tokens that holds this much probability", within="(0, 1]")
    max_new_tokens: int | None = key("tokens after which an answer is truncated; null: as rollouts", within="[1, inf)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"\w[\w.+-]*", self.name):
            raise self.refuse("name", "names a directory; use letters, digits, _ . + -")
        if not _distinct(self.temperatures) or not all(0 <= t < 100 for t in self.temperatures):
            raise self.refuse("temperatures", "give one number or more, different ones, each from 0 to 100")
        if self.sets is not None and not _distinct(self.sets):
            raise self.refuse("sets", "give one set or more, different ones, or null for the test sets of dataset")


def _distinct(items: Sequence[object]) -> bool:
    return 0 < len(set(items)) == len(items)
