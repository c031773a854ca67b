"""Checkpoints at step boundaries: written, flushed, digested, renamed; a run resumes from the newest whole one."""

import contextlib
import hashlib
import logging
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pspo import __version__
from pspo.base.files import SaveError, new_directory, read_json, write_json
from pspo.base.schema import ConfigError, Schema, key
from pspo.model import Policy

log = logging.getLogger("pspo")


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Schema, block="checkpoint"):
    """How often a run can be resumed from."""

    every: int = key("steps from one checkpoint to the next; the last step always has one", within="[1, inf)")
    keep: int = key("newest checkpoints on the disk; older ones are deleted", within="[1, inf)")


FORMAT = 4  # version of the content of ``state.pt``; a checkpoint of another format is refused


def save(directory: Path, name: str, state: dict[str, Any], about: dict[str, Any]) -> None:
    """Write ``directory/name/``: ``state.pt``, and ``meta.json`` with its digest and ``about``. Raises SaveError."""
    try:
        with new_directory(directory / name) as new:
            with (new / "state.pt").open("wb") as file:
                torch.save(state, file)
            meta = {"format": FORMAT, "version": __version__, "sha256": _sha256(new / "state.pt")}
            write_json(new / "meta.json", meta | about)
    except (OSError, RuntimeError) as error:  # torch.save wraps an OSError of the file in a RuntimeError
        whole = [path for path in _steps(directory) if _read_meta(path) is not None]
        raise SaveError(
            f"cannot save {directory / name} ({_cause(error)}); "
            + (f"the last good checkpoint is {whole[0]}" if whole else "there is no earlier checkpoint")
            + "; make room or mend the permissions, then run the same command again to resume"
        ) from error


def prune(directory: Path, keep: int, best: int = 0) -> None:
    """Delete all but the newest ``keep`` checkpoints of steps and the best one, and what interrupted saves left."""
    others = [path for path in directory.glob("best_*") if path.name != f"best_{best:06d}"]
    for path in [*_steps(directory)[keep:], *others, *directory.glob(".step_*"), *directory.glob(".best_*")]:
        shutil.rmtree(path)


def names(directory: Path) -> list[str]:
    """Names of the checkpoints of steps, newest first, whole or torn."""
    return [path.name for path in _steps(directory)]


def check(directory: Path, identity: str) -> None:
    """Refuse checkpoints that the run ``identity`` cannot resume from. Raises ConfigError; reads no more than meta."""
    for path in _steps(directory):
        meta, reason = read_json(path / "meta.json"), ""
        if meta and meta.get("format") != FORMAT:
            by = f"pspo {meta.get('version')} in format {meta.get('format')}"
            reason = f"was saved by {by}, and this pspo {__version__} reads format {FORMAT}; resume with that version"
        elif meta and meta.get("identity") != identity:
            reason = f"is a checkpoint of another configuration ({meta.get('identity')}) than this run's ({identity})"
        if reason:  # a torn checkpoint will be passed over
            raise ConfigError(f"{path} {reason}, move the run directory away, or set another group")


def newest(directory: Path) -> tuple[Path, dict[str, Any], dict[str, Any]] | None:
    """The newest checkpoint that is whole: its path, state and meta. Torn ones are passed over with a warning."""
    loaded = ((path, load(path)) for path in _steps(directory))
    return next(((path, *whole) for path, whole in loaded if whole is not None), None)


def load(path: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """State and meta of one checkpoint, or None (with a warning) where it does not match its digest."""
    meta = _read_meta(path)
    return None if meta is None else (torch.load(path / "state.pt", map_location="cpu", weights_only=True), meta)


def _read_meta(path: Path) -> dict[str, Any] | None:
    meta = read_json(path / "meta.json")
    with contextlib.suppress(OSError):
        if meta and _sha256(path / "state.pt") == meta.get("sha256"):
            return meta
    log.warning("passing over checkpoint %s: its digest does not match; it is torn or was changed", path)
    return None


def _sha256(path: Path) -> str:  # not ``files.digest``, which would take equal time and size for an equal file
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seed_global_generators(seed: int) -> None:
    """Seed torch, NumPy and Python. This package draws from none of them, but a user's reward or an adapter may."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def random_state() -> dict[str, Any]:
    """The states of the global generators."""
    name, words, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (name, np.asarray(words).tolist(), *rest),
        "python": random.getstate(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Undo ``random_state``."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


def random_state_kept() -> contextlib.ExitStack:
    """A context that puts the global generators back as they were before it, however its block ends."""
    context = contextlib.ExitStack()
    context.callback(restore_random_state, random_state())
    return context


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    """The trained parameters, by name."""
    return {name: parameter.detach() for name, parameter in policy.trainable().items()}


def load_whole(path: Path) -> dict[str, Any]:
    """The state of one checkpoint. Raises SaveError where the checkpoint is torn or missing."""
    if (loaded := load(path)) is None:
        raise SaveError(f"{path} cannot be read; choose another checkpoint, or move the run directory away")
    return loaded[0]


def load_weights(policy: Policy, path: Path) -> None:
    """Put the weights of one checkpoint into the policy. Raises SaveError where the checkpoint is torn or missing."""
    restore_weights(policy, load_whole(path)["weights"])


@torch.no_grad()
def restore_weights(policy: Policy, saved: dict[str, torch.Tensor]) -> None:
    """Copy saved parameters into the policy."""
    for name, parameter in policy.trainable().items():
        parameter.copy_(saved[name])


def _steps(directory: Path) -> list[Path]:
    return sorted(directory.glob("step_*"), reverse=True)


def _cause(error: BaseException) -> str:
    while not isinstance(error, OSError) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__ or error
    return error.strerror or str(error) if isinstance(error, OSError) else str(error).partition("\n")[0]
