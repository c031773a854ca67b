"""The whole configuration: its schemas, the checks across blocks, and what names a run."""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pspo import dataset, model
from pspo.advantage import Advantage
from pspo.base.files import read_yaml
from pspo.base.schema import ConfigError, Schema, as_dict, build, key
from pspo.budget import Budget
from pspo.checkpoint import Checkpoint
from pspo.dataset import DatasetConfig
from pspo.diagnostics import DiagnosticsConfig
from pspo.evaluate import EvaluateConfig
from pspo.loss import LossConfig
from pspo.model import ModelConfig
from pspo.objective import Objective, default_objective
from pspo.optimizer import Optimizer
from pspo.reward import Reward
from pspo.rollout import RolloutConfig
from pspo.smoothing import Smoothing
from pspo.tracker import TrackerConfig
from pspo.update import UpdateConfig


@dataclass(frozen=True, kw_only=True)
class Config(Schema):
    """The settings of one run. Every block stands in the module of its name."""

    group: str = key("directory under output_dir, and group in the tracker, that holds the runs of one comparison")
    output_dir: str = key("where run directories are made", path=True)
    seed: int = key("of the warm start, the data order, the samples and the minibatches", within="[0, 4294967295]")
    device: Literal["auto", "cpu", "cuda"] = key("auto takes a GPU where there is one")
    threads: int | None = key("CPU threads; null takes the processors that this process may use", within="[1, inf)")
    selection: Literal["last", "best"] = key("weights kept at the end: the last, or the best by validation reward")
    rerun: Literal["never", "changed", "all", "resume"] = key(
        "earlier runs to move aside and make anew: never; changed: where code, data, reward or model has changed; all: "
        "all finished ones too; resume: none, and unfinished ones go on although data, reward or model has changed"
    )
    continue_from: str | None = key(
        "directory of a finished run to continue with a longer budget, all other settings being that run's; or null",
        path=True,
    )
    model: ModelConfig
    dataset: DatasetConfig
    reward: Reward
    objective: Objective
    smoothing: Smoothing
    advantage: Advantage
    loss: LossConfig
    rollout: RolloutConfig
    update: UpdateConfig
    optimizer: Optimizer
    budget: Budget
    evaluate: EvaluateConfig
    diagnostics: DiagnosticsConfig
    checkpoint: Checkpoint
    tracker: TrackerConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[\w.+-]+", self.group):
            raise self.refuse("group", "names a directory; use letters, digits, _ . + -")
        if self.selection == "best" and self.dataset.num_validation == 0:
            raise self.refuse("selection", "needs validation problems; set dataset.num_validation")
        rows = self.rollout.prompts * self.rollout.group_size
        if self.update.num_minibatches > rows:
            raise ConfigError(
                f"update.num_minibatches={self.update.num_minibatches} must be at most the {rows} completions of a "
                "step (rollout.prompts x rollout.group_size)"
            )
        self.loss.check(self.objective, self.advantage)
        if self.smoothing.name == "adaptive" and self.diagnostics.every != 1:
            raise self.diagnostics.refuse("every", "smoothing=adaptive is steered by them; set diagnostics.every=1")
        for name in self.diagnostics.counterfactual if self.diagnostics.counterfactual_every else []:
            self.loss.check(default_objective(name), self.advantage)


NOT_SCIENCE = (
    "group", "output_dir", "device", "threads", "rerun", "continue_from", "checkpoint", "tracker", "diagnostics",
)  # fmt: skip
"""Keys and blocks that do not name a run: where it is made, how it is saved and watched, not what is trained."""

ONLY_MEMORY = {"rollout": ("max_rows",), "update": ("max_tokens",), "model": ("gradient_checkpointing",)}
"""Keys that bound memory and change results by rounding alone, so that a run may be resumed with lower values."""


def read(path: Path) -> Config:
    """The configuration of an earlier run, from its ``config.yaml``. Raises ConfigError, also for another version's."""
    try:
        return build(Config, read_yaml(path))
    except ConfigError as error:
        raise ConfigError(f"{path} was written by another version of pspo, with other keys: {error}") from error


def science(config: Config) -> dict[str, Any]:
    """The settings that name a run: the configuration without ``NOT_SCIENCE`` and ``ONLY_MEMORY``."""
    values = {name: value for name, value in as_dict(config).items() if name not in NOT_SCIENCE}
    if config.smoothing.constant:  # its alpha stands in the objective
        del values["smoothing"]
    values["evaluate"] = {"every": config.evaluate.every}  # selection=best goes by it; answers change no weights
    for block, names in ONLY_MEMORY.items():
        values[block] = {name: value for name, value in values[block].items() if name not in names}
    return values


def identity(config: Config) -> str:
    """Eight hexadecimal digits of the digest of ``science``."""
    return hashlib.sha256(json.dumps(science(config), sort_keys=True).encode()).hexdigest()[:8]


def check(config: Config) -> None:
    """Refuse a directory that cannot be written, and a data set, model or reward that is missing. Raises ConfigError.

    On a login node too, before anything is loaded, written or submitted, without network; imports a user's own code.
    """
    parent = Path(config.output_dir, config.group).absolute()
    nearest = next(path for path in (parent, *parent.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"output_dir={config.output_dir}: cannot write in {nearest}; set output_dir=<directory>")
    dataset.check(config.dataset, training=bool(config.budget.total))
    for name in config.evaluate.sets or []:
        if name != "validation":
            dataset.check_set(name, config.evaluate.path)
    config.reward.check()
    if config.model.path is not None:  # the hub's cache may lie where only the jobs see it
        model.check(config.model)
