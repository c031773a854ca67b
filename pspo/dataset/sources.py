"""The real data sets: the repository, the files and the rows of each; JSON, JSON lines, Parquet, Arrow and XML."""

import contextlib
import hashlib
import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pspo.base.schema import ConfigError
from pspo.dataset.problem import Problem, boxed, worked
from pspo.host import hub

# train.jsonl, train-00000-of-00001.parquet and the folder train, but not train_socratic.jsonl
SPLIT = re.compile(r"(train|validation|test)(-\d+-of-\d+.*)?")


@dataclass(frozen=True)
class RawRow:
    """The named fields of one problem and the place they were read from."""

    fields: Mapping[str, object]
    where: str

    def error(self, reason: str) -> ConfigError:
        return ConfigError(f"{self.where}: {reason}")

    def text(self, *names: str) -> str:
        """The value of the first of ``names`` that the row has: text that is not blank. Raises ConfigError."""
        for name in names:
            value = self.fields.get(name)
            if isinstance(value, str) and value.strip():
                return value.strip()
            if value is not None:
                raise self.error(f"{name} must be text that is not blank, got {value!r}")
        raise self.error(f"{' or '.join(names)} is missing; the row has {', '.join(self.fields) or 'no fields'}")

    def scalar(self, name: str) -> str:
        """Like ``text``, and a number is taken too: 51.0 becomes "51"."""
        value = self.fields.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return self.text(name)
        if isinstance(value, float) and not math.isfinite(value):
            raise self.error(f"{name} must be a finite number, got {value!r}")
        return str(int(value)) if value == int(value) else str(value)

    def has(self, name: str) -> bool:
        """Whether the row has an optional field, not null and not empty."""
        return self.fields.get(name) not in (None, "")


@dataclass(frozen=True)
class Source:
    """One repository of a data set, and how its files and rows are read."""

    name: str
    parse: Callable[[RawRow], Problem]  # with the row's own name in its split as the id, "" where it has none
    columns: str  # names that ``parse`` reads; every further column goes to ``Problem.extra``
    repo: str = ""  # on the Hub; "" for a user's own files
    subset: str = ""  # the folder of the repository that holds the wanted configuration
    whole: str = ""  # the authors' one file with the entire set
    lone: str = "test"  # the split of the file ``whole``, and of a file whose name is not that of a split
    splits: dict[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})  # theirs -> ours
    test_share: float = 0.0  # of the test split's problems, by the hash of the question, that stay there; others train

    def find(self, path: Path) -> dict[str, list[Path]]:
        """The files of each split, by our names, under ``path``, a file or a folder. Raises ConfigError.

        A file belongs to a split by its own name or by that of a folder above it.
        """
        formats, files = ", ".join(READERS), dict[str, list[Path]]()
        with _readable(path):
            if path.is_file() and path.suffix not in READERS:
                raise ConfigError(f"dataset.path={str(path)!r}: the format must be one of {formats}")
            if not path.exists():
                raise ConfigError(f"dataset.path={str(path)!r} does not exist; give the file or folder with the data")
            lone = path if path.is_file() else path / self.whole
            if lone.is_file():
                splits = {lone: _split(Path(lone.name)) or self.lone}
            else:
                root = path / self.subset if (path / self.subset).is_dir() else path
                splits = {file: _split(file.relative_to(root)) for file in sorted(root.rglob("*"))}
            for file, split in splits.items():
                if split in self.splits and file.suffix in READERS and file.is_file():
                    files.setdefault(self.splits[split], []).append(file)
        if self.test_share and "test" in files:
            files["train"] = files["test"]
        if not files:
            wanted = " or ".join([self.whole, *self.splits] if self.whole else self.splits)
            raise ConfigError(
                f"{path} holds no {wanted} file in one of the formats {formats}; dataset={self.name} needs one, as in "
                "train.jsonl or main/test-00000-of-00001.parquet"
            )
        for split, paths in files.items():
            if len(suffixes := sorted({file.suffix for file in paths})) > 1:
                raise ConfigError(f"{path} holds {split} as {' and as '.join(suffixes)}; keep one of them there")
        return files


def gsm8k(row: RawRow) -> Problem:
    """The answer follows ``####``; calculator marks ``<<48/2=24>>`` go, as a policy should not learn to write them."""
    working, mark, answer = row.text("answer").rpartition("####")
    if not mark or not answer.strip():
        raise row.error("answer must end in '#### <number>'")
    answer = answer.strip().replace(",", "")
    return Problem("", row.text("question"), answer, worked(answer, re.sub(r"<<.*?>>", "", working)))


def svamp(row: RawRow) -> Problem:
    """Body and question joined by a space, as in the Hub's question_concat, so that both sources give one prompt."""
    question = f"{row.text('Body')} {row.text('Question')}"
    return Problem(row.text("ID"), question, re.sub(r"\.0+$", "", row.scalar("Answer")))


def asdiv(row: RawRow) -> Problem:
    """``9 (apples)`` becomes 9 and ``5 (cm); 6 (cm)`` becomes ``5; 6``; names, times and ratios stay as they are."""
    answer = re.sub(r"\s+\([^()]*\)", "", row.text("answer"))
    return Problem("", f"{row.text('body')} {row.text('question')}", answer)


def asdiv_split(row: RawRow) -> Problem:
    """As ``asdiv``, with the set's formula, ``7+2=9``, as the working."""
    problem = asdiv(row)
    return replace(problem, solution=worked(problem.answer, row.text("formula")))


def math500(row: RawRow) -> Problem:
    """The gold answer is LaTeX, as given."""
    answer = row.scalar("answer")
    solution = worked(answer, row.text("solution")) if row.has("solution") else ""
    return Problem(row.text("unique_id").removeprefix("test/"), row.text("problem"), answer, solution)


def hendrycks(row: RawRow) -> Problem:
    r"""The gold answer is the content of the solution's last ``\boxed{7}``, which few write as ``\boxed 7``."""
    solution = row.text("solution")
    answer = boxed(re.sub(r"(\\boxed|\\fbox)\s*([^\s${][^\s$]*?)(?=[.,]*(?:[\s$]|\Z))", r"\1{\2}", solution))
    if not answer:
        raise row.error("solution must hold its answer in \\boxed{...}")
    return Problem("", row.text("problem"), answer, worked(answer, solution))


def jsonl(row: RawRow) -> Problem:
    """A line of a user's own: question or prompt, answer, and optionally solution and id."""
    answer = row.scalar("answer")
    if "####" in answer:
        raise row.error("answer must be the final answer alone; put the working into solution")
    solution = worked(answer, row.text("solution").partition("####")[0]) if row.has("solution") else ""
    return Problem(row.scalar("id") if row.has("id") else "", row.text("question", "prompt"), answer, solution)


TRAIN, VALIDATION, TEST = ({split: split} for split in ("train", "validation", "test"))
MATH500 = Source("math500", math500, "problem answer solution unique_id", "HuggingFaceH4/MATH-500", splits=TEST)
MATH = Source("math", hendrycks, "problem solution", "EleutherAI/hendrycks_math", splits=TRAIN)
ASDIV = Source(
    "asdiv", asdiv, "body question answer", "EleutherAI/asdiv", whole="ASDiv.xml", splits={"validation": "test"} | TEST
)
ASDIV_SPLIT = replace(
    ASDIV, name="asdiv_split", parse=asdiv_split, columns=f"{ASDIV.columns} formula", splits=ASDIV.splits | TRAIN,
    test_share=0.3,
)  # fmt: skip
JSONL = Source("jsonl", jsonl, "question prompt answer solution id", lone="train", splits=TRAIN | VALIDATION | TEST)
SETS = {
    "gsm8k": [Source("gsm8k", gsm8k, "question answer", "openai/gsm8k", subset="main")],
    "svamp": [Source("svamp", svamp, "Body Question Answer ID", "ChilleD/SVAMP", whole="SVAMP.json")],
    "asdiv": [ASDIV],
    "asdiv_split": [ASDIV_SPLIT],  # of experiment=smollm2 alone: in the paper all of ASDiv is a test set
    "math500": [MATH500],
    "math": [MATH, MATH500],  # 7500 official training problems; MATH-500 was drawn from the official test problems
    "jsonl": [JSONL],
}


def locate(name: str, path: str | None) -> list[tuple[Source, str, list[Path]]]:
    """Source, split and files of each split of data set ``name``: under ``path``, else in the hub's cache.

    Fetched where the cache lacks them. Raises ConfigError. Not ``datasets.load_dataset``: offline it reads only a copy
    that it has itself prepared before, not the files of ``hf download`` or of a copied cache.
    """

    def place(source: Source) -> Path:
        if path is not None:  # MATH stands in two repositories, so in two folders
            return Path(path) / source.repo.partition("/")[2] if len(SETS[name]) > 1 else Path(path)
        instead = "set dataset.path=<folder with the files>"
        return hub.locate(source.repo, ["*.parquet", "*.jsonl"], source.find, f"dataset={name}", "dataset", instead)

    return [(source, *split) for source in SETS[name] for split in source.find(place(source)).items()]


def read(source: Source, split: str, paths: list[Path]) -> list[Problem]:
    """The problems of one split, with ids ``<source>/<split>/<own name or index>``. Raises ConfigError."""
    problems: dict[str, Problem] = {}
    for row in (row for path in paths for row in _rows(path)):
        problem = source.parse(row)
        name = problem.id or str(len(problems))
        if source.test_share and (_fraction(problem.question) < source.test_share) != (split == "test"):
            continue
        if name in problems:
            raise row.error(f"id {name} stands here for the second time; ids must be unique")
        extra = {column: value for column, value in row.fields.items() if column not in source.columns.split()}
        problems[name] = replace(problem, id=f"{source.name}/{split}/{name}", extra=extra)
    if not problems:
        raise ConfigError(f"{paths[0]} has no rows; put at least one there, or remove it")
    return list(problems.values())


def _fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, evenly spread over texts."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def _split(relative: Path) -> str:
    matches = map(SPLIT.fullmatch, (relative.stem, *relative.parts[:-1]))
    return next((match[1] for match in matches if match), "")


def _rows(path: Path) -> Iterator[RawRow]:
    with _readable(path):
        for row in READERS[path.suffix](path):
            if not isinstance(row.fields, dict):
                raise row.error(f"must be an object with named fields, got {type(row.fields).__name__}")
            yield row


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn the errors of the system and of the file formats' libraries for an unreadable file into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, TypeError, LookupError, NotImplementedError, ET.ParseError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        remedy = "mend its name or permissions, or copy it again (a Git LFS pointer is not data)"
        raise ConfigError(f"{path} cannot be read: {reason}; {remedy}") from error


def _jsonl(path: Path) -> Iterator[RawRow]:
    with path.open("rb") as lines:  # bytes, so that only \n ends a line
        places = ((line, f"{path} line {number}") for number, line in enumerate(lines, start=1) if line.strip())
        yield from (RawRow(_parse(line, where), where) for line, where in places)


def _json(path: Path) -> Iterator[RawRow]:
    content = _parse(path.read_bytes(), str(path))
    for number, item in enumerate(content if isinstance(content, list) else [content], start=1):
        yield RawRow(item, f"{path} item {number}")


def _parse(content: bytes, where: str) -> Any:
    try:
        parsed = json.loads(content)
        json.dumps(parsed, ensure_ascii=False).encode()  # fails for half a character, a lone "\\ud800"
    except (ValueError, RecursionError) as error:  # ValueError: also for an integer of more digits than Python reads
        reason = str(error).partition(";")[0]
        raise ConfigError(f"{where} is not JSON in UTF-8: {reason}; repair or remove it") from error
    return parsed


def _xml(path: Path) -> Iterator[RawRow]:
    for number, problem in enumerate(ET.parse(path).getroot().iter("Problem"), start=1):
        texts = {child.tag: child.text or "" for child in problem}
        fields = {name.lower(): text for name, text in (problem.attrib | texts).items()}
        yield RawRow(fields, f"{path} problem {problem.get('ID', number)}")


def _table(path: Path) -> Iterator[RawRow]:
    if path.suffix == ".arrow":
        from datasets import Dataset  # whose ``save_to_disk`` wrote the file; imported here, as it takes two seconds

        table = Dataset.from_file(str(path)).data
    else:
        from pyarrow import parquet  # here, as it is slow to import

        table = parquet.ParquetFile(path).read()
    for number, values in enumerate(zip(*table.columns, strict=True), start=1):
        where = f"{path} row {number}"
        try:
            fields = {name: value.as_py() for name, value in zip(table.column_names, values, strict=True)}
        except UnicodeDecodeError as error:
            raise ConfigError(f"{where} is not UTF-8: {error}; repair or remove it") from error
        yield RawRow(fields, where)


READERS = {".jsonl": _jsonl, ".json": _json, ".parquet": _table, ".arrow": _table, ".xml": _xml}
