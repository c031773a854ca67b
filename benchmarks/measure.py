"""What the benchmarks share: medians with their spread, the machine, the matmul rate, and where results go."""

import json
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pspo import environment

RESULTS = Path(__file__).parent / "results"


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Of two things measured in turns: the median of the rounds' ratios, with its spread."""
    return summary([t / o for t, o in zip(theirs, ours, strict=True)])


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


def matmul_s(rows: float, inner: int, columns: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of one (rows, inner) x (inner, columns) product: the machine's rate at that shape, least of five."""
    a = torch.randn(max(1, round(rows)), inner, dtype=dtype, device=device)
    b = torch.randn(columns, inner, dtype=dtype, device=device)
    repeats = max(1, int(2e9 / (2 * len(a) * inner * columns)))

    def work() -> None:
        for _ in range(repeats):
            torch.nn.functional.linear(a, b)

    seconds(work, device)
    return min(seconds(work, device) for _ in range(5)) / repeats


def peak_rss_gib() -> float:
    """Peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def write(name: str, result: dict[str, Any]) -> None:
    """Keep a result with the machine and the versions it was measured on, and print it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = environment.describe(torch.get_num_threads(), device)
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(result | {"date": time.strftime("%Y-%m-%d"), "environment": about}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(json.dumps(result, indent=1))
