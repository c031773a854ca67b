"""Rows from files: JSON, JSON lines, Parquet, Arrow and XML."""

import contextlib
import json
import math
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pspo.base.schema import ConfigError


@dataclass(frozen=True)
class Row:
    """The named fields of one problem and the place they were read from."""

    fields: Mapping[str, object]
    where: str

    def error(self, reason: str) -> ConfigError:
        """The error for a row that cannot be used."""
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


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn the errors of the system and of the file formats' libraries for an unreadable file into a ConfigError."""
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


def read(path: Path) -> Iterator[Row]:
    """The rows of one file, in order. Raises ConfigError, naming the file and the line, on what cannot be read."""
    with readable(path):
        for row in READERS[path.suffix](path):
            if not isinstance(row.fields, dict):
                raise row.error(f"must be an object with named fields, got {type(row.fields).__name__}")
            yield row


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:  # bytes, so that only \n ends a line
        places = ((line, f"{path} line {number}") for number, line in enumerate(lines, start=1) if line.strip())
        yield from (Row(_parse(line, where), where) for line, where in places)


def _json(path: Path) -> Iterator[Row]:
    content = _parse(path.read_bytes(), str(path))
    for number, item in enumerate(content if isinstance(content, list) else [content], start=1):
        yield Row(item, f"{path} item {number}")


def _parse(content: bytes, where: str) -> Any:
    try:
        parsed = json.loads(content)
        json.dumps(parsed, ensure_ascii=False).encode()  # fails for half a character, a lone "\\ud800"
    except (ValueError, RecursionError) as error:  # ValueError: also for an integer of more digits than Python reads
        reason = str(error).partition(";")[0]
        raise ConfigError(f"{where} is not JSON in UTF-8: {reason}; repair or remove it") from error
    return parsed


def _xml(path: Path) -> Iterator[Row]:
    for number, problem in enumerate(ET.parse(path).getroot().iter("Problem"), start=1):
        texts = {child.tag: child.text or "" for child in problem}
        fields = {name.lower(): text for name, text in (problem.attrib | texts).items()}
        yield Row(fields, f"{path} problem {problem.get('ID', number)}")


def _table(path: Path) -> Iterator[Row]:
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
        yield Row(fields, where)


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    **{".jsonl": _jsonl, ".json": _json, ".parquet": _table, ".arrow": _table, ".xml": _xml}
}
