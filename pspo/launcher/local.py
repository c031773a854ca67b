"""Slots on this machine: a run per slot at one time, each a ``python -m pspo.run`` of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from pspo.base.console import log
from pspo.base.schema import ConfigError, key
from pspo.launcher.base import Launcher, Outcome, outcomes, record_runs
from pspo.launcher.plan import Planned, counted
from pspo.run.outcome import failure

POLL_S = 0.2
STOP_TIMEOUT_S = 60.0
"""Longest time that runs may take to save when the launcher is stopped; they are killed then."""


@dataclass(frozen=True, kw_only=True)
class Local(Launcher):
    """``hydra/launcher=local``."""

    slots: int | None = key("runs at one time; null takes as many as there are GPUs for, or one", within="[1, inf)")
    gpus: int | None = key("GPUs of one run; null takes one where there are any", within="[0, inf)")

    command = (sys.executable, "-m", "pspo.run")  # to which a slot adds the overrides of its run

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
            folder.mkdir(parents=True)
        except OSError as error:
            raise ConfigError(f"cannot write {folder.parent} ({error.strerror}); set output_dir=<directory>") from error
        free, busy = list(range(self._num_slots()))[::-1], dict[int, tuple[subprocess.Popen[bytes], int, float]]()
        tasks, waiting = [""] * len(todo), list(enumerate(todo))
        record_runs(self, "local", folder, todo, tasks)
        log.info("logs in %s", folder)
        with _stoppable():
            try:
                while waiting or busy:
                    while waiting and free:
                        slot, (number, run) = free.pop(), waiting.pop(0)
                        tasks[number] = str(number)
                        busy[slot] = (self._start(slot, run, folder / f"{number}_0_log"), number, time.monotonic())
                        record_runs(self, "local", folder, todo, tasks)
                        log.info("started  %d of %d: %s", number + 1, len(todo), run.directory.name)
                    for slot, (process, number, begun) in list(busy.items()):
                        if process.poll() is not None:
                            del busy[slot]
                            free.append(slot)
                            _tell_end(todo[number], time.monotonic() - begun, folder / f"{number}_0_log.err")
                    time.sleep(POLL_S)
            except KeyboardInterrupt:
                _stop([process for process, *_ in busy.values()])
                raise

    def _start(self, slot: int, run: Planned, logs: Path) -> subprocess.Popen[bytes]:
        """A run's process with the GPUs and processors of a slot, in a process group that Ctrl-C does not reach.

        A run takes as many threads as it has processors; what SLURM and the shell say of threads is for all slots.
        """
        processors, gpus = _processors(), _gpus()[slot * self._num_gpus() : (slot + 1) * self._num_gpus()]
        each = len(processors) // self._num_slots()
        environment = os.environ | {"OMP_NUM_THREADS": str(each), "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}
        environment.pop("SLURM_CPUS_PER_TASK", None)
        _pin(processors[slot * each : (slot + 1) * each])  # a child inherits them
        try:
            with logs.with_suffix(".out").open("wb") as out, logs.with_suffix(".err").open("wb") as err:
                command = [*self.command, *run.overrides]
                return subprocess.Popen(command, env=environment, stdout=out, stderr=err, start_new_session=True)
        finally:
            _pin(processors)


def _tell_end(run: Planned, seconds: float, log_file: Path) -> None:
    if (run.directory / "DONE").is_file():
        log.info("done     %s (%.0f s)", run.directory.name, seconds)
    else:
        log.error("failed   %s: %s", run.directory.name, failure(run.directory) or f"see {log_file}")


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """Tell all runs to save and leave; kill those that do not, and what they have started."""
    log.warning("stopping %d runs", len(processes))
    deadline = time.monotonic() + STOP_TIMEOUT_S
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


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
