"""Model directories: found on the hub or given by the user, checked before anything is loaded."""

import json
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from pspo.schema import ConfigError

FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "*.model"]
"""What a causal language model needs: configuration, weights, tokenizer. No pickles and no code."""


def locate(hub_id: str) -> Path:
    """The local snapshot of a hub repository, downloaded where it is missing. Raises ConfigError without a network."""
    try:
        directory = Path(snapshot_download(hub_id, allow_patterns=FILES))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ConfigError(
            f"model.hub_id={hub_id} is not in the cache and cannot be downloaded ({type(error).__name__}); "
            f"run `hf download {hub_id}` on a node with internet that shares this cache, or give model.path=<directory>"
        ) from error
    check_directory(directory)
    return directory


def check_directory(directory: Path) -> None:
    """Refuse a directory without configuration, safetensors weights, tokenizer or chat template. Raises ConfigError."""
    need = "a Hugging Face directory with config.json, *.safetensors, a tokenizer and its chat template"
    if not directory.is_dir():
        raise ConfigError(f"model.path={directory} does not exist; give {need}")
    if not (directory / "config.json").is_file():
        raise ConfigError(f"model.path={directory} has no config.json; give {need}")
    if not any(directory.glob("*.safetensors")):
        raise ConfigError(
            f"model.path={directory} has no *.safetensors weights (pickles are not loaded); "
            "save it again with save_pretrained(safe_serialization=True)"
        )
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ConfigError(f"model.path={directory} has no tokenizer (tokenizer.json); save it beside the model")
    settings = directory / "tokenizer_config.json"
    in_settings = settings.is_file() and json.loads(settings.read_text()).get("chat_template")
    if not in_settings and not (directory / "chat_template.jinja").is_file():
        raise ConfigError(
            f"model.path={directory} has no chat template; set tokenizer.chat_template and save the tokenizer again"
        )
