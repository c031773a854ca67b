"""The tables of a comparison as texts, for the terminal, for LaTeX and for the page."""

from collections.abc import Iterator

import pandas as pd

from pspo.compare.comparison import Comparison

COLUMNS = {
    "arms": {"arm": "{arm}", "seeds": "{seeds}", "mean": "{mean:.1f}", "95 %": "[{low:.1f}, {high:.1f}]",
             "bootstrap": "[{bootstrap_low:.1f}, {bootstrap_high:.1f}]", "IQM": "{iqm:.1f}"},
    "differences": {"arm": "{arm}", "points": "{difference:+.1f}", "95 %": "[{low:+.1f}, {high:+.1f}]",
                    "bootstrap": "[{bootstrap_low:+.1f}, {bootstrap_high:+.1f}]", "p": "{p:.3f}",
                    "Holm": "{p_holm:.3f}", "sees": "±{detectable:.1f}"},
    "pass_at_k": {"arm": "{arm}", "k": "{k}", "pass@k": "{pass_at_k:.1f}", "bootstrap": "[{low:.1f}, {high:.1f}]"},
}  # fmt: skip
"""The columns of each table, and how a row of a comparison's frame, shares in per cent, is written in them."""
SHARES = ("mean", "low", "high", "bootstrap_low", "bootstrap_high", "iqm", "difference", "detectable", "pass_at_k")


def tables(comparison: Comparison) -> Iterator[tuple[str, pd.DataFrame, pd.DataFrame]]:
    """The title, the texts and the rows of every table, selection by selection."""
    units = {"arms": "arms, %", "differences": f"minus {comparison.against}, points", "pass_at_k": "pass@k, %"}
    for selection in comparison.arms["selection"].unique():
        for name, columns in COLUMNS.items():
            frame: pd.DataFrame = getattr(comparison, name)
            if len(frame) and len(rows := frame[frame["selection"] == selection]):
                shares = rows.reindex(columns=SHARES) * 100
                records = rows.drop(columns=[*SHARES], errors="ignore").join(shares).to_dict("records")
                cells = [[text.format(**row) for text in columns.values()] for row in records]
                texts = pd.DataFrame(cells, columns=list(columns)).replace(
                    {r"^\[?[+-]?nan(, [+-]?nan\])?$": "", r"^0\.000$": "<.001"}, regex=True
                )
                yield f"{selection}: {units[name]}", texts.loc[:, (texts != "").any()], rows
