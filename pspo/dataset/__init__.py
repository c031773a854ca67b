"""Problems: the data sets, their splits, their prompts and the order in which they are visited."""

import hashlib
import itertools
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

from pspo.base.files import digest
from pspo.base.schema import ConfigError, Schema, key, unknown
from pspo.base.stream import Stream, generator
from pspo.dataset import embedded, reversal, sources
from pspo.dataset.problem import Problem, Splits
from pspo.dataset.prompt import Prompt, encode, prompt_date, render
from pspo.host import hub

__all__ = [
    "DatasetConfig", "EmbeddedConfig", "Problem", "Prompt", "Splits", "check", "check_set", "digests", "encode", "load",
    "load_set", "order", "prompt_date", "render", "set_digests",
]  # fmt: skip

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DatasetConfig(Schema, block="dataset"):
    """Which problems, and what a prompt looks like."""

    replacement: ClassVar[bool] = False
    """Whether each training problem is drawn on its own, as in ``order``."""

    name: Literal["embedded", "reversal", "gsm8k", "svamp", "asdiv", "asdiv_split", "math500", "math", "jsonl"] = key(
        "the data set"
    )
    path: str | None = key("a file or folder to read instead of the Hugging Face Hub, or null", path=True)
    system_prompt: str = key("the system message before each question; empty for none")
    prompt: str | None = key(
        "plain text with {question} in it, used instead of the model's chat template; null: the chat template, or "
        "where there is none 'Question: {question}', a new line and 'Answer:'"
    )
    shots: int = key("training problems shown with their solutions before each question", within="[0, inf)")
    num_validation: int = key("training problems held out for validation", within="[0, inf)")
    test_limit: int | None = key("test problems to evaluate, a fixed random choice; null for all", within="[1, inf)")
    max_prompt_tokens: int = key("problems with a longer prompt are dropped", within="[1, inf)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt is not None and "{question}" not in self.prompt:
            raise self.refuse("prompt", "must hold {question}, which each problem's question replaces")

    @classmethod
    def select(cls, values: Mapping[str, Any]) -> type[Self]:
        kinds = {"embedded": EmbeddedConfig, "reversal": ReversalConfig}
        return cast(type[Self], kinds.get(str(values.get("name")), cls))

    @property
    def made(self) -> bool:
        """Whether the problems are made in memory, from no file."""
        return isinstance(self, EmbeddedConfig | ReversalConfig)


@dataclass(frozen=True, kw_only=True)
class EmbeddedConfig(DatasetConfig):
    """The embedded task, whose problems no file holds."""

    num_train: int = key("training problems to make", within="[1, inf)")
    num_test: int = key("test problems to make", within="[1, inf)")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, split in (("num_validation", "validation"), ("num_test", "test")):
            if getattr(self, name) > (num := len(embedded.tales()[split])):
                raise self.refuse(name, f"there are {num} different ones")
        _check_no_path(self)


@dataclass(frozen=True, kw_only=True)
class ReversalConfig(DatasetConfig):
    """Token reversal: the problems of training, validation and test are the same 2^H, as published."""

    replacement: ClassVar[bool] = True

    num_bits: int = key("H: bits of a prompt, whose reverse is the answer", within="[1, 16]")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_validation > 2**self.num_bits:
            raise self.refuse("num_validation", f"there are {2**self.num_bits} prompts of {self.num_bits} bits")
        if self.shots:
            raise self.refuse("shots", "the policy of this task reads bits alone; set dataset.shots=0")
        _check_no_path(self)


def _check_no_path(config: DatasetConfig) -> None:
    if config.path is not None:
        why = f"dataset={config.name} is made, not read; use dataset=jsonl for a file of your own"
        raise config.refuse("path", why)


def check(config: DatasetConfig, *, training: bool = False) -> None:
    """Refuse a path without known files, and ``training`` where there is no training split. Raises ConfigError."""
    if config.made:
        return
    if config.path is None and config.name == "jsonl":
        raise config.refuse("path", "dataset=jsonl needs dataset.path=<file, or folder with train.jsonl>")
    splits = [split for source in sources.SETS[config.name] for split in source.splits.values()]
    if config.path is not None:
        splits = [split for _, split, _ in sources.locate(config.name, config.path)]
    if training and "train" not in splits:
        near, place = "math" if config.name == "math500" else "gsm8k", f" in {config.path}" if config.path else ""
        remedy = f"train on dataset={near}, add a train file, or set budget.steps=0 to evaluate"
        raise ConfigError(f"dataset={config.name} is a test set{place}: {remedy}")


def digests(config: DatasetConfig) -> dict[str, str]:
    """SHA-256 of each file of ``dataset.path``, or the commit of each hub repository. Raises ConfigError."""
    return _digests(config.name, config.path)


def _digests(name: str, path: str | None) -> dict[str, str]:
    if path is None:
        repos = [source.repo for source in sources.SETS.get(name, [])]
        return {repo: hub.commit(repo, "dataset", f"dataset={name}") for repo in repos}
    return {str(file): digest(file) for *_, files in sources.locate(name, path) for file in files}


def load(config: DatasetConfig, seed: int) -> Splits:
    """All problems of a data set, downloaded if need be. Raises ConfigError.

    As in the paper's protocol (arXiv 2509.21282) the training problems are shuffled by the run's seed and the last
    ``num_validation`` held out: 7000 and 473 for GSM8K. Where there is a validation split, its first problems are
    taken. The same ``shots`` of the training problems, with every seed, are held out as examples.
    """
    check(config)
    if isinstance(config, ReversalConfig):
        every = reversal.load(config.num_bits)
        return Splits(every, _limit(every, config.num_validation), {config.name: _limit(every, config.test_limit)})
    if isinstance(config, EmbeddedConfig):
        sizes = {"train": config.num_train, "validation": config.num_validation, "test": config.num_test}
        problems = {("embedded", split): embedded.load(split, num) for split, num in sizes.items()}
    else:
        located = sources.locate(config.name, config.path)
        problems = {(source.name, split): sources.read(source, split, paths) for source, split, paths in located}
    pool = {split: rows for (_, split), rows in problems.items()}
    test = {name: rows for (name, split), rows in problems.items() if split == "test"}
    train = _without(pool.get("train", []), itertools.chain(*test.values()))
    shots = _limit([problem for problem in train if problem.solution], config.shots)
    if len(shots) < config.shots:
        raise config.refuse("shots", f"there are only {len(shots)} training problems with a solution")
    train = [problem for problem in train if problem not in shots]
    num, validation = config.num_validation, pool.get("validation")
    if validation is None:
        if 0 < len(train) <= num:
            raise config.refuse("num_validation", f"must be less than the {len(train)} training problems")
        shuffled = [train[i] for i in _permutation(len(train), seed, Stream.SPLIT)]
        train, validation = shuffled[: len(train) - num], shuffled[len(train) - num :]
    elif len(validation) < num:
        raise config.refuse("num_validation", f"there are only {len(validation)} validation problems")
    limited = {name: _limit(rows, config.test_limit) for name, rows in test.items()}
    return Splits(_without(train, validation[:num]), validation[:num], limited, shots)


def load_set(config: DatasetConfig, name: str, folder: str | None) -> list[Problem]:
    """The problems of one test set by its name, from ``folder/name`` or the hub, or by a path as dataset=jsonl has it.

    Of a user's own files the test problems, or the only file. Raises ConfigError.
    """
    if name == "embedded":
        return _limit(embedded.load("test"), config.test_limit)
    located = sources.locate(*_place(name, folder))
    tests = [split for split in located if split[1] == "test"] or located[: int(name not in sources.SETS)]
    if not tests:
        raise ConfigError(
            f"evaluate.sets: {name} in {folder} has no test problems; give a folder that holds test files"
        )
    return _limit([problem for split in tests for problem in sources.read(*split)], config.test_limit)


def check_set(name: str, folder: str | None) -> None:
    """Refuse an unknown test set, or a path that holds none, without network. Raises ConfigError."""
    known, path = _place(name, folder)
    if path is not None:
        sources.locate(known, path)


def set_digests(name: str, folder: str | None) -> dict[str, str]:
    """As ``digests``, for a test set of ``load_set``; known names and existing paths alone. Raises ConfigError."""
    return _digests(*_place(name, folder))


def _place(name: str, folder: str | None) -> tuple[str, str | None]:
    """The data set and the path, None without files of ours, that the name of a test set means. Raises ConfigError."""
    known = [*(known for known in sources.SETS if known != "jsonl"), "embedded"]
    if name not in known:
        if re.search(r"[/.]", name):
            return "jsonl", os.path.expanduser(name)
        refusal = unknown(name, [*known, "validation"], "evaluate.sets")
        raise ConfigError(f"{refusal}, or the path of a file of your own")
    if folder is None or name == "embedded":
        return name, None
    if not Path(folder, name).exists():
        raise ConfigError(f"evaluate.path={folder!r} has no {name}; give a folder that holds one for each data set")
    return name, str(Path(folder, name))


def order(num_problems: int, seed: int, start: int, count: int, replacement: bool = False) -> list[int]:
    """Problems number ``start`` to ``start + count`` of endless epochs, each a shuffle drawn from (seed, epoch).

    With ``replacement`` each is drawn on its own, from (seed, number), so that one may come again at once.
    """
    if replacement:
        numbers = range(start, start + count)
        return [int(generator(seed, Stream.ORDER, number).integers(num_problems)) for number in numbers]
    epochs = range(start // num_problems, (start + count - 1) // num_problems + 1)
    indices = [index for epoch in epochs for index in _permutation(num_problems, seed, Stream.ORDER, epoch)]
    return indices[start % num_problems :][:count]


def _permutation(num: int, *words: int) -> list[int]:
    return cast(list[int], generator(*words).permutation(num).tolist())


def _limit(problems: list[Problem], num: int | None) -> list[Problem]:
    """The first ``num`` by the hash of their ids, in the set's order: files are sorted by subject and grade."""
    ids = sorted((problem.id for problem in problems), key=lambda id: hashlib.sha256(id.encode()).digest())
    chosen = set(ids[:num])
    return [problem for problem in problems if problem.id in chosen]


def _without(train: list[Problem], held_out: Iterable[Problem]) -> list[Problem]:
    """The training problems whose question, in any case and spacing, is not that of a held-out problem."""
    questions = {tuple(problem.question.lower().split()) for problem in held_out}
    remaining = [problem for problem in train if tuple(problem.question.lower().split()) not in questions]
    if len(remaining) < len(train):
        log.warning("left out %d training problems that are held-out problems too", len(train) - len(remaining))
    return remaining
