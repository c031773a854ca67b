"""The whole configuration: its schema, its checks across blocks, what names a run, and how Hydra composes it."""

import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from pspo import dataset, model
from pspo.advantage import Advantage
from pspo.base.files import CONF, read_yaml
from pspo.base.grammar import in_quotes, parsed, quoted
from pspo.base.schema import MISSING, ConfigError, S, Schema, as_dict, build, fields_of, key, keys_of, unknown
from pspo.budget import Budget
from pspo.checkpoint import Checkpoint
from pspo.dataset import DatasetConfig
from pspo.diagnostics import DiagnosticsConfig
from pspo.evaluate import EvaluateConfig
from pspo.loss import LossConfig
from pspo.model import ModelConfig
from pspo.objective import OBJECTIVES, Objective, default_objective
from pspo.optimizer import Optimizer
from pspo.reward import Reward
from pspo.rollout import RolloutConfig
from pspo.smoothing import Smoothing
from pspo.tracker import TrackerConfig
from pspo.update.rows import UpdateConfig


@dataclass(frozen=True, kw_only=True)
class Config(Schema):
    """The settings of one run. Every block stands in the module of its name."""

    group: str = key("directory under output_dir, and group in the tracker, that holds the runs of one comparison")
    output_dir: str = key("where run directories are made", path=True)
    seed: int = key("of the warm start, the data order, the samples and the minibatches", within="[0, 4294967295]")
    device: Literal["auto", "cpu", "cuda"] = key(
        "auto takes a GPU where there is one", why="Apple's GPU (mps) is not supported; a Mac takes its CPU"
    )
    threads: int | None = key("CPU threads; null takes the processors that this process may use", within="[1, inf)")
    selection: Literal["last", "best"] = key("weights kept at the end: the last, or the best by validation reward")
    rerun: Literal["never", "changed", "all", "resume"] = key(
        "earlier runs to move aside and make anew: never; changed: where code, data, reward or model has changed; all: "
        "finished runs too; resume: none, and unfinished runs go on although data, reward or model has changed"
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
        bits, task = self.dataset.name == "reversal", self.model.architecture and self.model.architecture.task
        if task == "reversal" and not bits:
            raise self.dataset.refuse("name", "model=reversal reads and writes bits alone; choose dataset=reversal")
        if bits and self.reward.name not in ("exact", "custom"):
            raise self.reward.refuse("name", "to it 011 and 11 are one number; dataset=reversal needs reward=exact")
        self.update.check(self.objective, self.rollout)
        self.loss.check(self.objective, self.advantage)
        self.rollout.check(self.update.old_logprobs, self.model.dtype)
        if self.smoothing.name == "adaptive" and self.diagnostics.every != 1:
            raise self.diagnostics.refuse("every", "smoothing=adaptive is steered by them; set diagnostics.every=1")
        for name in self.diagnostics.counterfactual if self.diagnostics.counterfactual_every else []:
            self.loss.check(probed := default_objective(name), self.advantage)
            if probed.needs_batch and not self.objective.needs_batch and self.update.num_minibatches > 1:
                raise self.update.refuse("num_minibatches", f"the probe of {name} needs whole groups; set it to 1")


NOT_SCIENCE = (
    "group", "output_dir", "device", "threads", "rerun", "continue_from", "checkpoint", "tracker", "diagnostics",
)  # fmt: skip
"""Keys and blocks that do not name a run: where it is made, how it is saved and watched, not what is trained."""

ONLY_MEMORY = {"rollout": ("max_rows", "kv_cache_gib"), "update": ("max_tokens",), "model": ("gradient_checkpointing",)}
"""Keys that bound memory and change results by rounding alone, so that a run may be resumed with lower values."""


def read(path: Path) -> Config:
    """The configuration of an earlier run, from its ``config.yaml``. Raises ConfigError, also for another version's."""
    try:
        return build(Config, read_yaml(path), earlier=True)
    except ConfigError as error:
        raise ConfigError(f"{path} was written by another version of pspo, with other keys: {error}") from error


def science(config: Config) -> dict[str, Any]:
    """The settings that name a run: not ``NOT_SCIENCE``, ``ONLY_MEMORY``, nor later keys at their value ``before``."""
    values = {name: value for name, value in as_dict(config).items() if name not in NOT_SCIENCE}
    if config.smoothing.constant:  # its alpha stands in the objective
        del values["smoothing"]
    values["evaluate"] = {"every": config.evaluate.every}  # selection=best goes by it; answers change no weights
    for block, names in ONLY_MEMORY.items():
        values[block] = {name: value for name, value in values[block].items() if name not in names}
    for dotted, field, value in keys_of(Config, values):
        if value == field.metadata.get("before", MISSING):  # a run keeps its name when keys are added
            *blocks, name = dotted.split(".")
            del functools.reduce(dict.__getitem__, blocks, values)[name]
    return values


def identity(config: Config) -> str:
    """Eight hexadecimal digits of the digest of ``science``."""
    return hashlib.sha256(json.dumps(science(config), sort_keys=True).encode()).hexdigest()[:8]


def check(config: Config) -> None:
    """Refuse what this machine lacks, without network, before anything is loaded or written. Raises ConfigError."""
    parent = Path(config.output_dir, config.group).absolute()
    nearest = next(path for path in (parent, *parent.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"output_dir={config.output_dir}: cannot write in {nearest}; set output_dir=<directory>")
    config.rollout.check_installed()
    dataset.check(config.dataset, training=bool(config.budget.total))
    for name in [name for name in config.evaluate.sets or [] if name != "validation"]:
        dataset.check_set(name, config.evaluate.path)
    config.reward.check()
    if config.model.path is not None:  # the hub's cache may lie where only the jobs see it
        model.check(config.model)


def compose(overrides: Sequence[str] = ()) -> Config:
    """The configuration of ``python -m pspo.run <overrides>``. Raises ConfigError."""
    return resolve(_values("config", overrides), overrides)


def compose_all(jobs: Iterable[Sequence[str]]) -> list[Config]:
    """The configurations of many jobs; Hydra is set up once. Raises ConfigError at the first that does not fit."""
    with _hydra():
        return [compose(overrides) for overrides in jobs]


def compose_tree(root: str, tree: type[S], overrides: Sequence[str]) -> S:
    """The ``tree`` of dataclasses that the overrides make of ``conf/<root>.yaml``. Raises ConfigError."""
    return build(tree, _values(root, overrides))


def launcher_keys(overrides: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The launcher that overrides of ``hydra/launcher`` and ``hydra.launcher`` choose: its name and its keys."""
    composed = _compose("config", overrides, return_hydra_config=True).hydra
    values = cast(dict[str, Any], OmegaConf.to_container(composed.launcher, resolve=True))
    return composed.runtime.choices["hydra/launcher"], {k: v for k, v in values.items() if not k.startswith("_")}


def _values(root: str, overrides: Sequence[str]) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(_compose(root, overrides), resolve=True))


def _compose(root: str, overrides: Sequence[str], return_hydra_config: bool = False) -> DictConfig:
    try:
        with _hydra():
            return hydra.compose(root, open_keys(overrides), return_hydra_config)
    except HydraException as error:
        raise explained(error) from error


def _hydra() -> contextlib.AbstractContextManager[None]:
    """Hydra set up for ``conf/``, as it already is inside a multirun and inside this context."""
    is_set_up = GlobalHydra.instance().is_initialized()
    return contextlib.nullcontext() if is_set_up else hydra.initialize_config_dir(str(CONF), version_base="1.3")


# Keys and blocks that answers to held-out problems may have otherwise than the run whose weights give them.
FOR_ANSWERS = (
    "evaluate", "dataset", "reward", "device", "threads", "seed", "rollout.max_rows", "rollout.kv_cache_gib",
    "rollout.sampler",
)  # fmt: skip


def for_answers(run: Path, overrides: Sequence[str]) -> Config:
    """The configuration of a run with the overrides of an evaluation. Raises ConfigError, also for any other key."""
    names, free = _names(overrides), ", ".join(FOR_ANSWERS)
    for name in names:
        if not any(f"{name}.".startswith(f"{known}.") for known in FOR_ANSWERS):
            raise ConfigError(f"{name} is a setting of the run {run}, whose weights answer; what may differ: {free}")
    return build(Config, _replaced(run / "config.yaml", _values("config", overrides), names))


REMEDIES = {  # by group: what to write where a path, a function or a name on the hub was given as the option
    "model": "model=hf model.hub_id={0}, or model.path={0} for a folder",
    "dataset": "dataset=jsonl dataset.path={0}",
    "reward": "reward=custom reward.function={0}",
    "objective": "objective=custom objective.function={0}",
}


def explained(error: Exception) -> ConfigError:
    """Hydra's refusal of an option or of a value as one sentence of ours."""
    missing = re.fullmatch(r"((?:hydra/)?[^/]+)/(.*)", str(getattr(error, "missing_cfg_file", "")))
    if missing and (options := getattr(error, "options", None)):
        group, option = missing.groups()
        if group in REMEDIES and re.search(r"[/.:]", option):
            return ConfigError(f"{group}={option} is no option; write {REMEDIES[group].format(option)}")
        if option[:1] == "[":
            return ConfigError(f"{group} takes one option; -m {group}={option.strip('[]')} makes a run with each")
        return unknown(option, options, group)
    if several := re.match(r"Ambiguous value for argument '\+*(.*?)=(.*)'", str(error)):
        name, value = several.groups()
        remedy = f"add -m to make a run with each, or quote a value that has a comma in it twice: {name}='\"{value}\"'"
        return ConfigError(f"{name}={value} gives one run several values; {remedy}")
    if word := re.match(r"(?:Error parsing override '|LexerNoViableAltException: )([^'=\s]+)['\s]", str(error)):
        return ConfigError(f"{word[1]} is no key=value; python -m pspo.run --help lists the keys")
    return ConfigError(str(error))


def resolve(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """The typed tree of ``values``, which Hydra composed under the command line's ``overrides``. Raises ConfigError.

    Under ``continue_from`` the settings of that run, except for the keys that an override has set; under an experiment,
    which sets keys in many blocks, all keys are compared with that run's.
    """
    path = Path(os.path.expanduser(str(values["continue_from"])), "config.yaml")
    names = [*_names(overrides), "continue_from", "rerun"]
    if values["continue_from"] and path.is_file() and all(name.split(".")[0] in values for name in names):
        values = _replaced(path, values, names)
    smoothing, objective = values["smoothing"], values["objective"]
    alpha, constant = smoothing.get("alpha"), Smoothing.select(smoothing).constant
    if not (alpha is None and constant) and "alpha" not in fields_of(Objective.select(objective)):
        takes_alpha = ", ".join(name for name, known in OBJECTIVES.items() if "alpha" in fields_of(known))
        lacking = f"which objective={objective['name']} does not have; objectives with alpha: {takes_alpha}"
        raise ConfigError(f"smoothing={smoothing['name']} sets objective.alpha, {lacking} (or leave smoothing=none)")
    if alpha not in (None, objective.get("alpha")):
        also = f"but objective.alpha={objective.get('alpha')} is set as well; give one of them"
        raise ConfigError(f"smoothing={smoothing['name']} sets alpha to {alpha}, {also}")
    return build(Config, values)


def _names(overrides: Iterable[str]) -> list[str]:
    """The keys and blocks that overrides set."""
    return [override.lstrip("+~").partition("=")[0] for override in overrides]


def _replaced(path: Path, values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The settings in the file ``path``, in which ``values`` replace the keys and blocks ``names``."""
    source, composed = OmegaConf.create(as_dict(read(path))), OmegaConf.create(dict(values))
    for name in names:
        OmegaConf.update(source, name, OmegaConf.select(composed, name), merge=False, force_add=True)
    return cast(dict[str, Any], OmegaConf.to_container(source))


@functools.cache
def groups() -> dict[str, list[str]]:
    """Every configuration group with its options."""
    folders = [folder for folder in sorted(CONF.iterdir()) if folder.is_dir() and folder.name != "hydra"]
    return {folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in folders}


def open_keys(arguments: Sequence[str]) -> list[str]:
    """Let every ``key=value`` through Hydra, so that the schema refuses an unknown key and lists the known ones.

    Plain Hydra would accept ``+objective.alpha=.3`` under ``clip`` and advise a ``+`` for a misspelt key.
    """

    def opened(argument: str) -> str:
        name, equals, value = argument.lstrip("+").partition("=")
        if name in groups() or name.startswith("hydra/"):  # an option is one name: not 0.1, not [pspo,clip]
            read = parsed(value)
            is_name = read and (read.is_sweep_override() or isinstance(read.value(), str))
            return argument if is_name or not equals else f"{name}={in_quotes(value)}"
        return f"++{name}={value}" if equals and re.fullmatch(r"(?!hydra\.(?!launcher\.))[\w.]*", name) else argument

    return [opened(quoted(argument)) for argument in arguments]
