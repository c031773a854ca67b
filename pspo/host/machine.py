"""What the machine grants this process: memory, processor time, a disk, the network."""

import contextlib
import math
import os
import re
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import psutil

REACH_TIMEOUT_S = 10.0  # for a server to answer at all
SAMPLE_MIB = 64  # written and flushed to time a disk


def memory_gib(root: Path = Path("/")) -> tuple[float, float]:
    """Memory that this process may have, and what is free of it, by the machine and its cgroups."""
    total, free = (number / 2**30 for number in psutil.virtual_memory()[:2])
    for folder in _cgroups(root):
        limit, used = (_read(folder, *names) for names in (
            ("memory.max", "memory.limit_in_bytes"), ("memory.current", "memory.usage_in_bytes")
        ))  # fmt: skip
        if limit.isdigit() and used and (gib := int(limit) / 2**30) < total:
            cached = re.findall(r"^(?:total_)?inactive_file (\d+)", _read(folder, "memory.stat"), re.MULTILINE)
            total, free = (
                gib,
                min(free, gib - (int(used) - sum(map(int, cached[-1:]))) / 2**30),
            )  # the last is the total
    return total, free


def processor_quota(root: Path = Path("/")) -> float:
    """Processors' worth of time that the cgroups grant this process; inf where they set no limit."""
    texts = [
        _read(folder, "cpu.max") or f"{_read(folder, 'cpu.cfs_quota_us')} {_read(folder, 'cpu.cfs_period_us')}"
        for folder in _cgroups(root)
    ]
    pairs = filter(None, (re.fullmatch(r"(\d+) (\d+)", text) for text in texts))
    return min((int(pair[1]) / int(pair[2]) for pair in pairs), default=math.inf)


def busy(processors: Sequence[int], watch_s: float = 1.0) -> float:
    """Processors' worth of work that is done on ``processors`` while this process sleeps."""
    shares: list[float] = psutil.cpu_percent(watch_s, percpu=True)
    return sum(shares[number] for number in processors if number < len(shares)) / 100


def write_rate(directory: Path) -> float:
    """Bytes per second at which a new file is written and flushed to the disk. Raises OSError."""
    content = os.urandom(2**20)
    with tempfile.TemporaryFile(dir=directory) as file:
        begun = time.perf_counter()
        for _ in range(SAMPLE_MIB):
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return SAMPLE_MIB * 2**20 / (time.perf_counter() - begun)


def unreachable(url: str) -> str:
    """Why a server does not answer; "" where it does, with whatever status."""
    try:
        urllib.request.urlopen(url, timeout=REACH_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except OSError as error:
        return str(getattr(error, "reason", error))
    return ""


def _cgroups(root: Path) -> list[Path]:
    """The folders of this process's cgroups and of those around them, in both versions of the kernel's interface."""
    folders = []
    for line in _read(root, "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        top = root / "sys/fs/cgroup" / controllers.removeprefix("name=")
        own = top / path.strip("/")
        folders += [folder for folder in (own, *own.parents) if folder.is_relative_to(top)]
    return folders


def _read(folder: Path, *names: str) -> str:
    """The text of the first of the files that can be read, or ""."""
    for name in names:
        with contextlib.suppress(OSError):
            return (folder / name).read_text().strip()
    return ""
