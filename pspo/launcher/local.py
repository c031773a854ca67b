"""Slots on this machine: one run per slot at a time, each a process of its own."""

import logging
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
from pspo.host.environment import processors
from pspo.launcher.base import Launcher, Outcome, Planned, counted, outcomes, record_runs
from pspo.run.outcome import failure

POLL_S = 0.2  # between two looks at the processes of the slots
STOP_TIMEOUT_S = 60.0  # longest time for runs to save when the launcher is stopped; they are killed then


@dataclass(frozen=True, kw_only=True)
class Local(Launcher):
    """``hydra/launcher=local``."""

    slots: int | None = key("runs at one time; null takes as many as there are GPUs for, or one", within="[1, inf)")
    gpus: int | None = key("GPUs of one run; null takes one where there are any", within="[0, inf)")

    interpreter = (sys.executable, "-m")  # a slot adds the command's module and its overrides

    def check(self) -> None:
        slots, gpus, here = self._num_slots(), self._num_gpus(), len(_gpus())
        if slots * gpus > here:
            remedy = "set hydra.launcher.gpus=0 or fewer hydra.launcher.slots"
            raise ConfigError(f"hydra.launcher.gpus={gpus} in {slots} slots: there are {here} GPUs here; {remedy}")
        if slots > (here := len(processors())):
            raise self.refuse("slots", f"there are {here} processors here, and a slot needs one")

    def _num_slots(self) -> int:
        gpus = self._num_gpus()
        return self.slots or (max(1, len(_gpus()) // gpus) if gpus else 1)

    def _num_gpus(self) -> int:
        return min(1, len(_gpus())) if self.gpus is None else self.gpus

    def _notes(self, todo: list[Planned]) -> list[str]:
        slots = min(self._num_slots(), max(1, len(todo)))
        each = f"{len(processors()) // self._num_slots()} processors and {self._num_gpus()} GPUs"
        hours = f"; about {-(-len(todo) // slots) * self.hours_per_run:g} h in all" if self.hours_per_run else ""
        return [self._cost(len(todo), self._num_gpus()), f"{slots} at a time, each with {each}{hours}"]

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
        tasks, waiting = [""] * len(todo), list(range(len(todo)))
        busy: dict[int, tuple[int, subprocess.Popen[bytes]]] = {}
        handler = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as the runs would go on without us
        try:
            while waiting or busy:
                for slot in range(self._num_slots()):
                    if slot in busy and busy[slot][1].poll() is not None:
                        number, _ = busy.pop(slot)
                        is_done, reason = (todo[number].directory / "DONE").is_file(), failure(todo[number].directory)
                        end = "done" if is_done else f"failed: {reason or f'see {folder}/{number}_0_log.err'}"
                        log.log(logging.INFO if is_done else logging.ERROR, "%s: %s", todo[number].name, end)
                    if slot not in busy and waiting:
                        number = waiting.pop(0)
                        busy[slot] = number, self._start(slot, todo[number], folder / f"{number}_0_log")
                        tasks[number] = str(number)
                        record_runs(self, "local", folder, todo, tasks)
                        log.info("%s: started, %d of %d", todo[number].name, number + 1, len(todo))
                time.sleep(POLL_S)
        except KeyboardInterrupt:
            _stop([process for _, process in busy.values()])
            raise
        finally:
            signal.signal(signal.SIGTERM, handler)

    def _start(self, slot: int, run: Planned, logs: Path) -> subprocess.Popen[bytes]:
        """Start a run on the GPUs and processors of a slot, in a process group that Ctrl-C does not reach.

        A run takes one thread per processor of its slot; thread numbers of SLURM and the shell are meant for all slots.
        """
        ours, gpus = processors(), _gpus()[slot * self._num_gpus() : (slot + 1) * self._num_gpus()]
        each = len(ours) // self._num_slots()
        environment = os.environ | {"OMP_NUM_THREADS": str(each), "CUDA_VISIBLE_DEVICES": ",".join(gpus)}
        environment.pop("SLURM_CPUS_PER_TASK", None)
        _pin(ours[slot * each : (slot + 1) * each])  # the process started next inherits them
        try:
            with logs.with_suffix(".out").open("wb") as out, logs.with_suffix(".err").open("wb") as err:
                command = [*self.interpreter, f"pspo.{run.command}", *run.overrides]
                return subprocess.Popen(command, env=environment, stdout=out, stderr=err, start_new_session=True)
        finally:
            _pin(ours)


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


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(torch.cuda.device_count())) if visible is None else visible.split(",")
    return [name.strip() for name in names if name.strip()]


def _pin(numbers: list[int]) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, numbers)
