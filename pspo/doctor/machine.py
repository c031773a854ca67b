"""What the doctor looks at without a model: processors, memory, caches, hub, W&B, SLURM and the disk."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants

from pspo.base.schema import ConfigError
from pspo.config import Config, launcher_keys
from pspo.doctor import Finding, found
from pspo.host import environment, machine, slurm
from pspo.launcher import configure
from pspo.model import source
from pspo.tracker import check_login

MIN_FREE_GIB = 2.0  # memory below which not even the embedded run is safe


def device(config: Config) -> Finding:
    """The device that a run takes. Raises ConfigError for a GPU that is absent."""
    chosen, warn = environment.choose_device(config.device), ""
    about = environment.describe(1, chosen)
    if chosen.type == "cuda":
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
        if free < 0.9 * total:
            warn = "CUDA_VISIBLE_DEVICES=<another GPU>: another process holds memory of this one"
        text = "device={asked}: {gpu}, {free_gib:.0f} of {total_gib:.0f} GiB free; a run uses one GPU of {num}"
        numbers: dict[str, Any] = {"free_gib": free, "total_gib": total, "num": torch.cuda.device_count()}
        return found("device", text, warn=warn, asked=config.device, gpu=about["device"], **numbers)
    if torch.backends.mps.is_available():
        warn = "device=cpu: Apple's GPU (device=mps) is not supported, a run takes this Mac's processors"
    elif shutil.which("nvidia-smi"):
        warn = "install torch's CUDA build, or ask for --gres=gpu:1: nvidia-smi is here, but torch sees no GPU"
    numbers = {name: about[name] for name in ("cpu", "capability")}
    return found("device", "device={asked}: no GPU; {cpu}, {capability}", warn=warn, asked=config.device, **numbers)


def memory() -> Finding:
    """Memory of the CPU."""
    total, free = machine.memory_gib()
    warn = "stop what holds memory, or ask for more: hydra.launcher.memory_gib" * (free < MIN_FREE_GIB)
    return found("memory", "{free_gib:.1f} of {total_gib:.1f} GiB free", warn=warn, free_gib=free, total_gib=total)


def threads(config: Config) -> Finding:
    """CPU threads beside the processors that this process may use, and the work that others do on these."""
    processors, chosen = environment.processors(), environment.choose_threads(config.threads)
    granted, busy = min(len(processors), machine.processor_quota()), machine.busy(processors)
    free, warn = max(1, int(granted - busy + 0.25)), ""
    if chosen > granted:
        warn = f"threads={max(1, int(granted))}: more threads than processors wait for one another"
    elif chosen > free:
        warn = f"threads={free}: threads meet after every product and wait for the slowest"
    elif busy > granted - 0.5:
        warn = "stop the neighbours, or go elsewhere: threads=1 is the least, and all speeds below suffer"
    numbers: dict[str, Any] = {"threads": chosen, "granted": granted, "busy": busy, "load": os.getloadavg()[0]}
    text = "threads={threads} of {granted:g} processors; others keep {busy:.1f} busy (load {load:.1f})"
    return found("threads", text, warn=warn, **numbers)


def cache(name: str, folder: Path) -> Finding:
    """A cache, by writing into it or, where it is not made yet, into the folder that will hold it."""
    try:
        with tempfile.TemporaryFile(dir=nearest(folder)):
            return found(name, "{folder} can be written", folder=str(folder))
    except OSError as error:
        fail, reason = f"export {name}=<a directory that can be written>", error.strerror
        return found(name, "{folder} cannot be written ({reason})", fail=fail, folder=str(folder), reason=reason)


def nearest(folder: Path) -> Path:
    """The folder, or of those around it the nearest that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def caches() -> list[Finding]:
    """The hub's cache, and that of models made on this machine."""
    return [cache("HF_HOME", Path(constants.HF_HOME)), cache("XDG_CACHE_HOME", source.cache_directory())]


def hub() -> Finding:
    """Whether the Hugging Face hub answers."""
    if constants.HF_HUB_OFFLINE:
        return found("hub", "HF_HUB_OFFLINE is set: models and data sets come from the cache alone")
    reason = machine.unreachable(constants.ENDPOINT)
    warn = "python -m pspo.prefetch where there is internet, then export HF_HUB_OFFLINE=1" * bool(reason)
    text = "{url} cannot be reached ({reason})" if reason else "{url} answers"
    return found("hub", text, warn=warn, url=constants.ENDPOINT, reason=reason)


def wandb(config: Config) -> Finding:
    """Whether a run sends its metrics to W&B."""
    mode = os.environ.get("WANDB_MODE", "online")
    if config.tracker.name != "wandb" or mode != "online":
        text = "tracker={tracker}, WANDB_MODE={mode}: a run sends nothing by itself"
        return found("W&B", text, tracker=config.tracker.name, mode=mode)
    try:
        check_login()
    except ConfigError as error:
        warn = "wandb login" if "login" in str(error) else "export WANDB_MODE=offline, and later python -m pspo.sync"
        return found("W&B", "{reason}", warn=f"{warn}; or tracker=jsonl", reason=str(error).partition("; ")[0])
    return found("W&B", "there is a login, and the server answers")


def cluster(words: Sequence[str]) -> Finding:
    """SLURM's limits beside the keys of ``hydra.launcher``. Raises ConfigError for keys that do not fit."""
    if shutil.which("sinfo") is None:
        return found("SLURM", "none here; hydra/launcher=local runs a sweep in slots of this machine")
    if not (limits := slurm.partitions()):
        return found("SLURM", "sinfo names no partition", warn="start it where sinfo answers, or hydra/launcher=local")
    own, warn = [word for word in words if word.startswith("hydra.launcher.")], ""
    keys = vars(configure("slurm", launcher_keys(["hydra/launcher=slurm", *own])[1], own))
    partition, minutes = keys["partition"] or next(iter(limits)), keys["time_min"]
    most = max(limits.get(name, 0.0) for name in partition.split(","))
    if minutes > most:
        warn = f"hydra.launcher.time_min={most:.0f}" if most else f"hydra.launcher.partition={next(iter(limits))}"
    shown = ", ".join(f"{name} {limit:.0f} min".replace("inf min", "no limit") for name, limit in limits.items())
    return found(
        "SLURM", "{partitions}; arrays of {size}; jobs ask for {minutes} min of {partition}", warn=warn,
        partitions=shown, size=slurm.max_array_size(), minutes=minutes, partition=partition,
    )  # fmt: skip


def disk(config: Config) -> Finding:
    """Room and speed of the disk that run directories are made on."""
    folder, about = nearest(Path(config.output_dir)), dict[str, Any](bytes_per_s=0.0, free_gb=0.0)
    try:
        about = {"bytes_per_s": machine.write_rate(folder), "free_gb": shutil.disk_usage(folder).free / 1e9}
    except OSError as error:
        text, reason = "{folder} cannot be written ({reason})", error.strerror
        return found("disk", text, fail="output_dir=<directory>", folder=str(folder), reason=reason, **about)
    text = "{folder}: {gb_per_s:.2f} GB/s written and flushed, {free_gb:.0f} GB free"
    return found("disk", text, folder=str(folder), gb_per_s=about["bytes_per_s"] / 1e9, **about)
