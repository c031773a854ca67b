"""Print ``keys.md``, every key of every option: ``python docs/keys.py > docs/keys.md``."""

import json
import sys
from collections.abc import Mapping
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pspo.base.files import CONF
from pspo.base.schema import describe, keys_of
from pspo.config import Config, groups
from pspo.launcher.local import Local
from pspo.launcher.slurm import Slurm
from pspo.supervise import Supervise

HEAD = """# Every key
Made by `python docs/keys.py > docs/keys.md`; a test compares it with the code. The default is the value in a plain
`python -m pspo.run`, followed by the options that set another one; a key that only some options have is listed with
each of them, and `supervise` is of `python -m pspo.supervise`, whose other defaults stand in `conf/supervise.yaml`.
`experiment=` sets several keys at once, in plain sight in `conf/experiment/`."""
LAUNCHERS = {"local": Local, "slurm": Slurm}
LAUNCHER = "hydra/launcher"
PLAIN = ("", "")


def main() -> str:
    """The whole of ``keys.md``."""
    options = {group: names for group, names in groups().items() if group != "experiment"}
    pairs = [PLAIN, *((group, option) for group, names in options.items() for option in names)]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        trees = [composed(f"{group}={option}" if group else "seed=0") for group, option in pairs]
    defaults: dict[tuple[str, ...], dict[tuple[str, str], Any]] = {}
    for pair, tree in zip(pairs, trees, strict=True):
        for dotted, field, value in keys_of(Config, tree):
            block = dotted.partition(".")[0]
            if block == pair[0] or name_of(tree[block]) == name_of(trees[0][block]):  # not those of another option
                defaults.setdefault((dotted, *about(field)), {})[pair] = value
    for dotted, field, value in keys_of(Supervise, yaml.safe_load((CONF / "supervise.yaml").read_text())["supervise"]):
        defaults.setdefault((dotted, *about(field)), {})[PLAIN] = value
    for launcher, schema in LAUNCHERS.items():
        for dotted, field, value in keys_of(schema, yaml.safe_load((CONF / LAUNCHER / f"{launcher}.yaml").read_text())):
            defaults.setdefault((dotted, *about(field)), {})[LAUNCHER, launcher] = value
    options[LAUNCHER] = list(LAUNCHERS)
    sections: dict[str, list[str]] = {}
    for (dotted, meaning, values), found in defaults.items():
        section = dotted.partition(".")[0] if "." in dotted else "of the run"
        section = LAUNCHER if section == "hydra" else section
        if meaning and dotted != f"{section}.name":  # neither a block that is null, nor what its group chooses
            default = told(found, {(section, option) for option in options.get(section, [])})
            cells = [text.replace("|", "\\|") for text in (f"`{dotted}`", meaning, values, default)]
            sections.setdefault(section, []).append(f"| {' | '.join(cells)} |")
    lines = [HEAD]
    for section, rows in sections.items():
        chosen = f"Chosen by `{section}=`{', '.join(options[section])}.\n\n" if section in options else ""
        lines += [f"\n## {section}\n{chosen}| key | meaning | values | default |\n|---|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def composed(override: str) -> dict[str, Any]:
    """The values under one override; ``???`` where the user has to give one."""
    return OmegaConf.to_container(compose("config", overrides=[override]), resolve=True)


def name_of(block: Any) -> str | None:
    """The option that a block is made by, where it is a group's."""
    return block.get("name") if isinstance(block, dict) else None


def about(field: Any) -> tuple[str, str]:
    """The meaning of a key, and the values that it takes."""
    within = field.metadata.get("within")
    return field.metadata.get("meaning", ""), describe(field.type) + (f" in {within}" if within else "")


def told(values: Mapping[tuple[str, str], Any], own: set[tuple[str, str]]) -> str:
    """The value of a key that all its group's options have, then the options with another; else each that has it."""
    everywhere, usual = own <= values.keys(), next(iter(values.values()))
    found: dict[str, list[str]] = {shown(usual): []} if everywhere else {}
    for (group, option), value in values.items():
        if value != usual or (not everywhere and (group, option) in own):
            found.setdefault(f"{shown(value)} with {group}=", []).append(option)
    return "; ".join(value + ", ".join(names) for value, names in found.items())


def shown(value: Any) -> str:
    """A value as one writes it in YAML."""
    return "to be given" if value == "???" else f"`{value if value and isinstance(value, str) else json.dumps(value)}`"


if __name__ == "__main__":
    sys.stdout.write(main())
