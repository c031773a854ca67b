"""What became of a group's runs, in one table: from their directories, and from SLURM where it exists.

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
from rich.console import Group as Together
from rich.live import Live
from rich.padding import Padding
from rich.text import Text

from pspo.base.command import answering
from pspo.base.console import duration
from pspo.base.schema import ConfigError, build
from pspo.host import slurm
from pspo.status.state import RETRIED, STATES, Group, Row, collect

WATCH_S = 5.0
INDENT = (0, 0, 0, 4)


def table(group: Group, width: int) -> RenderableType:
    """The rows for a person: each run's name and numbers, in one line where ``width`` columns allow it, then notes."""
    states = [row.state for row in group.rows]
    counts = [f"{len(states)} run{'s' * (len(states) != 1)}"]
    counts += [f"{states.count(state)} {state}" for state in STATES if state in states]
    columns = [column for column in zip(*map(_numbers, group.rows), strict=True) if any(column)]
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    lines = ["  ".join(cells).rstrip() for cells in zip(*padded, strict=True)]
    names = _names(group.rows)
    column = max(map(len, names), default=0) + 2
    in_one = column + max(map(len, lines), default=0) <= width
    made: list[RenderableType] = [Text(f"{group.directory}: {', '.join(counts)}")]
    for row, name, line in zip(group.rows, names, lines, strict=True):
        state = Text.assemble((row.state, STATES[row.state]), line.removeprefix(row.state))
        made += [Text(name.ljust(column)) + state] if in_one else [Text(name), Padding(state, INDENT, expand=False)]
        if notes := _notes(row):
            made.append(Padding(Text(notes), INDENT, expand=False))
    return Together(*made)


def _numbers(row: Row) -> list[str]:
    return [
        row.state,
        "" if row.budget is None else f"{row.done or 0:.0f}/{row.budget:.0f} {row.unit}",
        "" if row.reward is None else f"reward {row.reward:.3f}",
        ", ".join(f"{100 * share:.1f} % {name}" for name, share in row.accuracy.items()),
        f"job {row.job_id}" if row.job_id else "",
    ]


def _notes(row: Row) -> str:
    """What a run does, with the time that is left; its restarts; and the last line of why it ended or waits."""
    left = "" if row.eta_s is None else f", {duration(row.eta_s)} left"
    restarts = f"{row.restarts} restart{'s' * (row.restarts != 1)}" if row.restarts else ""
    return "; ".join(filter(None, [row.phase + left, restarts, row.why and row.why.splitlines()[-1]]))


def _names(rows: list[Row]) -> list[str]:
    """What sets each run apart, and the end of its directory's name; all of that name where nothing does."""
    shared = set[str]().union(*(row.overrides for row in rows)).intersection(*(row.overrides for row in rows))
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
    """Cancel every job of the group that is at work or waits."""
    alive = {job_id: job for job_id, job in group.jobs.items() if job.alive}
    for row in group.rows:
        if row.state == "running" and row.job_id not in alive:
            sys.stderr.write(f"pspo: {row.run} runs outside SLURM; stop its process\n")
    if not alive:
        sys.stderr.write("pspo: no job of this group runs or waits in SLURM; nothing to cancel\n")
        return
    for job_id, job in sorted(alive.items()):
        print(f"cancel {job_id} ({job.state.lower()})")  # noqa: T201
    if complaint := slurm.cancel(sorted(alive)):
        raise ConfigError(f"scancel says: {complaint}; ask the cluster's administrators, or cancel these jobs yourself")


def retry(group: Group) -> None:
    """Submit again what failed, each run by the launcher that submitted it, with the settings of that time."""
    from pspo.launcher import make_plan  # seconds that a look at the table need not wait for
    from pspo.launcher.local import Local
    from pspo.launcher.slurm import Slurm

    tasks = {row.run: group.task(row.run) for row in group.rows if row.state in RETRIED}
    for run in [run for run, task in tasks.items() if task is None]:
        sys.stderr.write(f"pspo: {run} was not submitted by a launcher; the command that started it resumes it\n")
    by_record: dict[Path, list[list[str]]] = {}
    for task in filter(None, tasks.values()):
        by_record.setdefault(task.record, []).append(task.overrides)
    if not by_record:
        sys.stderr.write("pspo: no submitted run of this group has failed; nothing to retry\n")
    for path, jobs in by_record.items():
        record = json.loads(path.read_text())
        kind: Any = {"slurm": Slurm, "local": Local}[record["cluster"]]
        planned = make_plan(jobs)
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
    given = parser.parse_args()
    with answering(ConfigError):
        group = collect(given.group)
        if given.cancel:
            cancel(group)
        if given.retry_failed:
            retry(group)
        if given.cancel or given.retry_failed:
            group = collect(given.group)
        if given.json:
            sys.stdout.write(json.dumps([asdict(row) for row in group.rows], indent=2) + "\n")
        elif given.watch:
            _watch(given.group, group)
        else:
            console = Console()
            console.print(table(group, console.width), highlight=False)


def _watch(directory: Path, group: Group) -> None:
    with Live(table(group, Console().width), auto_refresh=False) as live:
        while group.unfinished:
            time.sleep(WATCH_S)
            group = collect(directory)
            live.update(table(group, live.console.width), refresh=True)


if __name__ == "__main__":
    main()
