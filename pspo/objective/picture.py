"""The gradient weights of all objectives, and what alpha does, as figures and a table: ``python -m pspo.objective``.

Computed by autograd from the classes themselves, at the defaults under ``conf/objective``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from pspo.objective import OBJECTIVES, Objective, ObjectiveInput, default_objective
from pspo.objective.toy import ARMS, drift

OLD_PROBABILITY = 0.1
"""π_old of the token shown: DPPO and MASPO look at it, the others at the ratio alone."""

SHOWN = (0.25, 0.5, 0.8, 1.0, 1.25, 2.0, 4.0)
REACH = 8.0
BLUE, ORANGE, GREY, INK, RULE = "#0072B2", "#E69F00", "#9CA3AF", "#1F2933", "#E5E7EB"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#6B7280")


def variants() -> dict[str, Objective]:
    """Every objective at its defaults, and the other forms that its options give it."""
    found = {name: default_objective(name) for name in OBJECTIVES}
    options: dict[str, dict[str, Any]] = {
        "clip": {"dual": 3.0},
        "clip ": {"two_sided": 4.0},
        "dppo": {"divergence": "kl", "delta": 0.05},
    }
    for name, changes in options.items():
        told = ", ".join(f"{key}={value:g}" if isinstance(value, float) else value for key, value in changes.items())
        found[f"{name.strip()}, {told}"] = replace(found[name.strip()], **changes)
    return found


def weight(objective: Callable[[ObjectiveInput], Tensor], ratio_N: Tensor, advantage: float) -> Tensor:
    """w(r, A) = −(∂loss/∂log π) / A at each ratio, for completions of one token of old probability 0.1."""
    old_logprob_N1 = torch.full((len(ratio_N), 1), math.log(OLD_PROBABILITY), dtype=torch.float64)
    logprob_N1 = (old_logprob_N1 + ratio_N.double().log()[:, None]).requires_grad_()
    x = ObjectiveInput(
        logprob_BT=logprob_N1,
        old_logprob_BT=old_logprob_N1,
        log_ratio_BT=logprob_N1 - old_logprob_N1,
        advantage_BT=torch.full_like(old_logprob_N1, advantage),
        mask_BT=torch.ones_like(old_logprob_N1, dtype=torch.bool),
    )
    (gradient_N1,) = torch.autograd.grad(objective(x).sum(), logprob_N1)
    return -gradient_N1.squeeze(-1) / advantage


def table() -> str:
    """w(r, A) at some ratios as a Markdown table."""
    lines = ["| objective | A | " + " | ".join(f"r = {r:g}" for r in SHOWN) + " |", "|---|---|" + "---:|" * len(SHOWN)]
    for name, objective in variants().items():
        for sign, advantage in (("+", 1.0), ("−", -1.0)):
            values = weight(objective, torch.tensor(SHOWN), advantage).tolist()
            cells = " | ".join(f"{value + 0.0:.3f}".replace("-", "−") for value in values)
            lines.append(f"| {f'`{name}`' if sign == '+' else ''} | {sign} | {cells} |")
    return "\n".join(lines)


def draw_weights(path: Path) -> None:
    """One panel for each objective: w over r for A > 0 and A < 0, noclip's w = r dotted behind."""
    shown = variants()
    columns = 4
    lines = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(3.1 * columns, 2.45 * lines + 0.7), layout="constrained")
    ratio_N = torch.logspace(-math.log2(REACH), math.log2(REACH), 1201, base=2, dtype=torch.float64)
    grid = figure.subplots(lines, columns, squeeze=False).flat
    for axes, (name, objective) in zip(grid, shown.items(), strict=False):
        _style(axes, name)
        axes.set_xscale("log", base=2)
        axes.set_xlim(1 / REACH, REACH)
        axes.set_xticks([1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8], ["⅛", "¼", "½", "1", "2", "4", "8"])
        axes.minorticks_off()
        axes.set_ylim(-1.2, 5.2)
        axes.set_yticks([-1, 0, 1, 2, 3, 4, 5])
        axes.axvline(1, color=GREY, lw=0.8)
        noclip = axes.plot(ratio_N, ratio_N, color=GREY, lw=1.0, ls=(0, (2, 2)))
        negative = axes.plot(ratio_N, weight(objective, ratio_N, -1.0), color=ORANGE, lw=4.0)
        positive = axes.plot(ratio_N, weight(objective, ratio_N, 1.0), color=BLUE, lw=1.4)
    title = "Gradient weight w(r, A): the factor on A ∇log π, over the importance ratio r (log scale)"
    _legend(figure, [*positive, *negative, *noclip], ["A > 0", "A < 0", "noclip: w = r"], title)
    _save(figure, path)


def draw_alpha(path: Path) -> None:
    """How far alpha moves a run from the same run at alpha 0, for linear and other smoothing, in the toy of ``toy``."""
    alphas = [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9]
    figure = Figure(figsize=(7.6, 4.4), layout="constrained")
    axes = figure.subplots()
    _style(axes, "")
    height = 10.0
    points = {name: [max(drift(arm, alpha), 1e-16) for alpha in alphas] for name, arm in ARMS.items()}
    for name, color in sorted(zip(points, COLORS, strict=True), key=lambda item: -points[item[0]][-1]):
        axes.plot(alphas, points[name], color=color, lw=1.8, marker="o", ms=3.5)
        height = min(points[name][-1], height / 8)  # names do not overlap
        axes.text(0.93, height, name, color=color, fontsize=8.5, va="center")
    axes.set_yscale("log")
    axes.set_ylim(1e-16, 3)
    axes.set_xlim(0, 1.42)
    axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8])
    axes.set_xlabel("alpha", fontsize=9, color=INK)
    axes.set_title(
        "Distance of the final parameters from the run at alpha = 0,\nas a share of the way that run went (log scale)",
        loc="left",
        fontsize=10,
        color=INK,
        fontweight="bold",
    )
    _save(figure, path)


def _style(axes: Axes, name: str) -> None:
    axes.set_title(name, loc="left", fontsize=10, color=INK, fontweight="bold")
    axes.tick_params(length=0, labelsize=8, labelcolor=INK)
    axes.grid(color=RULE, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def _legend(figure: Figure, lines: Sequence[Artist], labels: Sequence[str], title: str) -> None:
    figure.legend(
        lines, labels, loc="outside upper left", ncols=3, frameon=False, fontsize=10, title=title, alignment="left"
    )


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure).print_figure(path, format="png", dpi=110, metadata={"Software": None})
