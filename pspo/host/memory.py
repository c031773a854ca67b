"""Peak memory, and the retry of a batch that does not fit with half its size."""

import gc
import resource
from collections.abc import Callable
from typing import TypeVar

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
