"""The state of every run of a group in one table, from the run directories, and from SLURM where it exists.

python -m pspo.status outputs/<group> [--watch] [--json] [--cancel] [--retry-failed]
"""

import argparse
import json
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.text import Text

from pspo.base.command import answering, expanded
from pspo.base.console import duration
from pspo.base.files import read_json
from pspo.base.schema import ConfigError, build
from pspo.host import slurm
from pspo.status.state import RETRIED, STATES, GroupStatus, collect

WATCH_S = 5.0  # between two refreshes of the table


def table(group: GroupStatus) -> Text:
    """The table for a person: the name of each run and, below it, its state with numbers, then notes."""
    states = [row.state for row in group.rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in STATES if state in states)
    text = Text(f"{group.directory}: {counts or 'no run'}\n")
    for row in group.rows:
        numbers = ["" if row.budget is None else f"{row.done or 0:.0f}/{row.budget:.0f} {row.unit}"]
        numbers += ["" if row.reward is None else f"reward {row.reward:.3f}"]
        numbers += [f"{100 * share:.1f} % {name}" for name, share in row.accuracy.items()]
        numbers += [f"job {row.job_id}" if row.job_id else ""]
        left = "" if row.eta_s is None else f", {duration(row.eta_s)} left"
        restarts = f"restarts: {row.restarts}" if row.restarts else ""
        notes = "; ".join(filter(None, [row.phase + left, restarts, row.why.rpartition("\n")[2]]))
        text.append(f"{row.run}\n    ").append(row.state, STATES[row.state])
        text.append("  ".join(["", *filter(None, numbers)]) + (f"\n    {notes}\n" if notes else "\n"))
    if re.search(r"_\+\d+_seed", text.plain):
        text.append("_+2 in a name stands for two overrides more; --json lists all of them.\n")
    return text


def cancel(group: GroupStatus) -> None:
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


def retry(group: GroupStatus) -> None:
    """Submit the failed runs again, each by the launcher and with the settings of its newest submission."""
    from pspo.launcher import make_plan  # imports torch, which a look at the table does without
    from pspo.launcher.local import Local
    from pspo.launcher.slurm import Slurm

    failed: dict[Path, list[list[str]]] = {}
    for row in group.rows:
        if row.state in RETRIED and (task := group.tasks.get(row.run)):
            failed.setdefault(task.record, []).append(task.overrides)
        elif row.state in RETRIED:
            sys.stderr.write(f"pspo: {row.run} was not submitted by a launcher; its own command resumes it\n")
    if not failed:
        sys.stderr.write("pspo: no submitted run of this group has failed; nothing to retry\n")
    for path, jobs in failed.items():
        record, planned = read_json(path), make_plan(jobs)
        kind: Any = {"slurm": Slurm, "local": Local}[record["cluster"]]
        if {run.directory.parent.resolve() for run in planned} != {group.directory.resolve()}:
            raise ConfigError(f"submitted from another directory; go there, and retry {group.directory}")
        build(kind, record["launcher"] | {"retry_failed": True, "dry_run": False}).launch(planned)


def main() -> None:
    """``python -m pspo.status``."""
    parser = argparse.ArgumentParser(prog="python -m pspo.status", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("group", type=expanded, help="outputs/<group>")
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
        if arguments.json:
            sys.stdout.write(json.dumps([asdict(row) for row in group.rows], indent=2) + "\n")
            return
        with Live(auto_refresh=False) as live:
            live.update(table(group), refresh=arguments.watch)
            while arguments.watch and group.unfinished:
                time.sleep(WATCH_S)
                group = collect(arguments.group)
                live.update(table(group), refresh=True)


if __name__ == "__main__":
    main()
