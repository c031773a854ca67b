"""What a run shows at its end: a table in the terminal, and one self-contained HTML page from ``page.html``."""

import base64
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Group
from rich.table import Table
from rich.text import Text

from pspo.base.files import read_json, read_lines, read_yaml, write_text
from pspo.base.schema import dotted
from pspo.host import environment
from pspo.report.curves import panel_images
from pspo.report.metrics import METRICS, meaning

EXAMPLES_PER_STEP = 4
MAX_COMPLETION_CHARACTERS = 4000
LOCATION = ("group", "output_dir", "host", "job_id")  # settings that say where a run lies, not what it computes

_CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}


def difference(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[float, float, float]:
    """Accuracy after − before with a 95 % interval: Newcombe's score interval (1998, Stat. Med. 17:873, method 10).

    d − √((p₂−l₂)² + (u₁−p₁)²), d + √((u₂−p₂)² + (p₁−l₁)²), with Wilson limits l, u. It assumes independent samples
    and so is conservative where the same problems were answered twice.
    """
    d = after["accuracy"] - before["accuracy"]
    down = math.hypot(after["accuracy"] - after["ci95_low"], before["ci95_high"] - before["accuracy"])
    up = math.hypot(after["ci95_high"] - after["accuracy"], before["accuracy"] - before["ci95_low"])
    return d, d - down, d + up


def percent(result: Mapping[str, float]) -> str:
    """``42.0 % [38.1, 46.0]``."""
    low, high = 100 * result["ci95_low"], 100 * result["ci95_high"]
    return f"{100 * result['accuracy']:.1f} % [{low:.1f}, {high:.1f}]"


def points(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """``+21.9 [16.2, 27.4]``, percentage points."""
    d, low, high = (100 * value for value in difference(before, after))
    return f"{d:+.1f} [{low:+.1f}, {high:+.1f}]"


def final_table(summary: Mapping[str, Any]) -> Group:
    """The table that a run prints at its end: accuracy per test set, before and after training where it has trained."""
    results = summary.get("evaluation", {})
    is_trained = any("before" in result for result in results.values())
    accuracies = ("before [95 %]", "after [95 %]", "points [95 %]") if is_trained else ("accuracy [95 %]",)
    rows = []
    for name, result in results.items():
        change = [points(result["before"], result["after"])] if "before" in result else []
        rows.append([name, f"{result['after']['n']:,}", *map(percent, result.values()), *change])
    title = f"{objective(summary)}, seed {summary['seed']}, {summary['steps']} steps"
    return plain(title, ("test set", "n", *accuracies), rows)


def plain(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Group:
    """A table without lines, the first column at the left, under a title that may be wider than the table."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for place, name in enumerate(columns):
        table.add_column(Text(name), justify="right" if place else "left", no_wrap=bool(place), overflow="fold")
    for cells in rows:
        table.add_row(*map(Text, cells))
    return Group(Text(title, style="bold"), table)


def objective(summary: Mapping[str, Any]) -> str:
    """The objective's name with its settings: ``pspo (alpha 0.1)``."""
    settings = ", ".join(f"{key} {value}" for key, value in summary["objective"].items() if key != "name")
    return str(summary["objective"]["name"]) + (f" ({settings})" if settings else "")


def visible(value: Any) -> str:
    """Text with pictures for control characters and ? for lone surrogates: a completion must not hide its text."""
    if isinstance(value, Markup):  # only the page itself makes it
        return value
    return str(value).translate(_CONTROL_PICTURES).encode("utf-8", "replace").decode("utf-8")


def templates(folder: Path) -> Environment:
    """The templates in a folder; everything that a model or a user wrote is escaped."""
    looks: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "undefined": StrictUndefined}
    return Environment(loader=FileSystemLoader(folder), autoescape=True, finalize=visible, **looks)


def write_report(directory: Path) -> Path:
    """Write ``report.html`` from a run directory's files; numbers of the clock and the memory have their own lines."""
    rows, completions = read_lines(directory / "metrics.jsonl"), read_lines(directory / "completions.jsonl")
    summary, config = read_json(directory / "summary.json"), directory / "config.yaml"
    steps = [row["step"] for row in completions[:1] + completions[-1:]]
    last = {key: value for row in rows for key, value in row.items()}
    templating = templates(Path(__file__).parent)
    templating.filters["percent"] = percent
    page = templating.get_template("page.html").render(
        title=summary.get("run", directory.name),
        summary=summary,
        panels={title: base64.b64encode(png).decode() for title, png in panel_images(rows).items()},
        examples={step: [row for row in completions if row["step"] == step][:EXAMPLES_PER_STEP] for step in steps},
        max_characters=MAX_COMPLETION_CHARACTERS,
        configuration=_texts(read_yaml(config) if config.is_file() else {}),
        environment=_texts(next(reversed(environment.history(directory)), {})),  # of the run's last process
        last={key: last[key] for key in (*METRICS, *last) if key in last},
        **{function.__name__: function for function in (meaning, objective, points)},
    )
    path = directory / "report.html"
    write_text(path, page)
    return path


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Dotted key -> its value as text, JSON where it is no text already; without ``LOCATION``."""
    flat = dotted({key: value for key, value in values.items() if key not in LOCATION})
    return {key: x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for key, x in flat.items()}
