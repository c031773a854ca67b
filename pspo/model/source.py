"""Model directories, the hub's or the user's own, are checked before anything is loaded."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import try_to_load_from_cache

from pspo.base.files import digest
from pspo.base.schema import ConfigError
from pspo.host import hub

if TYPE_CHECKING:
    from pspo.model.policy import Model

FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "*.model"]
"""What a causal language model needs: configuration, weights, tokenizer. No pickles and no code."""


def locate(hub_id: str) -> Path:
    """The local snapshot of a model on the hub. Raises ConfigError where it cannot be had."""
    asked = f"model.hub_id={hub_id}"
    return hub.locate(
        hub_id,
        FILES,
        lambda directory: check_directory(directory, asked),
        asked=asked,
        kind="model",
        instead="give model.path=<directory>",
    )


def digests(config: "Model") -> dict[str, str]:
    """What the weights and the tokenizer are: SHA-256 of each file of ``model.path``, or the commit on the hub.

    Empty for the embedded policy, which the configuration alone determines. Asks no network: raises ConfigError where
    the hub's cache has no such model.
    """
    if config.path is not None:
        folder = Path(config.path).expanduser()
        return {str(path): digest(path) for pattern in FILES for path in sorted(folder.glob(pattern))}
    if config.hub_id is None:
        return {}
    cached = try_to_load_from_cache(config.hub_id, "config.json")
    if not isinstance(cached, str):
        raise ConfigError(f"model.hub_id={config.hub_id} is not in the cache; run `python -m pspo.prefetch`")
    return {config.hub_id: hub.commit(Path(cached).parent)}


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
    shards = set(_read(index).get("weight_map", {}).values())
    missing = sorted(shard for shard in shards if not (directory / shard).is_file())
    if missing:
        raise ConfigError(f"{source} has no {missing[0]}, which {index.name} names; copy or download it again")
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ConfigError(f"{source} has no tokenizer (tokenizer.json); save it beside the model")
    settings = directory / "tokenizer_config.json"
    if not _read(settings).get("chat_template") and not (directory / "chat_template.jinja").is_file():
        raise ConfigError(f"{source} has no chat template; set tokenizer.chat_template and save the tokenizer again")


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); copy or download it again") from error
