"""Test accuracy before and after training and the difference, each with its 95 % interval."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text


def difference(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[float, float, float]:
    """Accuracy after − before with a 95 % interval: Newcombe's score interval (1998, Stat. Med. 17:873, method 10).

    d − √((p₂−l₂)² + (u₁−p₁)²), d + √((u₂−p₂)² + (p₁−l₁)²), with Wilson limits l, u. It assumes independent samples
    and so is conservative where the same problems were answered twice.
    """
    d = after["accuracy"] - before["accuracy"]
    down = math.hypot(after["accuracy"] - after["ci95_low"], before["ci95_high"] - before["accuracy"])
    up = math.hypot(after["ci95_high"] - after["accuracy"], before["accuracy"] - before["ci95_low"])
    return d, d - down, d + up


def percent(result: Mapping[str, float]) -> str:
    """``42.0 % [38.1, 46.0]``."""
    low, high = 100 * result["ci95_low"], 100 * result["ci95_high"]
    return f"{100 * result['accuracy']:.1f} % [{low:.1f}, {high:.1f}]"


def points(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """``+21.9 [16.2, 27.4]``, percentage points."""
    d, low, high = (100 * value for value in difference(before, after))
    return f"{d:+.1f} [{low:+.1f}, {high:+.1f}]"


def final_table(summary: Mapping[str, Any]) -> Group:
    """The table that a run prints at its end: accuracy per test set, before and after training where it has trained."""
    results = summary.get("evaluation", {})
    is_trained = any("before" in result for result in results.values())
    accuracies = ("before [95 %]", "after [95 %]", "points [95 %]") if is_trained else ("accuracy [95 %]",)
    rows = []
    for name, result in results.items():
        change = [points(result["before"], result["after"])] if "before" in result else []
        rows.append([name, f"{result['after']['n']:,}", *map(percent, result.values()), *change])
    title = f"{objective(summary)}, seed {summary['seed']}, {summary['steps']} steps"
    return plain(title, ("test set", "n", *accuracies), rows)


def plain(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Group:
    """A table without lines, the first column at the left, under a title that may be wider than the table."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for place, name in enumerate(columns):
        table.add_column(Text(name), justify="right" if place else "left", no_wrap=bool(place), overflow="fold")
    for cells in rows:
        table.add_row(*map(Text, cells))
    return Group(Text(title, style="bold"), table)


def objective(summary: Mapping[str, Any]) -> str:
    """The objective's name with its settings: ``pspo (alpha 0.1)``."""
    settings = ", ".join(f"{key} {value}" for key, value in summary["objective"].items() if key != "name")
    return str(summary["objective"]["name"]) + (f" ({settings})" if settings else "")
