"""The keys of a launcher, from its preset, the cluster's own file and the command line."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pspo.base.schema import ConfigError, build
from pspo.launcher.base import Launcher
from pspo.launcher.local import Local
from pspo.launcher.slurm import Slurm


def configure(kind: str, values: Mapping[str, Any], overrides: Sequence[str]) -> Launcher:
    """The launcher ``slurm`` or ``local`` with ``values`` as composed by Hydra. Raises ConfigError.

    For SLURM the cluster's file comes over the preset, and ``overrides``, those of the command line, over both.
    """
    if kind == "local":
        return build(Local, values)
    given = {override.lstrip("+").partition("=")[0].removeprefix("hydra.launcher.") for override in overrides}
    merged, file = dict(values), cluster_file()
    for name, value in _read(file).items():
        if name == "additional" and isinstance(value, dict):
            merged[name] = value | dict(values[name])
        elif name not in given:
            merged[name] = value
    try:
        return build(Slurm, merged)
    except ConfigError as error:
        raise ConfigError(f"{error}; {file} counts too" if file.is_file() else str(error)) from error


def cluster_file() -> Path:
    """Where the settings of the user's cluster are looked for; it need not exist, unless $PSPO_CLUSTER names it."""
    told = os.environ.get("PSPO_CLUSTER")
    if told is not None and not Path(told).is_file():
        raise ConfigError(f"PSPO_CLUSTER={told}: there is no such file; make it, or unset the variable")
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(told) if told is not None else Path(home) / "pspo" / "cluster.yaml"


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values or {}, dict):
        raise ConfigError(f"{file} must hold keys of hydra.launcher, such as partition: gpu")
    return dict(values or {})
