"""The tables of a comparison as texts, for the terminal, for LaTeX and for the page."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from pspo.compare.comparison import Comparison, points


def interval(row: dict[str, Any], name: str = "") -> str:
    """``[78.1, 84.3]``, per cent, of an arm's ``<name>_low`` and ``<name>_high``."""
    low, high = (f"{name}_{end}".removeprefix("_") for end in ("low", "high"))
    return "" if pd.isna(row.get(low)) else f"[{100 * row[low]:.1f}, {100 * row[high]:.1f}]"


def arms_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The arms of one selection as texts, per cent."""
    records = rows.to_dict("records")
    columns = {
        "arm": [row["arm"] for row in records],
        "seeds": [str(row["seeds"]) for row in records],
        "mean": [f"{100 * row['mean']:.1f}" for row in records],
        "95 %": [interval(row) for row in records],
        "bootstrap": [interval(row, "bootstrap") for row in records],
        "IQM": ["" if pd.isna(row.get("iqm")) else f"{100 * row['iqm']:.1f}" for row in records],
    }
    return pd.DataFrame(columns)


def differences_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The differences of one selection as texts, percentage points."""
    records = rows.to_dict("records")
    columns = {
        "arm": [row["arm"] for row in records],
        "points": [points(row["difference"]) for row in records],
        "95 %": [f"[{points(row['low'])}, {points(row['high'])}]" for row in records],
        "bootstrap": [f"[{points(row['bootstrap_low'])}, {points(row['bootstrap_high'])}]" for row in records],
        "p": [f"{row['p']:.3f}" for row in records],
        "Holm": [f"{row['p_holm']:.3f}" for row in records],
        "sees": [f"±{100 * row['detectable']:.1f}" for row in records],
    }
    return pd.DataFrame(columns)


def passes_table(rows: pd.DataFrame) -> pd.DataFrame:
    """pass@k of one selection as texts, per cent, a column for each k."""
    cells = rows.assign(text=[f"{100 * row['pass_at_k']:.1f} {interval(row)}" for row in rows.to_dict("records")])
    wide = cells.pivot(index="arm", columns="k", values="text").reindex(rows["arm"].unique()).fillna("")
    return wide.rename(columns=lambda k: f"pass@{k}").reset_index()


TABLES = {
    "arms": ("%", arms_table),
    "differences": ("points", differences_table),
    "pass_at_k": ("%, with bootstrap over problems and seeds", passes_table),
}
"""By name of a comparison's frame: the unit of its numbers, and the function that makes its texts."""


def tables(comparison: Comparison) -> Iterator[tuple[str, pd.DataFrame, pd.DataFrame]]:
    """The title, the texts and the rows of every table, selection by selection."""
    for selection in comparison.arms["selection"].unique():
        for name, (unit, text_of) in TABLES.items():
            rows: pd.DataFrame = getattr(comparison, name)
            if len(rows) and len(chosen := rows[rows["selection"] == selection]):
                subject = f"minus {comparison.against}" if name == "differences" else name.replace("_at_", "@")
                yield f"{selection}: {subject}, {unit}", text_of(chosen), chosen
