"""What SLURM knows of jobs, asked through its own commands; where there is no SLURM, nothing is known."""

import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

TIMEOUT_S = 20.0
"""A controller that does not answer for so long is taken for one that cannot tell."""

WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
ACTIVE = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")


@dataclass(frozen=True)
class JobState:
    """One job or array task.

    Attributes:
        state: SLURM's word, such as PENDING, RUNNING, COMPLETED, FAILED, TIMEOUT, CANCELLED, NODE_FAIL, OUT_OF_MEMORY.
        signal: the number of the signal that ended it, 0 for none; that of a step where it is the step that was killed.
        exit_code: of the batch script, 0 where it has not ended.
        restarts: how often it was requeued; 0 where SLURM does not say.
        reason: why it waits or failed, in SLURM's word.
    """

    state: str
    signal: int = 0
    exit_code: int = 0
    restarts: int = 0
    reason: str = ""

    @property
    def waiting(self) -> bool:
        """Whether it has yet to start, for the first time or again."""
        return self.state in WAITING

    @property
    def active(self) -> bool:
        """Whether it may have a process."""
        return self.state in ACTIVE

    @property
    def alive(self) -> bool:
        """Whether it waits or may have a process."""
        return self.waiting or self.active


def current_job() -> str | None:
    """The job that this process is part of, ``123`` or ``123_4`` in an array; None outside of SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def job_end() -> float | None:
    """When SLURM will end the current job, in seconds since the epoch; None outside of a job or where it is unknown."""
    job, told = current_job(), os.environ.get("SLURM_JOB_END_TIME", "")
    if job is None or told.isdigit():
        return None if job is None else float(told)
    queue = _run(["squeue", "--noheader", f"--jobs={job}", "--format=%e"])
    try:
        return datetime.fromisoformat(queue.stdout.strip() if queue else "").timestamp()
    except ValueError:  # N/A, NONE
        return None


def job_states(job_ids: Iterable[str]) -> dict[str, JobState]:
    """The jobs and array tasks (``12`` or ``12_3``) that SLURM knows: from squeue, else from sacct. Never raises."""
    return _ask(job_ids)[0]


def is_gone(job_id: str) -> bool:
    """Whether SLURM answers that this job has no process: it has ended, was never there, or waits to start again."""
    found, answered = _ask([job_id])
    return answered and not (job_id in found and found[job_id].active)


def gone(job_ids: Iterable[str]) -> set[str]:
    """The jobs that have ended or were never there; empty where SLURM cannot be asked."""
    wanted = set(job_ids)
    found, answered = _ask(wanted)
    return {job_id for job_id in wanted if not (job_id in found and found[job_id].alive)} if answered else set()


def cancel(job_ids: Sequence[str]) -> str:
    """Cancel jobs; returns what scancel complains of, "" for nothing."""
    done = _run(["scancel", *job_ids])
    return "scancel cannot be run or does not answer" if done is None else done.stderr.strip()


def max_array_size() -> int | None:
    """How many jobs an array may have on this cluster (``MaxArraySize``); None where SLURM cannot be asked."""
    done = _run(["scontrol", "show", "config"])
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", done.stdout, re.MULTILINE) if done is not None else None
    return max(1, int(found[1])) if found else None  # 0 switches arrays off


def _ask(job_ids: Iterable[str]) -> tuple[dict[str, JobState], bool]:
    """The states known, and whether SLURM answered at all."""
    wanted = set(job_ids)
    arrays = ",".join(sorted({job_id.partition("_")[0] for job_id in wanted}))
    if not wanted:
        return {}, False
    fields = "JobArrayID:64|,State:32|,exit_code:32|,DerivedEC:32|,RestartCnt:16|,Reason:64"
    queue = _run(["squeue", "--noheader", "--array", "--states=all", f"--jobs={arrays}", f"--Format={fields}"])
    answered = queue is not None and (queue.returncode == 0 or "Invalid job id" in queue.stderr)
    found: dict[str, JobState] = {}
    for line in queue.stdout.splitlines() if queue is not None else []:
        job_id, state, code, derived, restarts, reason = (cell.strip() for cell in line.split("|"))
        found[job_id] = _state(state, code, derived, int(restarts), reason)
    if answered and (missing := wanted - found.keys()):  # squeue forgets what ended some minutes ago
        found |= _accounted(missing)
    return {job_id: state for job_id, state in found.items() if job_id in wanted}, answered


def _accounted(job_ids: set[str]) -> dict[str, JobState]:
    """What accounting, where a cluster has it, remembers of ended jobs."""
    jobs = ",".join(sorted({job_id.partition("_")[0] for job_id in job_ids}))
    columns = "--format=JobID,State,ExitCode,DerivedExitCode"
    done = _run(["sacct", "--parsable2", "--allocations", columns, f"--jobs={jobs}"])
    if done is None or done.returncode:
        return {}
    header, *lines = done.stdout.splitlines() or [""]
    rows = [dict(zip(header.split("|"), line.split("|"), strict=False)) for line in lines]
    return {
        row["JobID"]: _state(row["State"], row.get("ExitCode", ""), row.get("DerivedExitCode", ""), 0, "")
        for row in rows
        if row["JobID"] in job_ids  # of two rows with one id, as after a requeue, the last is the newest
    }


def _state(word: str, code: str, derived: str, restarts: int, reason: str) -> JobState:
    exit_code, number = _status(code)
    if exit_code > 128 and not number:  # a shell's way to say that its child was killed
        number = exit_code - 128
    name = word.partition(" ")[0].rstrip("+")  # of "CANCELLED by 0"
    return JobState(name, number or _status(derived)[1], exit_code, restarts, "" if reason == "None" else reason)


def _status(code: str) -> tuple[int, int]:
    """Exit code and signal, from ``1:0`` as sacct has it or from a wait status as squeue may have it."""
    first, colon, second = code.partition(":")
    if colon:
        return int(first), int(second)
    return divmod(int(first), 256) if first.isdigit() else (0, 0)


def _run(command: list[str]) -> subprocess.CompletedProcess[str] | None:
    try:
        plain = os.environ | {"LC_ALL": "C", "SLURM_TIME_FORMAT": "standard"}
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=plain)
    except (OSError, subprocess.TimeoutExpired):
        return None
