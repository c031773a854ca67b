"""What all commands share: their list, the answer to a module that is none, errors and Ctrl-C in one sentence."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

PACKAGE = Path(__file__).parents[1]
INTERRUPTED = 130
"""Exit status at Ctrl-C, as shells call the end by signal 2."""


def overview() -> str:
    """Every module that can be run as ``python -m <module>``, one a line, with the first line of its docstring."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
    about = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__main__"): text.split('"""')[1]
        for path, text in texts.items()
        if '\nif __name__ == "__main__":' in text
    }
    return "\n".join(f"  python -m {name:<15} {text.partition(chr(10))[0]}" for name, text in about.items()) + "\n"


def refuse_other_modules(name: str) -> None:
    """Leave the process, which Python would start a module of the package in, where the module is no command."""
    if name.startswith("pspo.") and f" {name} " not in overview():
        sys.stderr.write(f"pspo: {name} is no command; the commands, each of which has --help:\n{overview()}")
        sys.exit(2)


@contextlib.contextmanager
def answering(*expected: type[Exception], stopped: str = "stopped") -> Iterator[None]:
    """Around a command: an ``expected`` error is one sentence and exit status 2, Ctrl-C is ``stopped`` and 130."""
    try:
        yield
    except expected as error:
        leave(error, 2)
    except KeyboardInterrupt:
        leave(stopped, INTERRUPTED)


def leave(sentence: object, status: int) -> NoReturn:
    """End the process with one line on standard error."""
    sys.stderr.write(f"pspo: {' '.join(str(sentence).split())}\n")
    sys.exit(status)
