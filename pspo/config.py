"""The whole configuration: its schemas, the rejection of what does not fit, and the name of a run's directory."""

import contextlib
import functools
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from pspo import dataset, model
from pspo.advantage import Advantage
from pspo.base.files import CONF
from pspo.base.schema import ConfigError, Schema, as_dict, build, key, keys_of, short_names, unknown
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
from pspo.update import UpdateConfig


@dataclass(frozen=True, kw_only=True)
class Config(Schema):
    """One run. Every block stands in the module of its name."""

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


LABEL_CHARACTERS = 80
"""What does not fit into a run's name is counted there: ``_+2``. The names of files may have 255 bytes."""


def resolve(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """The typed tree of a configuration composed with ``overrides``, those of the command line. Raises ConfigError."""
    values = _with_source(values, overrides)
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
    """The configuration of an earlier run, from its ``config.yaml``. Raises ConfigError, also for another version's."""
    try:
        return build(Config, _load(path))
    except ConfigError as error:
        raise ConfigError(f"{path} was written by another version of pspo, with other keys: {error}") from error


def _load(path: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    return dict(cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(path))))


def _with_source(values: Mapping[str, Any], overrides: Sequence[str]) -> Mapping[str, Any]:
    """Under ``continue_from`` the settings of that run, with those of ``values`` that an override has set."""
    source = Path(values.get("continue_from") or "") / "config.yaml"
    names = [override.lstrip("+~").partition("=")[0].split(".") for override in overrides]
    if not values.get("continue_from") or not source.is_file() or any(name[0] not in values for name in names):
        return values  # an experiment sets keys in many blocks: then all keys are compared with that run's
    merged = _load(source)
    for *blocks, last in [*names, ["continue_from"], ["rerun"]]:
        from_block, to_block = values, merged
        for block in blocks:
            from_block, to_block = from_block[block], to_block[block]
        to_block[last] = from_block[last]
    return merged


def no_alpha(smoothing: str, objective: str) -> ConfigError:
    """The error for a smoothing of an objective that has no alpha."""
    takes = ", ".join(name for name, known in OBJECTIVES.items() if known.takes_alpha)
    return ConfigError(
        f"smoothing={smoothing} sets objective.alpha, which objective={objective} does not have"
        f"; objectives with alpha: {takes} (or leave smoothing=none)"
    )


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
    """``output_dir/group/<objective>_<its keys>_<other keys>_seed<seed>_<identity>``; the identity alone decides.

    The same run asked for in other words (a default spelt out, say) finds the directory that it already has.
    """
    parent = Path(config.output_dir) / config.group
    found = sorted(parent.glob(f"*_{identity(config)}")) if parent.is_dir() else []
    return found[0] if found else parent / f"{_label(config, overrides)}_seed{config.seed}_{identity(config)}"


def _label(config: Config, overrides: Sequence[str]) -> str:
    """The objective, its keys as they were set, then what else was set, in whole words of letters that any shell takes.

    An option is told by its name alone and a key by its last part, wherever no other group or key has the same.
    """
    short = short_names(dotted.removeprefix("objective.") for dotted, _, _ in keys_of(Config, as_dict(config)))
    options = Counter(option for names in groups().values() for option in names)
    words: dict[str, str] = {}
    for override in overrides:
        name, _, value = override.lstrip("+").partition("=")
        if name.startswith("objective.") or name.partition(".")[0] not in (*NOT_SCIENCE, "objective", "seed"):
            value = re.sub(r"[^\w.+-]+", "-", Path(value).name.strip("[](){}\"' "), flags=re.ASCII)
            shown = short.get(name.removeprefix("objective."), name)
            words[name] = value if name in groups() and options[value] == 1 else f"{shown}={value}"
    label = [config.objective.name]
    for name in sorted(words, key=lambda name: (not name.startswith("objective."), name)):
        if len("_".join([*label, words[name]])) <= LABEL_CHARACTERS:
            label.append(words[name])
    left = len(words) + 1 - len(label)
    return "_".join([*label, f"+{left}"] if left else label)


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

    Plain Hydra would accept ``+objective.alpha=.3`` under ``clip`` and advise a ``+`` for a misspelt key. A value that
    Hydra's grammar has no place for, such as a path with parentheses, is quoted.
    """
    return [f"++{a.lstrip('+')}" if _sets_value(a) else a for a in map(quoted, arguments)]


def quoted(argument: str) -> str:
    """``key=value`` with quotes about a value, or about the items of a list, that Hydra's grammar has no place for."""
    name, equals, value = argument.partition("=")
    if not equals or name.startswith(("-", "~")) or _is_grammatical(value):
        return argument
    brackets = ("[", "]") if value[0] + value[-1] == "[]" else ("", "")
    value = value.removeprefix(brackets[0]).removesuffix(brackets[1])
    items = re.findall(r"""(?:'[^']*'|"[^"]*"|[^,])+""", value)
    if ",".join(items) != value:  # two commas in a row, or one at an end: not a list
        items = [value]
    inside = ",".join(item if _is_grammatical(item) else in_quotes(item.strip()) for item in items)
    return f"{name}={brackets[0]}{inside}{brackets[1]}"


def in_quotes(value: str) -> str:
    """A value in quotes, as Hydra's grammar has them."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(value, Quote.single).with_quotes()


@functools.cache
def _is_grammatical(value: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(f"key={value}")
    except (HydraException, ValueError, RecursionError):  # ValueError: more digits than Python reads
        return False
    return True


def compose(overrides: Sequence[str] = ()) -> Config:
    """The configuration that ``python -m pspo.run <overrides>`` would run with. Raises ConfigError."""
    return compose_all([overrides])[0]


def compose_all(jobs: Iterable[Sequence[str]]) -> list[Config]:
    """The configurations of many jobs; Hydra is set up once. Raises ConfigError at the first that does not fit."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    made = []
    ready = GlobalHydra.instance().is_initialized()  # as in a multirun
    with contextlib.nullcontext() if ready else initialize_config_dir(str(CONF), version_base="1.3"):
        for overrides in jobs:
            try:
                composed = hydra_compose("config", overrides=open_keys(overrides))
            except HydraException as error:
                raise explained(error) from error
            values = OmegaConf.to_container(composed, resolve=True)
            assert isinstance(values, dict)
            made.append(resolve({str(name): value for name, value in values.items()}, overrides))
    return made


MEANT = {
    "model": "model=hf model.hub_id={0}, or model.path={0} for a folder",
    "dataset": "dataset=jsonl dataset.path={0}",
    "reward": "reward=custom reward.function={0}",
    "objective": "objective=custom objective.function={0}",
}
"""What was meant by a path, a function or a name on the hub in the place of a group's option."""


def explained(error: Exception) -> ConfigError:
    """A refusal of Hydra's as one sentence of ours."""
    if options := getattr(error, "options", None):
        file = str(getattr(error, "missing_cfg_file", ""))
        group = next((name for name in groups() if file.startswith(f"{name}/")), file.rpartition("/")[0])
        option = file.removeprefix(f"{group}/")
        if group in MEANT and re.search(r"[/.:]", option):
            return ConfigError(f"{group}={option} is no option; write {MEANT[group].format(option)}")
        return unknown(option, options, group)
    if several := re.match(r"Ambiguous value for argument '\+*(.*?)=(.*)'", str(error)):
        name, value = several[1], several[2]
        return ConfigError(
            f"{name}={value} gives one run several values; add -m to make a run with each, or quote a value that has "
            f"a comma in it twice: {name}='\"{value}\"'"
        )
    return ConfigError(str(error))


def check(config: Config) -> None:
    """Refuse what can be seen before anything is loaded, written or submitted, on a login node too. No network.

    Imports a user's own code. Raises ConfigError: a directory that cannot be written, a data set, model or
    reward that is not there.
    """
    at = (Path(config.output_dir) / config.group).absolute()
    nearest = next(path for path in (at, *at.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"output_dir={config.output_dir}: cannot write in {nearest}; set output_dir=<directory>")
    dataset.check(config.dataset, training=bool(config.budget.total))
    config.reward.check()
    if config.model.path is not None:  # one of the hub's may lie in a cache that the jobs alone see
        model.check(config.model)


def _sets_value(argument: str) -> bool:
    name, equals, _ = argument.lstrip("+").partition("=")
    ours = not name.startswith("hydra.") or name.startswith("hydra.launcher.")
    return bool(equals) and re.fullmatch(r"[\w.]+", name) is not None and name not in groups() and ours
