"""Where the runs of a sweep are made: in arrays of SLURM jobs, or in slots on this machine; and a launcher's keys.

``hydra_plugins/`` hands these launchers to Hydra.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pspo.base.files import read_keys
from pspo.base.schema import ConfigError, build
from pspo.config import open_keys
from pspo.launcher.base import Launcher, Planned, RunsFailed, make_plan, show
from pspo.launcher.local import Local
from pspo.launcher.slurm import Job, Slurm

__all__ = ["Job", "Planned", "RunsFailed", "configure", "make_plan", "open_keys", "show"]


def configure(kind: str, values: Mapping[str, Any], overrides: Sequence[str]) -> Launcher:
    """The launcher ``slurm`` or ``local`` with ``values`` as composed by Hydra. Raises ConfigError.

    For SLURM the cluster's file, ~/.config/pspo/cluster.yaml unless $PSPO_CLUSTER names it, counts more than the
    preset, and the command line's ``overrides`` more than both.
    """
    if kind == "local":
        return build(Local, values)
    home, named = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config", os.environ.get("PSPO_CLUSTER")
    file = Path(named or Path(home, "pspo", "cluster.yaml"))
    if named and not file.is_file():
        raise ConfigError(f"PSPO_CLUSTER={named}: there is no such file; make it, or unset the variable")
    own = read_keys(file, " of hydra.launcher, such as partition: gpu") if file.is_file() else {}
    names = {override.lstrip("+").partition("=")[0].removeprefix("hydra.launcher.") for override in overrides}
    merged = dict(values) | {name: value for name, value in own.items() if name not in names}
    if isinstance(additional := own.get("additional"), dict):
        merged["additional"] = additional | dict(values["additional"])
    try:
        return build(Slurm, merged)
    except ConfigError as error:
        raise ConfigError(f"{error}; {file} counts too" if file.is_file() else str(error)) from error
