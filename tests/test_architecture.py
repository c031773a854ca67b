import ast
import dataclasses
from pathlib import Path

import pytest

from pspo.base.schema import Schema
from pspo.config import CONF, Config, compose, groups

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pspo"
MODULES = sorted(PACKAGE.rglob("*.py"))


def exists(word):
    return (PACKAGE / f"{word}.py").is_file() or (PACKAGE / word / "__init__.py").is_file()


def test_one_word_per_concern():
    config = compose()
    blocks = [f.name for f in dataclasses.fields(config) if isinstance(getattr(config, f.name), Schema)]
    for word in blocks:
        assert exists(word), f"cfg.{word} has no pspo/{word}"
        assert getattr(config, word).block == word
    for word in set(groups()) - {"experiment"}:
        assert word in blocks, f"conf/{word} has no cfg.{word}"
    assert {f.name for f in dataclasses.fields(Config)} >= set(blocks)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_is_over_300_lines(path):
    assert len(path.read_text().splitlines()) <= 300


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_hydra_stays_at_the_border():
    users = {p.name for p in MODULES if any(name.split(".")[0] in ("hydra", "omegaconf") for name in imports(p))}
    assert users == {"__main__.py", "job.py", "config.py", "sweep.py"}


def test_the_trainer_knows_no_objective_by_name():
    for name in ("trainer.py", "update/step.py", "loss.py"):
        source = (PACKAGE / name).read_text()
        assert not any(f'"{objective}"' in source for objective in groups()["objective"])


def test_configuration_has_no_targets_optionals_or_clock():
    for path in CONF.rglob("*.yaml"):
        text = path.read_text()
        plugin = path.relative_to(CONF).parts[0] == "hydra"  # Hydra finds its plugins by their targets alone
        assert not any(word in text for word in ("_target_", "optional ", "${now")[plugin:])
