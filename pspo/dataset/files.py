"""Rows from files: which files of a folder belong to which split, and what stands in them."""

import contextlib
import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what the system and the file formats' libraries say of a file that cannot be read into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, TypeError, LookupError, NotImplementedError, ET.ParseError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise ConfigError(
            f"{path} cannot be read: {reason}; mend its name or permissions, or copy it again (a Git LFS pointer is "
            "not data)"
        ) from error


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
        split = _split(file.relative_to(root)) if file.suffix in READERS and file.is_file() else None
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
    with readable(path):
        for row in READERS[path.suffix](path):
            if not isinstance(row.fields, dict):
                raise row.error(f"must be an object with named fields, got {type(row.fields).__name__}")
            yield row


def _split(relative: Path) -> str | None:
    match = SPLIT.fullmatch(relative.stem)
    if match:
        return match[1]
    return next((part for part in relative.parts[:-1] if part in ("train", "validation", "test")), None)


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:  # bytes, so that only \n ends a line
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield Row(_parse(line, f"{path} line {number}"), f"{path} line {number}")


def _json(path: Path) -> Iterator[Row]:
    content = _parse(path.read_bytes(), str(path))
    for number, item in enumerate(content if isinstance(content, list) else [content], start=1):
        yield Row(item, f"{path} item {number}")


def _parse(content: bytes, where: str) -> Any:
    try:
        parsed = json.loads(content)
        json.dumps(parsed, ensure_ascii=False).encode()  # fails for half a character, a lone "\\ud800"
    except (ValueError, RecursionError) as error:  # ValueError: also for an integer of more digits than Python reads
        told = str(error).partition(";")[0]
        raise ConfigError(f"{where} is not JSON in UTF-8: {told}; repair or remove it") from error
    return parsed


def _xml(path: Path) -> Iterator[Row]:
    for number, problem in enumerate(ET.parse(path).getroot().iter("Problem"), start=1):
        fields = {child.tag.lower(): child.text or "" for child in problem}
        yield Row(fields, f"{path} problem {problem.get('ID', number)}")


def _parquet(path: Path) -> Iterator[Row]:
    from pyarrow import parquet  # here, as it is slow to import

    return _rows(parquet.ParquetFile(path).read(), path)


def _arrow(path: Path) -> Iterator[Row]:
    """What ``save_to_disk`` of the library ``datasets`` writes: a stream, not a file, of Arrow's formats."""
    from pyarrow import ipc

    return _rows(ipc.open_stream(path.read_bytes()).read_all(), path)


def _rows(table: Any, path: Path) -> Iterator[Row]:
    for number, values in enumerate(zip(*table.columns, strict=True), start=1):
        where = f"{path} row {number}"
        try:
            fields = {name: value.as_py() for name, value in zip(table.column_names, values, strict=True)}
        except UnicodeDecodeError as error:
            raise ConfigError(f"{where} is not UTF-8: {error}; repair or remove it") from error
        yield Row(fields, where)


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".xml": _xml,
}
