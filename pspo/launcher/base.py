"""What all launchers share: the plan of a sweep, the choice of the runs to make, and the dry run."""

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pspo.base.console import log, log_to_console
from pspo.base.files import write_json
from pspo.base.schema import ConfigError, Schema, as_dict, key
from pspo.budget import gpu_hours
from pspo.config import check, compose_all, identity
from pspo.run import earlier
from pspo.run.outcome import failure, result


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One run of a sweep, or the evaluation of one.

    ``state`` is that of ``earlier.History``, or queued where SLURM has the run; ``arm`` names the run's arm by factor.
    ``command`` is run or evaluate; the directory of an evaluation is that of its answers.
    """

    overrides: list[str]
    directory: Path
    state: str
    arm: Mapping[str, str] = field(default_factory=dict)
    command: str = "run"

    @property
    def name(self) -> str:
        return (self.directory if self.command == "run" else self.directory.parents[2]).name

    @property
    def group(self) -> Path:
        """Where the launcher keeps its records and logs: the group, or a folder of evaluations in it."""
        return self.directory.parent if self.command == "run" else self.directory.parents[3] / ".evaluate"

    @property
    def label(self) -> str:
        return " ".join(f"{factor}={name}" for factor, name in self.arm.items())


def make_plan(jobs: Sequence[Sequence[str]], arms: Sequence[Mapping[str, str]] = ()) -> list[Planned]:
    """One entry for each job, in order. Raises ConfigError if any does not compose, or if two arms are the same run."""
    overrides = [[override.lstrip("+") for override in job] for job in jobs]
    checked, runs, seen = set[str](), [], dict[tuple[str, str, str], Planned]()
    for job, config, arm in zip(overrides, compose_all(overrides), arms or [{} for _ in jobs], strict=True):
        blocks = map(as_dict, (config.dataset, config.model, config.reward, config.evaluate))
        inputs = json.dumps([config.output_dir, config.group, config.budget.total > 0, *blocks])
        if inputs not in checked:
            check(config)
            checked.add(inputs)
        same = (config.output_dir, config.group, identity(config))
        before = seen.get(same)
        directory = earlier.run_directory(config, job) if before is None else before.directory
        run = Planned(overrides=job, directory=directory, state=earlier.look(config, directory).state, arm=arm)
        if arm and before:
            why = "either they differ in nothing, or an override takes away what they differ in"
            arms_of_run = f"{directory.name}: {before.label} and {run.label}"
            raise ConfigError(f"two arms are one and the same run, {arms_of_run}; {why}")
        seen[same] = run
        runs.append(run)
    return runs


def show(runs: Sequence[Planned], *notes: str) -> None:
    """Print the table of runs and the notes below it."""
    shared = set.intersection(*(set(run.overrides) for run in runs)) if runs else set()
    names = [run.label or " ".join(each for each in run.overrides if each not in shared) for run in runs]
    width = max(map(len, names), default=0) + 2
    lines = [f"{run.state:<8}{name:<{width}}{run.directory}" for run, name in zip(runs, names, strict=True)]
    sys.stdout.write("\n".join([*lines, "", *(notes or [counted(runs)])]) + "\n")
    sys.stdout.flush()


def counted(runs: Sequence[Planned]) -> str:
    """``12 runs: 9 new, 2 done, 1 failed``."""
    states = [run.state for run in runs]
    counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    return f"{len(runs)} run{'s' * (len(runs) != 1)}: {', '.join(counts)}"


class RunsFailed(RuntimeError):
    """One run of a sweep, or more, did not reach its end."""


Outcome = float | RunsFailed | None  # the number for the sweeper, its failure, or None for a job not waited for


@dataclass(frozen=True, kw_only=True)
class Launcher(Schema, ABC, block="hydra.launcher"):
    """Keys of every launcher."""

    dry_run: bool = key("print what would be run, and run nothing")
    retry_failed: bool = key("run again every run whose last attempt raised an error")
    hours_per_run: float | None = key("your estimate, for the cost in GPU-hours", within="(0, inf)")

    def launch(self, planned: Sequence[Planned]) -> list[Outcome]:
        """Make the runs that are not done; one outcome for each run planned. Raises ConfigError before the first."""
        log_to_console()
        self.check()
        runs = list({run.directory: run for run in planned}.values())
        queued = self._queued(runs)
        runs = [replace(run, state="queued") if run.directory in queued else run for run in runs]
        again = ("new", "resume", "again", *(["failed"] if self.retry_failed else []))
        todo = [run for run in runs if run.state in again]
        hints = [HINTS[state] for state in HINTS if any(run.state == state for run in runs if run not in todo)]
        if self.dry_run:
            show(runs, f"{counted(runs)}; {len(todo)} to run", *hints, *self._notes(todo))
            return [None] * len(planned)
        for hint in hints:
            log.warning(hint)
        outcomes = self._run(runs, todo)
        return [outcomes.get(run.directory) for run in planned]

    @abstractmethod
    def check(self) -> None:
        """Raise ConfigError where the launcher cannot work: no SLURM, too few GPUs or processors."""

    def _queued(self, runs: list[Planned]) -> dict[Path, str]:
        """Directories of the runs that an earlier submission has brought into a queue, with their jobs."""
        return {}

    @abstractmethod
    def _run(self, runs: list[Planned], todo: list[Planned]) -> Mapping[Path, Outcome]:
        """Make the runs ``todo`` of all ``runs``; the outcomes of all by directory."""

    @abstractmethod
    def _notes(self, todo: list[Planned]) -> list[str]:
        """What a dry run prints below the runs, the cost first."""

    def _cost(self, num_runs: int, gpus: int) -> str:
        if (hours := self.hours_per_run) is None:
            return "cost: set hydra.launcher.hours_per_run=<estimate> to see GPU-hours"
        return f"cost: {num_runs} runs x {hours:g} h x {gpus} GPU = {gpu_hours(num_runs, hours, gpus):g} GPU-hours"


HINTS = {
    "failed": "failed: its last attempt raised an error; hydra.launcher.retry_failed=true runs it again",
    "changed": "changed: done, but from other code, data, reward or model; rerun=changed makes it again",
}


def outcomes(runs: Sequence[Planned], reasons: Mapping[Path, str]) -> dict[Path, Outcome]:
    """Outcomes of ended runs: one without DONE has failed, for the reason in its directory or else in ``reasons``."""
    failed = {
        run.directory: failure(run.directory) or reasons.get(run.directory) or "ended without DONE; see its run.log"
        for run in runs
        if not (run.directory / "DONE").is_file()
    }
    lines = [f"{directory} ({reason})" for directory, reason in failed.items()]
    error = RunsFailed(f"{len(failed)} of {len(runs)} runs failed: {'; '.join(lines[:5])}{'; ...' * (len(lines) > 5)}")
    return {run.directory: error if run.directory in failed else result(run.directory) for run in runs}


def record_runs(launcher: Launcher, cluster: str, folder: Path, runs: Sequence[Planned], tasks: Sequence[str]) -> None:
    """Write ``.submitit/<job id>/runs.json`` in the group of every run: which task is which run."""
    about = {"cluster": cluster, "job_id": folder.name, "folder": str(folder), "launcher": as_dict(launcher)}
    rows: dict[Path, list[dict[str, Any]]] = {}
    for task, run in zip(tasks, runs, strict=True):
        row = {"task": task, "directory": str(run.directory), "overrides": run.overrides}
        rows.setdefault(run.group / ".submitit" / folder.name, []).append(row)
    for place, of_group in rows.items():
        place.mkdir(parents=True, exist_ok=True)
        write_json(place / "runs.json", about | {"command": runs[0].command, "runs": of_group})
