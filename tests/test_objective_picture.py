from pathlib import Path

import pytest
import torch

from pspo.objective import OBJECTIVES
from pspo.objective import __main__ as picture

DOCS = Path(__file__).parents[1] / "docs"


def cells(text):
    return [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]


def same(cell, other):
    try:
        return abs(float(cell.replace("−", "-")) - float(other.replace("−", "-"))) < 1.001e-3
    except ValueError:  # no numbers
        return cell == other


def test_the_table_in_the_documentation_is_what_the_classes_say():
    """``python -m pspo.objective docs`` writes it; a weight half-way between two numbers is rounded either way."""
    written, made = cells((DOCS / "objectives.md").read_text()), cells(picture.table())
    assert [len(line) for line in written] == [len(line) for line in made]
    assert all(same(*pair) for lines in zip(written, made, strict=True) for pair in zip(*lines, strict=True))


def test_every_objective_is_shown():
    shown = {name for name, objective in OBJECTIVES.items() if not objective.needs_batch}
    assert {name.partition(",")[0] for name in picture.variants()} == shown
    assert len(picture.variants()) == len(shown) + len(picture.OPTIONS)


@pytest.mark.parametrize("advantage", [2.0, -0.5])
def test_the_weight_is_the_factor_on_the_gradient_of_log_pi(advantage):
    ratio_N = torch.tensor([0.25, 1.0, 4.0])
    assert picture.weight(picture.variants()["noclip"], ratio_N, advantage).tolist() == pytest.approx([0.25, 1, 4])
    assert picture.weight(picture.variants()["pspo"], ratio_N, advantage).tolist() == pytest.approx([0.225, 0.9, 3.6])


def test_the_figure_is_written(tmp_path):
    picture.draw_weights(tmp_path / "objectives.png")
    assert (tmp_path / "objectives.png").read_bytes()[:4] == b"\x89PNG"


def test_alpha_drifts_as_the_figure_says():
    drift = {arm: picture.drifts(arm, [0.5])[0] for arm in picture.ARMS}
    assert drift["pspo, SGD at lr / (1 − alpha)"] < 1e-11
    assert drift["pspo, AdamW"] < 1e-4
    for name in ("pspo, SGD", "pspo, AdamW, entropy term", "pspo_geometric, AdamW", "pspo_clip, AdamW"):
        assert drift[name] > 1e-2, name
