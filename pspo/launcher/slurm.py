"""Arrays of SLURM jobs for a sweep, through submitit: one, or several where the cluster bounds the size of an array."""

import contextlib
import io
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.helpers import clean_env
from submitit.slurm.slurm import _make_sbatch_string

from pspo.base.console import log
from pspo.base.schema import ConfigError, key
from pspo.config import compose
from pspo.host import ranks, slurm
from pspo.launcher.base import Launcher, Outcome, Planned, counted, outcomes, record_runs
from pspo.run.outcome import result

MAX_REQUEUES = 10**6  # requeues that submitit allows: a job that is preempted often must not use them up
POLL_S = 10.0  # between two questions to SLURM while waiting
NAMED_AS_IN_SBATCH = ("partition", "account", "qos", "nodes", "constraint", "exclude", "comment")


class Job(submitit.helpers.Checkpointable):
    """One job: compose, validate and make the run, or the evaluation, of overrides; submitit requeues it as it is.

    It holds its overrides alone: after the loss of a node SLURM starts the pickle of the submission again.
    """

    def __init__(self, overrides: Sequence[str], command: str = "run") -> None:
        self.overrides, self.command = list(overrides), command

    def __call__(self) -> float | None:
        """Make the run; whatever it raises is the job's failure. Returns the ``result`` of the run."""
        if self.command == "evaluate":
            from pspo.run import evaluation

            evaluation.of_words(self.overrides).answer()
            return None
        from pspo.run.job import run

        if int(os.environ.get("SLURM_NTASKS", "1")) > 1:
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        with ranks.joined():
            return result(run(compose(self.overrides), self.overrides))


@dataclass(frozen=True, kw_only=True)
class Slurm(Launcher):
    """``hydra/launcher=slurm``; null leaves a choice to the cluster."""

    partition: str | None = key("partition, or several with commas")
    account: str | None = key("account that is charged")
    qos: str | None = key("quality of service")
    time_min: int = key("minutes of one job at most; a longer run is requeued and resumes", within="[1, inf)")
    memory_gib: float | None = key("memory of one job in GiB", within="(0, inf)")
    gpus: int = key("GPUs of one node of a job, with a rank of the run on each", within="[0, inf)")
    gpu_type: str | None = key("kind of GPU, as in --gres=gpu:<kind>:1")
    cpus: int = key("processors of one rank, and so its CPU threads", within="[1, inf)")
    nodes: int = key("nodes of one job", within="[1, inf)")
    constraint: str | None = key("features that a node must have")
    exclude: str | None = key("nodes not to use")
    comment: str | None = key("text that SLURM stores with the job")
    array_parallelism: int = key("jobs at one time, divided among the arrays, at least one each", within="[1, inf)")
    notice_s: int = key("seconds before the time limit or a preemption when a run is told to save", within="[10, inf)")
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

    def check(self) -> None:
        if not self.dry_run and shutil.which("sbatch") is None:
            where = "run this on a login node of the cluster, or here with hydra/launcher=local"
            raise ConfigError(f"hydra/launcher=slurm: no sbatch on the path; {where}")

    def _queued(self, runs: list[Planned]) -> dict[Path, str]:
        tasks: dict[str, Path] = {}
        for parent in {run.group for run in runs}:
            for path in parent.glob(".submitit/*/runs.json"):
                record = json.loads(path.read_text())
                is_run = record.get("command", "run") == "run"  # whose group may have been moved
                for row in record["runs"] if record["cluster"] == "slurm" else ():
                    directory = Path(row["directory"])
                    tasks[row["task"]] = parent / directory.name if is_run else directory
        wanted = {run.directory for run in runs}
        states = slurm.job_states(task for task, directory in tasks.items() if directory in wanted)
        return {tasks[task]: task for task, state in states.items() if state.alive}

    def _run(self, runs: list[Planned], todo: list[Planned]) -> Mapping[Path, Outcome]:
        tasks, lines, num_submitted = self._queued(runs), [f"{counted(runs)}; {len(todo)} submitted"], 0
        for array, folder, parameters in self._arrays(todo):
            try:
                jobs = self._submit(array, folder, parameters)
            except ConfigError as error:
                rest = f"{num_submitted} of {len(todo)} runs are in the queue, and this command submits the others"
                raise ConfigError(f"{error}; {rest}" if num_submitted else str(error)) from error
            tasks |= {run.directory: job.job_id for run, job in zip(array, jobs, strict=True)}
            num_submitted += len(array)
            lines += [f"jobs   {jobs[0].paths.folder.name}, {len(array)} in all", f"logs   {jobs[0].paths.folder}"]
        groups = sorted({str(run.directory.parent) for run in runs if run.command == "run"})
        sys.stdout.write("\n".join([*lines, *(f"watch  python -m pspo.status {group}" for group in groups)]) + "\n")
        sys.stdout.flush()
        try:
            return outcomes(runs, _wait(tasks)) if self.wait else {}
        except KeyboardInterrupt:
            log.warning("the jobs go on; scancel, or python -m pspo.status --cancel outputs/<group>, ends them")
            raise

    def _submit(self, array: list[Planned], folder: Path, parameters: dict[str, Any]) -> list[submitit.Job[Any]]:
        """Submit and record one of a sweep's arrays."""
        cluster = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
        outside = clean_env() if "SLURM_JOB_ID" in os.environ else contextlib.nullcontext()
        try:  # sbatch would take the variables of a job that this process is part of for wishes
            with outside, contextlib.redirect_stderr(io.StringIO()):  # where submitit repeats what sbatch says
                os.environ |= cluster
                executor = submitit.SlurmExecutor(folder, max_num_timeout=MAX_REQUEUES)
                executor.update_parameters(**parameters)
                jobs = executor.submit_array([Job(run.overrides, run.command) for run in array])
        except submitit.core.utils.FailedJobError as error:
            lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("Try ")]
            raise ConfigError(f"sbatch refuses: {lines[-1] if lines else 'it does not say why'}") from error
        except OSError as error:
            raise ConfigError(f"cannot write {folder.parent} ({error.strerror}); set output_dir=<directory>") from error
        record_runs(self, "slurm", jobs[0].paths.folder, array, [job.job_id for job in jobs])
        return jobs

    def _notes(self, todo: list[Planned]) -> list[str]:
        notes = [self._cost(len(todo), self.gpus * self.nodes)]
        for array, folder, parameters in self._arrays(todo):
            command = f"{sys.executable} -u -m submitit.core._submit {folder}"
            notes += ["", _make_sbatch_string(command=command, folder=folder, map_count=len(array), **parameters)]
        return notes

    def _arrays(self, todo: list[Planned]) -> list[tuple[list[Planned], Path, dict[str, Any]]]:
        """The runs in as few, nearly equally long arrays as ``MaxArraySize`` allows; submitit's folder and parameters.

        srun is needed, as USR2 does not reach Python without it; srun must be told the processors again.
        """
        num_arrays = -(-len(todo) // (slurm.max_array_size() or len(todo) or 1))
        bounds = [len(todo) * i // num_arrays for i in range(num_arrays + 1)] if todo else []
        values = {name: getattr(self, name) for name in NAMED_AS_IN_SBATCH} | {
            "time": self.time_min,
            "mem": None if self.memory_gib is None else f"{round(self.memory_gib * 1024)}M",
            "gres": ":".join(filter(None, ["gpu", self.gpu_type, str(self.gpus)])) if self.gpus else None,
            "cpus_per_task": self.cpus,
            "ntasks_per_node": max(1, self.gpus),
            "array_parallelism": max(1, self.array_parallelism // max(1, num_arrays)),
            "signal_delay_s": self.notice_s,
            "setup": self.setup or None,
            "srun_args": [f"--cpus-per-task={self.cpus}", "--kill-on-bad-exit=1"],
            "additional_parameters": {"requeue": True} | self.additional,
        }
        parameters, arrays = {name: value for name, value in values.items() if value is not None}, []
        for first, last in itertools.pairwise(bounds):
            array, group = todo[first:last], todo[first].group.absolute()
            folder = group / ".submitit" / ("%A" if len(array) > 1 else "%j")
            arrays.append((array, folder, {"job_name": f"pspo-{group.name}"} | parameters))
        return arrays


def _wait(tasks: Mapping[Path, str]) -> dict[Path, str]:
    """Wait until no task runs or waits; SLURM's last word on each. A job has ended when it is seen so twice.

    submitit's own ``result()`` waits for ever for a job that was cancelled or killed, where there is no accounting.
    """
    waiting, ended_before, words = dict(tasks), set[str](), dict[Path, str]()
    while waiting:
        time.sleep(POLL_S)
        states = slurm.job_states(waiting.values())
        ended = {job for job, state in states.items() if not state.alive}
        for directory, job in list(waiting.items()):
            if job in ended_before & ended:
                del waiting[directory]
                words[directory] = f"job {job} is {states[job].state}"
                log.info("%s: %s", directory.name, "DONE" if (directory / "DONE").is_file() else words[directory])
        ended_before = ended
    return words
