"""A sweep's arms beside each other: ``python -m benchmarks.compare outputs/<group> [baseline]``.

Reads the runs that are DONE: greedy test accuracy after training over seeds, the difference to the baseline objective
at the same learning rate and updates per rollout, paired over seeds (t interval), and what the diagnostics saw.
"""

import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from scipy import stats

SEEN = ("kl/after_k3", "ratio/ess", "weight/zero_rate", "weight/mass_kept", "policy/ratio_max")


def read(directory: Path) -> dict[str, Any]:
    """One run: its arm, its seed, its accuracy and the diagnostics, means over steps (medians of the largest ratio)."""
    config = yaml.safe_load((directory / "config.yaml").read_text())
    summary = json.loads((directory / "summary.json").read_text())
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    (test,) = summary["evaluation"].values()
    seen = {}
    for name in SEEN:
        values = [row[name] for row in rows if row.get(name) is not None]
        middle = statistics.median if name.endswith("_max") else statistics.mean
        seen[name] = middle(values) if values else math.nan
    return {
        "objective": config["objective"]["name"],
        "updates": config["update"]["num_epochs"] * config["update"]["num_minibatches"],
        "lr": config["optimizer"]["lr"],
        "seed": config["seed"],
        "before": 100 * test["before"]["accuracy"],
        "after": 100 * test["after"]["accuracy"],
        **seen,
    }


def interval(values: Sequence[float]) -> str:
    """Mean [95 % interval by t]."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.1f}"
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.1f} [{mean - half:.1f}, {mean + half:.1f}]"


def main() -> None:
    """Print one Markdown table."""
    baseline = sys.argv[2] if len(sys.argv) > 2 else "noclip"
    arms: dict[tuple[float, int, str], dict[int, dict[str, Any]]] = defaultdict(dict)
    for done in Path(sys.argv[1]).glob("*/DONE"):
        run = read(done.parent)
        arms[run["lr"], run["updates"], run["objective"]][run["seed"]] = run
    heads = ["lr", "updates", "objective", "seeds", "accuracy, %", f"less {baseline}, points", *SEEN]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for (lr, updates, objective), runs in sorted(arms.items(), key=lambda item: (item[0][0], item[0][1])):
        others = arms.get((lr, updates, baseline), {})
        paired = [runs[seed]["after"] - others[seed]["after"] for seed in sorted(runs.keys() & others.keys())]
        cells = [f"{lr:g}", updates, objective, len(runs), interval([run["after"] for run in runs.values()])]
        cells.append("–" if objective == baseline or not paired else interval(paired))
        cells += [f"{statistics.mean(run[name] for run in runs.values()):.3g}" for name in SEEN]
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
