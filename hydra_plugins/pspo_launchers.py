"""What Hydra finds of pspo: two launchers and a sweeper, over ``pspo.launcher`` and ``pspo.sweep``.

Hydra imports this file whenever it starts, in other applications too, so that pspo is imported in the methods alone.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict, read_write

if TYPE_CHECKING:
    from pspo.launcher import Planned

BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"


class SlurmLauncher(Launcher):
    """``hydra/launcher=slurm``: one array of jobs."""

    kind: ClassVar[str] = "slurm"

    def __init__(self, **values: Any) -> None:
        self.values = values
        self.planned: list[Planned] | None = None  # by our sweeper, which has composed every job already

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Check the launcher and its keys, before any job is looked at or anything is written. Raises ConfigError."""
        from pspo.launcher import configure

        self.settings = configure(self.kind, self.values, config.hydra.overrides.hydra)
        self.settings.check()

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit, or run; what is not waited for counts as completed without a value."""
        from pspo.launcher import RunsFailed, make_plan

        planned, self.planned = self.planned or make_plan(job_overrides), None
        outcomes = self.settings.launch(planned)
        return [
            JobReturn(
                overrides=run.overrides,
                status=JobStatus.FAILED if isinstance(outcome, RunsFailed) else JobStatus.COMPLETED,
                _return_value=outcome,
            )
            for run, outcome in zip(planned, outcomes, strict=True)
        ]


class LocalLauncher(SlurmLauncher):
    """``hydra/launcher=local``: slots on this machine."""

    kind = "local"


class Arms(Sweeper):
    """The products of lists, and of the arms of a file in ``sweeps/``; for every launcher, Hydra's own too."""

    def __init__(self, file: str | None) -> None:
        self.file = file

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Make the launcher. ``hydra.launcher.dry_run`` is a key of ours that Hydra's own gets as well."""
        from pspo.base.schema import ConfigError

        self.loader, launcher, self.dry_run = hydra_context.config_loader, config.hydra.launcher, False
        if launcher._target_ == BASIC:
            with read_write(launcher), open_dict(launcher):
                self.dry_run = bool(launcher.pop("dry_run", False))
            for name in set(launcher) - {"_target_"}:
                raise ConfigError(
                    f"hydra.launcher.{name}: hydra/launcher=basic knows dry_run alone; take local or slurm"
                )
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Compose and check every job, then hand all to the launcher. Raises ConfigError."""
        from pspo import launcher, sweep

        jobs = sweep.expand(self.file, arguments, self.loader)
        planned = sweep.plan(self.file, jobs)
        chosen, dry_run = self.launcher, self.dry_run
        if isinstance(chosen, SlurmLauncher):
            chosen.planned, dry_run = planned, chosen.settings.dry_run
        elif dry_run:
            launcher.show(planned)
            return []
        if self.file and not dry_run:
            sweep.record(self.file, planned)
        assert chosen is not None
        returns = chosen.launch([launcher.open_keys(run.overrides) for run in planned], initial_job_idx=0)
        for job in returns:
            if job.status == JobStatus.FAILED:
                raise job._return_value  # the error itself, without Hydra's line before it
        return returns
