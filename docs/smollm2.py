"""Draw ``smollm2.png`` and print its table: ``python docs/smollm2.py <supervised run> outputs/smollm2/*``.

The runs of experiment=smollm2: accuracy while they train and, paired over all test problems, what training by GRPO
added to the supervised start: of each seed (the problems are random) and of all together (seeds and problems are).
Intervals are 95 %.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from pspo.base.figure import BLUE, GREY, ORANGE, styled, write_png
from pspo.compare.statistics import Floats, estimate

KINDS = {"greedy": ("t0", "validation/greedy_accuracy", BLUE), "sampled": ("t1", "validation/sampled_accuracy", ORANGE)}
FOLDER = "evaluation/after/greedy_and_sampled/asdiv_split_{}.jsonl"


def answers(run: Path, temperature: str) -> pd.DataFrame:
    """The answers to the test problems at one temperature."""
    return pd.DataFrame(map(json.loads, (run / FOLDER.format(temperature)).read_text().splitlines()))


def rises(start: Path, runs: Sequence[Path], temperature: str) -> Floats:
    """Accuracy after training minus at the start, seeds × problems."""
    before, *after = (answers(run, temperature).groupby("problem").correct.mean() for run in (start, *runs))
    return np.stack([(one - before).to_numpy(dtype=float) for one in after])


def table(start: Path, runs: Sequence[Path]) -> str:
    """Markdown: accuracy at the start and after training, the difference, and how many answers were cut off."""
    lines = [
        "| answers | seed | start, % | after, % | rise, points [95 %] | cut off, % | tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, (temperature, *_) in KINDS.items():
        first, rise_SP = answers(start, temperature), rises(start, runs, temperature)
        for number, run in enumerate([*runs, None]):
            found = estimate(rise_SP if run is None else rise_SP[number : number + 1])
            last = pd.concat([answers(one, temperature) for one in ([run] if run else runs)])
            low, high = (100 * (found.mean + side * found.half_width) for side in (-1, 1))
            cells = [kind, "all" if run is None else str(number), f"{100 * first.correct.mean():.1f}"]
            cells += [
                f"{100 * last.correct.mean():.1f}",
                f"{100 * found.mean:+.1f} [{low:+.1f}, {high:+.1f}]",
            ]
            cells += [f"{100 * last.truncated.mean():.1f}", f"{last.tokens.mean():.1f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


@styled
def draw(start: Path, runs: Sequence[Path], file: Path) -> None:
    """Left: accuracy on 64 held-out training problems by step, each seed. Right: test accuracy, start and after."""
    figure = Figure(figsize=(9.0, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    for kind, (temperature, metric, color) in KINDS.items():
        for number, run in enumerate(runs):
            rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            points = [(row["step"], 100 * row[metric]) for row in rows if metric in row]
            left.plot(
                *zip(*points, strict=True), color=color, lw=1, marker="o", ms=3, label=kind if number == 0 else None
            )
        before = 100 * answers(start, temperature).groupby("problem").correct.mean()
        rise_SP = 100 * rises(start, runs, temperature)
        for number, found in enumerate([*(estimate(row[None]) for row in rise_SP), estimate(rise_SP)]):
            place = number + (0.12 if kind == "sampled" else -0.12)
            right.errorbar(place, found.mean, yerr=found.half_width, fmt="o", color=color, elinewidth=1.6, ms=4)
        label = f"{kind}, from {before.mean():.1f} %"
        right.text(0.02, 0.95 if kind == "greedy" else 0.87, label, color=color, fontsize=8, transform=right.transAxes)
    left.set_title("64 validation problems, %")
    left.set_xlabel("step")
    left.legend(fontsize=8)
    right.set_title("696 test problems: points gained")
    right.axhline(0, color=GREY, lw=1)
    right.set_xticks(range(len(runs) + 1), [*(f"seed {n}" for n in range(len(runs))), "all"])
    write_png(figure, file, dpi=150)


if __name__ == "__main__":
    first, *others = map(Path, sys.argv[1:])
    sys.stdout.write(table(first, others) + "\n")
    draw(first, others, Path(__file__).with_name("smollm2.png"))
