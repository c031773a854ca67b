"""Hugging Face folders of models: reading a folder, and a cache of folders that this machine makes once and reuses."""

import hashlib
import importlib.metadata
import logging
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from pspo.base.files import digest, new_directory
from pspo.base.schema import ConfigError

log = logging.getLogger("pspo")


def read_tokenizer(directory: Path, **options: Any) -> Any:
    """The tokenizer of a folder, or with ``gguf_file`` of a file in it."""
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, **options)
    tokenizer.init_kwargs.pop("local_files_only", None)  # so that a saved tokenizer does not hold it
    return tokenizer


def read_model(directory: Path, dtype: torch.dtype, **options: Any) -> Any:
    """The model of a folder, every weight of it read from there and none drawn at random. Raises ConfigError."""
    options = {"trust_remote_code": False, "use_safetensors": True, "ignore_mismatched_sizes": True} | options
    try:
        read: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True, **options)
    except SafetensorError as error:
        raise ConfigError(f"{directory}: its weights cannot be read ({error}); copy or download them again") from error
    model, info = read
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


def converted(path: Path, setting: str) -> Path:
    """The folder of a GGUF file's model, dequantized to float32 on first use; ``setting`` is the key and its value.

    Raises ConfigError where transformers cannot read the file.
    """
    versions = [importlib.metadata.version(package) for package in ("transformers", "gguf")]
    content = [*versions, digest(path), digest(Path(__file__))]
    name = hashlib.sha256("\n".join(content).encode()).hexdigest()[:16]
    return made_once("gguf", name, lambda directory: _convert(path, setting, directory))


def _convert(path: Path, setting: str, directory: Path) -> None:
    try:
        tokenizer = read_tokenizer(path.parent, gguf_file=path.name)
        model = read_model(path.parent, torch.float32, gguf_file=path.name)
    except (ValueError, KeyError, NotImplementedError, struct.error) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ConfigError(f"{setting} cannot be read by transformers ({reason}); choose another") from error
    model.hf_quantizer = None  # the weights are plain float32 now, which save_pretrained would not believe
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
