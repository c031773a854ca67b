"""A user's own objective, without a fork: ``objective=custom objective.function=mine.py:Capped objective.cap=2``."""

from collections.abc import Mapping
from dataclasses import dataclass, make_dataclass
from typing import Any

from pspo.base import user_code
from pspo.base.schema import Schema, build, key
from pspo.objective.base import Objective


@dataclass(frozen=True, kw_only=True)
class Place(Schema, block="objective"):
    """The file or module that holds a user's objective; the objective's own fields are further keys of the block."""

    name: str
    function: str = key("your Objective class: path/to/file.py:Name or package.module:Name", path=True)


def own_class(values: Mapping[str, Any]) -> type[Schema]:
    """The user's class with the key ``objective.function`` as one more field. Raises ConfigError."""
    if values.get("function", "???") == "???":
        return Place  # whose construction says that the key is missing
    place = build(Place, {name: values[name] for name in ("name", "function") if name in values})
    objective = user_code.find(place, "function")
    if not (isinstance(objective, type) and issubclass(objective, Objective)):
        raise place.refuse("function", "must be a subclass of pspo.objective.Objective, a frozen dataclass")
    return make_dataclass(objective.__name__, [], bases=(objective, Place), frozen=True, kw_only=True)
