"""Memory: how much was used at most, and what to do where it does not suffice."""

import gc
import resource
from collections.abc import Callable
from typing import TypeVar

import torch

from pspo.base.console import log

T = TypeVar("T")


class NoRoomError(RuntimeError):
    """A batch does not fit into memory, not even half of it; says which key to lower."""


def peak_gib(device: torch.device) -> float:
    """Peak memory: of the GPU in this step where there is one, else of the process so far (Linux counts in KiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def halving(name: str, size: int, advice: str, work: Callable[[int], T]) -> tuple[T, int]:
    """``work(size)``, or where memory does not suffice ``work(size // 2)``, and the size that did.

    For work that leaves nothing behind when it fails, and whose result does not depend on the size. Raises NoRoomError
    that names the key.
    """
    for attempt in (size, max(1, size // 2)):
        try:
            return work(attempt), attempt
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if attempt == size:
            log.warning("%s=%d does not fit into memory (%s): trying %d", name, size, reason, max(1, size // 2))
    raise NoRoomError(
        f"{name}={size} does not fit into memory, nor does half of it ({reason}); set {name}={max(1, size // 4)} or "
        f"lower, {advice}"
    )
