"""One process at a time in a run directory: a lock that the kernel releases, and a record of the process that holds it.

On a network file system the lock of a node that died may hang. It is taken over when SLURM says that the recorded job
is gone; should its process live on, cut off from SLURM, it finds the record changed and stops before it writes.
"""

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock

from pspo.base.files import write_json
from pspo.base.schema import ConfigError
from pspo.host import slurm

log = logging.getLogger("pspo")

LOCK_TIMEOUT_S = 0.5
"""A status that looks whether the lock is held keeps it for some microseconds, which must not turn a run away."""

SETTLE_S = 1.0
"""A record that SLURM calls dead must stand unchanged for so long: a process that has just locked writes its own."""


@dataclass(frozen=True)
class Owner:
    """The process that is at work in a run directory, or was last: the content of ``.owner``.

    Attributes:
        host: its node.
        pid: its process there.
        job_id: its SLURM job, ``123`` or ``123_4``; None outside of SLURM.
        requeues: how often SLURM had requeued that job, under the same id.
        restart: how many processes were at work in the directory before it.
        started: when, ISO 8601.
        ended: whether it left by itself, done, failed or interrupted; a process that is killed leaves this False.
    """

    host: str
    pid: int
    job_id: str | None
    requeues: int
    restart: int
    started: str
    ended: bool = True  # as far as pspo 0.1.0 recorded

    def __str__(self) -> str:
        return (f"job {self.job_id}, " if self.job_id else "") + f"process {self.pid} on host {self.host}"


def owner(directory: Path) -> Owner | None:
    """The record in a run directory; None where there is none that can be read."""
    try:
        record = json.loads((directory / ".owner").read_text())
        return Owner(**{field.name: record[field.name] for field in fields(Owner) if field.name in record})
    except (OSError, ValueError, TypeError):  # none, or no such record
        return None


@contextlib.contextmanager
def hold(directory: Path) -> Iterator[Owner]:
    """Make a run directory and keep other processes out of it. Raises ConfigError that names who is at work there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            held, mine = _enter(directory)
        except filelock.Timeout:
            held, mine = _take_over(directory)
    except OSError as error:
        raise ConfigError(f"cannot write {directory} ({error.strerror}); set output_dir=<directory>") from error
    with held:
        try:
            yield mine
        finally:
            if owner(directory) == mine:
                with contextlib.suppress(OSError):  # a full disk must not hide why the block failed
                    write_json(directory / ".owner", asdict(replace(mine, ended=True)))


def check(directory: Path, mine: Owner) -> None:
    """Leave the process, writing nothing more, if another one has taken the directory over."""
    now = owner(directory)
    if now is not None and now != mine:
        log.error("%s has taken over %s; this process stops", now, directory)
        raise SystemExit(1)


def _enter(directory: Path) -> tuple[AbstractContextManager[Any], Owner]:
    held = filelock.FileLock(directory / ".lock", timeout=LOCK_TIMEOUT_S).acquire()
    before, started = owner(directory), datetime.now(UTC).isoformat(timespec="milliseconds")
    restart = 0 if before is None else before.restart + 1
    mine = Owner(os.uname().nodename, os.getpid(), slurm.current_job(), _requeues(), restart, started, ended=False)
    write_json(directory / ".owner", asdict(mine))
    return held, mine


def _take_over(directory: Path) -> tuple[AbstractContextManager[Any], Owner]:
    """Replace the lock of a job that is gone by a new file: a kernel that still holds it holds the old one."""
    before = owner(directory)
    at_work = ConfigError(f"another process ({before or 'unknown'}) is at work in {directory}; wait for it, or stop it")
    if before is None or not _is_gone(before):
        raise at_work
    try:
        with filelock.FileLock(directory / ".takeover", timeout=0):
            time.sleep(SETTLE_S)
            if owner(directory) != before:
                raise at_work
            log.warning("%s is locked by %s, which SLURM says is gone: taking over", directory, before)
            (directory / ".lock").unlink(missing_ok=True)
            return _enter(directory)
    except filelock.Timeout:
        raise at_work from None


def _is_gone(other: Owner) -> bool:
    """Whether SLURM says that the job has no process; also where it is ours, in the run that SLURM ended to requeue."""
    if other.job_id is None:
        return False
    if other.job_id == slurm.current_job():
        return other.requeues != _requeues()
    return slurm.is_gone(other.job_id)


def _requeues() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)
