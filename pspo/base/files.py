"""Files that are whole or absent: written under another name, flushed to the disk, then renamed."""

import contextlib
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pspo.base.schema import ConfigError

PACKAGE = Path(__file__).parents[1]
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"  # in a wheel, or in a checkout


class SaveError(RuntimeError):
    """A file could not be written; what was saved before is intact."""


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8 as ``write_bytes`` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader, at any instant and after any crash, sees the old content or the new one."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_bytes(content)
        _sync(new)
        new.replace(path)
        _sync(path.parent)
    finally:
        new.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON as ``write_text`` does; keys keep their order."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none."""
    with contextlib.suppress(OSError, ValueError):
        if isinstance(content := json.loads(path.read_text(encoding="utf-8")), dict):
            return content
    return {}


@contextlib.contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """An empty directory to fill, which takes the place of ``directory`` when the block ends, flushed to the disk.

    If the block fails, ``directory`` stays as it was. One process at a time: what a killed one left is removed.
    """
    new, old = (directory.with_name(f".{directory.name}.{word}") for word in ("new", "old"))
    for left_over in (new, old):
        shutil.rmtree(left_over, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        yield new
        for path in (new, *new.rglob("*")):
            _sync(path)
        if directory.exists():
            directory.rename(old)
        new.rename(directory)
        _sync(directory.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _sync(path: Path) -> None:
    """Flush a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal; a process reads an unchanged file once."""
    return _digest(path, path.stat().st_mtime_ns, path.stat().st_size)


@functools.cache
def _digest(path: Path, modified_ns: int, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_yaml(path: Path) -> Any:
    """The content of a YAML file, by libyaml where PyYAML has it: ten times as fast. Raises yaml.YAMLError."""
    return yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def read_keys(path: Path, which: str, loader: Any = yaml.SafeLoader) -> dict[str, Any]:
    """The keys in a YAML file, {} where it is empty. Raises ConfigError, which says ``which`` keys belong there."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), loader) or {}
    except (yaml.YAMLError, OSError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is no YAML in UTF-8: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys{which}")
    return values


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, [] where there is none; a last line still being written is left out."""
    if not path.is_file():
        return []
    # Bytes, as that last line may end within a character. Text's splitlines() would break at a U+2028 inside a string.
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


class JsonLines:
    """An append-only file of JSON objects, one a line, that can be cut back to an earlier size."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one line. Raises ValueError for NaN and infinity."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        return read_lines(self.path)

    def num_rows(self) -> int:
        return self.path.read_bytes().count(b"\n")

    def sync(self) -> int:
        """Flush the appended lines to the disk; returns the number of lines."""
        _sync(self.path)
        return self.num_rows()

    def cut(self, num_rows: int) -> None:
        """Drop all lines but the first ``num_rows``. Lines are counted, as their bytes may depend on the clock."""
        lines = self.path.read_bytes().split(b"\n")[:num_rows]
        os.truncate(self.path, min(sum(len(line) + 1 for line in lines), self.path.stat().st_size))
