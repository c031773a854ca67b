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

    For SLURM the cluster's file counts more than the preset, and the command line's ``overrides`` more than both.
    """
    if kind == "local":
        return build(Local, values)
    file = _cluster_file()
    own = read_keys(file, " of hydra.launcher, such as partition: gpu") if file.is_file() else {}
    names = {override.lstrip("+").partition("=")[0].removeprefix("hydra.launcher.") for override in overrides}
    merged = dict(values) | {name: value for name, value in own.items() if name not in names}
    if isinstance(additional := own.get("additional"), dict):
        merged["additional"] = additional | dict(values["additional"])
    try:
        return build(Slurm, merged)
    except ConfigError as error:
        raise ConfigError(f"{error}; {file} counts too" if file.is_file() else str(error)) from error


def _cluster_file() -> Path:
    """The file with the settings of the user's cluster, which need not exist, unless $PSPO_CLUSTER names it."""
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    named = os.environ.get("PSPO_CLUSTER")
    if named is not None and not Path(named).is_file():
        raise ConfigError(f"PSPO_CLUSTER={named}: there is no such file; make it, or unset the variable")
    return Path(home, "pspo", "cluster.yaml") if named is None else Path(named)


def read_keys(file: Path, which: str, loader: Any = yaml.SafeLoader) -> dict[str, Any]:
    """The content of a YAML file, {} where it is empty. Raises ConfigError, which says ``which`` keys belong there."""
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Loader=loader) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold keys{which}")
    return values
