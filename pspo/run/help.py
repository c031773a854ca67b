"""What ``python -m pspo.run --help`` prints: made from the schemas and ``conf/``, so that it cannot go stale."""

import textwrap

from pspo.base.schema import as_dict, keys_of
from pspo.config import Config, compose, groups

MOST_USED = (  # noqa: SIM905  one a line would fill a page
    "seed objective.alpha loss.importance loss.aggregation loss.kl_weight optimizer.lr budget.steps rollout.prompts "
    "rollout.group_size rollout.max_new_tokens rollout.temperature update.num_epochs update.num_minibatches "
    "update.max_tokens model.path dataset.path dataset.test_limit evaluate.every diagnostics.counterfactual_every "
    "group device selection rerun continue_from"
).split()
EXAMPLES = {
    "python -m pspo.run": "the embedded task on this machine, in minutes",
    "python -m pspo.run objective=pspo model=qwen1_5b": "the paper's GR-PSPO run on GSM8K, on a GPU",
    "python -m pspo.run -m objective=noclip,clip,pspo seed=0,1,2": "a matched comparison, one run after another",
    "python -m pspo.run smoothing=strong tracker=jsonl": "alpha 0.3, without Weights & Biases",
    "python -m pspo.run model=qwen0_5b model.path=/models/qwen dataset.path=/data/gsm8k": "all from local files",
}
FLAGS = """
-m runs all combinations of lists; --cfg job prints the composed configuration and checks it; --info says how it was
composed; --hydra-help lists Hydra's own flags. Every key: docs/keys.md. Other commands: python -m pspo.
"""


def help_text() -> str:
    """Groups with their options, the most used keys with defaults and meanings, examples, and flags."""
    known = {dotted: (field, value) for dotted, field, value in keys_of(Config, as_dict(compose()))}
    lines = ["python -m pspo.run [group=option ...] [key=value ...]", "", "Groups and their options:"]
    for name, options in groups().items():
        lines += textwrap.wrap("  ".join(options), 106, initial_indent=f"  {name:<12}", subsequent_indent=" " * 14)
    lines += ["", "Most used keys (default in the embedded run, meaning, range):"]
    for dotted in MOST_USED:
        field, value = known[dotted]
        shown = f"{dotted}={'null' if value is None else value}"
        lines.append(f"  {shown:<38}{field.metadata['meaning']} {field.metadata['within'] or ''}".rstrip())
    lines += ["", "Examples:"]
    for command, meaning in EXAMPLES.items():
        lines += [f"  # {meaning}", f"  {command}"]
    return "\n".join(lines) + "\n" + FLAGS
