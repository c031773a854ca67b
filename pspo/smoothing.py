"""How alpha is given over time; the options under ``conf/smoothing`` set ``objective.alpha``."""

from dataclasses import dataclass
from typing import Literal

from pspo.schema import Schema, key


@dataclass(frozen=True, kw_only=True)
class Smoothing(Schema, block="smoothing"):
    """Which preset of ``objective.alpha`` was chosen."""

    name: Literal["none", "light", "paper", "strong"] = key("none leaves alpha to the objective")
    alpha: float | None = key("what the preset sets objective.alpha to", within="[0, 1)")
