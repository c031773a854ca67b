"""The state of every run of a group in one table, from the run directories, and from SLURM where it exists.

python -m pspo.status outputs/<group> [--watch] [--json] [--cancel] [--retry-failed]
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.console import Group as Renderables
from rich.live import Live
from rich.padding import Padding
from rich.text import Text

from pspo.base.command import answering
from pspo.base.console import duration
from pspo.base.schema import ConfigError, build
from pspo.host import slurm
from pspo.status.state import RETRIED, STATES, Group, Row, collect

WATCH_S = 5.0
"""Seconds between two refreshes of the table."""

INDENT = (0, 0, 0, 4)


def table(group: Group, width: int) -> RenderableType:
    """The table for a person: each run's name and numbers, in one line where ``width`` columns allow it, then notes."""
    states = [row.state for row in group.rows]
    counts = [f"{len(states)} run{'s' * (len(states) != 1)}"]
    counts += [f"{states.count(state)} {state}" for state in STATES if state in states]
    columns = [column for column in zip(*map(_numbers, group.rows), strict=True) if any(column)]
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    lines = ["  ".join(cells).rstrip() for cells in zip(*padded, strict=True)]
    names = _names(group.rows)
    column = max(map(len, names), default=0) + 2
    in_one = column + max(map(len, lines), default=0) <= width
    parts: list[RenderableType] = [Text(f"{group.directory}: {', '.join(counts)}")]
    for row, name, line in zip(group.rows, names, lines, strict=True):
        state = Text.assemble((row.state, STATES[row.state]), line.removeprefix(row.state))
        parts += [Text(name.ljust(column)) + state] if in_one else [Text(name), Padding(state, INDENT, expand=False)]
        if notes := _notes(row):
            parts.append(Padding(Text(notes), INDENT, expand=False))
    return Renderables(*parts)


def _numbers(row: Row) -> list[str]:
    return [
        row.state,
        "" if row.budget is None else f"{row.done or 0:.0f}/{row.budget:.0f} {row.unit}",
        "" if row.reward is None else f"reward {row.reward:.3f}",
        ", ".join(f"{100 * share:.1f} % {name}" for name, share in row.accuracy.items()),
        f"job {row.job_id}" if row.job_id else "",
    ]


def _notes(row: Row) -> str:
    """A run's phase with the time that is left, its restarts, and the last line of why it ended or waits."""
    left = "" if row.eta_s is None else f", {duration(row.eta_s)} left"
    restarts = f"{row.restarts} restart{'s' * (row.restarts != 1)}" if row.restarts else ""
    return "; ".join(filter(None, [row.phase + left, restarts, row.why.rpartition("\n")[2]]))


def _names(rows: list[Row]) -> list[str]:
    """The overrides that not all runs share and the end of the directory's name; that whole name without overrides."""
    shared = set.intersection(*(set(row.overrides) for row in rows)) if rows else set()
    names = []
    for row in rows:
        words = " ".join(_short(override, row.run) for override in row.overrides if override not in shared)
        names.append(f"{words} …{row.run[-8:]}" if words else row.run)
    return names


def _short(override: str, run: str) -> str:
    """``lr=1e-5`` for ``optimizer.lr=1e-5``, where the directory's name says ``lr`` too."""
    name, _, value = override.partition("=")
    parts = name.split(".")
    ends = (".".join(parts[at:]) for at in reversed(range(len(parts))))
    return next((f"{end}={value}" for end in ends if f"_{end}=" in run), override)


def cancel(group: Group) -> None:
    """Cancel every running or waiting job of the group."""
    alive = {job_id: job for job_id, job in sorted(group.jobs.items()) if job.alive}
    for row in group.rows:
        if row.state == "running" and row.job_id not in alive:
            sys.stderr.write(f"pspo: {row.run} runs outside SLURM; stop its process\n")
    if not alive:
        sys.stderr.write("pspo: no job of this group runs or waits in SLURM; nothing to cancel\n")
        return
    for job_id, job in alive.items():
        print(f"cancel {job_id} ({job.state.lower()})")  # noqa: T201
    if complaint := slurm.cancel(list(alive)):
        raise ConfigError(f"scancel says: {complaint}; ask the cluster's administrators, or cancel these jobs yourself")


def retry(group: Group) -> None:
    """Submit the failed runs again, each by the launcher and with the settings of its newest submission."""
    from pspo.launcher import make_plan  # imports torch, which a look at the table does without
    from pspo.launcher.local import Local
    from pspo.launcher.slurm import Slurm

    failed: dict[Path, list[list[str]]] = {}
    for row in group.rows:
        if row.state in RETRIED and (task := group.task(row.run)):
            failed.setdefault(task.record, []).append(task.overrides)
        elif row.state in RETRIED:
            sys.stderr.write(
                f"pspo: {row.run} was not submitted by a launcher; the command that started it resumes it\n"
            )
    if not failed:
        sys.stderr.write("pspo: no submitted run of this group has failed; nothing to retry\n")
    for path, jobs in failed.items():
        record, planned = json.loads(path.read_text()), make_plan(jobs)
        kind: Any = {"slurm": Slurm, "local": Local}[record["cluster"]]
        if {run.directory.parent.resolve() for run in planned} != {group.directory.resolve()}:
            raise ConfigError(
                f"these runs were submitted from another directory; go there, and retry {group.directory}"
            )
        build(kind, record["launcher"] | {"retry_failed": True, "dry_run": False}).launch(planned)


def main() -> None:
    """``python -m pspo.status``."""
    parser = argparse.ArgumentParser(prog="python -m pspo.status", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("group", type=Path, help="outputs/<group>")
    parser.add_argument("--watch", action="store_true", help="refresh until no run is running or waiting")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--cancel", action="store_true", help="scancel the group's running and waiting jobs")
    parser.add_argument("--retry-failed", action="store_true", help=f"submit again what is {', '.join(RETRIED)}")
    arguments = parser.parse_args()
    with answering(ConfigError):
        group = collect(arguments.group)
        for chosen, act in ((arguments.cancel, cancel), (arguments.retry_failed, retry)):
            if chosen:
                act(group)
                group = collect(arguments.group)
        console = Console()
        if arguments.json:
            sys.stdout.write(json.dumps([asdict(row) for row in group.rows], indent=2) + "\n")
        elif not arguments.watch:
            console.print(table(group, console.width), highlight=False)
        else:
            with Live(table(group, console.width), console=console, auto_refresh=False) as live:
                while group.unfinished:
                    time.sleep(WATCH_S)
                    group = collect(arguments.group)
                    live.update(table(group, console.width), refresh=True)


if __name__ == "__main__":
    main()
