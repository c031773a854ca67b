"""The configuration: its schema, and how a command line's words become one."""

from pspo.config.composing import (
    compose,
    compose_all,
    compose_tree,
    explained,
    for_answers,
    groups,
    in_quotes,
    launcher_keys,
    open_keys,
    quoted,
    resolve,
)  # fmt: skip
from pspo.config.tree import NOT_SCIENCE, ONLY_MEMORY, Config, check, identity, read, science

__all__ = [
    "NOT_SCIENCE", "ONLY_MEMORY", "Config", "check", "compose", "compose_all", "compose_tree", "explained",
    "for_answers", "groups", "identity", "in_quotes", "launcher_keys", "open_keys", "quoted", "read", "resolve",
    "science",
]  # fmt: skip
