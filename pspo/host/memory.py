"""Peak memory, and the retry of a batch that does not fit with half its size."""

import contextlib
import ctypes
import gc
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from pspo.base.console import log

T = TypeVar("T")


class NoRoomError(RuntimeError):
    """Neither a batch nor half of it fits into memory; the error names the key to lower."""


def peak_gib(device: torch.device) -> float:
    """Peak memory: of the GPU in this step where there is one, else of the process so far (Linux counts in KiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def call_peak_gib(work: Callable[[], Any], device: torch.device) -> float:
    """Peak memory of a call: all that the GPU holds, or what the process grows by over what it held before.

    A child's ``ru_maxrss`` begins at what its parent held, so the kernel's own mark of the peak is set back instead;
    and what is freed but kept is given back first, as far as the C library can. Raises OSError without Linux's /proc.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) / 2**30
    gc.collect()
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident_gib("VmRSS")
    work()
    return _resident_gib("VmHWM") - before


def _resident_gib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**20


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def halving(name: str, size: int, advice: str, work: Callable[[int], T]) -> tuple[T, int]:
    """``work(size)``, or ``work(size // 2)`` if memory does not suffice, and the size that fitted.

    For work that can be repeated and whose result does not depend on the size. Raises NoRoomError, with the key.
    """
    half = max(1, size // 2)
    for attempt in (size, half):
        try:
            return work(attempt), attempt
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
        gc.collect()
        torch.cuda.empty_cache()
        if attempt == size:
            log.warning("%s=%d does not fit into memory (%s): trying %d", name, size, reason, half)
    remedy = f"set {name}={max(1, size // 4)} or lower, {advice}"
    raise NoRoomError(f"{name}={size} does not fit into memory, nor does half of it ({reason}); {remedy}")
