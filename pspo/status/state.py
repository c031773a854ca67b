"""The state of each run of a group, from its directory, its lock and, where there is one, SLURM."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pspo.base.files import read_json, read_yaml
from pspo.base.schema import ConfigError
from pspo.host import environment, slurm
from pspo.run.lock import is_held

STATES = {
    "done": "green",
    "running": "cyan",
    "waiting": "dim",
    "requeued": "dim cyan",  # SLURM starts the run again, which resumes
    "failed": "red",
    "out of memory": "red",
    "timed out": "yellow",
    "cancelled": "yellow",
    "node failure": "yellow",
    "lost": "magenta",  # SLURM does not know the run's job, and no file says how the run ended
    "cut off": "yellow",  # the run stopped before its end, and no job of SLURM's says why
}
"""Each state of a run, with the colour of its word."""

RETRIED = ("failed", "out of memory", "timed out", "node failure", "lost", "cut off")
STATE_OF_ENDED_JOB = {
    "OUT_OF_MEMORY": "out of memory",
    "TIMEOUT": "timed out",
    "CANCELLED": "cancelled",
    "NODE_FAIL": "node failure",
    "FAILED": "failed",
    slurm.UNKNOWN: "lost",
}
TAIL_BYTES, IMPORTING = 1 << 17, "importing"


@dataclass(frozen=True)
class Task:
    """A run as a launcher submitted it, recorded in the file ``record``."""

    cluster: str
    job_id: str | None
    record: Path
    logs: Path
    overrides: list[str]


@dataclass
class RunStatus:
    """One run; unknown numbers are None, unknown words ""."""

    run: str
    overrides: list[str] = field(default_factory=list)
    state: str = "cut off"
    done: float | None = None
    budget: float | None = None
    unit: str = ""
    phase: str = ""  # what a running run does
    eta_s: float | None = None  # seconds to the end of the phase
    reward: float | None = None
    accuracy: dict[str, float] = field(default_factory=dict)
    restarts: int = 0
    job_id: str | None = None
    why: str = ""  # how the run ended, or why it waits


@dataclass
class GroupStatus:
    """The runs of ``outputs/<group>``, the submission of each that counts, and the state of their jobs."""

    directory: Path
    tasks: dict[str, Task]
    jobs: dict[str, slurm.JobState]
    rows: list[RunStatus]

    @property
    def unfinished(self) -> bool:
        """Whether any run is running or waiting."""
        return any(row.state in ("running", "waiting", "requeued") for row in self.rows)


def collect(directory: Path) -> GroupStatus:
    """Look at every run of a group. Raises ConfigError where there is no such group."""
    if not directory.is_dir():
        raise ConfigError(f"{directory} is no directory; give outputs/<group>")
    if (directory / "config.yaml").is_file():
        raise ConfigError(f"{directory} is a single run; give its group, {directory.parent}")
    submitted: list[tuple[str, Task]] = []
    for path in sorted(directory.glob(".submitit/*/runs.json"), key=lambda path: path.stat().st_mtime_ns):
        record = read_json(path)
        for run in record["runs"]:
            task = Task(record["cluster"], run["task"], path, Path(record["folder"]), run["overrides"])
            submitted.append((Path(run["directory"]).name, task))
    begun = {path.name for path in directory.iterdir() if (path / "config.yaml").is_file() or (path / ".lock").exists()}
    owners = {run: read_json(directory / run / ".owner") for run in begun}
    ids = {task.job_id for _, task in submitted if task.job_id and task.cluster == "slurm"}
    ids |= {str(owner["job_id"]) for owner in owners.values() if owner.get("job_id")}
    jobs = slurm.job_states(ids)
    # The last of a run's submissions counts: one whose job is alive, else the newest.
    submitted.sort(key=lambda pair: pair[1].job_id in jobs and jobs[pair[1].job_id].alive)
    group = GroupStatus(directory, dict(submitted), jobs, [])
    group.rows = [_row(group, run, owners.get(run, {})) for run in sorted(begun | group.tasks.keys())]
    return group


def _row(group: GroupStatus, run: str, owner: Mapping[str, Any]) -> RunStatus:
    directory, task = group.directory / run, group.tasks.get(run)
    row = RunStatus(run, task.overrides if task else [], job_id=task.job_id if task else owner.get("job_id"))
    if not task and (directory / "overrides.yaml").is_file():
        row.overrides = read_yaml(directory / "overrides.yaml") or []
    job = group.jobs.get(row.job_id or "")
    row.restarts = max(job.restarts if job else 0, int(owner.get("restart") or 0))
    _progress(row, directory)
    failed = directory / "FAILED"  # of the submission, or of an earlier attempt
    is_old = task and failed.is_file() and failed.stat().st_mtime_ns <= task.record.stat().st_mtime_ns
    if (directory / "DONE").is_file():
        row.state = "done"
        tests = read_json(directory / "summary.json").get("evaluation", {})
        row.accuracy = {name: result["after"]["accuracy"] for name, result in tests.items()}
    elif is_held(directory):
        row.state, row.job_id = "running", owner.get("job_id") or row.job_id
        row.phase, row.eta_s = _phase(directory)
    elif job and job.active:
        row.state, row.phase, row.why = "running", IMPORTING, "no process holds the run's lock: it starts, or ends"
    elif job and job.waiting:
        row.state, row.why = "requeued" if job.restarts else "waiting", job.reason
    elif (failure := read_json(failed)) and not is_old:
        row.state = "out of memory" if failure.get("kind") == "out of memory" else "failed"
        row.why = str(failure.get("error", "")).strip()
    elif job:
        row.state, row.why = _ended(job, _log(task) if task else "")
    elif task and task.cluster == "local" and not owner:
        row.state, row.why = _in_slot(task)
    else:
        killed = ", and the last was killed: kill -9, out of memory, or a lost node" * (owner.get("ended") is False)
        row.why = f"no process holds the run's lock{killed}; the same command resumes it"
    return row


def _phase(directory: Path) -> tuple[str, float | None]:
    """The phase in a running run's ``.phase``, its counts and ranks, and the seconds left in it when it was written."""
    phase = read_json(directory / ".phase")
    counts = "" if phase.get("total") is None else f" {phase['done']:.0f}/{phase['total']:.0f}"
    about = (environment.history(directory) or [{}])[-1]
    number, nodes = about.get("ranks", 1), about.get("nodes", 1)
    where = f", {number} ranks" * (number > 1) + f" on {nodes} nodes" * (nodes > 1)
    return phase.get("phase", IMPORTING) + counts + where, phase.get("left_s")


def _ended(job: slurm.JobState, log: str) -> tuple[str, str]:
    """State and reason of a run whose job has ended, while the run itself is not done and left no reason."""
    if any(mark in log for mark in ("oom-kill", "oom_kill", "OOM Killed")):  # slurmstepd writes it there
        return "out of memory", "SLURM's step daemon saw the kernel kill it for memory"
    state = STATE_OF_ENDED_JOB.get(job.state, "cut off")
    if state == "failed" and job.signal:
        return state, f"killed by signal {job.signal}" + (", probably memory" if job.signal == 9 else "")
    if state == "failed":
        return state, _last_lines(log) or f"exit code {job.exit_code}, {job.reason or 'no reason given'}"
    return state, f"its job is {job.state}"


def _in_slot(task: Task) -> tuple[str, str]:
    """State and reason of a run that the local launcher has, and that has left no trace in its directory."""
    launcher = task.logs.name.rpartition("_")[2]
    if b"pspo" in _tail(Path("/proc", launcher, "cmdline")):
        return ("running", IMPORTING) if task.job_id else ("waiting", f"for a slot of process {launcher}")
    if task.job_id:
        return "failed", _last_lines(_log(task)) or "it ended before it began its directory"
    return "cut off", f"never begun: its launcher, process {launcher}, is not at work on this machine"


def _log(task: Task) -> str:
    return _tail(task.logs / f"{task.job_id}_0_log.err").decode(errors="replace")


def _last_lines(log: str) -> str:
    """The last lines of the run itself; SLURM's own say only that the step has ended."""
    own = [line for line in log.splitlines() if line.strip() and not line.startswith(("srun: ", "slurmstepd"))]
    return "\n".join(own[-3:])


def _progress(row: RunStatus, directory: Path) -> None:
    """Fill in how far the run has come, from its configuration and the last whole lines of its metrics."""
    config = directory / "config.yaml"
    budget = (read_yaml(config) or {}).get("budget", {}) if config.is_file() else {}
    row.unit, row.budget = next(((unit, total) for unit, total in budget.items() if total is not None), ("", None))
    for line in _tail(directory / "metrics.jsonl").split(b"\n")[:-1]:  # without a last line that is still being written
        with contextlib.suppress(ValueError):  # the first line, cut by the tail
            metrics = json.loads(line)
            row.done = metrics.get(f"budget/{row.unit}", row.done or 0)
            row.reward = metrics.get("reward/mean", row.reward)


def _tail(path: Path) -> bytes:
    """The last ``TAIL_BYTES`` of a file; b"" where it cannot be read."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))  # 0 in /proc, whose files have no size
        return file.read()
    return b""
