"""Model directories: found on the hub or given by the user, checked before anything is loaded."""

import json
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HFValidationError,
    HTTPError,  # the base of all errors of the HTTP client that the library uses
    LocalEntryNotFoundError,
)

from pspo.schema import ConfigError

FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "*.model"]
"""What a causal language model needs: configuration, weights, tokenizer. No pickles and no code."""


def locate(hub_id: str) -> Path:
    """The local snapshot of a hub repository; only what the cache lacks is downloaded. Raises ConfigError.

    The cache comes first: all arms of a comparison get one snapshot, and a compute node does not wait for a network
    that drops its packets (huggingface_hub 2.4.0 asks for the newest revision without a timeout).
    """
    try:
        return _snapshot(hub_id, local_files_only=True)
    except (LocalEntryNotFoundError, ConfigError):
        pass  # not in the cache, or only in part
    try:
        return _snapshot(hub_id)
    except (LocalEntryNotFoundError, HTTPError) as error:
        raise ConfigError(
            f"model.hub_id={hub_id} is not in the cache and cannot be downloaded ({type(error).__name__}); "
            f"run `hf download {hub_id}` on a node with internet that shares this cache, or give model.path=<directory>"
        ) from error


def _snapshot(hub_id: str, local_files_only: bool = False) -> Path:
    try:
        directory = Path(snapshot_download(hub_id, allow_patterns=FILES, local_files_only=local_files_only))
    except HFValidationError as error:
        raise ConfigError(f"model.hub_id={hub_id} is no name of a repository, such as Qwen/Qwen2.5-0.5B") from error
    check_directory(directory, f"model.hub_id={hub_id}")
    return directory


def check_directory(directory: Path, source: str | None = None) -> None:
    """Refuse a directory without configuration, safetensors weights, tokenizer or chat template. Raises ConfigError."""
    source = source or f"model.path={directory}"
    need = "a Hugging Face directory with config.json, *.safetensors, a tokenizer and its chat template"
    if not directory.is_dir():
        raise ConfigError(f"{source} does not exist; give {need}")
    if not (directory / "config.json").is_file():
        raise ConfigError(f"{source} has no config.json; give {need}")
    if not any(directory.glob("*.safetensors")):
        raise ConfigError(
            f"{source} has no *.safetensors weights (pickles are not loaded); "
            "save it again with save_pretrained(safe_serialization=True)"
        )
    index = directory / "model.safetensors.index.json"
    shards = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    missing = sorted(shard for shard in shards if not (directory / shard).is_file())
    if missing:
        raise ConfigError(f"{source} has no {missing[0]}, which {index.name} names; copy or download it again")
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ConfigError(f"{source} has no tokenizer (tokenizer.json); save it beside the model")
    settings = directory / "tokenizer_config.json"
    in_settings = settings.is_file() and json.loads(settings.read_text()).get("chat_template")
    if not in_settings and not (directory / "chat_template.jinja").is_file():
        raise ConfigError(f"{source} has no chat template; set tokenizer.chat_template and save the tokenizer again")
