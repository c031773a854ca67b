"""What all commands share: their list, the answer to a module that is no command, errors in one sentence."""

import ast
import contextlib
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

PACKAGE = Path(__file__).parents[1]
STATUS_MISTAKE = 2
STATUS_INTERRUPTED = 130
"""Exit statuses: a user's mistake as argparse has it; Ctrl-C as shells call an end by SIGINT, 128 + 2."""


def commands() -> dict[str, str]:
    """Every module of the package that can be run as ``python -m <module>``, with its docstring's first sentence."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if '\nif __name__ == "__main__":' in text:
            name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__main__")
            found[name] = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return found


def overview() -> str:
    """The commands, one a line."""
    known = commands()
    width = max(map(len, known))
    return "\n".join(f"  python -m {name:<{width}}  {meaning}" for name, meaning in known.items()) + "\n"


def refuse_module(arguments: Sequence[str]) -> None:
    """Leave the process where ``arguments``, Python's own, ask to run a module of the package that is no command."""
    flags = ((re.fullmatch(r"-[a-zA-Z]*m(.*)", a), b) for a, b in itertools.pairwise([*arguments, ""]))
    name = next((flag[1] or following for flag, following in flags if flag), "")
    if name.startswith("pspo.") and name not in commands():
        sys.stderr.write(f"pspo: {name} is no command; the commands, each with --help:\n{overview()}")
        sys.exit(STATUS_MISTAKE)


@contextlib.contextmanager
def answering(*expected: type[Exception], after: str = "") -> Iterator[None]:
    """Around a command: an ``expected`` error is one sentence and status 2, Ctrl-C status 130.

    ``after`` says what becomes of a command that was stopped.
    """
    try:
        yield
    except expected as error:
        leave(error, STATUS_MISTAKE)
    except KeyboardInterrupt:
        leave(f"stopped{after}", STATUS_INTERRUPTED)


def leave(sentence: object, status: int) -> NoReturn:
    """End the process with one sentence, in one line, on standard error."""
    sys.stderr.write(f"pspo: {' '.join(str(sentence).split())}\n")
    sys.exit(status)
