"""What ``python -m pspo.run --help`` prints: ``help.txt``, filled in from the schemas and ``conf/``."""

import re
import textwrap
from pathlib import Path

from pspo.base.schema import as_dict, keys_of
from pspo.config import Config, compose, groups

TEMPLATE = Path(__file__).with_name("help.txt")


def help_text() -> str:
    """The template with every ``{key}`` as its default, meaning and range, and ``{groups}`` with their options."""

    def row(label: str, text: str) -> str:
        return textwrap.fill(text, 118, initial_indent=label, subsequent_indent=" " * len(label))

    rows = {"groups": "\n".join(row(f"  {name:<12}", "  ".join(options)) for name, options in groups().items())}
    for name, field, value in keys_of(Config, as_dict(compose())):
        label = f"  {name}={'null' if value is None else value}"
        rows[name] = row(f"{label:<40}", f"{field.metadata.get('meaning')} {field.metadata.get('within') or ''}")
    return re.sub(r"\{(.+)\}", lambda match: rows[match[1]], TEMPLATE.read_text(encoding="utf-8"))
