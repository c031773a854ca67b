"""Slots on this machine: one run per slot at a time, each a process of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from pspo.base.console import log
from pspo.base.schema import ConfigError, key
from pspo.launcher.base import Launcher, Outcome, Planned, counted, outcomes, record_runs
from pspo.run.outcome import failure

POLL_S = 0.2
"""Seconds between two looks at the processes of the slots."""

STOP_TIMEOUT_S = 60.0
"""Longest time in seconds that runs may take to save when the launcher is stopped; they are killed then."""


@dataclass(frozen=True, kw_only=True)
class Local(Launcher):
    """``hydra/launcher=local``."""

    slots: int | None = key("runs at one time; null takes as many as there are GPUs for, or one", within="[1, inf)")
    gpus: int | None = key("GPUs of one run; null takes one where there are any", within="[0, inf)")

    interpreter = (sys.executable, "-m")  # a slot adds the command's module and its overrides

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
        hours = (
            "" if self.hours_per_run is None else f"; about {-(-len(todo) // slots) * self.hours_per_run:g} h in all"
        )
        return [f"{slots} at a time, each with {each}{hours}"]

    def _run(self, runs: list[Planned], todo: list[Planned]) -> Mapping[Path, Outcome]:
        log.info("%s; %d to run, %d at a time", counted(runs), len(todo), self._num_slots())
        if todo:
            self._fill_slots(todo)
        return outcomes(runs, {})

    def _fill_slots(self, todo: list[Planned]) -> None:
        """Start a run whenever a slot is free, until all have ended. Ctrl-C or SIGTERM stops the runs, which save."""
        name = f"local_{time.strftime('%Y%m%d_%H%M%S')}_{os.getpid()}"
        folder = todo[0].group.absolute() / ".submitit" / name
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise ConfigError(f"cannot write {folder.parent} ({error.strerror}); set output_dir=<directory>") from error
        log.info("logs in %s", folder)
        num_slots, tasks, waiting = self._num_slots(), [""] * len(todo), list(range(len(todo)))
        busy: dict[int, tuple[int, float, subprocess.Popen[bytes]]] = {}
        handler = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as the runs would go on without us
        try:
            while waiting or busy:
                for slot in range(num_slots):
                    if slot in busy and busy[slot][-1].poll() is not None:
                        number, begun, _ = busy.pop(slot)
                        _log_end(todo[number], time.monotonic() - begun, folder / f"{number}_0_log.err")
                    if slot not in busy and waiting:
                        number = waiting.pop(0)
                        process = self._start(slot, todo[number], folder / f"{number}_0_log")
                        busy[slot], tasks[number] = (number, time.monotonic(), process), str(number)
                        record_runs(self, "local", folder, todo, tasks)
                        log.info("started  %d of %d: %s", number + 1, len(todo), todo[number].name)
                time.sleep(POLL_S)
        except KeyboardInterrupt:
            _stop([process for *_, process in busy.values()])
            raise
        finally:
            signal.signal(signal.SIGTERM, handler)

    def _start(self, slot: int, run: Planned, logs: Path) -> subprocess.Popen[bytes]:
        """Start a run on the GPUs and processors of a slot, in a process group that Ctrl-C does not reach.

        A run takes one thread per processor of its slot; thread numbers of SLURM and the shell are meant for all slots.
        """
        processors, gpus = _processors(), _gpus()[slot * self._num_gpus() : (slot + 1) * self._num_gpus()]
        each = len(processors) // self._num_slots()
        environment = os.environ | {"OMP_NUM_THREADS": str(each), "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}
        environment.pop("SLURM_CPUS_PER_TASK", None)
        _pin(processors[slot * each : (slot + 1) * each])  # the process started next inherits them
        try:
            with logs.with_suffix(".out").open("wb") as out, logs.with_suffix(".err").open("wb") as err:
                command = [*self.interpreter, f"pspo.{run.command}", *run.overrides]
                return subprocess.Popen(command, env=environment, stdout=out, stderr=err, start_new_session=True)
        finally:
            _pin(processors)


def _log_end(run: Planned, seconds: float, log_file: Path) -> None:
    if (run.directory / "DONE").is_file():
        log.info("done     %s (%.0f s)", run.name, seconds)
    else:
        log.error("failed   %s: %s", run.name, failure(run.directory) or f"see {log_file}")


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """Tell all runs to save and leave; kill a run that does not, with the processes that it has started."""
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


def _gpus() -> list[int]:
    """The GPUs that this process may use, by their numbers in CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return list(range(torch.cuda.device_count()))
    names = [name.strip() for name in visible.split(",") if name.strip()]
    if not all(name.isdigit() for name in names):
        raise ConfigError(f"CUDA_VISIBLE_DEVICES={visible}: hydra/launcher=local needs the GPUs by number, such as 0,1")
    return [int(name) for name in names]


def _processors() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]


def _pin(processors: list[int]) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, processors)
