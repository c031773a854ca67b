"""How long a run trains: exactly one of steps, prompts or completion tokens."""

from dataclasses import dataclass

from pspo.base.schema import ConfigError, Schema, key


@dataclass
class Progress:
    """Counters of a run so far; every counter is logged, whichever the budget limits."""

    steps: int = 0
    prompts: int = 0  # sampled from
    completion_tokens: int = 0
    prompts_used: int = 0  # trained on: fewer than sampled from under dynamic sampling
    optimizer_steps: int = 0

    def metrics(self) -> dict[str, float]:
        """The counters as ``budget/*`` metrics."""
        return {f"budget/{name}": value for name, value in vars(self).items()}


def gpu_hours(num_runs: int, hours_per_run: float, gpus_per_run: int = 1) -> float:
    """What runs cost, in GPU-hours: in a sweep's dry run, for the published table and in ``pspo.doctor``."""
    return num_runs * hours_per_run * gpus_per_run


@dataclass(frozen=True, kw_only=True)
class Budget(Schema, block="budget"):
    """The length of a run. A step is one rollout with all its updates."""

    steps: int | None = key("rollouts, each with all its updates; 0 evaluates only", within="[0, inf)")
    prompts: int | None = key("prompts sampled from", within="[1, inf)")
    completion_tokens: int | None = key("tokens sampled", within="[1, inf)")

    def __post_init__(self) -> None:
        super().__post_init__()
        limits = {name: value for name, value in vars(self).items() if value is not None}
        if len(limits) != 1:
            got = ", ".join(f"budget.{name}={value}" for name, value in limits.items()) or "none"
            raise ConfigError(
                f"give exactly one of budget.steps, budget.prompts and budget.completion_tokens, got {got}; "
                "set the others to null"
            )

    @property
    def unit(self) -> str:
        """The counter of ``Progress`` that this budget limits."""
        return next(name for name, value in vars(self).items() if value is not None)

    @property
    def total(self) -> int:
        """The budget in ``unit``; a run ends with the step that reaches it, and may exceed it by part of that step."""
        return int(getattr(self, self.unit))

    def fraction(self, progress: Progress) -> float:
        """The share of the budget spent, in [0, 1]."""
        return min(1.0, getattr(progress, self.unit) / self.total) if self.total else 1.0

    def spent(self, progress: Progress) -> bool:
        """Whether the budget is spent."""
        return bool(getattr(progress, self.unit) >= self.total)
