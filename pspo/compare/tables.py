"""The tables of a comparison as text, for the terminal and the page, and with all digits, for programs."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import quote

import pandas as pd

from pspo.compare.comparison import Comparison

COLUMNS = {
    "arms": {"arm": "{arm}", "seeds": "{seeds}", "mean": "{mean:.1f}", "95 %": "[{low:.1f}, {high:.1f}]",
             "bootstrap": "[{bootstrap_low:.1f}, {bootstrap_high:.1f}]", "IQM": "{iqm:.1f}"},
    "differences": {"arm": "{arm}", "points": "{difference:+.1f}", "95 %": "[{low:+.1f}, {high:+.1f}]",
                    "bootstrap": "[{bootstrap_low:+.1f}, {bootstrap_high:+.1f}]", "p": "{p:.3f}",
                    "Holm": "{p_holm:.3f}", "sees": "±{detectable:.1f}", "verdict": "{verdict}"},
    "pass_at_k": {"arm": "{arm}", "k": "{k}", "pass@k": "{pass_at_k:.1f}", "bootstrap": "[{low:.1f}, {high:.1f}]"},
}  # fmt: skip
"""The columns of each table, and how a row of a comparison's frame, shares in per cent, is written in them."""
SHARES = ["mean", "low", "high", "bootstrap_low", "bootstrap_high", "iqm", "difference", "detectable", "pass_at_k"]


@dataclass(frozen=True)
class Table:
    """A table: ``shown`` has it as text, for people, ``numbers`` with all digits, for programs."""

    title: str
    shown: pd.DataFrame
    numbers: pd.DataFrame

    @property
    def files(self) -> dict[str, str]:
        """The numbers as CSV and the text as LaTeX with booktabs: name of each file -> an address that holds it."""
        name, latex = re.sub(r"[^\w.@]+", "_", self.title).strip("_"), self.shown.to_latex(index=False, escape=True)
        csv = "data:text/csv;charset=utf-8," + quote(self.numbers.to_csv(index=False))
        return {f"{name}.csv": csv, f"{name}.tex": "data:text/x-tex;charset=utf-8," + quote(latex)}


def tables(comparison: Comparison) -> Iterator[Table]:
    """Every table, selection by selection."""
    units = {"arms": "arms, %", "differences": f"minus {comparison.against}, points", "pass_at_k": "pass@k, %"}
    for selection in comparison.arms["selection"].unique():
        for name, columns in COLUMNS.items():
            frame: pd.DataFrame = getattr(comparison, name)
            if len(rows := frame[frame["selection"] == selection]):
                percent = rows.reindex(columns=rows.columns.union(SHARES))
                percent[SHARES] *= 100
                cells = [[text.format(**row) for text in columns.values()] for row in percent.to_dict("records")]
                texts = pd.DataFrame(cells, columns=list(columns)).replace(
                    {r"^\[?[+-]?nan(, [+-]?nan\])?$": "", r"^0\.000$": "<.001"}, regex=True
                )
                yield Table(f"{selection}: {units[name]}", texts.loc[:, (texts != "").any()], rows)
