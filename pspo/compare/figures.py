"""The figures of a comparison as plotly's JSON: aggregated before they are drawn, and told apart without colour.

The rows that a figure draws have the columns ``arm``, ``value``, and ``low`` and ``high``, the ends of an interval.
"""

import html
import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pspo.base.figure import COLORS
from pspo.report.panels import Panel

LOOKS = {
    "color": COLORS,
    "dash": ("solid", "6px,4px", "2px,3px", "10px,4px", "6px,3px,2px,3px", "10px,3px,2px,3px"),
    "symbol": ("circle", "square", "diamond", "triangle-up", "x", "triangle-down", "cross"),
    "sign": "●■◆▲✖▼✚",
}
"""Colour, dashes and marker of an arm as plotly has them, and a character like the marker for the page's legend."""
INK = "#1f2933"
BAND_OPACITY = "24"  # after a colour, two hexadecimal digits: 14 %
MAX_POINTS_PER_CURVE = 100
"""Steps beyond this number are averaged in windows before a curve is drawn."""
LABEL_CHARACTERS = 18
"""Longest line of an arm's label at an axis: a telephone shows 390 pixels."""
LINE_PIXELS, ROW_PIXELS, AXIS_PIXELS = 17, 36, 80
"""Heights: of a line of a label, of a row of marks at least, and of the axis below the rows."""


@dataclass(frozen=True)
class Figure:
    """One figure: ``traces`` and ``layout`` as plotly has them, ``height`` in pixels of the page."""

    title: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any]
    height: int = 260


def style(arm: int) -> dict[str, str]:
    """How the arm of this number is drawn in every figure: no two of the first 42 arms are alike."""
    return {name: values[arm % len(values)] for name, values in LOOKS.items()}


def curves(rows: pd.DataFrame, arms: Sequence[str], x: str, panel: Panel) -> Iterator[Figure]:
    """Each metric of a panel over ``x``: the mean over an arm's runs, a band from the lowest run to the highest.

    ``rows`` has the columns ``arm``, ``run`` and ``x``; a metric that no run has logged has no figure.
    """
    for metric, name in panel.curves.items():
        if metric not in rows or rows[metric].isna().all():
            continue
        logged = rows[["arm", "run", x, metric]].dropna(subset=[metric])
        window = math.ceil(logged[x].nunique() / MAX_POINTS_PER_CURVE)
        end = logged.groupby(np.ceil(logged[x].rank(method="dense") / window))[x].transform("max")
        by_run = logged.groupby(["arm", "run", end])[metric].mean()
        means = by_run.groupby(["arm", x]).agg(value="mean", low="min", high="max").reset_index()
        traces: list[dict[str, Any]] = []
        for arm, own, line in _lines(means, arms):
            if (own["high"] > own["low"]).any():
                look = {"fill": "toself", "fillcolor": line["line"]["color"] + BAND_OPACITY, "line": {"width": 0}}
                outline = {"x": short([*own[x], *own[x][::-1]]), "y": short([*own["high"], *own["low"][::-1]])}
                traces.append({"type": "scatter", "mode": "lines", "meta": arm, "hoverinfo": "skip"} | look | outline)
            traces.append(line | {"x": short(own[x]), "marker": line["marker"] | {"maxdisplayed": 6}})
        y_axis = {"type": "log"} if panel.log else {"tickformat": "~%"} if panel.percent else {}
        title = f"{panel.title}: {' '.join(name.split())}" if name else panel.title
        yield Figure(title, traces, {"xaxis": {"title": {"text": x}}, "yaxis": y_axis})


def intervals(rows: pd.DataFrame, arms: Iterable[str], x: str, title: str, *, legend: bool = False) -> Figure:
    """An accuracy over the few values of ``x``, at equal distances, with its interval at every value.

    Lines that are not the page's arms need a ``legend`` of their own.
    """
    rows = rows.sort_values(x, kind="stable").assign(name=rows[x].map("{:g}".format))
    traces = [line | {"x": [*own["name"]], "error_y": _error(own)} for _, own, line in _lines(rows, arms)]
    x_axis = {"title": {"text": html.escape(x)}, "type": "category", "categoryarray": [*rows["name"].unique()]}
    layout: dict[str, Any] = {"scattermode": "group", "scattergap": 0.8, "showlegend": legend and len(traces) > 1}
    layout |= {"legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"}}
    return Figure(title, traces, layout | {"xaxis": x_axis, "yaxis": {"tickformat": "~%"}})


def forest(rows: pd.DataFrame, arms: Sequence[str], title: str, x: str, *, zero: bool = False) -> Figure:
    """A mark with its interval for each arm, one under the other; ``zero`` draws the line of no difference."""
    looks = pd.DataFrame([style(arms.index(arm)) for arm in rows["arm"]])
    labels = ["<br>".join(map(html.escape, textwrap.wrap(arm, LABEL_CHARACTERS))) for arm in rows["arm"]]
    marker = {"symbol": [*looks["symbol"]], "color": [*looks["color"]], "size": 10}
    trace: dict[str, Any] = {"type": "scatter", "mode": "markers", "x": short(rows["value"]), "y": [*range(len(rows))]}
    trace |= {"marker": marker, "error_x": _error(rows) | {"color": INK}, "text": labels}
    trace |= {"hovertemplate": "%{text}<br>%{x}<extra></extra>"}
    x_axis = {"title": {"text": x}} | ({"zeroline": True, "zerolinecolor": INK, "rangemode": "tozero"} if zero else {})
    y_axis = {"tickvals": trace["y"], "ticktext": labels, "range": [len(rows) - 0.5, -0.5], "showgrid": False}
    pixels = max(ROW_PIXELS, *(LINE_PIXELS * (label.count("<br>") + 1) for label in labels))
    return Figure(title, [trace], {"xaxis": x_axis, "yaxis": y_axis}, len(rows) * pixels + AXIS_PIXELS)


def short(values: Iterable[float]) -> list[float | None]:
    """Numbers with four digits; what is no number, and infinity, is None."""
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in map(float, values)]


def _lines(rows: pd.DataFrame, arms: Iterable[str]) -> Iterator[tuple[str, pd.DataFrame, dict[str, Any]]]:
    """Each arm that has rows, its rows, and its line with marks, which lacks the ``x``."""
    for number, arm in enumerate(arms):
        if len(own := rows[rows["arm"] == arm]):
            look = style(number)
            line: dict[str, Any] = {"type": "scatter", "mode": "lines+markers", "name": html.escape(arm), "meta": arm}
            line |= {"line": {"color": look["color"], "dash": look["dash"], "width": 2}, "y": short(own["value"])}
            line |= {"marker": {"color": look["color"], "symbol": look["symbol"], "size": 7}}
            yield arm, own, line | {"hovertemplate": "%{fullData.name}<br>%{x}: %{y}<extra></extra>"}


def _error(rows: pd.DataFrame) -> dict[str, Any]:
    """Plotly's error bars from the ends of intervals."""
    ends: dict[str, Any] = {
        "array": short(rows["high"] - rows["value"]),
        "arrayminus": short(rows["value"] - rows["low"]),
    }
    return {"type": "data", "symmetric": False, "width": 5, "thickness": 1.5} | ends
