"""What SLURM knows of jobs, through its own commands; where there is no SLURM, nothing is known."""

import math
import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

TIMEOUT_S = 20.0  # longest wait for a command of SLURM; a slower controller counts as no answer
UNKNOWN = "unknown to SLURM"  # the state of a job that SLURM, when asked, does not know (any more)
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
ACTIVE = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")


@dataclass(frozen=True)
class JobState:
    """One job or array task."""

    state: str  # SLURM's word, such as PENDING, RUNNING, COMPLETED, FAILED, TIMEOUT, CANCELLED; or UNKNOWN
    signal: int = 0  # that ended the job, or the job's step where only the step was killed; 0 for none
    exit_code: int = 0  # of the batch script, 0 before its end
    restarts: int = 0  # number of requeues; 0 where SLURM does not report it
    reason: str = ""  # SLURM's word for why the job waits or failed

    @property
    def waiting(self) -> bool:
        return self.state in WAITING

    @property
    def active(self) -> bool:
        return self.state in ACTIVE

    @property
    def alive(self) -> bool:
        return self.waiting or self.active


def current_job() -> str | None:
    """The job that this process is part of, ``123`` or ``123_4`` in an array; None outside of SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def job_end() -> float | None:
    """Time limit of the current job, in seconds since the epoch; None outside of a job or where it is unknown."""
    job, end = current_job(), os.environ.get("SLURM_JOB_END_TIME", "")
    if job is None or end.isdigit():
        return None if job is None else float(end)
    answer = _call("squeue", "--noheader", f"--jobs={job}", "--format=%e").stdout.strip()  # SLURM before 22.05
    try:
        return datetime.fromisoformat(answer).timestamp()
    except ValueError:  # N/A, NONE
        return None


def job_states(job_ids: Iterable[str]) -> dict[str, JobState]:
    """State of each job or array task (``12``, ``12_3``), from squeue, else sacct; {} where SLURM does not answer."""
    wanted = set(job_ids)
    if not wanted:
        return {}
    jobs = f"--jobs={','.join(sorted({job_id.partition('_')[0] for job_id in wanted}))}"
    fields = "JobArrayID:64|,State:32|,exit_code:32|,DerivedEC:32|,RestartCnt:16|,Reason:64"
    queue = _call("squeue", "--noheader", "--array", "--states=all", jobs, f"--Format={fields}")
    if queue.returncode and "Invalid job id" not in queue.stderr:
        return {}
    lines = queue.stdout.splitlines()
    if wanted - {line.partition("|")[0].strip() for line in lines}:  # squeue lists ended jobs for minutes only
        columns = "--format=JobID,State,ExitCode,DerivedExitCode"
        lines = _call("sacct", "--parsable2", "--allocations", columns, jobs).stdout.splitlines() + lines
    states = dict.fromkeys(wanted, JobState(UNKNOWN))
    for line in lines:
        job_id, *cells = (cell.strip() for cell in line.split("|"))
        if job_id in wanted:
            states[job_id] = _state(*cells)
    return states


def is_gone(job_id: str) -> bool:
    """Whether SLURM answers that a job has no process: it has ended, was never there, or waits to start again."""
    state = job_states([job_id]).get(job_id)
    return state is not None and not state.active


def cancel(job_ids: Sequence[str]) -> str:
    """Cancel jobs; returns scancel's complaint, or ""."""
    return _call("scancel", *job_ids).stderr.strip()


def max_array_size() -> int | None:
    """How many jobs an array may have on this cluster (``MaxArraySize``); None where SLURM cannot be asked."""
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", _call("scontrol", "show", "config").stdout, re.MULTILINE)
    return max(1, int(match[1])) if match else None  # 0 switches arrays off


def partitions() -> dict[str, float]:
    """Each partition with its time limit in minutes, inf for none, the default one first; {} where SLURM is silent."""
    lines = _call("sinfo", "--noheader", "--format=%P|%l").stdout.splitlines()
    found = dict(line.split("|")[:2] for line in sorted(lines, key=lambda line: "*|" not in line) if "|" in line)
    return {name.rstrip("*"): _minutes(limit.strip()) for name, limit in found.items()}


def _minutes(limit: str) -> float:
    """Minutes of ``1-02:30:00``, ``30:00`` or ``infinite``."""
    days, _, clock = limit.rpartition("-")
    if not clock.replace(":", "").isdigit():  # infinite, n/a
        return math.inf
    hours, minutes, seconds = ([0, 0, *map(int, clock.split(":"))])[-3:]
    return 1440 * int(days or 0) + 60 * hours + minutes + seconds / 60


def _call(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of SLURM; one that is not there or does not answer in time has failed, without output."""
    plain = os.environ | {"LC_ALL": "C", "SLURM_TIME_FORMAT": "standard"}
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=plain)
    except (OSError, subprocess.TimeoutExpired):
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]} cannot be run or does not answer")


def _state(word: str, code: str = "", derived: str = "", restarts: str = "0", reason: str = "None") -> JobState:
    """A job's state from the cells of squeue or, without the last two, of sacct."""
    exit_code, number = _status(code)
    if exit_code > 128 and not number:  # a shell's way to say that its child was killed
        number = exit_code - 128
    name = word.partition(" ")[0].rstrip("+")  # of "CANCELLED by 0"
    return JobState(name, number or _status(derived)[1], exit_code, int(restarts), "" if reason == "None" else reason)


def _status(code: str) -> tuple[int, int]:
    """Exit code and signal, from sacct's ``1:0`` or from squeue's wait status."""
    exit_code, colon, number = code.partition(":")
    return (int(exit_code), int(number)) if colon else divmod(int(code or 0), 256)
