"""The figure of a run: accuracy and reward over steps, and the lengths, divergence and gradients behind them."""

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pspo.base.figure import GREY, name_curves, png, styled, write_png
from pspo.base.files import read_lines
from pspo.report.panels import FIGURE, Panel

LABEL_SPACING = 0.13
"""Share of a panel's height between two curves' names, of two lines each."""


@styled
def write_curves(directory: Path) -> Path:
    """Draw ``curves.png`` from metrics.jsonl; panels without a metric are left out."""
    rows = read_lines(directory / "metrics.jsonl")
    panels = panels_of(rows)
    columns, lines = min(3, len(panels)) or 1, math.ceil(len(panels) / 3) or 1
    figure = Figure(figsize=(4.9 * columns, 3.3 * lines), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    for number, panel in enumerate(panels, start=1):
        _draw(figure.add_subplot(lines, columns, number), panel, rows)
    if not panels:
        figure.text(0.5, 0.5, "no steps were logged", ha="center", color=GREY)
    path = directory / "curves.png"
    write_png(figure, path, dpi=140)
    return path


@styled
def panel_images(rows: list[dict[str, Any]]) -> dict[str, bytes]:
    """Title -> PNG of every panel alone, so that a page can arrange the panels to its width."""
    images = {}
    for panel in panels_of(rows):
        figure = Figure(figsize=(4.9, 3.3), layout="constrained")
        _draw(figure.subplots(), panel, rows)
        images[panel.title] = png(figure, dpi=160)
    return images


def panels_of(rows: list[dict[str, Any]]) -> list[Panel]:
    """The panels of which a metric was logged."""
    return [panel for panel in FIGURE if any(_points(rows, metric) for metric in panel.curves)]


def _points(rows: list[dict[str, Any]], metric: str) -> list[tuple[int, float]]:
    return [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]


def _draw(axes: Axes, panel: Panel, rows: list[dict[str, Any]]) -> None:
    axes.set_title(panel.title)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    names = []
    for metric, name in panel.curves.items():
        if points := _points(rows, metric):
            marker = "o" if metric.startswith("validation/") or len(points) == 1 else ""
            (line,) = axes.plot(*zip(*points, strict=True), marker=marker)
            names.append((points[-1][1], name, str(line.get_color())))
    if panel.log:
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
    if panel.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None, symbol=" %"))
    low, high = axes.get_ylim()
    widened = max(0.0, 0.001 * max(abs(low), abs(high)) - (high - low)) / 2  # float32 rounding makes no curve
    low, high = low - widened, high + widened
    if panel.log:
        low, high = min(low, 0.95), max(high, 2.1)  # with the ratio 1, at which the policy has not moved
    elif panel.percent:
        low, high = max(low, -0.05 * max(high, 0.01)), max(high, 0.01)  # no share is negative, nor its axis
    axes.set_ylim(low, high)
    if len(names) > 1:
        name_curves(axes, names, LABEL_SPACING)
