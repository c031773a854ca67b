"""A user's own objective, without a fork: ``objective=custom objective.function=mine.py:Capped objective.cap=2``."""

from collections.abc import Mapping
from dataclasses import dataclass, make_dataclass
from typing import Any

from pspo.base import user_code
from pspo.base.schema import Schema, build, key
from pspo.objective.base import Objective


@dataclass(frozen=True, kw_only=True)
class Named(Schema, block="objective"):
    """Where the class of a user's objective is; its own fields are further keys of the block."""

    name: str
    function: str = key("your Objective class: path/to/file.py:Name or package.module:Name", path=True)


def own_class(values: Mapping[str, Any]) -> type[Schema]:
    """The user's class with one more field, the place that it is named by. Raises ConfigError."""
    if values.get("function", "???") == "???":
        return Named  # which says that the key is missing
    named = build(Named, {name: values[name] for name in ("name", "function") if name in values})
    found = user_code.find(named, "function")
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise named.refuse("function", "must be a subclass of pspo.objective.Objective, a frozen dataclass")
    place = Named.__dataclass_fields__["function"].metadata
    field = ("function", str, key(place["meaning"], path=True))
    return make_dataclass(found.__name__, [field], bases=(found,), frozen=True, kw_only=True)
