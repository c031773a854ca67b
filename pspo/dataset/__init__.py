"""Problems: the data sets, their splits, their prompts and the order in which they are visited."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any, Literal, Self, cast

from pspo.base.files import digest
from pspo.base.schema import ConfigError, Schema, key
from pspo.base.stream import Stream, generator
from pspo.dataset import embedded, sources
from pspo.dataset.problem import Problem, Splits
from pspo.dataset.prompt import prompt_date, render, render_all
from pspo.host import hub

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = [
    "DatasetConfig", "EmbeddedConfig", "Problem", "Prompt", "Splits", "check", "digests", "encode", "is_test_set",
    "load", "order", "prompt_date", "refuse_training", "render", "render_all",
]  # fmt: skip

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DatasetConfig(Schema, block="dataset"):
    """Which problems, and what a prompt looks like."""

    name: Literal["embedded", "gsm8k", "svamp", "asdiv", "math500", "math", "jsonl"] = key("the data set")
    path: str | None = key("a file or folder to read instead of the Hugging Face Hub, or null", path=True)
    system_prompt: str = key("the system message before each question; empty for none")
    num_validation: int = key("training problems held out for validation", within="[0, inf)")
    test_limit: int | None = key("test problems to evaluate, a fixed random choice; null for all", within="[1, inf)")
    max_prompt_tokens: int = key("problems with a longer prompt are dropped", within="[1, inf)")

    @classmethod
    def select(cls, values: Mapping[str, Any]) -> type[Self]:
        """The embedded task has sizes of its own."""
        return cast(type[Self], EmbeddedConfig) if values.get("name") == "embedded" else cls


@dataclass(frozen=True, kw_only=True)
class EmbeddedConfig(DatasetConfig):
    """The embedded task, which is made and not read."""

    num_train: int = key("training problems to make", within="[1, inf)")
    num_test: int = key("test problems to make", within="[1, inf)")

    def __post_init__(self) -> None:
        """Refuse a path, which nothing would read."""
        super().__post_init__()
        for name, split in (("num_validation", "validation"), ("num_test", "test")):
            if getattr(self, name) > embedded.num_tales(split):
                raise self.refuse(name, f"there are {embedded.num_tales(split)} different ones")
        if self.path is not None:
            raise self.refuse("path", "dataset=embedded is made, not read; use dataset=jsonl for a file of your own")


@dataclass(frozen=True)
class Prompt:
    """A problem, its rendered question, and in training its place in the data order."""

    problem: Problem
    token_ids: list[int]
    place: int = 0


def check(config: DatasetConfig) -> None:
    """Refuse a path that does not exist or holds no known format; reads no rows, no network. Raises ConfigError."""
    if config.path is not None:
        sources.locate(config.name, config.path)
    elif config.name == "jsonl":
        raise config.refuse("path", "dataset=jsonl needs dataset.path=<file, or folder with train.jsonl>")


def digests(config: DatasetConfig) -> dict[str, str]:
    """What the problems are read from: SHA-256 of each file of ``dataset.path``, or the commit on the hub.

    Empty for the embedded task, which the configuration alone determines. Raises ConfigError.
    """
    if isinstance(config, EmbeddedConfig):
        return {}
    if config.path is None:
        return {s.repo: hub.commit(sources.cached(s)) for s in sources.SETS[config.name]}
    located = sources.locate(config.name, config.path)
    return {str(path): digest(path) for _, splits in located for paths in splits.values() for path in paths}


def is_test_set(config: DatasetConfig) -> bool:
    """Whether the source has no training split, so that training on it would be contamination.

    So it is with MATH-500 and ASDiv, and with a path that holds test problems only, such as the authors' SVAMP.json.
    """
    if isinstance(config, EmbeddedConfig):
        return False
    if config.path is None:
        return not any("train" in source.splits for source in sources.SETS[config.name])
    return not any("train" in splits for _, splits in sources.locate(config.name, config.path))


def refuse_training(config: DatasetConfig) -> ConfigError:
    """The error for a run that would train on a test set."""
    if any("train" in source.splits for source in sources.SETS[config.name]):
        return config.refuse("path", "holds test problems only: add a train file, or set budget.steps=0 to evaluate")
    near = "math" if config.name == "math500" else "gsm8k"
    return ConfigError(
        f"dataset={config.name} is a test set: train on dataset={near}, or set budget.steps=0 to evaluate"
    )


def load(config: DatasetConfig, seed: int) -> Splits:
    """All problems of a data set; a few MB at most, downloaded if need be.

    As in the paper's protocol (arXiv 2509.21282) the training problems are shuffled by the run's seed and the last
    ``num_validation`` held out: 7000 and 473 for GSM8K. A source with a validation file, and the embedded task, whose
    split is fixed, take the first ``num_validation`` of theirs. Training problems that ask word for word what a
    held-out problem asks are left out. ``train`` is empty for a test set (``is_test_set``). Raises ConfigError.
    """
    if isinstance(config, EmbeddedConfig):
        sizes = {"train": config.num_train, "validation": config.num_validation, "test": config.num_test}
        made = {split: embedded.load(split, num) for split, num in sizes.items()}
        return Splits(made["train"], made["validation"], {"embedded": _limit(made["test"], config.test_limit)})
    check(config)
    pool: dict[str, list[Problem]] = {"train": []}
    test: dict[str, list[Problem]] = {}
    for source, splits in sources.locate(config.name, config.path):
        for split, paths in splits.items():
            problems = sources.read(source, split, paths)
            if split == "test":
                test[source.name] = problems
            else:
                pool[split] = problems
    pool["train"] = _without(pool["train"], [problem for problems in test.values() for problem in problems])
    train, validation = _hold_out(config, pool["train"], pool.get("validation"), seed)
    train = _without(train, validation)
    return Splits(train, validation, {name: _limit(problems, config.test_limit) for name, problems in test.items()})


def encode(
    tokenizer: "Tokenizer", config: DatasetConfig, problems: list[Problem], today: date | None = None
) -> tuple[list[Prompt], int]:
    """The prompts of at most ``max_prompt_tokens``, in order, and the number of longer ones, which are dropped.

    ``today`` is what ``prompt_date`` returned. Raises ConfigError where the chat template refuses a prompt, or leaves
    the system prompt out.
    """
    rendered = render_all(tokenizer, config.system_prompt, [problem.question for problem in problems], today)
    if config.system_prompt and problems and rendered[0] == render(tokenizer, "", problems[0].question, today):
        raise config.refuse("system_prompt", 'the model\'s chat template leaves it out; set dataset.system_prompt=""')
    prompts = [Prompt(problem, token_ids) for problem, token_ids in zip(problems, rendered, strict=True)]
    kept = [prompt for prompt in prompts if len(prompt.token_ids) <= config.max_prompt_tokens]
    return kept, len(prompts) - len(kept)


def order(num_problems: int, seed: int, start: int, count: int) -> list[int]:
    """Problems number ``start`` to ``start + count`` of an endless sequence of epochs, each a shuffle of all problems.

    Epoch e is a permutation drawn from (seed, e) alone, so the position in the data is one integer.
    """
    indices: list[int] = []
    while len(indices) < count:
        epoch, offset = divmod(start + len(indices), num_problems)
        indices += _permutation(num_problems, seed, Stream.ORDER, epoch)[offset : offset + count - len(indices)]
    return indices


def _hold_out(
    config: DatasetConfig, train: list[Problem], validation: list[Problem] | None, seed: int
) -> tuple[list[Problem], list[Problem]]:
    num = config.num_validation
    if validation is not None:
        if len(validation) < num:
            raise config.refuse("num_validation", f"there are only {len(validation)} validation problems")
        return train, validation[:num]
    if not train:
        return [], []
    if len(train) <= num:
        raise config.refuse("num_validation", f"must be less than the {len(train)} training problems")
    shuffled = [train[i] for i in _permutation(len(train), seed, Stream.SPLIT)]
    return shuffled[: len(train) - num], shuffled[len(train) - num :]


def _permutation(num: int, *words: int) -> list[int]:
    return cast(list[int], generator(*words).permutation(num).tolist())


def _limit(problems: list[Problem], num: int | None) -> list[Problem]:
    """The first ``num`` by the hash of their ids, in the set's order: files are sorted by subject and grade."""
    if num is None:
        return problems
    chosen = sorted(problems, key=lambda problem: hashlib.sha256(problem.id.encode()).digest())[:num]
    ids = {problem.id for problem in chosen}
    return [problem for problem in problems if problem.id in ids]


def _without(train: list[Problem], held_out: list[Problem]) -> list[Problem]:
    """The training problems whose question, in any case and spacing, is not that of a held-out problem."""
    seen = {_normal(problem.question) for problem in held_out}
    kept = [problem for problem in train if _normal(problem.question) not in seen]
    if len(kept) < len(train):
        log.warning("left out %d training problems that are held-out problems too", len(train) - len(kept))
    return kept


def _normal(question: str) -> str:
    return " ".join(question.lower().split())
