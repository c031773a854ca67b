"""The configuration from the words of a command line, composed by Hydra."""

import contextlib
import functools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf

from pspo.base.files import CONF
from pspo.base.schema import ConfigError, Schema, build, fields_of, unknown
from pspo.config.tree import Config, read
from pspo.objective import OBJECTIVES, Objective
from pspo.smoothing import Smoothing

Tree = TypeVar("Tree", bound=Schema)


def compose(overrides: Sequence[str] = ()) -> Config:
    """The configuration of ``python -m pspo.run <overrides>``. Raises ConfigError."""
    return compose_all([overrides])[0]


def compose_all(jobs: Iterable[Sequence[str]]) -> list[Config]:
    """The configurations of many jobs; Hydra is set up once. Raises ConfigError at the first that does not fit."""
    in_multirun = GlobalHydra.instance().is_initialized()
    with contextlib.nullcontext() if in_multirun else hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return [resolve(_composed(overrides), overrides) for overrides in jobs]


def compose_tree(root: str, tree: type[Tree], overrides: Sequence[str]) -> Tree:
    """The ``tree`` of dataclasses that the overrides make of ``conf/<root>.yaml``. Raises ConfigError."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return build(tree, _composed(overrides, root))


def _composed(overrides: Sequence[str], root: str = "config") -> dict[str, Any]:
    """What Hydra, which is set up, composes; with its own settings under ``hydra``. Raises ConfigError."""
    try:
        composed = hydra.compose(root, overrides=open_keys(overrides))
    except HydraException as error:
        raise explained(error) from error
    return cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))


def launcher_keys(overrides: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The launcher that overrides of ``hydra/launcher`` and ``hydra.launcher`` choose: its name and its keys."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            composed = hydra.compose("config", overrides=open_keys(overrides), return_hydra_config=True).hydra
        except HydraException as error:
            raise explained(error) from error
        values = cast(dict[str, Any], OmegaConf.to_container(composed.launcher, resolve=True))
    return composed.runtime.choices["hydra/launcher"], {k: v for k, v in values.items() if not k.startswith("_")}


FOR_ANSWERS = ("evaluate", "dataset", "reward", "device", "threads", "rollout.max_rows", "seed")
"""Keys and blocks that answers to held-out problems may have otherwise than the run whose weights give them."""


def for_answers(run: Path, overrides: Sequence[str]) -> Config:
    """The configuration of a run with the overrides of an evaluation. Raises ConfigError, also for any other key."""
    path, names = run / "config.yaml", [override.lstrip("+~").partition("=")[0] for override in overrides]
    for name in names:
        if not any(name == known or name.startswith(f"{known}.") for known in FOR_ANSWERS):
            known = ", ".join(FOR_ANSWERS)
            raise ConfigError(f"{name} is a setting of the run {run}, whose weights answer; what may differ: {known}")
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        values = _composed(overrides)
    read(path)  # refuses another version's
    return build(Config, _replaced(path, values, names))


REMEDIES = {
    "model": "model=hf model.hub_id={0}, or model.path={0} for a folder",
    "dataset": "dataset=jsonl dataset.path={0}",
    "reward": "reward=custom reward.function={0}",
    "objective": "objective=custom objective.function={0}",
}
"""By group: the overrides to write where a path, a function or a name on the hub was given as the option."""


def explained(error: Exception) -> ConfigError:
    """Hydra's refusal of an option or of a value as one sentence of ours."""
    missing = re.fullmatch(r"((?:hydra/)?[^/]+)/(.*)", str(getattr(error, "missing_cfg_file", "")))
    if missing and (options := getattr(error, "options", None)):
        group, option = missing.groups()
        if group in REMEDIES and re.search(r"[/.:]", option):
            return ConfigError(f"{group}={option} is no option; write {REMEDIES[group].format(option)}")
        return unknown(option, options, group)
    if several := re.match(r"Ambiguous value for argument '\+*(.*?)=(.*)'", str(error)):
        name, value = several.groups()
        return ConfigError(
            f"{name}={value} gives one run several values; add -m to make a run with each, or quote a value that has "
            f"a comma in it twice: {name}='\"{value}\"'"
        )
    return ConfigError(str(error))


def resolve(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """The typed tree of ``values``, which Hydra composed under the command line's ``overrides``. Raises ConfigError."""
    values = _with_source(values, overrides)
    smoothing, objective = values["smoothing"], values["objective"]
    alpha, constant = smoothing.get("alpha"), Smoothing.select(smoothing).constant
    if not (alpha is None and constant) and "alpha" not in fields_of(Objective.select(objective)):
        takes_alpha = ", ".join(name for name, known in OBJECTIVES.items() if "alpha" in fields_of(known))
        raise ConfigError(
            f"smoothing={smoothing['name']} sets objective.alpha, which objective={objective['name']} does not have"
            f"; objectives with alpha: {takes_alpha} (or leave smoothing=none)"
        )
    if alpha not in (None, objective.get("alpha")):
        raise ConfigError(
            f"smoothing={smoothing['name']} sets alpha to {alpha}, but objective.alpha={objective.get('alpha')} is set "
            "as well; give one of them"
        )
    return build(Config, values)


def _with_source(values: Mapping[str, Any], overrides: Sequence[str]) -> Mapping[str, Any]:
    """Under ``continue_from`` the settings of that run, except for the keys of ``values`` that an override has set."""
    path = Path(os.path.expanduser(str(values["continue_from"])), "config.yaml")
    names = [override.lstrip("+~").partition("=")[0] for override in overrides]
    if not (values["continue_from"] and path.is_file() and all(name.split(".")[0] in values for name in names)):
        return values  # an experiment sets keys in many blocks: then all keys are compared with that run's
    return _replaced(path, values, [*names, "continue_from", "rerun"])


def _replaced(path: Path, values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The settings in ``path``, with those of ``values`` for the keys and blocks ``names``."""
    source, composed = OmegaConf.load(path), OmegaConf.create(dict(values))
    for name in names:
        OmegaConf.update(source, name, OmegaConf.select(composed, name), merge=False, force_add=True)
    return cast(dict[str, Any], OmegaConf.to_container(source))


@functools.cache
def groups() -> dict[str, list[str]]:
    """Every configuration group with its options."""
    return {
        folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
        for folder in sorted(CONF.iterdir())
        if folder.is_dir() and folder.name != "hydra"
    }


SETS_KEY = re.compile(r"\+*((?!hydra\.)[\w.]+|hydra\.launcher\.[\w.]+)=")
"""The beginning of an argument that sets a key of ours, or chooses a group's option."""


def open_keys(arguments: Sequence[str]) -> list[str]:
    """Let every ``key=value`` through Hydra, so that the schema refuses an unknown key and lists the known ones.

    Plain Hydra would accept ``+objective.alpha=.3`` under ``clip`` and advise a ``+`` for a misspelt key. A value that
    Hydra's grammar has no place for, such as a path with parentheses, is quoted.
    """

    def opened(argument: str) -> str:
        match = SETS_KEY.match(argument)
        return f"++{argument.lstrip('+')}" if match and match[1] not in groups() else argument

    return [opened(quoted(argument)) for argument in arguments]


def quoted(argument: str) -> str:
    """``key=value`` with quotes about a value, or about the items of a list, that Hydra's grammar has no place for."""
    name, equals, value = argument.partition("=")
    if not equals or name.startswith(("-", "~")) or _is_grammatical(value):
        return argument
    if value[0] + value[-1] == "[]":
        return f"{name}=[{quoted(f'{name}={value[1:-1]}').removeprefix(f'{name}=')}]"
    items = re.findall(r"""(?:'[^']*'|"[^"]*"|[^,])+""", value)
    if ",".join(items) != value:  # two commas in a row, or one at an end: not a list
        items = [value]
    return f"{name}=" + ",".join(item if _is_grammatical(item) else in_quotes(item.strip()) for item in items)


def in_quotes(value: str) -> str:
    """A value in quotes, as Hydra's grammar has them."""
    return QuotedString(value, Quote.single).with_quotes()


@functools.cache
def _is_grammatical(value: str) -> bool:
    try:
        OverridesParser.create().parse_override(f"key={value}")
    except (HydraException, ValueError, RecursionError):  # ValueError: more digits than Python reads
        return False
    return True
