"""The house: rooms by their words, imports that run downward only, files that one can read."""

import ast
import dataclasses
from collections import Counter
from pathlib import Path

import pytest

from pspo.base.files import CONF
from pspo.base.schema import Schema
from pspo.config import Config, compose, groups

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pspo"
MODULES = sorted(PACKAGE.rglob("*.py"))
ORDER = """
base | host | budget optimizer smoothing objective dataset report tracker | reward model | advantage checkpoint | loss |
diagnostics | rollout | update | evaluate | config | trainer | run | launcher | sweep status results supervise |
compare | judge doctor | dashboard | prefetch sync
"""
"""Rooms, the lowest first; a room may import its own files and rooms strictly below it."""
FLOOR = {room: floor for floor, rooms in enumerate(ORDER.split("|")) for room in rooms.split()}


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """The modules that a file imports, wherever in it the import stands, names of submodules spelt out."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_command(path):
    """A command's thin entry, and the package's own description, which may look at anything."""
    return path.name == "__main__.py" or path == PACKAGE / "__init__.py"


def test_every_room_has_its_floor():
    assert {room_of(path) for path in MODULES} - {"__init__", "__main__"} == FLOOR.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downward_only(path):
    if not is_command(path):
        for name in imports(path):
            head, _, rest = name.partition(".")
            room = rest.partition(".")[0]
            if head == "pspo" and room != room_of(path) and room != "__version__":
                assert FLOOR[room] < FLOOR[room_of(path)], f"{path.relative_to(ROOT)} imports {name}"
                # A command may look at anything, so that whoever imports one imports what the launchers import.
                below_commands = FLOOR[room_of(path)] <= FLOOR["launcher"]
                assert not (below_commands and "__main__" in name), f"{path.relative_to(ROOT)} imports {name}"


def test_no_module_imports_itself_over_others():
    """Inside of a room, too, there is no circle of imports at the top of files."""

    def module_of(path):
        return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")

    names = {module_of(path): path for path in MODULES}
    arrows = {}
    for name, path in names.items():
        top = ast.Module(body=[node for node in ast.parse(path.read_text()).body], type_ignores=[])
        found = set()
        for node in top.body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pspo"):
                found |= {
                    f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in names else node.module for a in node.names
                }
        arrows[name] = found & names.keys() - {name}
    done, at_work = set(), []

    def visit(name):
        assert name not in at_work, " -> ".join([*at_work[at_work.index(name) :], name])
        if name not in done:
            at_work.append(name)
            for other in sorted(arrows[name]):
                visit(other)
            at_work.pop()
            done.add(name)

    for name in arrows:
        visit(name)


def test_a_name_of_a_class_has_one_meaning():
    """In the whole package: a second ``Row`` or ``Score`` is how a reader gets lost."""
    nodes = (node for path in MODULES for node in ast.parse(path.read_text()).body)
    assert [name for name, n in Counter(n.name for n in nodes if isinstance(n, ast.ClassDef)).items() if n > 1] == []


def test_one_word_per_concern():
    config = compose()
    blocks = [f.name for f in dataclasses.fields(config) if isinstance(getattr(config, f.name), Schema)]
    for word in blocks:
        assert word in FLOOR, f"cfg.{word} has no pspo/{word}"
        assert getattr(config, word).block == word
    for word in set(groups()) - {"experiment"}:
        assert word in blocks, f"conf/{word} has no cfg.{word}"
    assert {f.name for f in dataclasses.fields(Config)} >= set(blocks)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_is_over_300_lines(path):
    assert len(path.read_text().splitlines()) <= 300


def test_hydra_stays_at_the_border():
    users = {p for p in MODULES if any(name.split(".")[0] in ("hydra", "omegaconf") for name in imports(p))}
    assert {room_of(p) for p in users if p.stem != "grammar"} == {"run", "config", "sweep"}


def test_the_trainer_knows_no_objective_by_name():
    for name in ("trainer.py", "update/step.py", "loss.py"):
        source = (PACKAGE / name).read_text()
        assert not any(f'"{objective}"' in source for objective in groups()["objective"])


def test_configuration_has_no_targets_optionals_or_clock():
    for path in CONF.rglob("*.yaml"):
        text = path.read_text()
        plugin = path.relative_to(CONF).parts[0] == "hydra"  # Hydra finds its plugins by their targets alone
        assert not any(word in text for word in ("_target_", "optional ", "${now")[plugin:])
