"""Draw ``second_study.png``: ``python docs/second_study.py outputs/hard/*``, the run directories of sweeps/hard.yaml.

Each objective at three settings of its own knob, from sharp to wide, with the intervals of ``pspo.compare``.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from pspo.base.figure import BLUE, GREEN, GREY, ORANGE, styled, write_png
from pspo.compare.arms import group
from pspo.compare.comparison import choose, compare
from pspo.results import load

KINDS = {  # by objective: what its weight does outside the trust region, and the sign of its knob
    "pspo_proportional": ("pulls back", "δ"),
    "cfpo": ("pulls back", "ε"),
    "clip": ("masks", "ε"),
    "pspo_clip": ("masks", "ε"),
    "dppo": ("masks", "δ"),
    "sapo": ("fades", "τ"),
    "pspo_geometric": ("fades", "α"),
    "pspo": ("rescales", "α"),
}
COLOR_OF = {"pulls back": BLUE, "masks": ORANGE, "fades": GREEN, "rescales": GREY}
SHARPEST_IS_LARGE = ("sapo", "pspo_geometric", "pspo")


@styled
def draw(paths: Sequence[str], file: Path) -> None:
    """Greedy test accuracy in per cent, mean over seeds with its 95 % interval, of every arm."""
    runs = group(load(paths, texts=False))
    comparison = compare(runs, choose(runs, {}), "noclip")
    numbers = comparison.arms.set_index("arm")
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title("Greedy test accuracy at 16 updates per rollout, lr 2e-4, %", pad=22)
    noclip = 100 * numbers.loc["noclip"]
    axes.axhspan(noclip.low, noclip.high, color="#E5E7EB", lw=0)
    axes.axhline(noclip["mean"], color=GREY, lw=1)
    axes.text(-0.6, noclip["mean"] + 1, "noclip", color=GREY, fontsize=8)
    place, named = 0.0, set[str]()
    for objective, (kind, sign) in KINDS.items():
        labels = [label for label in numbers.index if label.split()[0] == objective]
        knob_of = {label: float(label.split()[1].partition("=")[2]) for label in labels}
        labels.sort(key=lambda label: knob_of[label], reverse=objective in SHARPEST_IS_LARGE)
        places = [place + n for n in range(len(labels))]
        mean, low, high = (100 * numbers.loc[labels, name] for name in ("mean", "low", "high"))
        color = COLOR_OF[kind]
        axes.errorbar(places, mean, yerr=[mean - low, high - mean], fmt="o-", color=color, lw=0.8, elinewidth=1.6)
        for x, label in zip(places, labels, strict=True):
            axes.text(x, -1.5, f"{knob_of[label]:g}", color=GREY, fontsize=8, ha="center", va="top")
        middle = sum(places) / len(places)
        axes.text(middle, -7.5, f"{objective}\n{sign}", color=color, fontsize=8, ha="center", va="top", linespacing=1.3)
        if kind not in named:
            axes.text(places[0], 101, kind, color=color, fontsize=8.5, fontweight="bold", va="bottom")
            named.add(kind)
        place = places[-1] + 2
    axes.set_xlim(-0.7, place - 1.3)
    axes.set_ylim(0, 100)
    axes.set_xticks([])
    axes.text(-0.5, -19.5, "each objective's own knob, from sharp to wide", color=GREY, fontsize=8, va="top")
    write_png(figure, file, dpi=160)


if __name__ == "__main__":
    draw(sys.argv[1:], Path(__file__).with_name("second_study.png"))
