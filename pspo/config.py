"""The whole configuration: its schemas, the rejection of what does not fit, and the name of a run's directory."""

import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from pspo import dataset, model
from pspo.advantage import Advantage
from pspo.base.schema import ConfigError, Schema, as_dict, build, key
from pspo.budget import Budget
from pspo.checkpoint import Checkpoint
from pspo.dataset import DatasetConfig
from pspo.diagnostics import Diagnostics
from pspo.evaluate import Evaluation
from pspo.loss import Loss
from pspo.model import Model
from pspo.objective import OBJECTIVES, Objective
from pspo.optimizer import Optimizer
from pspo.reward import Reward
from pspo.rollout import Rollout
from pspo.smoothing import Smoothing
from pspo.tracker import TrackerConfig
from pspo.update import Update

_PACKAGE = Path(__file__).parent
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"
"""The YAML files: inside an installed wheel, else beside the package."""


@dataclass(frozen=True, kw_only=True)
class Config(Schema):
    """One run. Every block stands in the module of its name."""

    group: str = key("directory under output_dir, and group in the tracker, that holds the runs of one comparison")
    output_dir: str = key("where run directories are made")
    seed: int = key("of the warm start, the data order, the samples and the minibatches", within="[0, 4294967295]")
    device: Literal["auto", "cpu", "cuda"] = key("auto takes a GPU where there is one")
    threads: int | None = key(
        "CPU threads, or processes for a small policy; null takes the processors that this one may use",
        within="[1, inf)",
    )
    selection: Literal["last", "best"] = key("weights kept at the end: the last, or the best by validation reward")
    rerun: Literal["never", "changed", "all"] = key(
        "move a finished run aside and make it anew: never, if the code has changed since, or in any case"
    )
    continue_from: str | None = key("finished run directory, equal but for its shorter budget, to begin from; or null")
    model: Model
    dataset: DatasetConfig
    reward: Reward
    objective: Objective
    smoothing: Smoothing
    advantage: Advantage
    loss: Loss
    rollout: Rollout
    update: Update
    optimizer: Optimizer
    budget: Budget
    evaluation: Evaluation
    diagnostics: Diagnostics
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
        if not self.smoothing.constant:
            if not self.objective.takes_alpha:
                raise no_alpha(self.smoothing.name, self.objective.name)
            if self.smoothing.name == "adaptive" and self.diagnostics.every != 1:
                raise self.diagnostics.refuse("every", "smoothing=adaptive is steered by them; set diagnostics.every=1")
        for name in self.diagnostics.counterfactual if self.diagnostics.counterfactual_every else []:
            self.loss.check(default_objective(name), self.advantage)


NOT_SCIENCE = (
    "group", "output_dir", "device", "threads", "rerun", "continue_from", "checkpoint", "tracker", "diagnostics",
)  # fmt: skip
"""Blocks that say where and how comfortably a run is made and how closely it is watched, not what is run."""

ONLY_MEMORY = {"rollout": ("max_rows",), "update": ("max_tokens",), "model": ("gradient_checkpointing",)}
"""Keys that bound memory and change results by rounding alone, so that a run may be resumed with less."""


def resolve(values: Mapping[str, Any]) -> Config:
    """The typed tree of a composed configuration. Raises ConfigError."""
    smoothing, objective = values.get("smoothing", {}), values.get("objective", {})
    cls = OBJECTIVES.get(objective.get("name"))
    if smoothing.get("alpha") is not None and cls is not None:
        if not cls.takes_alpha:
            raise no_alpha(smoothing["name"], objective["name"])
        if objective.get("alpha") != smoothing["alpha"]:
            raise ConfigError(
                f"smoothing={smoothing['name']} sets alpha to {smoothing['alpha']}, but objective.alpha="
                f"{objective.get('alpha')} is set as well; give one of them"
            )
    return build(Config, values)


def read(path: Path) -> Config:
    """The configuration of an earlier run, from its ``config.yaml``. Raises ConfigError."""
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(values, dict)
    return build(Config, {str(name): value for name, value in values.items()})


def no_alpha(smoothing: str, objective: str) -> ConfigError:
    """The error for a smoothing of an objective that has no alpha."""
    takes = ", ".join(name for name, known in OBJECTIVES.items() if known.takes_alpha)
    return ConfigError(
        f"smoothing={smoothing} sets objective.alpha, which objective={objective} does not have"
        f"; objectives with alpha: {takes} (or leave smoothing=none)"
    )


def default_objective(name: str) -> Objective:
    """An objective with the values of its option under ``conf/objective``."""
    values = yaml.safe_load((CONF / "objective" / f"{name}.yaml").read_text(encoding="utf-8"))
    return build(Objective, values)  # type: ignore[type-abstract]


def science(config: Config) -> dict[str, Any]:
    """What was run: the configuration without ``NOT_SCIENCE`` and ``ONLY_MEMORY``."""
    values = {name: value for name, value in as_dict(config).items() if name not in NOT_SCIENCE}
    if config.smoothing.constant:  # its alpha stands in the objective
        del values["smoothing"]
    for block, names in ONLY_MEMORY.items():
        values[block] = {name: value for name, value in values[block].items() if name not in names}
    return values


def identity(config: Config) -> str:
    """Eight hexadecimal digits that name what was run."""
    return hashlib.sha256(json.dumps(science(config), sort_keys=True).encode()).hexdigest()[:8]


def run_directory(config: Config, overrides: Sequence[str]) -> Path:
    """``output_dir/group/<objective>_<what was set>_seed<seed>_<identity>``; the identity alone decides.

    The same run asked for in other words (a default spelt out, say) finds the directory that it already has.
    """
    parent = Path(config.output_dir) / config.group
    found = sorted(parent.glob(f"*_{identity(config)}")) if parent.is_dir() else []
    return found[0] if found else parent / f"{_label(config, overrides)}_seed{config.seed}_{identity(config)}"


def _label(config: Config, overrides: Sequence[str]) -> str:
    told = []
    for override in sorted(overrides):
        name, _, value = override.lstrip("+").partition("=")
        if name.split(".")[0] not in (*NOT_SCIENCE, "objective", "seed") or name.startswith("objective."):
            told.append(f"{name.removeprefix('objective.')}={Path(value).name}")
    return re.sub(r"[^\w.=,+-]", "", "_".join([config.objective.name, *told]))[:120]


@functools.cache
def groups() -> dict[str, list[str]]:
    """Every configuration group with its options."""
    return {
        folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
        for folder in sorted(CONF.iterdir())
        if folder.is_dir() and folder.name != "hydra"
    }


def open_keys(arguments: Sequence[str]) -> list[str]:
    """Let every ``key=value`` through Hydra, so that the schema refuses an unknown key and lists the known ones.

    Plain Hydra would accept ``+objective.alpha=.3`` under ``clip`` and advise a ``+`` for a misspelt key. A path with a
    ``=`` in it, as run directories have, is quoted, which Hydra's grammar asks for.
    """
    quoted = [re.sub(r"^([^=]+)=([\w./~+-]*=[\w./~+=-]*)$", r"\1='\2'", a) for a in arguments]
    return [f"++{a.lstrip('+')}" if _sets_value(a) else a for a in quoted]


def compose(overrides: Sequence[str] = ()) -> Config:
    """The configuration that ``python -m pspo.run <overrides>`` would run with. Raises ConfigError."""
    return compose_all([overrides])[0]


def compose_all(jobs: Iterable[Sequence[str]]) -> list[Config]:
    """The configurations of many jobs; Hydra is set up once. Raises ConfigError at the first that does not fit."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    made = []
    ready = GlobalHydra.instance().is_initialized()  # as in a multirun
    with contextlib.nullcontext() if ready else initialize_config_dir(str(CONF), version_base="1.3"):
        for overrides in jobs:
            composed = hydra_compose("config", overrides=open_keys(overrides))
            values = OmegaConf.to_container(composed, resolve=True)
            assert isinstance(values, dict)
            made.append(resolve({str(name): value for name, value in values.items()}))
    return made


def check(config: Config) -> None:
    """Refuse what can be seen before anything is loaded, written or submitted, on a login node too. No network.

    Raises ConfigError: a directory that cannot be written, a data set, model or reward that is not there.
    """
    at = (Path(config.output_dir) / config.group).absolute()
    nearest = next(path for path in (at, *at.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"output_dir={config.output_dir}: cannot write in {nearest}; set output_dir=<directory>")
    dataset.check(config.dataset)
    if config.budget.total and dataset.is_test_set(config.dataset):
        raise dataset.refuse_training(config.dataset)
    config.reward.check()
    if config.model.path is not None:  # one of the hub's may lie in a cache that the jobs alone see
        model.check(config.model)


def _sets_value(argument: str) -> bool:
    name, equals, _ = argument.lstrip("+").partition("=")
    ours = not name.startswith("hydra.") or name.startswith("hydra.launcher.")
    return bool(equals) and re.fullmatch(r"[\w.]+", name) is not None and name not in groups() and ours
