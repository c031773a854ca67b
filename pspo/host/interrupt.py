"""Stopping a run: signals, noted at any time and obeyed where stopping is safe, and the end of the job's time.

SIGUSR2 (SLURM's ``--signal``, submitit, a preemption): save, then call the handler installed before ours; submitit's
requeues the job. Without such a handler the process leaves with ``STATUS[SIGUSR2]``.
SIGTERM (scancel): save, and leave with a status that requeues nothing. But where SLURM still calls the job RUNNING it
is a preemption without a SIGUSR2, which ends the job for ever if it leaves by itself, so it is handled as SIGUSR2.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from pspo.base.console import log
from pspo.host import ranks, slurm

STATUS = {signal.SIGUSR2: 75, signal.SIGTERM: 143}  # sysexits' EX_TEMPFAIL; what shells call the end by SIGTERM
REQUEUE_S = 60.0  # until SLURM ends the ranks of a job that its first rank has requeued
STEPS_AND_SAVES_LEFT = 1.5  # longest steps, each with its save: a checkpoint is due when a job has time for no more

_received: signal.Signals | None = None
_deferred = False


class Interrupted(BaseException):
    """The signal that is its argument asks this process to stop; no ``Exception``, as it is no failure."""


def check() -> None:
    """Raise ``Interrupted`` if a signal came. Call it where stopping is safe; it costs nothing."""
    if _received is not None and not _deferred:
        raise Interrupted(_received)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """While the block runs ``check`` raises nothing, so that a signal cannot split the block's changes."""
    global _deferred  # noqa: PLW0603  it belongs to the process, as signals do
    _deferred = True
    try:
        yield
    finally:
        _deferred = False


@contextlib.contextmanager
def caught() -> Iterator[None]:
    """Note the signals while the block runs; when it was left by ``Interrupted``, requeue or leave the process.

    In another thread than the main one, which gets no signals, this does nothing. A signal after the block's last
    ``check`` stops the next run of a multirun.
    """
    global _received
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {signum: signal.signal(signum, _note) for signum in STATUS}
    try:
        yield
        return
    except Interrupted as interrupted:
        signum, _received = interrupted.args[0], None
    finally:
        for each, handler in earlier.items():
            signal.signal(each, signal.SIG_DFL if handler is None else handler)
    job = slurm.current_job()
    state = slurm.job_states([job]).get(job) if job and signum == signal.SIGTERM else None
    if state and state.state == "RUNNING":  # a job cancelled or out of time is COMPLETING
        log.warning("SIGTERM to a job that SLURM still calls running: a preemption")
        signum = signal.SIGUSR2
    requeue = earlier[signum]
    if signum == signal.SIGUSR2 and callable(requeue):
        log.warning("stopped by %s; handing over to %s", signum.name, getattr(requeue, "__qualname__", requeue))
        requeue(signum, None)
        if not ranks.is_first():
            time.sleep(REQUEUE_S)  # for submitit returns here, and the exit of one task may end the first one's requeue
    log.warning("stopped by %s, exit status %d; the same command resumes", signum.name, STATUS[signum])
    raise SystemExit(STATUS[signum])


def _note(signum: int, frame: FrameType | None) -> None:
    """Note the signal; SIGTERM has the last word, as a cancelled job must not be requeued."""
    global _received  # noqa: PLW0603  signals belong to the process
    if _received != signal.SIGTERM:
        _received = signal.Signals(signum)


class TimeLimit:
    """Watches the time that the job has left, for clusters that send no signal before they kill."""

    def __init__(self) -> None:
        self.end = slurm.job_end()
        self.step_s = self.save_s = 0.0
        self._begun = time.time()

    def near(self) -> bool:
        """Whether the time may not suffice for another step and its save; to be called once at the end of each step."""
        now = time.time()
        self.step_s, self._begun = max(self.step_s, now - self._begun), now
        return self.end is not None and self.end - now < STEPS_AND_SAVES_LEFT * (self.step_s + self.save_s)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Measure a save, whose time is no part of a step's."""
        begun = time.time()
        yield
        self._begun = time.time()
        self.save_s = max(self.save_s, self._begun - begun)
