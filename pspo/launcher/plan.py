"""What a sweep would do: every job composed and validated, its directory, and what became of it so far."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pspo.base.schema import ConfigError, as_dict
from pspo.config import check, compose_all, identity
from pspo.run import earlier
from pspo.run.name import run_directory


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One run of a sweep.

    ``state`` is that of ``earlier.History``, or queued where SLURM has it; ``arm`` names its arm by factor.
    """

    overrides: list[str]
    directory: Path
    state: str
    arm: Mapping[str, str] = field(default_factory=dict)


def make_plan(jobs: Sequence[Sequence[str]], arms: Sequence[Mapping[str, str]] = ()) -> list[Planned]:
    """One entry for each job, in order. Raises ConfigError if any does not compose, or if two arms are the same run."""
    overrides = [[override.lstrip("+") for override in job] for job in jobs]
    checked, runs, seen = set(), [], dict[tuple[str, str, str], Planned]()
    for job, config, arm in zip(overrides, compose_all(overrides), arms or [{} for _ in jobs], strict=True):
        parts = [config.output_dir, config.group, *map(as_dict, (config.dataset, config.model, config.reward))]
        looked_at = json.dumps([*parts, config.budget.total > 0])
        if looked_at not in checked:
            check(config)
            checked.add(looked_at)
        same = (config.output_dir, config.group, identity(config))
        before = seen.get(same)
        directory = run_directory(config, job) if before is None else before.directory
        run = Planned(overrides=job, directory=directory, state=earlier.look(config, directory).state, arm=arm)
        if arm and before:
            raise ConfigError(
                f"two arms are one and the same run, {directory.name}: {_words(before)} and {_words(run)}; "
                "either they differ in nothing, or an override takes away what they differ in"
            )
        seen[same] = run
        runs.append(run)
    return runs


def unique(runs: Sequence[Planned]) -> list[Planned]:
    """Without those that would be made in the directory of an earlier one."""
    return list({run.directory: run for run in reversed(runs)}.values())[::-1]


def with_queued(runs: Sequence[Planned], queued: Mapping[Path, str]) -> list[Planned]:
    """The runs, those told queued that have a task in a queue."""
    return [replace(run, state="queued") if run.directory in queued else run for run in runs]


def show(runs: Sequence[Planned], *notes: str) -> None:
    """Print the table of runs and the notes below it."""
    shared = set[str]().union(*(run.overrides for run in runs)).intersection(*(run.overrides for run in runs))
    told = [_words(run) or " ".join(each for each in run.overrides if each not in shared) for run in runs]
    width = max(map(len, told), default=0) + 2
    lines = [f"{run.state:<8}{words:<{width}}{run.directory}" for run, words in zip(runs, told, strict=True)]
    sys.stdout.write("\n".join([*lines, "", *(notes or [counted(runs)])]) + "\n")
    sys.stdout.flush()


def counted(runs: Sequence[Planned]) -> str:
    """``12 runs: 9 new, 2 done, 1 failed``."""
    states = [run.state for run in runs]
    told = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    return f"{len(runs)} run{'s' * (len(runs) != 1)}: {', '.join(told)}"


def _words(run: Planned) -> str:
    return " ".join(f"{factor}={name}" for factor, name in run.arm.items())
