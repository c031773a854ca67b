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
from rich.markup import escape
from rich.table import Table

from pspo.base.schema import ConfigError, build
from pspo.host import slurm
from pspo.status.state import RETRIED, STATES, Group, Row, collect

WATCH_S = 5.0


def table(group: Group) -> RenderableType:
    """The rows for a person."""
    counts = [
        f"[{style}]{n} {state}[/]"
        for state, style in STATES.items()
        if (n := sum(r.state == state for r in group.rows))
    ]
    columns = {
        "run": _names(group.rows),
        "state": [f"[{STATES[row.state]}]{row.state}[/]" for row in group.rows],
        "budget": ["" if r.budget is None else f"{r.done or 0:g}/{r.budget:g} {r.unit}" for r in group.rows],
        "ETA": ["" if row.eta_s is None else _duration(row.eta_s) for row in group.rows],
        "reward": ["" if row.reward is None else f"{row.reward:.3f}" for row in group.rows],
        "test": [", ".join(f"{100 * share:.1f} % {name}" for name, share in r.accuracy.items()) for r in group.rows],
        "restarts": [str(row.restarts or "") for row in group.rows],
        "job": [row.job_id or "" for row in group.rows],
        "why": [escape(row.why.splitlines()[-1]) if row.why else "" for row in group.rows],
    }
    made = Table(box=None, padding=(0, 2, 0, 0))
    told = {name: cells for name, cells in columns.items() if any(cells)}
    for name in told:
        made.add_column(name, overflow="fold", no_wrap=name not in ("run", "test", "why"))
    for cells in zip(*told.values(), strict=True):
        made.add_row(*cells)
    return Together(f"{group.directory}: {', '.join([f'{len(group.rows)} runs', *counts])}", made)


def _names(rows: list[Row]) -> list[str]:
    """What sets each run apart, and the end of its directory's name; all of that name where nothing does."""
    shared = set[str]().union(*(row.overrides for row in rows)).intersection(*(row.overrides for row in rows))
    apart = [" ".join(each for each in row.overrides if each not in shared) for row in rows]
    return [f"{words} …{row.run[-8:]}" if words else row.run for words, row in zip(apart, rows, strict=True)]


def _duration(seconds: float) -> str:
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours}:{minutes:02d}:{int(seconds) % 60:02d}"


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
    try:
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
            Console().print(table(group))
    except ConfigError as error:
        sys.stderr.write(f"pspo: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        pass


def _watch(directory: Path, group: Group) -> None:
    with Live(table(group), auto_refresh=False) as live:
        while group.unfinished:
            time.sleep(WATCH_S)
            group = collect(directory)
            live.update(table(group), refresh=True)


if __name__ == "__main__":
    main()
