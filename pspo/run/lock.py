"""One process at a time in a run directory: a lock that the kernel releases, and a record of the process that holds it.

On a network file system the lock of a node that died may hang. It is taken over when SLURM says that the recorded job
is gone; should its process live on, cut off from SLURM, it finds the record changed and stops before it writes.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock

from pspo.base.console import log
from pspo.base.files import read_json, write_json
from pspo.base.schema import ConfigError
from pspo.host import slurm

LOCK_TIMEOUT_S = 0.5  # ``is_held`` holds a lock for microseconds, which must not turn a run away
SETTLE_S = 1.0  # before a takeover, while the record must not change: a process that has just locked writes its own


@dataclass(frozen=True)
class Owner:
    """The process that is at work in a run directory, or was last: the content of ``.owner``."""

    host: str
    pid: int
    job_id: str | None  # 123 or 123_4; None outside of SLURM
    requeues: int  # how often SLURM had requeued that job, under the same id
    restart: int  # how many processes were at work in the directory before this one
    started: str  # ISO 8601
    ended: bool  # False for a process at work, or killed

    def __str__(self) -> str:
        return (f"job {self.job_id}, " if self.job_id else "") + f"process {self.pid} on host {self.host}"


def owner(directory: Path) -> Owner | None:
    """The content of ``.owner``; None where the file is missing or damaged."""
    record = read_json(directory / ".owner")
    return Owner(**record) if record.keys() == Owner.__dataclass_fields__.keys() else None


@contextlib.contextmanager
def hold(directory: Path) -> Iterator[Owner]:
    """Make a run directory and keep other processes out of it. Raises ConfigError that names the process inside."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            lock, mine = _enter(directory)
        except filelock.Timeout:
            lock, mine = _take_over(directory)
    except OSError as error:
        raise ConfigError(f"cannot write {directory} ({error.strerror}); set output_dir=<directory>") from error
    with lock:
        try:
            yield mine
        finally:
            if owner(directory) == mine:
                with contextlib.suppress(OSError):  # a full disk must not hide why the block failed
                    write_json(directory / ".owner", asdict(replace(mine, ended=True)))


def is_held(directory: Path) -> bool:
    """Whether a process holds the run's lock, by this machine's kernel; False on a file system without locks."""
    with contextlib.suppress(OSError), (directory / ".lock").open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def check_owner(directory: Path, mine: Owner) -> None:
    """Leave this process, writing nothing more, if another one has taken the directory over."""
    other = owner(directory)
    if other not in (None, mine):
        log.error("%s has taken over %s; this process stops", other, directory)
        raise SystemExit(1)


def _enter(directory: Path) -> tuple[AbstractContextManager[Any], Owner]:
    lock = filelock.FileLock(directory / ".lock", timeout=LOCK_TIMEOUT_S).acquire()
    before, started = owner(directory), datetime.now(UTC).isoformat(timespec="milliseconds")
    restart = before.restart + 1 if before else 0
    mine = Owner(os.uname().nodename, os.getpid(), slurm.current_job(), _requeues(), restart, started, ended=False)
    write_json(directory / ".owner", asdict(mine))
    return lock, mine


def _take_over(directory: Path) -> tuple[AbstractContextManager[Any], Owner]:
    """Replace the lock of a job that is gone by a new file: a kernel that still holds it holds the old one."""
    before = owner(directory)
    with contextlib.suppress(filelock.Timeout):
        if before is not None and _is_gone(before):
            with filelock.FileLock(directory / ".takeover", timeout=0):
                time.sleep(SETTLE_S)
                if owner(directory) == before:
                    log.warning("%s is locked by %s, which SLURM says is gone: taking over", directory, before)
                    (directory / ".lock").unlink(missing_ok=True)
                    return _enter(directory)
    raise ConfigError(f"another process ({before or 'unknown'}) is at work in {directory}; wait for it, or stop it")


def _is_gone(other: Owner) -> bool:
    """Whether SLURM says that the owner's job has no process, or requeued that job, which this process is now."""
    if other.job_id == slurm.current_job():  # None outside of SLURM, where the counts are equal
        return other.requeues != _requeues()
    return other.job_id is not None and slurm.is_gone(other.job_id)


def _requeues() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)
