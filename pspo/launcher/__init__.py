"""Where the runs of a sweep are made: in arrays of SLURM jobs, or in slots on this machine.

``hydra_plugins/`` hands these launchers to Hydra.
"""

from pspo.config import open_keys
from pspo.launcher.base import Planned, RunsFailed, make_plan, show
from pspo.launcher.settings import configure
from pspo.launcher.slurm import Job

__all__ = ["Job", "Planned", "RunsFailed", "configure", "make_plan", "open_keys", "show"]
