"""Which arm of a comparison is better, and how sure one may be of it, from run directories.

python -m pspo.compare outputs/<group> [--by objective.alpha] [--against noclip] [--csv FILE] [--published] [--help]
"""

import argparse
import glob
import re
from pathlib import Path
from typing import Literal

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pspo.base.command import answering
from pspo.base.schema import ConfigError
from pspo.compare.arms import group
from pspo.compare.comparison import Comparison, choose, compare
from pspo.compare.page import write_page
from pspo.compare.published import PAPER_SEEDS, beside, cost
from pspo.compare.tables import COLUMNS, tables
from pspo.results import load


def show(console: Console, comparison: Comparison) -> None:
    """Print what to know first, then every table, with the verdicts below the differences."""
    for title, sentences in (("Left out", comparison.group.left_out), ("Know first", comparison.group.warnings)):
        for place, sentence in enumerate(sentences):
            lead = "" if place else f"{title}\n"
            console.print(Text.assemble((lead, "bold yellow"), f"- {sentence}"))
    for title, texts, rows in tables(comparison):
        table = Table(title=Text(f"\n{title}", style="bold"), title_justify="left", box=None, padding=(0, 2, 0, 0))
        for place, name in enumerate(texts.columns):
            justify: Literal["left", "right"] = "right" if place else "left"
            table.add_column(Text(str(name)), justify=justify, no_wrap=bool(place), overflow="fold")
        for cells in texts.itertuples(index=False):
            table.add_row(*(Text(str(cell)) for cell in cells))
        console.print(table)
        for row in rows.to_dict("records") if "verdict" in rows else []:
            chance = "" if pd.isna(row.get("improvement")) else f"; probability of improvement {row['improvement']:.2f}"
            console.print(Text.assemble((f"{row['arm']}: ", "bold"), row["verdict"] + chance))
    for place, note in enumerate(comparison.notes):
        console.print(Text(("" if place else "\n") + f"- {note}"))


def show_published(console: Console, comparison: Comparison, step_s: float | None) -> None:
    """Print each published number with the arms that it may be held to, and the cost of the published table."""
    console.print(Text("\nPublished, and ours", style="bold"))
    for row in beside(comparison).to_dict("records"):
        head = f"{row['model']} {row['published_arm']}, {row['set']}: "
        text = "published {published} % ({source}); ".format(**row)
        if row["arm"] is None:
            text += "no arm here"
        else:
            text += f"ours {100 * row['mean']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}], "
            text += "{arm}, {selection}, seeds: {seeds}; differs in {differs}".format(**row)
        console.print(Text.assemble((head, "bold"), text))
    costs = cost(comparison.group, step_s)
    console.print(Text(f"\nTraining the published table, {PAPER_SEEDS} seeds, evaluation aside", style="bold"))
    for row in costs.dropna().to_dict("records"):
        console.print(Text("{experiment}: {steps} steps of {step_s:.2f} s, {gpu_hours:.1f} GPU-hours".format(**row)))
    if missing := costs.loc[costs["step_s"].isna(), "experiment"].to_list():
        console.print(Text(f"no run here has measured a step of {', '.join(missing)}; give --step-s"))
    console.print(Text(f"together {costs['gpu_hours'].sum():.0f} GPU-hours", style="bold"))


def write_csv(path: Path, comparison: Comparison) -> None:
    """All numbers in one table, whose column ``table`` says arms, differences or pass_at_k."""
    frames = [getattr(comparison, name).assign(table=name) for name in COLUMNS]
    pd.concat([frame for frame in frames if len(frame)]).to_csv(path, index=False)


def write_latex(path: Path, comparison: Comparison) -> None:
    """The tables as printed, each a ``table`` with ``booktabs`` rules and a caption."""
    text = [texts.to_latex(index=False, escape=True, caption=_escape(title)) for title, texts, _ in tables(comparison)]
    path.write_text("\n".join(text), encoding="utf-8")


def _escape(text: str) -> str:
    return re.sub(r"([%_&#$])", r"\\\1", text)


def main() -> None:
    """``python -m pspo.compare``."""
    parser = argparse.ArgumentParser(prog="python -m pspo.compare", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("paths", nargs="+", help="outputs/<group>, or run directories, or quoted globs of them")
    parser.add_argument("--by", action="append", default=[], help="key that sets arms apart; default: all that differ")
    parser.add_argument("--against", help="reference arm; default: noclip where there is one, else the first arm")
    parser.add_argument("--set", action="append", default=[], dest="sets", help="test set; default: all")
    parser.add_argument("--evaluation", help="settings of the answers; default: greedy where there are such answers")
    parser.add_argument("--temperature", action="append", default=[], type=float, help="default: the lowest")
    parser.add_argument("--when", default="after", help="before, after or step_<number>; default: after")
    parser.add_argument("--score", default="correct", choices=["correct", "strict"], help="strict: in the asked format")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all numbers as CSV")
    parser.add_argument("--latex", type=Path, metavar="FILE", help="write the tables as LaTeX")
    parser.add_argument("--page", type=Path, metavar="FILE", help="default: comparison.html in the first run's group")
    parser.add_argument("--published", action="store_true", help="published numbers beside ours, and the table's cost")
    parser.add_argument("--step-s", type=float, help="seconds a step for the cost; default: measured by these runs")
    arguments = parser.parse_args()
    with answering(ConfigError, OSError):
        paths = [path for given in arguments.paths for path in sorted(glob.glob(given)) or [given]]
        runs = group(load(paths, texts=False), arguments.by)
        chosen = choose(
            runs, arguments.sets, arguments.evaluation, arguments.temperature, arguments.when, arguments.score
        )
        comparison = compare(runs, chosen, arguments.against)
        console = Console()
        show(console, comparison)
        if arguments.published:
            show_published(console, comparison, arguments.step_s)
        for path, write in ((arguments.csv, write_csv), (arguments.latex, write_latex)):
            if path is not None:
                write(path, comparison)
                console.print(Text(f"wrote {path}"))
        path = arguments.page or Path(next(iter(runs.arm_of))).parent / "comparison.html"
        console.print(Text(f"wrote {write_page(runs, comparison, path)}"))


if __name__ == "__main__":
    main()
