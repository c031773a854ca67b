"""Alpha over the steps of a run: constant presets, a schedule, or a controller, which steers other weights as well."""

import math
from dataclasses import dataclass
from typing import ClassVar, Self

from pspo.base.schema import Schema, key

WEIGHT_GAIN, WEIGHT_REACH = 0.5, 1e3
"""Of a steered weight: the largest change of its logarithm in one step, and its largest distance as a factor."""


@dataclass(frozen=True, kw_only=True)
class Controller:
    """Moves a value in [low, high] after every step so that a measurement comes to its target.

    The value, or with ``odds`` value / (1 − value), is multiplied by exp(gain · e), e = clip(measured / target − 1, −1,
    1): the proportional controller in log space that Ziegler et al. 2019 (arXiv 1909.08593, section 2.2) put on the
    weight of a KL. What grows with the value must bring the measurement down.
    """

    target: float
    gain: float
    low: float
    high: float
    odds: bool = False

    @classmethod
    def of_weight(cls, first: float, target: float) -> Self:
        """For a weight of the loss that begins at ``first``."""
        return cls(target=target, gain=WEIGHT_GAIN, low=first / WEIGHT_REACH, high=first * WEIGHT_REACH)

    def next(self, value: float, measured: float | None) -> float:
        """The value of the next step; as it is where nothing was measured."""
        if measured is None:
            return value
        error = min(1.0, max(-1.0, measured / self.target - 1)) if math.isfinite(measured) else 1.0
        within = min(self.high, max(self.low, value))
        moved = (within / (1 - within) if self.odds else within) * math.exp(self.gain * error)
        return min(self.high, max(self.low, moved / (1 + moved) if self.odds else moved))


@dataclass(frozen=True, kw_only=True)
class Smoothing(Schema, block="smoothing"):
    """A constant alpha: the objective's own under ``none``, set by ``light``, ``paper`` and ``strong``."""

    name: str
    alpha: float | None = key("what a preset sets objective.alpha to, or null", within="[0, 1)")
    constant: ClassVar[bool] = True

    def next_alpha(self, first: float, alpha: float, fraction: float, kl: float | None) -> float:
        """Alpha of the next step, from objective.alpha, the last step's alpha and the share of the budget spent.

        ``kl`` is KL(old‖new), k3, in nats per token, after the step's last update; None where it was not measured.
        """
        return alpha


@dataclass(frozen=True, kw_only=True)
class Linear(Smoothing):
    """α = α₀ + (α₁ − α₀) f, where f is the share of the budget spent and α₀ is objective.alpha."""

    constant: ClassVar[bool] = False
    final: float = key("α₁: alpha at the end of the budget", within="[0, 1)")

    def next_alpha(self, first: float, alpha: float, fraction: float, kl: float | None) -> float:
        return first + (self.final - first) * fraction


@dataclass(frozen=True, kw_only=True)
class Adaptive(Smoothing):
    """Odds of alpha times exp(gain · e) after every step, e = clip(KL / target − 1, −1, 1); alpha in [low, high].

    ``Controller`` on α / (1 − α): a policy that moves too far is smoothed more.
    """

    constant: ClassVar[bool] = False
    target_kl: float = key("KL(old‖new), nats per token, to hold after the last update of a step", within="(0, inf)")
    gain: float = key("largest change of the log-odds of alpha in one step", within="(0, inf)")
    low: float = key("smallest alpha", within="(0, 1)")
    high: float = key("largest alpha", within="(0, 1)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low >= self.high:
            raise self.refuse("low", f"must be below smoothing.high={self.high!r}")

    def next_alpha(self, first: float, alpha: float, fraction: float, kl: float | None) -> float:
        controller = Controller(target=self.target_kl, gain=self.gain, low=self.low, high=self.high, odds=True)
        return controller.next(alpha, kl)


SMOOTHINGS = dict.fromkeys(("none", "light", "paper", "strong"), Smoothing) | {"linear": Linear, "adaptive": Adaptive}
Smoothing.kinds = SMOOTHINGS
