"""What ``python -m pspo.run --help`` and ``--help keys`` print, from the schemas and ``conf/`` alone.

``docs/keys.md`` is ``python -m pspo.run --help keys``, which a test compares.
"""

from collections.abc import Mapping
from typing import Any

import yaml

from pspo.base.schema import Schema, as_dict, keys_of
from pspo.config import CONF, Config, compose, compose_values, groups

MOST_USED = (
    "seed",
    "objective.alpha",
    "loss.importance",
    "loss.aggregation",
    "loss.kl_weight",
    "optimizer.lr",
    "budget.steps",
    "rollout.prompts",
    "rollout.group_size",
    "rollout.max_new_tokens",
    "rollout.temperature",
    "update.num_epochs",
    "update.num_minibatches",
    "update.max_tokens",
    "model.path",
    "dataset.path",
    "dataset.test_limit",
    "evaluate.every",
    "diagnostics.counterfactual_every",
    "group",
    "device",
    "selection",
)
EXAMPLES = {
    "python -m pspo.run": "the embedded task on this machine, in minutes",
    "python -m pspo.run objective=pspo model=qwen1_5b": "the paper's GR-PSPO run on GSM8K, on a GPU",
    "python -m pspo.run -m objective=noclip,clip,pspo seed=0,1,2": "a matched comparison, one run after another",
    "python -m pspo.run smoothing=strong tracker=jsonl": "alpha 0.3, without Weights & Biases",
    "python -m pspo.run model=qwen0_5b model.path=/models/qwen dataset.path=/data/gsm8k": "all from local files",
}

BASE = ("", "")
LAUNCHER = "hydra/launcher"
KEYS_HEAD = """# Every key
Made by `python -m pspo.run --help keys`; a test compares it with the code. The default is the value in a plain
`python -m pspo.run`, followed by the options that set another one; a key that only some options have is listed with
each of them. `experiment=` sets several keys at once, in plain sight in `conf/experiment/`."""


def help_text() -> str:
    """Groups with their options, the most used keys with defaults and meanings, and examples."""
    known = {each.dotted: each for each in keys_of(Config, as_dict(compose()))}
    lines = ["python -m pspo.run [group=option ...] [key=value ...]", "", "Groups and their options:"]
    lines += [f"  {name:<11} {'  '.join(options)}" for name, options in groups().items()]
    lines += ["", "Most used keys (default in the embedded run, meaning, range):"]
    for dotted in MOST_USED:
        each = known[dotted]
        lines.append(f"  {f'{dotted}={_shown(each.value)}':<32} {each.meaning} {each.within}".rstrip())
    lines += ["", "Examples:"]
    for command, meaning in EXAMPLES.items():
        lines += [f"  # {meaning}", f"  {command}"]
    lines += [
        "",
        "--cfg job prints the composed configuration and checks it, --info how it was composed, -m runs all combinations",
        "of lists, --help keys describes every key, as docs/keys.md does, --hydra-help Hydra's own flags.",
        "python -m pspo lists the other commands.",
    ]
    return "\n".join(lines) + "\n"


def keys_text(launchers: Mapping[str, type[Schema]]) -> str:
    """Every key of every option, with its meaning, the values that it takes and its default, as Markdown."""
    options = {group: names for group, names in groups().items() if group != "experiment"}
    pairs = [(group, option) for group, names in options.items() for option in names]
    base, *others = compose_values([[], *([f"{group}={option}"] for group, option in pairs)])
    found: dict[tuple[str, ...], dict[tuple[str, str], Any]] = {}
    for pair, values in zip([BASE, *pairs], [base, *others], strict=True):
        for each in keys_of(Config, values):
            block = each.dotted.partition(".")[0]
            if block == pair[0] or _name(values[block]) == _name(base[block]):  # its defaults, not another option's
                found.setdefault(each[:-1], {})[pair] = each.value
    for launcher, cls in launchers.items():
        values = yaml.safe_load((CONF / LAUNCHER / f"{launcher}.yaml").read_text(encoding="utf-8"))
        for each in keys_of(cls, values):
            found.setdefault(each[:-1], {})[LAUNCHER, launcher] = each.value
    options |= {LAUNCHER: list(launchers)}
    sections: dict[str, list[str]] = {}
    for (dotted, meaning, allowed, within), defaults in found.items():
        block = dotted.partition(".")[0] if "." in dotted else "of the run"
        section = LAUNCHER if block == "hydra" else block
        if meaning and dotted != f"{section}.name":  # neither a block that is null, nor what its group chooses
            values = f"{allowed} in {within}" if within else allowed
            default = _default(defaults, {(section, option) for option in options.get(section, [])})
            row = " | ".join((f"`{dotted}`", *(text.replace("|", "\\|") for text in (meaning, values)), default))
            sections.setdefault(section, []).append(f"| {row} |")
    lines = [KEYS_HEAD]
    for section, rows in sections.items():
        chosen = f"Chosen by `{section}=`{', '.join(options[section])}.\n\n" if section in options else ""
        lines.append(f"\n## {section}\n{chosen}| key | meaning | values | default |\n|---|---|---|---|")
        lines += rows
    return "\n".join(lines) + "\n"


def _default(values: Mapping[tuple[str, str], Any], own: set[tuple[str, str]]) -> str:
    """The value of a key that all its group's options have, then the options with another; else each that has it."""
    everywhere, usual = own <= values.keys(), next(iter(values.values()))
    told: dict[str, list[str]] = {f"`{_shown(usual)}`": []} if everywhere else {}
    for (group, option), value in values.items():
        if value != usual or (not everywhere and (group, option) in own):
            told.setdefault(f"`{_shown(value)}` with {group}=", []).append(option)
    return "; ".join(value + ", ".join(names) for value, names in told.items())


def _name(block: Any) -> Any:
    return block.get("name") if isinstance(block, dict) else None


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    plain = {None: "null", True: "true", False: "false", "": "''", "???": "to be given"}
    return plain.get(value, str(value)) if value is None or isinstance(value, bool | str) else str(value)
