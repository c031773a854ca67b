"""The tracker of a run and its keys: one JSON line per step in ``metrics.jsonl``, and the same rows to a mirror."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pspo.base.files import JsonLines
from pspo.base.schema import Schema, key
from pspo.tracker.wandb import Mirror


@dataclass(frozen=True, kw_only=True)
class TrackerConfig(Schema, block="tracker"):
    """Where metrics go besides ``metrics.jsonl``, which is always written."""

    name: str = key("jsonl: metrics.jsonl alone; wandb: mirrored to Weights & Biases as well")


@dataclass(frozen=True, kw_only=True)
class WandbConfig(TrackerConfig, block="tracker"):
    """Weights & Biases; WANDB_MODE, WANDB_API_KEY and ``wandb login`` decide whether a run sends rows itself."""

    project: str = key("W&B project")
    entity: str | None = key("W&B user or team; null takes the login's own")


TrackerConfig.kinds = {"jsonl": TrackerConfig, "wandb": WandbConfig}


class Tracker:
    """Writes the metrics of one run directory, whose ``config.yaml`` a mirror reads.

    W&B gets a row when the checkpoint that contains the row is durable, so a step that a crash takes back is never
    sent. Call ``rewind`` once before the first ``log`` when the directory may hold an earlier attempt.
    """

    def __init__(self, config: TrackerConfig, directory: Path) -> None:
        self._lines = JsonLines(directory / "metrics.jsonl")
        self._pending: list[dict[str, Any]] = []
        mirrored = isinstance(config, WandbConfig) and os.environ.get("WANDB_MODE") != "disabled"
        self._mirror = Mirror(directory) if mirrored else None

    def log(self, metrics: Mapping[str, float | int], step: int) -> None:
        """Append the row of ``step``. JSON has no NaN or infinity: they are written as null."""
        row: dict[str, Any] = {"step": step}
        row |= {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._lines.append(row)
        self._pending.append(row)

    def state(self) -> dict[str, int]:
        """What a checkpoint stores: the number of rows in ``metrics.jsonl``, flushed to the disk."""
        return {"metrics_rows": self._lines.sync()}

    def rewind(self, state: Mapping[str, int] | None) -> None:
        """Cut ``metrics.jsonl`` back to a checkpoint's ``state`` (None: to nothing) and send W&B the rows it lacks.

        Raises ValueError if the file is shorter than the checkpoint says.
        """
        num_rows, path = state["metrics_rows"] if state else 0, self._lines.path
        if self._lines.num_rows() < num_rows:
            raise ValueError(f"{path} is shorter than its checkpoint says ({num_rows} rows); restore it or start anew")
        self._lines.cut(num_rows)
        self._pending = self._lines.rows()
        if self._pending:
            self.commit(self._pending[-1]["step"])

    def commit(self, step: int) -> None:
        """Send W&B the rows up to ``step``; call it when the checkpoint that contains them is durable."""
        rows = [row for row in self._pending if row["step"] <= step]
        self._pending = [row for row in self._pending if row["step"] > step]
        if self._mirror is not None:
            self._mirror.send(rows)

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Put final numbers into the W&B summary, nested keys joined by ``/``."""
        if self._mirror is not None:
            self._mirror.summarize(summary)

    def close(self, exit_code: int = 0) -> None:
        """Finish the W&B run, in bounded time; rows not committed are not sent. May be called twice."""
        mirror, self._mirror = self._mirror, None
        if mirror is not None:
            mirror.close(exit_code)
