"""One look for all figures of the package, the names at the right ends of curves, and PNG files."""

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_params_from_file, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pspo.base.files import write_bytes

STYLE = Path(__file__).with_name("figure.mplstyle")

styled = style.context(STYLE)  # decorator: the figures that a function draws have the look of ``figure.mplstyle``
COLORS: list[str] = rc_params_from_file(STYLE)["axes.prop_cycle"].by_key()["color"]  # the style's cycle as ``#rrggbb``
BLUE, ORANGE, GREEN, GREY = "C0", "C1", "C2", "C3"  # the first colours of the style's cycle


def png(figure: Figure, dpi: int) -> bytes:
    """The figure as a PNG file; equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})  # Software holds matplotlib's version
    return buffer.getvalue()


def write_png(figure: Figure, path: Path, dpi: int) -> None:
    """Write the figure as a whole file."""
    write_bytes(path, png(figure, dpi))


def name_curves(axes: Axes, names: Sequence[tuple[float, str, str]], spacing: float) -> None:
    """Write names, (y at the curve's end, text, colour), right of the axes, ``spacing`` of their height apart."""
    axes.set_ylim(axes.get_ylim())
    ordered = sorted(names, key=lambda name: name[0])
    heights = [(axes.transScale + axes.transLimits).transform((1.0, y))[1] for y, _, _ in ordered]
    for height, (_, text, color) in zip(spread(heights, spacing), ordered, strict=True):
        axes.text(1.02, height, text, color=color, fontsize=8, va="center", linespacing=1.0, transform=axes.transAxes)


def spread(heights: Sequence[float], spacing: float) -> list[float]:
    """Ascending heights moved apart to at least ``spacing``: the mean of pushing all up and pushing all down."""
    up, down = list(heights), list(heights)
    for i in range(1, len(up)):
        up[i] = max(up[i], up[i - 1] + spacing)
        down[-1 - i] = min(down[-1 - i], down[-i] - spacing)
    return [(above + below) / 2 for above, below in zip(up, down, strict=True)]
