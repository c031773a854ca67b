"""Typed configuration keys.

A block of the configuration is a frozen dataclass that stands in the module that uses it; the values stand in ``conf/``
and nowhere else. ``build`` turns plain mappings into that tree and refuses, in one sentence, what does not fit.
"""

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeVar, Union, cast


class ConfigError(ValueError):
    """A user's mistake in one sentence: the key, the value got, the values allowed, the remedy."""


MISSING = "???"
"""OmegaConf's mark of a key without a value."""


def key(
    meaning: str, *, within: str | None = None, why: str | None = None, path: bool = False, before: Any = MISSING
) -> Any:
    """Declare one key: its meaning, for numbers an interval such as ``[0, 1)`` and why, whether ``~`` is expanded.

    ``before`` is what a key that was added later had been all along: the value in runs of earlier versions.
    """
    about = {"meaning": meaning, "within": within, "why": why, "path": path, "before": before}
    return dataclasses.field(metadata=about)


@dataclass(frozen=True, kw_only=True)
class Schema:
    """Base of every configuration block; ``class Rollout(Schema, block="rollout")`` names where its keys live."""

    block: ClassVar[str] = ""
    kinds: ClassVar[Mapping[str, Any]]  # of a block of several kinds: the class of each ``name``, or a function to it

    def __init_subclass__(cls, block: str | None = None) -> None:
        super().__init_subclass__()
        if block is not None:
            cls.block = block

    def __post_init__(self) -> None:
        """Check every field's type and interval. Raises ConfigError."""
        for name, hint in fields_of(type(self)).items():
            _check(self.dotted(name), getattr(self, name), hint, self.__dataclass_fields__[name].metadata)

    @classmethod
    def select(cls, values: Mapping[str, Any]) -> type[Self]:
        """The class that describes ``values``: this one, or the kind that ``name`` names. Raises ConfigError."""
        kinds, name = vars(cls).get("kinds", {}), str(values.get("name"))
        if kinds and name not in kinds:
            raise unknown(name, kinds, cls.block)
        kind = kinds.get(name, cls)
        return cast(type[Self], kind if isinstance(kind, type) else kind(values))

    @classmethod
    def dotted(cls, name: str) -> str:
        """``rollout.top_p`` for field ``top_p`` of block ``rollout``."""
        return f"{cls.block}.{name}" if cls.block else name

    def refuse(self, name: str, reason: str) -> ConfigError:
        return ConfigError(f"{self.dotted(name)}={getattr(self, name)!r}: {reason}")


S = TypeVar("S", bound=Schema)


def fields_of(cls: type[Schema]) -> dict[str, Any]:
    """Field name -> resolved type, in order of declaration."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def build(cls: type[S], values: Mapping[str, Any], *, earlier: bool = False) -> S:
    """Construct ``cls`` from a plain mapping. Raises ConfigError on unknown, missing, mistyped or out-of-range keys.

    The mapping of a run of an ``earlier`` version may lack the keys that were added since, with ``before``.
    """
    cls = cls.select(values)
    hints = fields_of(cls)
    for name, value in values.items():
        if name not in hints:
            inner = f".{next(iter(value))}" if isinstance(value, Mapping) and value else ""
            tree = [dotted for dotted, _, _ in keys_of(cls, values)]
            raise unknown(cls.dotted(name) + inner, [cls.dotted(known) for known in hints], tree=tree)
    built = {}
    for name, hint in hints.items():
        metadata = cls.__dataclass_fields__[name].metadata
        value = values.get(name, metadata.get("before", MISSING) if earlier else MISSING)
        if isinstance(value, str) and value == MISSING:
            raise ConfigError(f"{cls.dotted(name)} has no value; set it with {cls.dotted(name)}=<value>")
        if isinstance(value, Mapping) and (block := _block(hint)):
            value = build(block, value, earlier=earlier)
        elif type(value) is int and float in _options(hint):
            value = float(value)
        elif isinstance(value, str) and metadata.get("path"):
            value = os.path.expanduser(value)
        built[name] = value
    return cls(**built)


def unknown(name: str, known: Iterable[str], noun: str = "key", tree: Sequence[str] = ()) -> ConfigError:
    """The error for a misspelt name, with the nearest of the known names and of the ends of the keys in ``tree``."""
    known, tree = list(known), sorted(tree, key=lambda key: key.count("."))
    near = [key for key in tree if key.endswith(f".{name}")]
    near = [key for key in near if key.count(".") == near[0].count(".")]  # optimizer.lr, not model.warm_start.lr
    by_end = {key.rpartition(".")[2]: key for key in reversed(tree)} | {key.lower(): key for key in (*tree, *known)}
    near = near or [by_end[match] for match in difflib.get_close_matches(name.lower(), by_end, n=1)]
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    return ConfigError(f"unknown {noun} {name}{hint}; known: {', '.join(known)}")


def keys_of(cls: type[Schema], values: Mapping[str, Any]) -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Every key of the blocks that describe ``values``, as ``optimizer.lr``, with its field and its value."""
    cls = cls.select(values)
    for name, hint in fields_of(cls).items():
        value = values.get(name)
        if isinstance(value, Mapping) and (block := _block(hint)):
            yield from keys_of(block, value)
        else:
            yield cls.dotted(name), cls.__dataclass_fields__[name], value


as_dict = dataclasses.asdict  # the configuration tree as plain dictionaries, lists and scalars


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with keys such as ``rollout.top_p``."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= dotted(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _check(name: str, value: Any, hint: Any, about: Mapping[str, Any]) -> None:
    """Refuse a value of the wrong type, outside its choices, or outside its interval. Raises ConfigError."""
    if not _fits(value, hint):
        several = isinstance(value, list) and not any(typing.get_origin(option) is list for option in _options(hint))
        advice = f"; it takes one value: -m {name}={','.join(map(str, value))} makes a run with each" if several else ""
        advice += f"; to have it as text, quote it twice: {name}='\"...\"'" if str in _options(hint) else ""
        why = f": {about['why']}" if typing.get_origin(hint) is Literal and about["why"] else ""
        raise ConfigError(f"{name} must be {describe(hint)}, got {value!r}{why}{advice}")
    if isinstance(value, str) and value.encode(errors="replace").decode() != value:
        raise ConfigError(f"{name} must be text in UTF-8, got {value!r}; rename what it names")
    if value is not None and (interval := about.get("within")):
        low, high = map(float, interval[1:-1].split(","))
        is_end = (value == low and interval[0] == "[") or (value == high and interval[-1] == "]")
        if not (low < value < high or is_end):
            why = f": {about['why']}" if about["why"] else ""
            raise ConfigError(f"{name} must be in {interval}, got {value!r}{why}")


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _block(hint: Any) -> type[Schema] | None:
    """The schema among the options of a type."""
    return next((o for o in _options(hint) if isinstance(o, type) and issubclass(o, Schema)), None)


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin in (list, dict):
        items = value.values() if isinstance(value, dict) else value
        return isinstance(value, origin) and all(_fits(item, arguments[-1]) for item in items)
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    if arguments:  # a union
        return any(_fits(value, option) for option in arguments)
    return hint is Any or isinstance(value, hint)


NOUNS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Any: "anything"}
NOUNS |= {types.NoneType: "null", list: "a list", dict: "a table"}


def describe(hint: Any) -> str:
    """The values that a key of this type takes, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in NOUNS:
        return f"{NOUNS[origin]}, each item {describe(arguments[-1])}"
    if arguments:
        return " or ".join(map(describe, arguments))
    return NOUNS.get(hint, "a block of keys")
