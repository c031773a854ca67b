"""Values of a command line in Hydra's grammar, and the quotes that it wants about paths and other text."""

import contextlib
import functools
import re

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException


def quoted(argument: str) -> str:
    """``key=value`` with quotes about a value, or about the items of a list, that Hydra's grammar has no place for."""
    name, equals, value = argument.partition("=")
    if not equals or name.startswith(("-", "~")) or parsed(value):
        return argument
    if value[0] + value[-1] == "[]":
        return f"{name}=[{quoted(f'{name}={value[1:-1]}').removeprefix(f'{name}=')}]"
    items = re.findall(r"""(?:'[^']*'|"[^"]*"|[^,])+""", value)
    items = items if ",".join(items) == value else [value]  # two commas in a row, or one at an end: not a list
    return f"{name}=" + ",".join(item if parsed(item) else in_quotes(item.strip()) for item in items)


def in_quotes(value: str) -> str:
    """A value in quotes, as Hydra's grammar has them."""
    return QuotedString(value, Quote.single).with_quotes()


@functools.cache
def parsed(value: str) -> Override | None:
    """The value as Hydra reads it on a command line, or None where its grammar has no place for the value."""
    with contextlib.suppress(HydraException, ValueError, RecursionError):  # ValueError: more digits than Python reads
        return OverridesParser.create().parse_override(f"key={value}")
    return None
