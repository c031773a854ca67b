"""Arrays of SLURM jobs for a sweep, through submitit: one, or several where the cluster bounds the size of an array."""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.helpers import clean_env
from submitit.slurm.slurm import _make_sbatch_string

from pspo.base.console import log
from pspo.base.schema import ConfigError, key
from pspo.host import slurm
from pspo.launcher.base import Launcher, Outcome, outcomes, record_runs
from pspo.launcher.job import Job
from pspo.launcher.plan import Planned, counted, with_queued

NO_LIMIT = 10**6
"""Requeues that submitit allows: a job that is preempted often must not use them up."""

POLL_S = (1.0, 30.0)
"""First and longest pause between two questions to SLURM while waiting."""


@dataclass(frozen=True, kw_only=True)
class Slurm(Launcher):
    """``hydra/launcher=slurm``; null leaves a choice to the cluster."""

    partition: str | None = key("partition, or several with commas")
    account: str | None = key("account that is charged")
    qos: str | None = key("quality of service")
    time_min: int = key(
        "time limit of one job in minutes; a run that needs longer is requeued and resumes", within="[1, inf)"
    )
    memory_gib: float | None = key("memory of one job in GiB", within="(0, inf)")
    gpus: int = key("GPUs of one job", within="[0, inf)")
    gpu_type: str | None = key("kind of GPU, as in --gres=gpu:<kind>:1")
    cpus: int = key("processors of one job, and so its CPU threads", within="[1, inf)")
    nodes: int = key("nodes of one job; a run is one process", within="[1, 1]")
    constraint: str | None = key("features that a node must have")
    exclude: str | None = key("nodes not to use")
    comment: str | None = key("kept with the job")
    array_parallelism: int = key(
        "jobs of the sweep that may run at one time, divided among its arrays, at least one each", within="[1, inf)"
    )
    notice_s: int = key(
        "seconds before the time limit, or a preemption, when a run is told to save", within="[10, inf)"
    )
    setup: list[str] = key("shell lines before the job, such as module load")
    additional: dict[str, Any] = key("any further sbatch parameter by its long name; true gives a bare flag")
    wait: bool = key("wait for the last job; exit status 1 if any failed")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.notice_s >= 60 * self.time_min:
            raise self.refuse("notice_s", f"must be less than hydra.launcher.time_min={self.time_min} minutes")
        if self.gpu_type is not None and not self.gpus:
            raise self.refuse("gpu_type", "needs hydra.launcher.gpus of at least 1")
        for name, value in self.additional.items():
            if not isinstance(value, str | int | float):
                raise ConfigError(f"hydra.launcher.additional.{name} must be text, a number or true, got {value!r}")

    def _num_gpus(self) -> int:
        return self.gpus

    def check(self) -> None:
        """Raise ConfigError where there is no sbatch, or no such partition."""
        if not self.dry_run and shutil.which("sbatch") is None:
            raise ConfigError(
                "hydra/launcher=slurm: no sbatch on the path; run this on a login node of the cluster, or here with "
                "hydra/launcher=local"
            )
        if self.partition is None or shutil.which("sinfo") is None:
            return
        asked = subprocess.run(["sinfo", "--noheader", "--format=%R"], capture_output=True, text=True, check=False)
        if asked.returncode:
            raise ConfigError(f"SLURM does not answer ({asked.stderr.strip()}); try again, or ask its administrators")
        known = sorted(set(asked.stdout.split()))
        for name in self.partition.split(","):
            if name not in known:
                raise self.refuse("partition", f"this cluster has no partition {name}; it has {', '.join(known)}")

    def _look(self, runs: list[Planned]) -> list[Planned]:
        return with_queued(runs, _queued(runs))

    def _run(self, runs: list[Planned], todo: list[Planned]) -> Mapping[Path, Outcome]:
        tasks = _queued(runs)
        lines = [f"{counted(runs)}; {len(todo)} submitted"]
        arrays, num_submitted = self._arrays(todo), 0
        for array in arrays:
            try:
                folder, submitted = self._submit(array, len(arrays))
            except ConfigError as error:
                if not num_submitted:
                    raise
                told = f"{num_submitted} of {len(todo)} runs are in the queue, and this command submits the others"
                raise ConfigError(f"{error}; {told}") from error
            tasks |= submitted
            num_submitted += len(array)
            lines += [f"jobs   {folder.name}, {len(array)} in all", f"logs   {folder}"]
        groups = sorted({str(run.directory.parent) for run in runs})
        sys.stdout.write("\n".join([*lines, *(f"watch  python -m pspo.status {group}" for group in groups)]) + "\n")
        sys.stdout.flush()
        if not self.wait:
            return {}
        try:
            return outcomes(runs, _wait(tasks))
        except KeyboardInterrupt:
            log.warning("the jobs go on; python -m pspo.status --cancel %s ends them", groups[0])
            raise

    def _arrays(self, todo: list[Planned]) -> list[list[Planned]]:
        """The runs in as few arrays as the cluster's ``MaxArraySize`` allows, all nearly equally long."""
        num_arrays = -(-len(todo) // (slurm.max_array_size() or len(todo) or 1))
        bounds = [len(todo) * i // num_arrays for i in range(num_arrays + 1)] if todo else []
        return [todo[first:last] for first, last in itertools.pairwise(bounds)]

    def _submit(self, array: list[Planned], num_arrays: int) -> tuple[Path, dict[Path, str]]:
        """Submit one of a sweep's arrays: its folder, and the job id of each run."""
        folder = _folder(array)
        try:
            with _outside_of_jobs():
                executor = submitit.SlurmExecutor(folder, max_num_timeout=NO_LIMIT)
                executor.update_parameters(**self._parameters(array, num_arrays))
                jobs = executor.submit_array([Job(run.overrides) for run in array])
        except submitit.core.utils.FailedJobError as error:
            lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("Try ")]
            raise ConfigError(f"sbatch refuses: {lines[-1] if lines else 'it does not say why'}") from error
        except OSError as error:
            raise ConfigError(f"cannot write {folder.parent} ({error.strerror}); set output_dir=<directory>") from error
        place, tasks = jobs[0].paths.folder, [job.job_id for job in jobs]
        record_runs(self, "slurm", place, array, tasks)
        return place, dict(zip((run.directory for run in array), tasks, strict=True))

    def _notes(self, todo: list[Planned]) -> list[str]:
        notes, arrays = [], self._arrays(todo)
        for array in arrays:
            folder, parameters = _folder(array), self._parameters(array, len(arrays))
            command = f"{sys.executable} -u -m submitit.core._submit {folder}"
            notes += ["", _make_sbatch_string(command=command, folder=folder, map_count=len(array), **parameters)]
        return notes

    def _parameters(self, array: list[Planned], num_arrays: int) -> dict[str, Any]:
        """What submitit is told of one of a sweep's arrays.

        srun is needed, as USR2 does not reach Python without it; srun must be told the processors again.
        """
        gpu = f"gpu:{self.gpu_type}:{self.gpus}" if self.gpu_type else f"gpu:{self.gpus}"
        memory = None if self.memory_gib is None else f"{round(self.memory_gib * 1024)}M"
        given = {
            "job_name": f"pspo-{array[0].directory.parent.name}",
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "time": self.time_min,
            "mem": memory,
            "gres": gpu if self.gpus else None,
            "cpus_per_task": self.cpus,
            "nodes": self.nodes,
            "ntasks_per_node": 1,
            "constraint": self.constraint,
            "exclude": self.exclude,
            "comment": self.comment,
            "array_parallelism": max(1, self.array_parallelism // num_arrays),
            "signal_delay_s": self.notice_s,
            "setup": self.setup or None,
            "srun_args": [f"--cpus-per-task={self.cpus}"],
            "additional_parameters": {"requeue": True} | self.additional,
        }
        return {name: value for name, value in given.items() if value is not None}


def _folder(array: list[Planned]) -> Path:
    """Where submitit keeps the pickles and logs of an array, or of a job."""
    return array[0].directory.parent.absolute() / ".submitit" / ("%A" if len(array) > 1 else "%j")


def _queued(runs: list[Planned]) -> dict[Path, str]:
    """The runs that an earlier submission has brought into SLURM's queue, and their jobs there."""
    wanted, tasks = {run.directory for run in runs}, dict[Path, set[str]]()
    for parent in {directory.parent for directory in wanted}:
        for path in parent.glob(".submitit/*/runs.json"):
            record = json.loads(path.read_text())
            for row in record["runs"] if record["cluster"] == "slurm" else []:
                tasks.setdefault(parent / Path(row["directory"]).name, set()).add(row["task"])
    states = slurm.job_states({task for directory in wanted for task in tasks.get(directory, ())})
    return {
        directory: task
        for directory in wanted
        for task in tasks.get(directory, ())
        if task in states and states[task].alive
    }


def _wait(tasks: Mapping[Path, str]) -> dict[Path, str]:
    """Until no task runs or waits; what SLURM calls each. A job has ended when it is seen so twice.

    submitit's own ``result()`` waits for ever for a job that was cancelled or killed, where there is no accounting.
    """
    (pause, longest), waiting, once, ended = POLL_S, dict(tasks), set[str](), dict[Path, str]()
    while waiting:
        time.sleep(pause)
        gone = slurm.gone(waiting.values())
        over = [place for place, job in waiting.items() if job in once & gone]
        pause = POLL_S[0] if gone - once else min(1.5 * pause, longest)
        once = gone
        states = slurm.job_states(waiting[place] for place in over)
        for place in over:
            job = waiting.pop(place)
            ended[place] = f"job {job} is {states[job].state if job in states else 'unknown to SLURM'}"
            log.info("%s: %s", place.name, "DONE" if (place / "DONE").is_file() else ended[place])
    return ended


@contextlib.contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Hide what SLURM tells the job that we are in, if any, as sbatch would take it for wishes."""
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    conf = os.environ.get("SLURM_CONF")
    with clean_env():
        if conf:
            os.environ["SLURM_CONF"] = conf
        yield
