"""Shared by all commands: their list, the refusal of other modules, errors and Ctrl-C as one sentence."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from pspo.base.files import PACKAGE


def overview() -> str:
    """Every module that can be run as ``python -m <module>``, one a line, with the first line of its docstring."""
    lines = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if '\nif __name__ == "__main__":' in text:
            name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__main__")
            lines.append(f"  python -m {name:<15} {text[3:].splitlines()[0]}\n")
    return "".join(lines)


def refuse_other_modules(name: str) -> None:
    """End the process where ``python -m`` names a module of the package that is no command."""
    if name.startswith("pspo.") and f" {name} " not in overview():
        sys.stderr.write(f"pspo: {name} is no command; the commands, each of which has --help:\n{overview()}")
        sys.exit(2)


def expanded(text: str) -> Path:
    """A path of a command line; a shell leaves ``~`` to us inside of quotes and behind ``=``."""
    return Path(os.path.expanduser(text))


@contextlib.contextmanager
def answering(*expected: type[Exception], stopped: str = "stopped") -> Iterator[None]:
    """Around a command: an ``expected`` error is one sentence and exit status 2, Ctrl-C is ``stopped`` and 130."""
    try:
        yield
    except expected as error:
        leave(error, 2)
    except KeyboardInterrupt:
        leave(stopped, 130)  # as a shell's command that signal 2 has ended


def leave(sentence: object, status: int) -> NoReturn:
    """End the process with one line on standard error."""
    sys.stderr.write(f"pspo: {' '.join(str(sentence).split())}\n")
    sys.exit(status)
