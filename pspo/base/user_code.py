"""A user's own code, named as ``path/to/file.py:name`` or ``package.module:name``."""

import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from pspo.base.schema import Schema


def find(block: Schema, field: str) -> Any:
    """The function or class that a key names; a file is imported once per process. Raises ConfigError."""
    place, _, name = getattr(block, field).rpartition(":")
    is_file = place.endswith(".py")
    if is_file and not Path(place).is_file():
        raise block.refuse(field, f"there is no file {place}")
    if not is_file and not all(part.isidentifier() for part in place.split(".")):
        raise block.refuse(field, f"must be path/to/file.py:{field} or package.module:{field}")
    try:
        module = _import_file(Path(place).resolve()) if is_file else importlib.import_module(place)
    except Exception as error:  # whatever the user's file raises
        raise block.refuse(field, f"cannot be imported: {type(error).__name__}: {error}") from error
    named = getattr(module, name, None)
    if not callable(named):
        raise block.refuse(field, f"{place} has no function or class {name}")
    return named


def source_files(named: str) -> list[Path]:
    """The file that holds the named function or class, looked up without an import; [] where there is no such file."""
    place = named.rpartition(":")[0]
    paths = [Path(folder, *place.split(".")) for folder in sys.path if place]
    files = [file for path in paths for file in (path / "__init__.py", path.with_name(f"{path.name}.py"))]
    return [file for file in ([Path(place)] if place.endswith(".py") else files) if file.is_file()][:1]


@functools.cache
def _import_file(file: Path) -> ModuleType:
    spec: Any = importlib.util.spec_from_file_location(str(file), file)  # its path is a name that no other file has
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass in the file looks itself up there
    spec.loader.exec_module(module)
    return module
