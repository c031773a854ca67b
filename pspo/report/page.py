"""One self-contained HTML page about a run, from the template ``page.html``."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pspo.base.files import read_json, read_lines, write_text
from pspo.base.schema import dotted
from pspo.host import environment
from pspo.report.curves import panel_images
from pspo.report.metrics import METRICS, meaning, read_metrics
from pspo.report.table import objective, percent, points

EXAMPLES_PER_STEP = 4
MAX_COMPLETION_CHARACTERS = 4000
LOCATION = ("group", "output_dir", "host", "job_id")
"""Configuration that says where a run lies, not what the run computes."""

_CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}


def visible(value: Any) -> str:
    """Text with pictures for control characters and ? for lone surrogates: a completion must not hide its text.

    Markup, which only a page itself makes, stays as it is.
    """
    return (
        value
        if isinstance(value, Markup)
        else str(value).translate(_CONTROL_PICTURES).encode("utf-8", "replace").decode("utf-8")
    )


def templates(folder: Path) -> Environment:
    """The templates in a folder; everything that a model or a user wrote is escaped."""
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        finalize=visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


_TEMPLATES = templates(Path(__file__).parent)
_TEMPLATES.filters["percent"] = percent
_TEMPLATES.globals |= {"meaning": meaning, "objective": objective, "points": points}


def write_report(directory: Path) -> Path:
    """Write ``report.html`` from a run directory's files; numbers of the clock and the memory have their own lines."""
    rows, summary = read_metrics(directory), read_json(directory / "summary.json")
    completions = read_lines(directory / "completions.jsonl")
    steps = [row["step"] for row in completions[:1] + completions[-1:]]
    config = directory / "config.yaml"
    configuration = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    process: dict[str, Any] = next(reversed(environment.history(directory)), {})  # the run's last one
    last = {key: value for row in rows for key, value in row.items()}
    speed = []
    for key, statistic, reduce in (
        ("time/step_s", "median", median),
        ("time/tokens_per_s", "median", median),
        ("memory/peak_gib", "largest", max),
    ):
        if values := [row[key] for row in rows if row.get(key) is not None]:
            speed.append((key, statistic, reduce(values)))
    page = _TEMPLATES.get_template("page.html").render(
        title=summary.get("run", directory.name),
        summary=summary,
        panels={title: base64.b64encode(png).decode() for title, png in panel_images(rows, summary).items()},
        speed=speed,
        examples={step: [row for row in completions if row["step"] == step][:EXAMPLES_PER_STEP] for step in steps},
        max_characters=MAX_COMPLETION_CHARACTERS,
        configuration=_texts({key: value for key, value in configuration.items() if key not in LOCATION}),
        environment=_texts({key: value for key, value in process.items() if key not in LOCATION}),
        last={key: last[key] for key in (*METRICS, *last) if key in last},
    )
    path = directory / "report.html"
    write_text(path, page)
    return path


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Dotted key -> its value as text, JSON where it is no text already."""
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in dotted(values).items()
    }
