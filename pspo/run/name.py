"""The name of a run's directory: short words for what was set, then a digest of the whole configuration."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from pspo.base.schema import as_dict, keys_of
from pspo.config import NOT_SCIENCE, Config, groups, identity

NAMELESS = (*NOT_SCIENCE, "evaluate", "objective", "seed")
"""Blocks and keys that add no word to a run's name; the objective has the first."""
LABEL_CHARACTERS = 80  # in a run's name, for words; more words are counted as _+2. A file's name may have 255 bytes.


def run_directory(config: Config, overrides: Sequence[str]) -> Path:
    """``output_dir/group/<objective>_<its keys>_<other keys>_seed<seed>_<identity>``, or an earlier run's directory.

    A run is recognized by its identity alone, as other overrides may set the same values.
    """
    parent = Path(config.output_dir) / config.group
    earlier = sorted(parent.glob(f"*_{identity(config)}")) if parent.is_dir() else []
    return earlier[0] if earlier else parent / f"{_label(config, overrides)}_seed{config.seed}_{identity(config)}"


def _label(config: Config, overrides: Sequence[str]) -> str:
    """The objective, the overrides of its keys, then the other overrides, in characters that need no shell quoting.

    An option is written without its group, and a key by its last part, where no other group or key has the same word.
    """
    keys = [dotted.removeprefix("objective.") for dotted, _, _ in keys_of(Config, as_dict(config))]
    short = short_names(key for key in keys if not key.startswith("evaluate.") or key == "evaluate.every")
    options = Counter(option for names in groups().values() for option in names)
    words: dict[str, str] = {}
    for override in overrides:
        name, _, value = override.lstrip("+").partition("=")
        if name.startswith("objective.") or name == "evaluate.every" or name.partition(".")[0] not in NAMELESS:
            value = re.sub(r"[^\w.+-]+", "-", Path(value).name.strip("[](){}\"' "), flags=re.ASCII)
            key_word = short.get(name.removeprefix("objective."), name)
            words[name] = value if name in groups() and options[value] == 1 else f"{key_word}={value}"
    label, num_left_out = config.objective.name, 0
    for name in sorted(words, key=lambda name: (not name.startswith("objective."), name)):
        if len(label) + 1 + len(words[name]) <= LABEL_CHARACTERS:
            label += f"_{words[name]}"
        else:
            num_left_out += 1
    return f"{label}_+{num_left_out}" if num_left_out else label


def short_names(dotted: Iterable[str]) -> dict[str, str]:
    """``lr`` for ``optimizer.lr``: each key's shortest end, in whole words, that is of no other key as short as it."""
    parts = {key: key.split(".") for key in dotted}
    ends = sorted((len(words), ".".join(words[at:]), key) for key, words in parts.items() for at in range(len(words)))
    owners: dict[str, list[tuple[int, str]]] = {}
    for depth, end, key in ends:
        owners.setdefault(end, []).append((depth, key))
    own = [(key, end) for end, [(depth, key), *others] in owners.items() if not others or others[0][0] > depth]
    return dict(sorted(own, key=lambda pair: -len(pair[1])))
