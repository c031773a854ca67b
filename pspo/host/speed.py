"""What the machine's processors can do: seconds of a call, memory bandwidth, the rate of matrix products."""

import time
from collections.abc import Callable
from typing import Any

import torch

SETTLED_S = 0.02
"""A matrix product that takes longer shows the machine's rate; a shorter one is tried at twice the size."""


def synchronize(device: torch.device) -> None:
    """Wait for what the GPU has yet to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call."""
    synchronize(device)
    begun = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begun


def rate_s(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a short call, repeated for some milliseconds: the least of five."""
    once = min(seconds(work, device) for _ in range(2))
    repeats = max(1, int(0.005 / once))

    def repeated() -> None:
        for _ in range(repeats):
            work()

    return min(seconds(repeated, device) for _ in range(5)) / repeats


def product_s(batch: int, rows: int, inner: int, columns: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of one (batch, rows, inner) x (batch, inner, columns) product, the second factor as it is faster."""
    a = torch.randn(batch, rows, inner, device=device).to(dtype)
    b = torch.randn(batch, inner, columns, device=device).to(dtype)
    factors = (b, b.transpose(1, 2).contiguous().transpose(1, 2))
    if batch == 1:
        return min(rate_s(lambda: torch.mm(a[0], factor[0]), device) for factor in factors)  # noqa: B023
    return min(rate_s(lambda: torch.bmm(a, factor), device) for factor in factors)  # noqa: B023


def copy_rate(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy of 1 GiB on a GPU, of 256 MiB on a CPU."""
    source = torch.zeros(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / rate_s(lambda: target.copy_(source), device)


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of a square matrix product, the first of doubling sizes that takes ``SETTLED_S``."""
    for size in (1024, 2048, 4096, 8192):
        if (product := product_s(1, size, size, size, dtype, device)) > SETTLED_S:
            break
    return 2.0 * size**3 / product
