"""Slots on this machine: so many runs at one time, each in a process of its own, through submitit."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import submitit
import torch

from pspo.base.console import log
from pspo.base.schema import ConfigError, key
from pspo.launcher.base import Launcher, Outcome, outcomes, record_runs
from pspo.launcher.job import Job
from pspo.launcher.plan import Planned, counted
from pspo.run.outcome import failure

NO_LIMIT_MIN = 366 * 24 * 60
POLL_S = 0.2
STOP_S = 60.0
"""How long runs may take to save when they are told to stop."""

KILL_S = 5.0
"""How long submitit may then take to end them."""


@dataclass(frozen=True, kw_only=True)
class Local(Launcher):
    """``hydra/launcher=local``."""

    slots: int | None = key("runs at one time; null takes as many as there are GPUs for, or one", within="[1, inf)")
    gpus: int | None = key("GPUs of one run; null takes one where there are any", within="[0, inf)")

    job = Job  # what a slot runs, made from overrides

    def check(self) -> None:
        """Raise ConfigError where there are not enough GPUs or processors for the slots."""
        slots, gpus, processors = self._num_slots(), self._num_gpus(), _processors()
        if slots * gpus > len(_gpus()):
            raise ConfigError(
                f"hydra.launcher.gpus={gpus} in {slots} slots: there are {len(_gpus())} GPUs here; set "
                "hydra.launcher.gpus=0 or fewer hydra.launcher.slots"
            )
        if slots > len(processors):
            raise ConfigError(
                f"hydra.launcher.slots={slots}: there are {len(processors)} processors here, and a slot needs one"
            )

    def _num_slots(self) -> int:
        gpus = self._num_gpus()
        return self.slots or (max(1, len(_gpus()) // gpus) if gpus else 1)

    def _num_gpus(self) -> int:
        return min(1, len(_gpus())) if self.gpus is None else self.gpus

    def _notes(self, todo: list[Planned]) -> list[str]:
        slots = min(self._num_slots(), max(1, len(todo)))
        each = f"{len(_processors()) // self._num_slots()} processors and {self._num_gpus()} GPUs"
        if self.hours_per_run is None:
            return [f"{slots} at a time, each with {each}"]
        return [f"{slots} at a time, each with {each}; about {-(-len(todo) // slots) * self.hours_per_run:g} h in all"]

    def _run(self, runs: list[Planned], todo: list[Planned]) -> Mapping[Path, Outcome]:
        log.info("%s; %d to run, %d at a time", counted(runs), len(todo), self._num_slots())
        if todo:
            self._feed(todo)
        return outcomes(runs, {})

    def _feed(self, todo: list[Planned]) -> None:
        """Run all, a new one whenever a slot is free. Stopped by Ctrl-C or SIGTERM, it stops its runs, which save."""
        folder = (
            todo[0].directory.parent.absolute() / ".submitit" / f"local_{time.strftime('%Y%m%d_%H%M%S')}_{os.getpid()}"
        )
        try:
            executor = submitit.LocalExecutor(folder, max_num_timeout=NO_LIMIT_MIN)
        except OSError as error:
            raise ConfigError(f"cannot write {folder.parent} ({error.strerror}); set output_dir=<directory>") from error
        free, busy, tasks = (
            list(range(self._num_slots()))[::-1],
            dict[int, tuple[Any, Planned, float]](),
            [""] * len(todo),
        )
        record_runs(self, "local", folder, todo, tasks)
        log.info("logs in %s", folder)
        waiting = list(enumerate(todo))
        with _stoppable():
            try:
                while waiting or busy:
                    while waiting and free:
                        slot, (number, run) = free.pop(), waiting.pop(0)
                        with self._in_slot(slot, executor):
                            process = executor.submit(self.job(run.overrides))
                        busy[slot], tasks[number] = (process, run, time.monotonic()), process.job_id
                        record_runs(self, "local", folder, todo, tasks)
                        log.info("started  %d of %d: %s", number + 1, len(todo), run.directory.name)
                    for slot, (process, run, begun) in list(busy.items()):
                        if process.done():
                            del busy[slot]
                            free.append(slot)
                            _tell_end(run, process, time.monotonic() - begun)
                    time.sleep(POLL_S)
            except KeyboardInterrupt:
                _stop([process for process, *_ in busy.values()])
                raise

    @contextlib.contextmanager
    def _in_slot(self, slot: int, executor: submitit.LocalExecutor) -> Iterator[None]:
        """What a process that is started in the block inherits: its GPUs and its processors.

        A run takes as many threads as it has processors; what SLURM and the shell say of threads is for all slots.
        """
        gpus = _gpus()[slot * self._num_gpus() : (slot + 1) * self._num_gpus()]
        executor.update_parameters(timeout_min=NO_LIMIT_MIN, gpus_per_node=len(gpus), visible_gpus=gpus)
        all_processors, environment = _processors(), dict(os.environ)
        each = len(all_processors) // self._num_slots()
        _pin(all_processors[slot * each : (slot + 1) * each])
        os.environ.pop("SLURM_CPUS_PER_TASK", None)
        os.environ["OMP_NUM_THREADS"] = str(each)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(environment)
            _pin(all_processors)


def _tell_end(run: Planned, process: Any, seconds: float) -> None:
    if (run.directory / "DONE").is_file():
        log.info("done     %s (%.0f s)", run.directory.name, seconds)
    else:
        log.error("failed   %s: %s", run.directory.name, failure(run.directory) or f"see {process.paths.stderr}")


def _stop(jobs: list[Any]) -> None:
    """Tell all to save and leave; end those that do not. Ctrl-C on a terminal reaches, and ends, them all itself."""
    log.warning("stopping %d runs", len(jobs))
    for tell, seconds in ((_terminate, STOP_S), (submitit.LocalJob.cancel, KILL_S), (_kill, KILL_S)):
        deadline = time.monotonic() + seconds
        for job in jobs:
            if not job.done():
                tell(job)
        while time.monotonic() < deadline and not all(job.done() for job in jobs):
            time.sleep(POLL_S)


def _terminate(job: Any) -> None:
    job._process.terminate()  # submitit hands it on to the run


def _kill(job: Any) -> None:
    """End submitit's process and the run, its child. Its SIGINT does nothing where a shell's ``&`` began us."""
    pid = job._process.pid
    os.kill(pid, signal.SIGSTOP)  # so that it starts no other
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            if stat.read_text().rpartition(")")[2].split()[1] == str(pid):
                os.kill(int(stat.parent.name), signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Make SIGTERM as good as Ctrl-C, as our runs would go on without us."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    earlier = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def _gpus() -> list[int]:
    """The GPUs that this process may use, by the number that CUDA_VISIBLE_DEVICES knows them by."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is None:
        return list(range(torch.cuda.device_count()))
    names = [name.strip() for name in told.split(",") if name.strip()]
    if not all(name.isdigit() for name in names):
        raise ConfigError(f"CUDA_VISIBLE_DEVICES={told}: hydra/launcher=local needs the GPUs by number, such as 0,1")
    return [int(name) for name in names]


def _processors() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _pin(processors: list[int]) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, processors)
