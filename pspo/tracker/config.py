"""The settings of the tracker."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

from pspo.base.schema import Schema, key


@dataclass(frozen=True, kw_only=True)
class TrackerConfig(Schema, block="tracker"):
    """Where metrics go besides ``metrics.jsonl``, which is always written."""

    name: Literal["jsonl", "wandb"] = key("jsonl: metrics.jsonl alone; wandb: mirrored to Weights & Biases as well")

    @classmethod
    def select(cls, values: Mapping[str, Any]) -> type[Self]:
        """``WandbConfig`` unless the name is jsonl, which has no other keys."""
        return cls if values.get("name") == "jsonl" else cast(type[Self], WandbConfig)


@dataclass(frozen=True, kw_only=True)
class WandbConfig(TrackerConfig, block="tracker"):
    """Weights & Biases; WANDB_MODE, WANDB_API_KEY and ``wandb login`` decide whether a run sends rows itself."""

    project: str = key("W&B project")
    entity: str | None = key("W&B user or team; null takes the login's own")
