"""Where the runs of a sweep are made: an array of SLURM jobs, or slots on this machine. ``hydra_plugins`` hands them to Hydra."""

from pspo.launcher.base import Launcher, RunsFailed
from pspo.launcher.job import Job
from pspo.launcher.local import Local
from pspo.launcher.plan import Planned, make_plan, show
from pspo.launcher.slurm import Slurm

__all__ = ["Job", "Launcher", "Local", "Planned", "RunsFailed", "Slurm", "make_plan", "show"]
