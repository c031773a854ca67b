"""What ``python -m pspo.run --help`` prints: ``help.txt``, filled in from the schemas and ``conf/``."""

import textwrap
from pathlib import Path

from pspo.base.schema import as_dict, keys_of
from pspo.config import Config, compose, groups

MOST_USED = (  # noqa: SIM905  one a line would fill a page
    "seed objective.alpha loss.importance loss.aggregation loss.kl_weight optimizer.lr budget.steps rollout.prompts "
    "rollout.group_size rollout.max_new_tokens rollout.temperature update.num_epochs update.num_minibatches "
    "update.max_tokens model.path dataset.path dataset.test_limit evaluate.every diagnostics.counterfactual_every "
    "group device selection rerun continue_from"
).split()


def help_text() -> str:
    """Groups with their options, the most used keys with defaults and meanings, examples, and flags."""
    known = {dotted: (field, value) for dotted, field, value in keys_of(Config, as_dict(compose()))}
    options, keys = [(f"  {name:<12}", "  ".join(names)) for name, names in groups().items()], []
    for name, (field, value) in ((name, known[name]) for name in MOST_USED):
        label = f"{name}={'null' if value is None else value}"
        keys.append((f"  {label:<38}", f"{field.metadata['meaning']} {field.metadata['within'] or ''}"))
    template = Path(__file__).with_name("help.txt").read_text(encoding="utf-8")
    return template.format(groups=_columns(options), keys=_columns(keys))


def _columns(rows: list[tuple[str, str]]) -> str:
    return "\n".join(textwrap.fill(text, 118, initial_indent=x, subsequent_indent=" " * len(x)) for x, text in rows)
