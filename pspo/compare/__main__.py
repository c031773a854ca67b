"""Which arm of a comparison is better, and how sure one may be of it, from run directories.

python -m pspo.compare outputs/<group> [--by objective.alpha] [--against noclip] [--published] [--help]
"""

import argparse
import glob
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.text import Text

from pspo.base.command import answering, expanded
from pspo.base.schema import ConfigError
from pspo.compare.arms import group
from pspo.compare.comparison import Comparison, choose, compare, tables
from pspo.compare.page import write_page
from pspo.compare.published import sentences
from pspo.report.page import plain
from pspo.results import load


def show(console: Console, comparison: Comparison) -> None:
    """Print what to know first, then every table, with the verdicts below the differences."""
    for title, lines in (("Left out", comparison.group.left_out), ("Know first", comparison.group.warnings)):
        if lines:
            console.print(Text.assemble((title, "bold yellow"), *(f"\n- {line}" for line in lines)))
    for table in tables(comparison):
        shown = table.shown.drop(columns="verdict", errors="ignore")
        console.print(plain(f"\n{table.title}", list(shown), shown.itertuples(index=False)))
        for row in table.numbers.to_dict("records") if "verdict" in table.shown else []:
            chance = "" if pd.isna(row.get("improvement")) else f"; probability of improvement {row['improvement']:.2f}"
            console.print(Text.assemble((f"{row['arm']}: ", "bold"), row["verdict"] + chance))
    console.print(Text("".join(f"\n- {note}" for note in comparison.notes)))


def main() -> None:
    """``python -m pspo.compare``."""
    parser = argparse.ArgumentParser(prog="python -m pspo.compare", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("paths", nargs="+", help="outputs/<group>, or run directories, or quoted globs of them")
    parser.add_argument("--by", action="append", default=[], help="key that sets arms apart; default: all that differ")
    parser.add_argument("--against", help="reference arm; default: noclip where there is one, else the first arm")
    parser.add_argument("--set", action="append", default=[], help="test set; default: all")
    parser.add_argument("--evaluation", action="append", default=[], help="evaluate.name of answers; default: greedy")
    parser.add_argument("--temperature", action="append", default=[], type=float, help="default: the lowest")
    parser.add_argument("--when", action="append", default=[], help="before, after or step_<number>; default: after")
    parser.add_argument(
        "--score", default="correct", choices=["correct", "strict"], help="strict: in the prompt's format"
    )
    parser.add_argument(
        "--page", type=expanded, metavar="FILE", help="default: comparison.html in the first run's group"
    )
    parser.add_argument("--published", action="store_true", help="published numbers beside ours, and the table's cost")
    parser.add_argument("--step-s", type=float, help="seconds a step for the cost; default: measured by these runs")
    arguments = parser.parse_args()
    with answering(ConfigError, OSError):
        patterns = [str(expanded(pattern)) for pattern in arguments.paths]
        paths = [path for pattern in patterns for path in sorted(glob.glob(pattern)) or [pattern]]
        compared = group(load(paths, texts=False), arguments.by)
        comparison = compare(compared, choose(compared, vars(arguments), arguments.score), arguments.against)
        console = Console()
        show(console, comparison)
        for sentence in sentences(comparison, arguments.step_s) if arguments.published else ():
            console.print(Text(sentence))
        path = arguments.page or Path(compared.runs.index[0]).parent / "comparison.html"
        console.print(Text(f"wrote {write_page(comparison, path)}"))


if __name__ == "__main__":
    main()
