import json
import math
import re
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training import Killed, make_trainer

from pspo.base.schema import ConfigError, build
from pspo.config import compose
from pspo.smoothing import SMOOTHINGS, WEIGHT_GAIN, Adaptive, Controller, Linear, Smoothing
from pspo.trainer import ALPHA


def adaptive(**changes):
    values = {"name": "adaptive", "alpha": None, "target_kl": 0.01, "gain": 0.5, "low": 0.01, "high": 0.95}
    return Adaptive(**values | changes)


# --- rules


@pytest.mark.parametrize("name", ["none", "light", "paper", "strong"])
def test_a_constant_never_moves(name):
    smoothing = compose([f"smoothing={name}"]).smoothing
    assert type(smoothing) is Smoothing
    assert smoothing.constant
    for fraction, kl in ((0.0, None), (0.5, 100.0), (1.0, math.nan)):
        assert smoothing.next_alpha(0.3, 0.2, fraction, kl) == 0.2


@given(first=st.floats(0, 0.99), final=st.floats(0, 0.99), fraction=st.floats(0, 1))
def test_linear_goes_straight_from_the_first_alpha_to_the_last(first, final, fraction):
    smoothing = Linear(name="linear", alpha=None, final=final)
    assert not smoothing.constant
    assert smoothing.next_alpha(first, 0.5, 0.0, None) == first
    assert smoothing.next_alpha(first, 0.5, 1.0, 3.0) == pytest.approx(final, abs=1e-15)
    expected = (1 - fraction) * first + fraction * final
    assert smoothing.next_alpha(first, 0.5, fraction, None) == pytest.approx(expected, abs=1e-12)


def test_adaptive_by_hand():
    """Odds of 0.2 are 1/4. KL at twice its target or over: error 1, odds times e^0.5; at half of it: e^−0.25."""
    smoothing, far = adaptive(), [(0.02, 0.5), (5.0, 0.5), (math.inf, 0.5), (math.nan, 0.5)]
    for kl, exponent in (*far, (0.01, 0.0), (0.005, -0.25), (0.0, -0.5)):
        odds = 0.25 * math.exp(exponent)
        assert smoothing.next_alpha(0.9, 0.2, 0.5, kl) == pytest.approx(odds / (1 + odds), rel=1e-12), kl
    assert smoothing.next_alpha(0.9, 0.2, 0.5, None) == 0.2  # a step without updates, or without diagnostics


@given(alpha=st.floats(0, 0.99), kl=st.floats(0, 100), low=st.floats(0.01, 0.4), high=st.floats(0.5, 0.99))
def test_adaptive_stays_in_its_range_and_moves_the_right_way(alpha, kl, low, high):
    smoothing = adaptive(low=low, high=high)
    following = smoothing.next_alpha(0.1, alpha, 0.0, kl)
    assert low <= following <= high
    within = min(high, max(low, alpha))
    assert (following >= within - 1e-12) if kl >= 0.01 else (following <= within + 1e-12)


@pytest.mark.parametrize("start", [0.0, 0.1, 0.5, 0.9])
def test_adaptive_finds_the_alpha_of_its_target_in_a_closed_loop(start):
    """A toy whose KL is 0.04 (1 − α)²: the target of 0.01 is met at α = 1/2, from wherever it begins."""
    smoothing, alpha = adaptive(), start
    for _ in range(60):
        alpha = smoothing.next_alpha(start, alpha, 0.0, 0.04 * (1 - alpha) ** 2)
    assert alpha == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(("kl", "expected"), [(1.0, 0.95), (0.0, 0.01)])
def test_adaptive_rests_at_its_bounds_where_the_target_is_out_of_reach(kl, expected):
    smoothing, alpha = adaptive(), 0.1
    for _ in range(60):
        alpha = smoothing.next_alpha(0.1, alpha, 0.0, kl)
    assert alpha == expected


# --- the controller of weights


@given(first=st.floats(1e-3, 10), measured=st.floats(0, 100), target=st.floats(1e-3, 10))
def test_a_weight_moves_by_the_gain_at_most_and_the_right_way(first, measured, target):
    controller = Controller.of_weight(first, target)
    moved = controller.next(first, measured)
    assert math.log(moved / first) == pytest.approx(WEIGHT_GAIN * min(1, max(-1, measured / target - 1)), abs=1e-9)
    assert controller.next(first, None) == first
    assert controller.next(first, math.nan) == pytest.approx(first * math.exp(WEIGHT_GAIN))
    for _ in range(100):
        moved = controller.next(moved, 1e9)
    assert moved == pytest.approx(1000 * first)


def test_a_weight_finds_its_target_in_a_closed_loop():
    """A toy whose KL is 0.1 / β: the target of 0.02 is met at β = 5."""
    controller, beta = Controller.of_weight(0.04, 0.02), 0.04
    for _ in range(60):
        beta = controller.next(beta, 0.1 / beta)
    assert beta == pytest.approx(5.0, rel=1e-6)


# --- in a run


def steps(directory):
    """The metrics of the steps, without the row before the first."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["step"] > 0]


def alphas(directory):
    return [row["objective/alpha"] for row in steps(directory)]


@pytest.mark.parametrize(
    "budget",
    [
        [],
        ["budget.steps=null", "budget.prompts=8"],
        ["budget.steps=null", "budget.completion_tokens=100"],
    ],
)
def test_linear_follows_the_budget_in_any_unit(tiny_policy, tmp_path, budget):
    """The first step has objective.alpha; the alpha after the last is ``final``."""
    overrides = ["smoothing=linear", "objective.alpha=0.8", "smoothing.final=0.2", *budget]
    trainer = make_trainer(tiny_policy(), tmp_path, *overrides)
    assert trainer.run().steered == {ALPHA: pytest.approx(0.2)}
    rows, budget = steps(tmp_path), trainer.config.budget
    spent = [0.0] + [min(1.0, row[f"budget/{budget.unit}"] / budget.total) for row in rows]
    assert alphas(tmp_path) == pytest.approx([0.8 - 0.6 * fraction for fraction in spent[:-1]])
    assert len(rows) >= 3


def test_the_objective_of_a_step_has_the_alpha_of_the_step(tiny_policy, tmp_path):
    trainer = make_trainer(tiny_policy(), tmp_path, "smoothing=linear", "objective.alpha=0.8")
    trainer.state.steered = {ALPHA: 0.35}
    assert trainer._steered_learner().objective.alpha == 0.35
    assert trainer._step()["objective/alpha"] == 0.35
    constant = make_trainer(tiny_policy(), tmp_path / "b", "objective.alpha=0.8")
    assert constant._steered_learner().objective is constant.config.objective
    other = make_trainer(tiny_policy(), tmp_path / "c", "objective=clip")
    assert "objective/alpha" not in other._step()


def test_adaptive_is_steered_by_the_kl_after_the_last_update(tiny_policy, tmp_path):
    overrides = ["smoothing=adaptive", "objective=pspo_geometric", "smoothing.target_kl=1e-4"]
    trainer = make_trainer(tiny_policy(), tmp_path, *overrides)
    trainer.run()
    rows = [json.loads(line) for line in (tmp_path / "diagnostics.jsonl").read_text().splitlines()]
    last = [[row for row in rows if row["step"] == step][-1]["kl/after_k3"] for step in range(1, 5)]
    expected = [trainer.config.objective.alpha]
    for kl in last:
        expected.append(trainer.config.smoothing.next_alpha(0.1, expected[-1], 0.0, kl))
    assert alphas(tmp_path) == expected[:-1]
    assert trainer.state.steered[ALPHA] == expected[-1] != expected[0]


KL = ["loss.kl=k3", "loss.kl_weight=0.1", "loss.kl_target=1e-6", "loss.reference=rollout"]
STEERED = {"objective/lam": ["objective=r2vpo", "objective.delta=1e-5"], "loss/kl_weight": ["objective=clip", *KL]}
MEASURED = {"objective/lam": ("policy/ratio_variance", 1e-5), "loss/kl_weight": ("policy/kl_reference", 1e-6)}


@pytest.mark.parametrize("name", STEERED)
def test_weights_are_steered_logged_and_resumed(tiny_policy, tmp_path, name):
    """From step to step by the controller, from that step's measurement; a resumed run goes on as the unbroken one."""
    whole = make_trainer(tiny_policy(), tmp_path / "whole", *STEERED[name])
    assert whole.learner.reference is None
    whole.run()
    rows, (metric, target) = steps(tmp_path / "whole"), MEASURED[name]
    expected = [rows[0][name]]
    controller = Controller.of_weight(expected[0], target)
    for row in rows:
        expected.append(controller.next(expected[-1], row[metric]))
    assert [row[name] for row in rows] == expected[:-1]
    assert len(set(expected)) == len(expected)
    assert whole.state.steered == {name: expected[-1]}
    block, _, key = name.partition("/")
    assert getattr(getattr(whole._steered_learner(), block), key) == expected[-1]
    with pytest.raises(Killed):
        make_trainer(tiny_policy(), tmp_path / "broken", *STEERED[name], calls=24).run()
    resumed = make_trainer(tiny_policy(), tmp_path / "broken", *STEERED[name])
    resumed.run()
    assert asdict(resumed.state) == asdict(whole.state)
    for a, b in zip(*(t.policy.trainable().values() for t in (whole, resumed)), strict=True):
        assert torch.equal(a, b)


def test_without_a_target_nothing_is_steered(tiny_policy, tmp_path):
    trainer = make_trainer(tiny_policy(), tmp_path, "objective=r2vpo", "loss.kl=k3", "loss.kl_weight=0.1")
    assert trainer.state.steered == trainer.controllers == {}
    assert trainer.learner.reference is not None
    assert trainer._steered_learner() == trainer.learner


@pytest.mark.process
@pytest.mark.parametrize("overrides", [["smoothing=linear", "objective.alpha=0.8"], ["smoothing=adaptive"]])
def test_a_resumed_run_has_the_alphas_and_weights_of_the_unbroken_one(tiny_policy, tmp_path, overrides):
    overrides = ["objective=pspo_geometric", *overrides]
    whole = make_trainer(tiny_policy(), tmp_path / "whole", *overrides)
    whole.run()
    with pytest.raises(Killed):  # in the fourth step: the third is lost, for no checkpoint has it
        make_trainer(tiny_policy(), tmp_path / "broken", *overrides, calls=24).run()
    resumed = make_trainer(tiny_policy(), tmp_path / "broken", *overrides)
    assert resumed.state.progress.steps == 2
    resumed.run()
    assert alphas(tmp_path / "broken") == alphas(tmp_path / "whole")
    assert len(set(alphas(tmp_path / "whole"))) == 4
    assert asdict(resumed.state) == asdict(whole.state)
    for a, b in zip(*(t.policy.trainable().values() for t in (whole, resumed)), strict=True):
        assert torch.equal(a, b)


# --- configuration


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"target_kl": 0.0}, "smoothing.target_kl must be in (0, inf), got 0.0"),
        ({"gain": 0.0}, "smoothing.gain must be in (0, inf), got 0.0"),
        ({"low": 0.0}, "smoothing.low must be in (0, 1), got 0.0"),
        ({"high": 1.0}, "smoothing.high must be in (0, 1), got 1.0"),
        ({"low": 0.95}, "smoothing.low=0.95: must be below smoothing.high=0.95"),
    ],
)
def test_bad_fields_are_refused(changes, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        adaptive(**changes)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["smoothing=linear", "objective=clip"],
            "smoothing=linear sets objective.alpha, which objective=clip does not",
        ),
        (["smoothing=adaptive", "objective=sapo"], "smoothing=adaptive sets objective.alpha, which objective=sapo"),
        (["smoothing=linear", "smoothing.final=1"], "smoothing.final must be in [0, 1), got 1.0"),
        (["smoothing=adaptive", "diagnostics.every=2"], "diagnostics.every=2: smoothing=adaptive is steered by them"),
        (["smoothing.target_kl=0.1"], "unknown key smoothing.target_kl"),
    ],
)
def test_impossible_pairs_are_refused(overrides, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        compose(overrides)


def test_an_unknown_smoothing_is_refused_with_the_list():
    told = f"unknown smoothing liner (did you mean linear?); known: {', '.join(SMOOTHINGS)}"
    with pytest.raises(ConfigError, match=re.escape(told)):
        build(Smoothing, {"name": "liner", "alpha": None})
