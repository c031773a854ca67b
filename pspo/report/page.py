"""One self-contained HTML page about a run, from the template ``page.html``."""

import base64
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pspo.base.files import read_json, read_lines, read_yaml, write_text
from pspo.base.schema import dotted
from pspo.host import environment
from pspo.report.curves import panel_images
from pspo.report.metrics import METRICS, meaning
from pspo.report.table import objective, percent, points

EXAMPLES_PER_STEP = 4
MAX_COMPLETION_CHARACTERS = 4000
LOCATION = ("group", "output_dir", "host", "job_id")
"""Configuration that says where a run lies, not what the run computes."""
SPEED: dict[str, Callable[[list[float]], float]] = {
    "time/step_s": median,
    "time/tokens_per_s": median,
    "memory/peak_gib": max,
}
"""Metric of the clock or of the memory -> what the page has of its values."""

_CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}


def visible(value: Any) -> str:
    """Text with pictures for control characters and ? for lone surrogates: a completion must not hide its text.

    Markup, which only a page itself makes, stays as it is.
    """
    if isinstance(value, Markup):
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
    values = {key: [row[key] for row in rows if row.get(key) is not None] for key in SPEED}
    templating = templates(Path(__file__).parent)
    templating.filters["percent"] = percent
    page = templating.get_template("page.html").render(
        title=summary.get("run", directory.name),
        summary=summary,
        panels={title: base64.b64encode(png).decode() for title, png in panel_images(rows, summary).items()},
        speed=[(key, reduce.__name__, reduce(values[key])) for key, reduce in SPEED.items() if values[key]],
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
