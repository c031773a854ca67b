"""Rows from files: which files of a folder belong to which split, and what stands in them."""

import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pspo.base.schema import ConfigError

# train.jsonl, train-00000-of-00001.parquet, but not train_socratic.jsonl
SPLIT = re.compile(r"(train|validation|test)(-\d+-of-\d+.*)?")


@dataclass(frozen=True)
class Row:
    """The named fields of one problem and the place they were read from."""

    fields: Mapping[str, object]
    where: str

    def error(self, reason: str) -> ConfigError:
        """The error for a row that cannot be used."""
        return ConfigError(f"{self.where}: {reason}")

    def text(self, *names: str) -> str:
        """The first of ``names`` that the row has: text that is not blank. Raises ConfigError."""
        name, value = self._first(names)
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"{name} must be text that is not blank, got {value!r}")
        return value.strip()

    def scalar(self, *names: str) -> str:
        """Like ``text``, and a number is taken too: 51.0 becomes "51"."""
        name, value = self._first(names)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return self.text(*names)
        if isinstance(value, float) and not math.isfinite(value):
            raise self.error(f"{name} must be a finite number, got {value!r}")
        return str(int(value)) if value == int(value) else str(value)

    def has(self, name: str) -> bool:
        """Whether an optional field is there: not null and not empty."""
        return self.fields.get(name) not in (None, "")

    def _first(self, names: tuple[str, ...]) -> tuple[str, object]:
        for name in names:
            if self.fields.get(name) is not None:
                return name, self.fields[name]
        raise self.error(f"{' or '.join(names)} is missing; the row has {', '.join(self.fields) or 'no fields'}")


def find(path: Path, *, subset: str, whole: str, lone: str) -> dict[str, list[Path]]:
    """The files of each split under ``path``, a file or a folder.

    A file belongs to a split by its own name or by that of a folder above it. ``subset`` is the folder of the
    configuration that is wanted, where there is one; ``whole`` is the name of a file that holds the entire set, and
    ``lone`` the split of such a file. Raises ConfigError when nothing is found or a split stands there in two formats.
    """
    if path.is_file():
        if path.suffix not in READERS:
            raise ConfigError(f"dataset.path={str(path)!r}: the format must be one of {', '.join(READERS)}")
        return {_split(Path(path.name)) or lone: [path]}
    if not path.is_dir():
        raise ConfigError(f"dataset.path={str(path)!r} does not exist; give the file or folder that holds the data")
    if whole and (path / whole).is_file():
        return {lone: [path / whole]}
    root = path / subset if (path / subset).is_dir() else path
    found: dict[str, list[Path]] = {}
    for file in sorted(root.rglob("*")):
        split = _split(file.relative_to(root)) if file.suffix in READERS else None
        if split is not None:
            found.setdefault(split, []).append(file)
    if not found:
        wanted = f"{whole} or " if whole else ""
        raise ConfigError(
            f"{path} holds no {wanted}train, validation or test file in one of the formats {', '.join(READERS)}; "
            "set dataset.path to a folder with such files, as in train.jsonl or main/test-00000-of-00001.parquet"
        )
    for split, files in found.items():
        formats = sorted({file.suffix for file in files})
        if len(formats) > 1:
            raise ConfigError(f"{path} holds {split} as {' and as '.join(formats)}; keep one of them there")
    return found


def read(path: Path) -> Iterator[Row]:
    """The rows of one file, in order. Raises ConfigError, naming the file and the line, on what cannot be read."""
    return READERS[path.suffix](path)


def _split(relative: Path) -> str | None:
    match = SPLIT.fullmatch(relative.stem)
    if match:
        return match[1]
    return next((part for part in relative.parts[:-1] if part in ("train", "validation", "test")), None)


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:  # bytes, so that only \n ends a line
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _record(_parse(line, f"{path} line {number}"), f"{path} line {number}")


def _json(path: Path) -> Iterator[Row]:
    content = _parse(path.read_bytes(), str(path))
    for number, item in enumerate(content if isinstance(content, list) else [content], start=1):
        yield _record(item, f"{path} item {number}")


def _parse(content: bytes, where: str) -> object:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not JSON: {error}; repair or remove it") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not UTF-8: {error}; repair or remove it") from error


def _record(item: object, where: str) -> Row:
    if not isinstance(item, dict):
        raise ConfigError(f"{where} must be an object with named fields, got {type(item).__name__}")
    return Row(item, where)


def _xml(path: Path) -> Iterator[Row]:
    try:
        root = ET.parse(path).getroot()
    except ET.ParseError as error:
        raise ConfigError(f"{path} is not XML: {error}; repair it or copy it again") from error
    for number, problem in enumerate(root.iter("Problem"), start=1):
        fields = {child.tag.lower(): child.text or "" for child in problem}
        yield Row(fields, f"{path} problem {problem.get('ID', number)}")


def _parquet(path: Path) -> Iterator[Row]:
    import datasets  # here, as it is slow to import
    import pyarrow

    datasets.disable_progress_bars()
    try:
        return _rows(datasets.Dataset.from_parquet(str(path)), path)
    except (pyarrow.ArrowInvalid, datasets.exceptions.DatasetGenerationError) as error:
        raise ConfigError(f"{path} is not Parquet; copy it again (a Git LFS pointer is not data)") from error


def _arrow(path: Path) -> Iterator[Row]:
    import datasets
    import pyarrow

    try:
        return _rows(datasets.Dataset.from_file(str(path)), path)
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(f"{path} is not an Arrow stream: {error}; save it again with save_to_disk") from error


def _rows(records: Iterable[dict[str, object]], path: Path) -> Iterator[Row]:
    return (Row(record, f"{path} row {number}") for number, record in enumerate(records, start=1))


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".xml": _xml,
}
