"""The figures of a comparison as plotly's JSON: aggregated before they are drawn, and told apart without colour."""

import html
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from pspo.base.figure import COLORS

DASHES = {"solid": "", "dash": "6 4", "dot": "2 3", "longdash": "10 4", "dashdot": "6 3 2 3", "longdashdot": "10 3 2 3"}
"""plotly's name of a line's dashes -> SVG's, for the legend that the page draws itself."""

SYMBOLS = {
    "circle": "M4 0A4 4 0 1 1-4 0A4 4 0 1 1 4 0Z",
    "square": "M-4-4H4V4H-4Z",
    "diamond": "M0-5L5 0L0 5L-5 0Z",
    "triangle-up": "M0-5L5 4H-5Z",
    "x": "M-4-4L4 4M-4 4L4-4",
    "triangle-down": "M0 5L5-4H-5Z",
    "cross": "M-5 0H5M0-5V5",
}
"""plotly's name of a marker -> its SVG path."""

FILLS, PATTERNS = ("#c8ced6", "#ffffff", "#6b7280", "#e5e7eb"), ("", "/", "", ".")
"""Grounds and patterns of the parts of a bar, or of a box."""

MAX_POINTS_PER_CURVE = 100
"""Steps beyond this number are averaged in windows before a curve is drawn."""

DODGE = 0.012
"""Distance of two arms' marks at the same x, as a share of the axis."""

LABEL_CHARACTERS = 18
"""Longest line of an arm's label at an axis: a telephone shows 390 pixels."""

LINE_PIXELS = 17

Points = Mapping[str, Sequence[tuple[float, float, float, float]]]
"""Label of an arm -> (x, y, lower end, upper end) of each of its points."""


@dataclass(frozen=True)
class Style:
    """How an arm is drawn in every figure: colour, dashes and marker, no two of the first 42 alike."""

    color: str
    dash: str
    symbol: str

    @classmethod
    def of(cls, arm: int) -> "Style":
        """The style of the arm of this number."""
        return cls(COLORS[arm % len(COLORS)], [*DASHES][arm % len(DASHES)], [*SYMBOLS][arm % len(SYMBOLS)])


@dataclass(frozen=True)
class Figure:
    """One figure: ``traces`` and ``layout`` as plotly has them, ``height`` in pixels of the page."""

    title: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)
    height: int = 260


def curves(
    rows: pd.DataFrame,
    arms: Sequence[str],
    x: str,
    metric: str,
    title: str,
    *,
    percent: bool = False,
    log: bool = False,
) -> Figure | None:
    """A metric over ``x``: for each arm the mean over its runs, and a band from the lowest run to the highest.

    ``rows`` has the columns ``arm``, ``run`` and ``x``. None where no run has a value of the metric.
    """
    if metric not in rows or rows[metric].isna().all():
        return None
    rows = rows.loc[rows[metric].notna(), ["arm", "run", x, metric]]
    width = math.ceil(rows[x].nunique() / MAX_POINTS_PER_CURVE) * _spacing(rows[x])
    rows = rows.assign(**{x: np.ceil(rows[x] / width) * width if width > 1 else rows[x]})
    by_run = rows.groupby(["arm", "run", x], observed=True)[metric].mean()
    by_arm = by_run.groupby(["arm", x], observed=True).agg(["mean", "min", "max", "size"]).reset_index(x)
    traces: list[dict[str, Any]] = []
    for number, arm in enumerate(arms):
        if arm in by_arm.index:
            own = by_arm.loc[[arm]]
            if own["size"].max() > 1:
                traces.append(_band(number, arm, own[x], own["min"], own["max"]))
            traces.append(_line(number, arm, own[x], own["mean"], width=2, markers=6))
    axis: dict[str, Any] = {"type": "log", "dtick": 1} if log else {}
    return Figure(
        title, traces, {"xaxis": {"title": {"text": x}}, "yaxis": axis | ({"tickformat": "~%"} if percent else {})}
    )


def intervals(points: Points, arms: Sequence[str], x: str, title: str, *, log: bool = False) -> Figure:
    """An accuracy over ``x`` with its interval at every point, one line for each arm."""
    ticks = sorted({x for own in points.values() for x, *_ in own})
    traces = []
    for number, (label, own) in enumerate(points.items()):
        xs, ys, lows, highs = zip(*own, strict=True)
        shift = DODGE * (number - (len(points) - 1) / 2)  # or else the bars of all arms stand on one another
        at = [x * (ticks[-1] / ticks[0]) ** shift if log else x + shift * (ticks[-1] - ticks[0]) for x in xs]
        line = _line(arms.index(label), label, at, ys, width=1.5, markers=0)
        hover = {"text": [f"{x:g}" for x in xs], "hovertemplate": "%{fullData.name}<br>%{text}: %{y}<extra></extra>"}
        traces.append(line | hover | {"error_y": _bars(ys, lows, highs)})
    axis = {"title": {"text": html.escape(x)}, "type": "log" if log else "linear"}
    named = {"tickvals": short(ticks), "ticktext": [f"{tick:g}" for tick in ticks]} if len(ticks) <= 8 else {}
    return Figure(title, traces, {"xaxis": axis | named, "yaxis": {"tickformat": "~%"}})


def forest(
    rows: Mapping[str, tuple[float, float, float]], arms: Sequence[str], title: str, x: str, *, zero: bool = False
) -> Figure:
    """A mark with its interval for each arm, one under the other; ``zero`` draws the line of no difference."""
    values, lows, highs = zip(*rows.values(), strict=True)
    styles = [Style.of(arms.index(label)) for label in rows]
    marker = {"symbol": [s.symbol for s in styles], "color": [s.color for s in styles], "size": 10}
    trace = {
        "type": "scatter", "mode": "markers", "x": short(values), "y": [*range(len(rows))], "marker": marker,
        "error_x": _bars(values, lows, highs) | {"color": "#1f2933"},
        "text": [html.escape(label) for label in rows], "hovertemplate": "%{text}<br>%{x}<extra></extra>",
    }  # fmt: skip
    line = {
        "type": "line",
        "x0": 0,
        "x1": 0,
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "line": {"color": "#1f2933", "width": 1},
    }
    layout = {"yaxis": _rows(rows), "xaxis": {"title": {"text": x}}, "shapes": [line] if zero else []}
    return Figure(title, [trace], layout, _height(rows, 36) + 80)


def boxes(quantiles: Mapping[str, Mapping[str, Sequence[float]]], title: str, x: str) -> Figure:
    """Horizontal boxes from quantiles 5, 25, 50, 75, 95 %: part -> label -> the five of them."""
    labels = list(dict.fromkeys(label for rows in quantiles.values() for label in rows))
    traces = []
    for number, (part, rows) in enumerate(quantiles.items()):
        five = [short(column) for column in zip(*rows.values(), strict=True)]
        names = ("lowerfence", "q1", "median", "q3", "upperfence")
        places = [labels.index(label) for label in rows]
        look = {"fillcolor": FILLS[number], "line": {"color": "#1f2933", "width": 1}}
        traces.append(
            {
                "type": "box",
                "name": part,
                "orientation": "h",
                "y": places,
                **dict(zip(names, five, strict=True)),
                **look,
            }
        )
    layout = {"yaxis": _rows(labels), "xaxis": {"title": {"text": x}, "rangemode": "tozero"}}
    return Figure(title, traces, layout | {"boxmode": "group", "showlegend": True}, _height(labels, 46) + 120)


def bars(parts: Mapping[str, Mapping[str, float]], title: str, x: str) -> Figure:
    """Horizontal bars stacked from ``parts``: part -> label -> its length. A pattern tells the parts apart."""
    labels = list(dict.fromkeys(label for rows in parts.values() for label in rows))
    traces = [
        {
            "type": "bar", "orientation": "h", "name": part, "x": short([rows.get(label, 0.0) for label in labels]),
            "y": [*range(len(labels))], "hovertemplate": "%{x} %{fullData.name}<extra></extra>",
            "marker": {"color": color, "pattern": {"shape": pattern, "fgcolor": "#1f2933", "size": 6, "solidity": 0.15},
                       "line": {"color": "#1f2933", "width": 1}},
        }
        for (part, rows), color, pattern in zip(parts.items(), FILLS, PATTERNS, strict=False)
    ]  # fmt: skip
    layout = {"barmode": "stack", "yaxis": _rows(labels), "xaxis": {"title": {"text": x}}, "showlegend": True}
    return Figure(title, traces, layout, _height(labels, 36) + 120)


def short(values: Iterable[float]) -> list[float | None]:
    """Numbers with four digits; what is no number, and infinity, is None."""
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in map(float, values)]


def _line(
    number: int, arm: str, x: Iterable[float], y: Iterable[float], *, width: float, markers: int
) -> dict[str, Any]:
    style = Style.of(number)
    return {
        "type": "scatter", "mode": "lines+markers", "name": html.escape(arm), "meta": arm, "x": short(x), "y": short(y),
        "line": {"color": style.color, "dash": style.dash, "width": width},
        "marker": {"symbol": style.symbol, "color": style.color, "size": 7, "maxdisplayed": markers},
        "hovertemplate": "%{fullData.name}<br>%{x}: %{y}<extra></extra>",
    }  # fmt: skip


def _band(number: int, arm: str, x: pd.Series, low: pd.Series, high: pd.Series) -> dict[str, Any]:
    red, green, blue = (int(Style.of(number).color[at : at + 2], 16) for at in (1, 3, 5))
    return {
        "type": "scatter", "mode": "lines", "hoverinfo": "skip", "line": {"width": 0}, "fill": "toself",
        "meta": arm, "fillcolor": f"rgba({red},{green},{blue},0.14)",
        "x": short([*x, *x[::-1]]), "y": short([*high, *low[::-1]]),
    }  # fmt: skip


def _bars(values: Sequence[float], lows: Sequence[float], highs: Sequence[float]) -> dict[str, Any]:
    """Plotly's error bars from the ends of intervals."""
    above, below = (np.abs(np.subtract(ends, values)) for ends in (highs, lows))
    return {
        "type": "data",
        "symmetric": False,
        "array": short(above),
        "arrayminus": short(below),
        "width": 5,
        "thickness": 1.5,
    }


def _spacing(x: pd.Series) -> float:
    """The smallest distance of two values."""
    distances = np.diff(np.sort(x.unique()))
    return float(distances.min()) if len(distances) else 1.0


def _rows(labels: Iterable[str]) -> dict[str, Any]:
    """A vertical axis with a row for each label, the first at the top."""
    texts = [_wrapped(label) for label in labels]
    return {
        "tickvals": [*range(len(texts))], "ticktext": texts, "range": [len(texts) - 0.5, -0.5], "showgrid": False,
        "zeroline": False,
    }  # fmt: skip


def _height(labels: Iterable[str], least: int) -> int:
    """Pixels of one row for each label, all as high as the label of most lines needs, and ``least`` at least."""
    lines = [_wrapped(label).count("<br>") + 1 for label in labels]
    return len(lines) * max(least, LINE_PIXELS * max(lines))


def _wrapped(label: str) -> str:
    lines = textwrap.wrap(label, LABEL_CHARACTERS, break_long_words=True, break_on_hyphens=True)
    return "<br>".join(map(html.escape, lines))
