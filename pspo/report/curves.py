"""The figure of a run: what was learned, and what it did to lengths, divergence and entropy."""

import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter, StrMethodFormatter

from pspo.report.metrics import read_metrics, read_summary

# Okabe and Ito (2008): told apart by colour-blind readers.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6B7280"
INK, RULE = "#1F2933", "#E5E7EB"
LABEL_SPACING = 0.13  # of a panel's height, between two labels at its right edge

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Curve:
    """One metric over steps, named at the right edge where a panel has several."""

    key: str
    color: str = BLUE
    label: str = ""
    marker: str = ""


@dataclass(frozen=True)
class Panel:
    """Axes with a title; ``below`` is a smaller one under it that shares the steps."""

    title: str
    curves: tuple[Curve, ...]
    percent: bool = False
    log: bool = False
    tests: bool = False
    below: "Panel | None" = None


PANELS = (
    Panel(
        "Accuracy",
        (
            Curve("reward/correct_mean", BLUE, "training,\nsampled"),
            Curve("validation/greedy_accuracy", ORANGE, "validation,\ngreedy", "o"),
        ),
        percent=True,
        tests=True,
    ),
    Panel("Reward", (Curve("reward/mean"),)),
    Panel(
        "Completion length (tokens)",
        (Curve("completion/length_mean"),),
        below=Panel("Truncated completions", (Curve("completion/truncated_rate", ORANGE),), percent=True),
    ),
    Panel("KL(old‖new), k3 (nats per token)", (Curve("policy/kl_old_new_k3", GREEN),)),
    Panel(
        "Gradient norm before clipping",
        (Curve("optimizer/grad_norm_mean", GREEN),),
        below=Panel("Largest importance ratio, log scale", (Curve("policy/ratio_max", ORANGE),), log=True),
    ),
    Panel("Policy entropy (nats per token)", (Curve("policy/entropy_mean", GREEN),)),
    Panel(
        "Tokens by gradient weight, beside noclip",
        (
            Curve("weight/zero_rate", ORANGE, "zero"),
            Curve("weight/damped_rate", BLUE, "damped"),
            Curve("weight/amplified_rate", GREEN, "amplified"),
            Curve("weight/reversed_rate", GREY, "reversed"),
        ),
        percent=True,
    ),
    Panel(
        "Gradient mass kept, beside noclip",
        (Curve("weight/mass_kept", BLUE),),
        below=Panel("Alpha", (Curve("objective/alpha", ORANGE),)),
    ),
    Panel("Effective sample size, share of tokens", (Curve("ratio/ess", GREEN),)),
)


def write_curves(directory: Path) -> Path:
    """Draw ``curves.png`` from metrics.jsonl and summary.json; panels without a metric are left out."""
    rows, summary = read_metrics(directory), read_summary(directory)
    panels = panels_of(rows)
    columns = max(1, min(3, len(panels)))
    lines = max(1, math.ceil(len(panels) / columns))
    figure = Figure(figsize=(4.9 * columns, 3.3 * lines), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    for subfigure, panel in zip(figure.subfigures(lines, columns, squeeze=False).flat, panels, strict=False):
        _draw(subfigure, panel, rows, summary)
    if not panels:
        figure.text(0.5, 0.5, "no steps were logged", ha="center", color=GREY)
    path = directory / "curves.png"
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(_png(figure, dpi=140))
    beside.replace(path)
    return path


def panel_images(rows: Rows, summary: dict[str, Any]) -> list[tuple[str, bytes]]:
    """Every panel by itself, title and PNG, so that a page can arrange them to its width."""
    images = []
    for panel in panels_of(rows):
        figure = Figure(figsize=(4.9, 3.3), layout="constrained")
        _draw(figure, panel, rows, summary)
        images.append((panel.title, _png(figure, dpi=160)))
    return images


def panels_of(rows: Rows) -> list[Panel]:
    """The panels that have something to show."""
    return [panel for panel in PANELS if _shown(panel, rows)]


def _png(figure: Figure, dpi: int) -> bytes:
    # A figure of its own canvas: no pyplot, no global state. No Software entry: it holds matplotlib's version.
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def _points(rows: Rows, key: str) -> tuple[list[int], list[float]]:
    found = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _shown(panel: Panel, rows: Rows) -> list[Panel]:
    """The panel and the one below it, without those that lack every metric."""
    both = [panel, panel.below] if panel.below else [panel]
    return [p for p in both if any(_points(rows, curve.key)[0] for curve in p.curves)]


def _draw(figure: Any, panel: Panel, rows: Rows, summary: dict[str, Any]) -> None:
    parts = _shown(panel, rows)
    heights = [2.0, 1.0][: len(parts)]
    grid = figure.subplots(len(parts), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, part in zip(grid.flat, parts, strict=True):
        _draw_axes(axes, part, rows, summary)
    grid.flat[-1].set_xlabel("step", color=GREY, fontsize=8.5)


def _draw_axes(axes: Axes, panel: Panel, rows: Rows, summary: dict[str, Any]) -> None:
    _style(axes, panel)
    labels: list[tuple[float, str, str]] = []
    for curve in panel.curves:
        steps, values = _points(rows, curve.key)
        if not steps:
            continue
        single = len(steps) == 1
        axes.plot(steps, values, color=curve.color, lw=1.6, marker=curve.marker or ("o" if single else ""), ms=4)
        labels.append((values[-1], curve.label, curve.color))
    low, high = axes.get_ylim()
    least = 0.001 * max(abs(low), abs(high))
    if not panel.log and high - low < least:  # float32 rounding makes no curve
        axes.set_ylim((low + high - least) / 2, (low + high + least) / 2)
    if panel.log:
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0.95), max(high, 2.1))  # with the ratio 1, where nothing has moved
    if panel.percent and not panel.tests:
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.05 * max(high, 0.01)), max(high, 0.01))  # no share is negative, nor its axis
    if panel.tests:
        labels += _draw_tests(axes, summary)
    if len(labels) > 1:
        _label(axes, labels)


def _style(axes: Axes, panel: Panel) -> None:
    axes.set_title(panel.title, loc="left", fontsize=10, color=INK, fontweight="bold")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.tick_params(which="both", length=0, labelsize=8.5, labelcolor=GREY)
    axes.grid(axis="y", color=RULE, lw=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.02, y=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    if panel.log:
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_locator(LogLocator(base=2, numticks=4))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    if panel.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None, symbol=" %"))


def _draw_tests(axes: Axes, summary: dict[str, Any]) -> list[tuple[float, str, str]]:
    """Dashed lines with 95 % bands: accuracy on the first test set before and after training."""
    labels = []
    for name, result in list(summary.get("evaluation", {}).items())[:1]:
        for when, color in (("before", GREY), ("after", GREEN)):
            if when in result:
                test = result[when]
                axes.axhspan(test["ci95_low"], test["ci95_high"], color=color, alpha=0.13, lw=0)
                axes.axhline(test["accuracy"], color=color, lw=1.3, ls=(0, (4, 3)))
                labels.append((test["accuracy"], f"{name} test,\n{when}", color))
    return labels


def _label(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Names at the right edge, each as near its line as the others let it."""
    axes.autoscale_view()
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    ordered = sorted(labels, key=lambda label: label[0])
    heights = _spread([(value - low) / (high - low) for value, _, _ in ordered], LABEL_SPACING)
    for height, (_, text, color) in zip(heights, ordered, strict=True):
        axes.text(1.02, height, text, color=color, fontsize=8, va="center", linespacing=1.0, transform=axes.transAxes)


def _spread(heights: Sequence[float], spacing: float) -> list[float]:
    """Ascending heights moved apart to at least ``spacing``: the mean of pushing all up and pushing all down."""
    up, down = list(heights), list(heights)
    for i in range(1, len(up)):
        up[i] = max(up[i], up[i - 1] + spacing)
        down[-1 - i] = min(down[-1 - i], down[-i] - spacing)
    return [(above + below) / 2 for above, below in zip(up, down, strict=True)]
