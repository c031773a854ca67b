"""Repositories of the Hugging Face hub: from the cache where they are whole there, else downloaded."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import errors, snapshot_download

from pspo.base.schema import ConfigError


def commit(repo: str, kind: str, words: str) -> str:
    """The commit of the cached snapshot of ``repo``; no network. Raises ConfigError where the cache has none."""
    try:
        return Path(snapshot_download(repo, repo_type=kind, local_files_only=True)).name
    except errors.LocalEntryNotFoundError as error:
        raise ConfigError(f"{words} is not in the cache; run `python -m pspo.prefetch {words}`") from error


def locate(repo: str, patterns: list[str], test: Callable[[Path], object], words: str, kind: str, instead: str) -> Path:
    """The local snapshot of ``repo``, a "model" or "dataset"; ``test`` raises ConfigError where files are missing.

    The cache comes first: all arms of a comparison get one snapshot, and a compute node does not wait for a network
    that drops its packets. Errors quote ``words``, the overrides that choose the repository, and ``instead``, a remedy.
    """

    def snapshot(local_files_only: bool) -> Path:
        path = Path(snapshot_download(repo, repo_type=kind, allow_patterns=patterns, local_files_only=local_files_only))
        test(path)
        return path

    try:
        with contextlib.suppress(errors.LocalEntryNotFoundError, ConfigError):  # not in the cache, or only in part
            return snapshot(local_files_only=True)
        return snapshot(local_files_only=False)
    except errors.HFValidationError as error:
        raise ConfigError(f"{words} is no name of a repository, such as Qwen/Qwen2.5-0.5B") from error
    except (errors.LocalEntryNotFoundError, errors.HTTPError) as error:  # type: ignore[attr-defined]  # httpx's base
        reason = f"is not in the cache and cannot be downloaded ({type(error).__name__})"
        remedy = f"run `python -m pspo.prefetch {words}` on a node with internet that shares this cache (HF_HOME)"
        raise ConfigError(f"{words} {reason}; {remedy}, or {instead}") from error
