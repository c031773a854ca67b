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
    written, made = cells((DOCS / "objectives.md").read_text()), cells(picture.document())
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


@pytest.mark.parametrize("draw", [picture.draw_weights, picture.draw_implied_smoothing])
def test_the_figures_are_written(tmp_path, monkeypatch, draw):
    few = dict(list(picture.variants().items())[:2])
    monkeypatch.setattr(picture, "variants", lambda: few)
    draw(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


# --- implied smoothing


def implied(name, r, advantage=1.0):
    shown = picture.variants()
    return picture.implied_smoothing(shown[name], torch.tensor(r, dtype=torch.float64), advantage).tolist()


def test_implied_smoothing_by_hand():
    ratios = [0.5, 0.8, 1.2, 2.0]
    assert implied("pspo", ratios) == pytest.approx([0.1] * 4)
    assert implied("sapo", ratios) == pytest.approx([0.060, 0.010, 0.010, 0.214], abs=5e-4)  # tanh²(τ (r − 1) / 2)
    assert implied("sapo", ratios, -1.0) == pytest.approx([0.066, 0.011, 0.011, 0.232], abs=5e-4)
    assert implied("clip", [0.5, 1.0, 1.5]) == pytest.approx([0, 0, 1])
    assert implied("clip", [0.5, 1.0, 1.5], -1.0) == pytest.approx([1, 0, 0])
    assert implied("pspo_geometric", ratios) == pytest.approx([1 - 0.9 * r**-0.1 for r in ratios])
    assert implied("pspo_relative", ratios) == pytest.approx([1 - 0.9 / (0.9 + 0.1 * r) ** 2 for r in ratios])
    assert implied("cfpo", ratios) == pytest.approx([(r - 1) / 0.2 for r in ratios])
    assert implied("pspo_proportional", ratios) == pytest.approx([0, 0, 1, 2])


def test_which_trust_regions_are_smoothings():
    """What the README says of r from 1/8 to 8: the least and the greatest implied smoothing of each objective."""
    ratios = torch.logspace(-3, 3, 241, base=2, dtype=torch.float64).tolist()
    alphas = {name: implied(name, ratios) + implied(name, ratios, -1.0) for name in picture.variants()}
    least, most = ({name: end(values) for name, values in alphas.items()} for end in (min, max))
    amplifying, reversing = {n for n in least if least[n] < -1e-9}, {n for n in most if most[n] > 1 + 1e-9}
    plain = {name for name in alphas if "," not in name}
    assert plain - amplifying - reversing == {
        "noclip", "clip", "pspo", "pspo_clip", "cispo", "sapo", "gmpo", "dppo", "maspo"
    }  # fmt: skip
    assert plain & (amplifying - reversing) == {
        "pspo_geometric", "pspo_relative", "gppo", "aspo", "topr", "vespo", "dro"
    }  # fmt: skip
    assert plain & reversing == {"pspo_proportional", "cfpo", "r2vpo"}
    assert plain & (reversing - amplifying) == {"pspo_proportional"}
    assert {name: round(least[name], 1) for name in ("pspo_geometric", "gppo", "topr", "dro", "aspo")} == {
        "pspo_geometric": -0.1, "gppo": -5.4, "topr": -7.0, "dro": -8.7, "aspo": -23.0
    }  # fmt: skip
    assert {name: round(most[name], 1) for name in ("pspo_proportional", "r2vpo", "cfpo")} == {
        "pspo_proportional": 2.0, "r2vpo": 7.0, "cfpo": 35.0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("noclip", None), ("pspo", None), ("clip", 1.2), ("cispo", 10.0), ("sapo", 2.763), ("cfpo", 1.1),
        ("pspo_relative", 1 + (2**0.5 - 1) / 0.1), ("pspo_geometric", 1024.0), ("r2vpo", 1.5), ("topr", 2.0),
    ],
)  # fmt: skip
def test_widths_by_hand(name, expected):
    found = picture.width(picture.variants()[name], 1.0, above=True)
    assert found == (expected if expected is None else pytest.approx(expected, abs=5e-4))


@pytest.mark.parametrize(
    ("name", "value"),
    [("cfpo", 0.4), ("pspo_clip", 0.18), ("dppo", 0.02)],
)
def test_a_knob_gives_the_width(name, value):
    found = picture.knob_of_width(picture.variants()[name], picture.KNOBS[name], 1.2)
    assert found == pytest.approx(value, rel=1e-4)


def test_a_width_that_no_value_gives_is_none():
    for name in ("cispo", "pspo_relative"):  # whose least are 2 and √2
        assert picture.knob_of_width(picture.variants()[name], picture.KNOBS[name], 1.2) is None


def test_knobs_are_printed_and_a_width_of_no_sense_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(picture, "KNOBS", {"clip": "eps_high", "cispo": "cap"})
    monkeypatch.setattr("sys.argv", ["pspo.objective", "--width", "1.2"])
    picture.main()
    assert capsys.readouterr().out.splitlines() == ["clip: objective.eps_high=0.2", "cispo: no objective.cap gives it"]
    monkeypatch.setattr("sys.argv", ["pspo.objective", "--width", "0.9"])
    with pytest.raises(SystemExit):
        picture.main()
    assert "--width=0.9: give a ratio above 1" in capsys.readouterr().err


def test_alpha_drifts_as_the_figure_says():
    drift = {arm: picture.drifts(arm, [0.5])[0] for arm in picture.ARMS}
    assert drift["pspo, SGD at lr / (1 − alpha)"] < 1e-11
    assert drift["pspo, AdamW"] < 1e-4
    for name in ("pspo, SGD", "pspo, AdamW, entropy term", "pspo_geometric, AdamW", "pspo_clip, AdamW"):
        assert drift[name] > 1e-2, name
