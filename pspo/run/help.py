"""What ``python -m pspo.run --help`` prints: made from the schemas and ``conf/``, so that it cannot go stale."""

import dataclasses
from typing import Any

from pspo.base.schema import Schema
from pspo.config import Config, compose, groups

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


def help_text() -> str:
    """Groups with their options, the most used keys with defaults and meanings, and examples."""
    config = compose()
    lines = ["python -m pspo.run [group=option ...] [key=value ...]", "", "Groups and their options:"]
    lines += [f"  {name:<11} {'  '.join(options)}" for name, options in groups().items()]
    lines += ["", "Most used keys (default in the embedded run, meaning, range):"]
    for dotted in MOST_USED:
        value, meaning, within = _look_up(config, dotted)
        shown = "null" if value is None else str(value)
        lines.append(f"  {f'{dotted}={shown}':<32} {meaning}" + (f" {within}" if within else ""))
    lines += ["", "Examples:"]
    for command, meaning in EXAMPLES.items():
        lines += [f"  # {meaning}", f"  {command}"]
    lines += [
        "",
        "--cfg job prints the composed configuration, --info how it was composed, -m runs all combinations of lists,",
        "--hydra-help Hydra's own flags. Every key: README.md, or the schema in the module of the block's name.",
    ]
    return "\n".join(lines) + "\n"


def _look_up(config: Config, dotted: str) -> tuple[Any, str, str | None]:
    block: Schema = config
    *path, name = dotted.split(".")
    for part in path:
        block = getattr(block, part)
    found = next(f for f in dataclasses.fields(block) if f.name == name)
    return getattr(block, name), found.metadata["meaning"], found.metadata["within"]
