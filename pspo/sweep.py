"""Run a sweep: named arms and lists of keys, from a file or the command line, become one run each.

``python -m pspo.sweep alpha [overrides] [hydra/launcher=slurm]``; README says what a file in ``sweeps/`` holds.
"""

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from pspo.base.command import answering, expanded
from pspo.base.files import CONF, read_keys, write_json
from pspo.base.grammar import in_quotes, quoted
from pspo.base.schema import ConfigError, Schema, build, key, unknown
from pspo.launcher import Planned, make_plan

SWEEPS = CONF.parent / "sweeps"  # the files that come with pspo: beside conf/, in a checkout and in a wheel


@dataclass(frozen=True, kw_only=True)
class SweepFile(Schema):
    """The keys of a sweep's file."""

    group: str = key("directory under output_dir; the file's name unless it is given")
    common: list[str] = key("overrides of all jobs")
    arms: dict[str, dict[str, list[str]]] = key("factors, each a table of arms, each a list of overrides")
    lists: dict[str, Any] = key("keys with their values, of which the product is taken")


class SweepJob(NamedTuple):
    """The overrides of one run of a sweep and, by factor, its arms."""

    overrides: list[str]
    arm: Mapping[str, str]


def expand(file: str | None, arguments: Sequence[str], loader: Any = None) -> list[SweepJob]:
    """The jobs of a file, if any, under the command line's overrides, which replace the file's common ones and lists.

    Raises ConfigError.
    """
    parser = OverridesParser.create(config_loader=loader)
    typed = dict(_values(parser, argument, "the command line") for argument in arguments)
    if file is None:
        return [SweepJob(list(job), {}) for job in itertools.product(*typed.values())]
    sweep = load(file)
    common = {"group": [f"group={sweep.group}"]} | _single(parser, sweep.common, f"{file}: common")
    lists: dict[str, list[str]] = {}
    for name, values in sweep.lists.items():
        texts = [f"{name}={_text(value)}" for value in (values if isinstance(values, list) else [values])]
        lists[name] = [each for text in texts for each in _values(parser, text, f"{file}: lists")[1]]
    setters = dict.fromkeys(lists, "lists") | dict.fromkeys(typed, "the command line")
    factors = {}
    for factor, table in sweep.arms.items():
        factors[factor] = {arm: _single(parser, texts, f"{file}: {factor}.{arm}") for arm, texts in table.items()}
        keys = set().union(*factors[factor].values())
        for name in sorted(keys & setters.keys()):
            raise ConfigError(f"{file}: the arms of {factor} set {name}, and so does {setters[name]}; leave it to one")
        setters |= dict.fromkeys(keys, f"arms.{factor}")
    jobs = []
    for arms in itertools.product(*(table.items() for table in factors.values())):
        arm = dict(zip(factors, (name for name, _ in arms), strict=True))
        overrides = common | {name: texts for _, own in arms for name, texts in own.items()} | lists | typed
        jobs += [SweepJob(list(job), arm) for job in itertools.product(*overrides.values())]
    return jobs


def plan(file: str | None, jobs: Sequence[SweepJob]) -> list[Planned]:
    """Every job composed and checked, with its directory and its state. Raises ConfigError."""
    try:
        return make_plan([job.overrides for job in jobs], [job.arm for job in jobs])
    except ConfigError as error:
        raise error if file is None else ConfigError(f"{file}: {error}") from error


def record(file: str, planned: Sequence[Planned]) -> None:
    """Add the runs to ``sweep.json`` of their group's directory, for reports to group by; the newest entry counts.

    Submissions at the same time add to it one after another. Raises ConfigError where it cannot be written.
    """
    for path in {run.directory.with_name("sweep.json") for run in planned}:
        rows = {
            run.directory.name: {"sweep": Path(file).stem, "arm": dict(run.arm), "overrides": run.overrides}
            for run in planned
            if run.directory.parent == path.parent
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(path.with_name(".sweep.lock")):
                known = {row["directory"]: row for row in json.loads(path.read_text())} if path.is_file() else {}
                write_json(path, [row | {"directory": name} for name, row in (known | rows).items()])
        except OSError as error:
            raise ConfigError(f"cannot write {path} ({error.strerror}); set output_dir=<directory>") from error


def _single(parser: OverridesParser, texts: Sequence[str], where: str) -> dict[str, list[str]]:
    """Overrides by key, each of one value."""
    overrides: dict[str, list[str]] = {}
    for text in texts:
        name, values = _values(parser, text, where)
        if name in overrides:
            raise ConfigError(f"{where}: {name} is given twice")
        if len(values) > 1:
            raise ConfigError(f"{where}: {text} has {len(values)} values; they belong into lists")
        overrides[name] = values
    return overrides


def _values(parser: OverridesParser, text: str, where: str) -> tuple[str, list[str]]:
    """The key of an override in Hydra's grammar, and one override for each of its values."""
    if "=" not in text and not text.startswith("~"):
        raise ConfigError(f"{where}: {text!r} is no override; write key=value")
    override = parser.parse_overrides([text := quoted(text)])[0]
    name = override.get_key_element().lstrip("+")
    if not override.is_sweep_override():
        return name, [text.lstrip("+")]
    if not override.is_discrete_sweep():
        raise ConfigError(f"{where}: {text} has no end of values; give a list, choice or range")
    return name, [f"{name}={value}" for value in override.sweep_string_iterator()]


def _text(value: Any) -> str:
    """A YAML scalar or list in Hydra's grammar."""
    return f"[{','.join(map(_text, value))}]" if isinstance(value, list) else str(value)


def load(name: str) -> SweepFile:
    """Read a sweep's file, by its name or its path; all scalars stay text, as Hydra parses them. Raises ConfigError."""
    path = find(name)
    try:
        values = read_keys(path, ": arms, lists, common or group", _Loader)
        sweep = build(SweepFile, {"group": path.stem, "common": [], "arms": {}, "lists": {}} | values)
    except ConfigError as error:
        raise error if str(path) in str(error) else ConfigError(f"{path}: {error}") from error
    if not sweep.arms and not sweep.lists:
        raise ConfigError(f"{path}: no arms and no lists, so that there is nothing to compare")
    return sweep


class _Loader(yaml.BaseLoader):  # type: ignore[misc]  # yaml has no types
    """Scalars stay text; a key given twice is an error, where YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(name, deep=True) for name, _ in node.value]
        if twice := next((name for name in names if names.count(name) > 1), None):
            line = node.start_mark.line + 1
            raise ConfigError(f"two arms or keys have the name {twice} (in the table of line {line}); rename one")
        return dict(super().construct_mapping(node, deep=deep))


def names() -> list[str]:
    """The sweeps that come with pspo."""
    return sorted(path.stem for path in SWEEPS.glob("*.yaml"))


def find(name: str) -> Path:
    """The file of a sweep, by its name or its path. Raises ConfigError."""
    path = expanded(name) if name.endswith((".yaml", ".yml")) else SWEEPS / f"{name}.yaml"
    if not path.is_file():
        raise unknown(name, names(), "sweep")
    return path.absolute()


def cli() -> None:
    """``python -m pspo.sweep``: what ``python -m pspo.run -m`` does, with the arms of a file."""
    from pspo.run import __main__ as run

    if not sys.argv[1:] or {"-h", "--help"} & set(sys.argv[1:]):
        about = {name: (SWEEPS / f"{name}.yaml").read_text().partition("\n")[0].lstrip("# ") for name in names()}
        lines = ["python -m pspo.sweep <name or file.yaml> [key=value ...] [hydra/launcher=basic|local|slurm]", ""]
        lines += [f"  {name:<{max(map(len, about))}}  {line}" for name, line in about.items()]
        lines += ["", "hydra.launcher.dry_run=true prints the runs, what became of them, and the cost.", ""]
        sys.stdout.write("\n".join(lines))
        return
    with answering(ConfigError):
        path = find(sys.argv[1])
    sys.argv[1:] = ["-m", f"hydra.sweeper.file={in_quotes(str(path))}", *sys.argv[2:]]
    run.cli()


if __name__ == "__main__":
    cli()
