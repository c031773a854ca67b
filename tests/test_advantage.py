import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pspo.advantage import ADVANTAGES, GAE, Advantage, Group, LeaveOneOut, Mean, has_spread
from pspo.base.schema import ConfigError, build
from pspo.config import compose


def group(ddof, eps):
    return Group(name="group", ddof=ddof, eps=eps)


PAPER = group(1, 1e-4)
MEAN, LEAVE_ONE_OUT = Mean(name="mean"), LeaveOneOut(name="leave_one_out")
GROUPS = [group(d, e) for d in (0, 1) for e in (0.0, 1e-4)]
rewards = st.lists(
    st.lists(st.sampled_from([0.0, 0.05, 0.1, 0.3, 0.85, 1.0]), min_size=5, max_size=5), min_size=1, max_size=4
).map(lambda rows: torch.tensor(rows, dtype=torch.float64))
every_group = pytest.mark.parametrize("advantage", GROUPS, ids=repr)
every = pytest.mark.parametrize("advantage", [*GROUPS, MEAN, LEAVE_ONE_OUT], ids=repr)  # all but GAE


@pytest.mark.parametrize(
    ("ddof", "eps", "expected"),
    [
        # Rewards 1, 0, 0, 0: mean 1/4, squared deviations 9/16 + 3 · 1/16 = 3/4, so std 1/2 by 3 and √3/4 by 4.
        (1, 1e-4, [0.75 / 0.5001, -0.25 / 0.5001]),
        (1, 0.0, [1.5, -0.5]),
        (0, 0.0, [3**0.5, -1 / 3**0.5]),
        (0, 0.5, [0.75 / (3**0.5 / 4 + 0.5), -0.25 / (3**0.5 / 4 + 0.5)]),
    ],
)
def test_by_hand(ddof, eps, expected):
    advantage_PG = group(ddof, eps)(torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 0]]))
    assert advantage_PG.dtype == torch.float64
    high, low = expected
    assert advantage_PG[0].tolist() == pytest.approx([high, low, low, low], rel=1e-12)
    assert advantage_PG[1].tolist() == pytest.approx([low, low, high, low], rel=1e-12)


def test_mean_and_leave_one_out_by_hand():
    """Rewards 1, 0, 0, 0: less 1/4; less the mean of the other three, which is 0 for the first and 1/3 else."""
    reward_PG = torch.tensor([[1.0, 0, 0, 0], [2.0, 0, 4.0, 2.0]])
    for advantage, expected in (
        (MEAN, [[0.75, -0.25, -0.25, -0.25], [0.0, -2.0, 2.0, 0.0]]),
        (LEAVE_ONE_OUT, [[1.0, -1 / 3, -1 / 3, -1 / 3], [0.0, -8 / 3, 8 / 3, 0.0]]),
    ):
        advantage_PG = advantage(reward_PG)
        assert advantage_PG.dtype == torch.float64
        assert advantage_PG.flatten().tolist() == pytest.approx(np.ravel(expected).tolist(), abs=1e-12)


@given(reward_PG=rewards)
def test_leave_one_out_is_the_reward_less_the_mean_of_the_others(reward_PG):
    expected_PG = torch.stack(
        [torch.stack([row[g] - torch.cat([row[:g], row[g + 1 :]]).mean() for g in range(5)]) for row in reward_PG]
    )
    torch.testing.assert_close(LEAVE_ONE_OUT(reward_PG), expected_PG, atol=1e-12, rtol=0)


@every
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.05, 0.1 * 3, 1 / 3, -0.2, 1e9, 1e-300])
@pytest.mark.parametrize("size", [2, 3, 4, 7, 64])
def test_equal_rewards_give_exactly_zero(advantage, reward, size):
    reward_PG = torch.full((2, size), reward, dtype=torch.float64)
    assert torch.equal(advantage(reward_PG), torch.zeros(2, size, dtype=torch.float64))


def test_only_the_group_of_equal_rewards_is_zero():
    reward_PG = torch.tensor([[0.1 * 3] * 3, [0.0, 0.0, 1.0]], dtype=torch.float64)
    assert has_spread(reward_PG).tolist() == [False, True]
    advantage_PG = group(1, 0.0)(reward_PG)
    assert not advantage_PG[0].any()
    assert advantage_PG[1].all()


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("others", [0.0, float("nan")])
@every
def test_a_reward_that_is_not_a_number_is_not_taken_for_no_spread(advantage, reward, others):
    """Such an advantage stops the update; 0 would hide it."""
    assert not advantage(torch.tensor([[reward, others, 1.0]])).isfinite().any()
    assert has_spread(torch.tensor([[reward, others, 1.0]])).all()


@every
@given(reward_PG=rewards, seed=st.integers(0, 1000))
def test_permuting_a_group_permutes_its_advantages(advantage, reward_PG, seed):
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(advantage(reward_PG[:, order]), advantage(reward_PG)[:, order], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(advantage(reward_PG.flip(0)), advantage(reward_PG).flip(0), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("advantage", [PAPER, MEAN, LEAVE_ONE_OUT], ids=lambda a: a.name)
@given(reward_PG=rewards, shift=st.sampled_from([-0.5, 0.25, 1.0, 8.0]))
def test_a_shift_of_a_groups_rewards_changes_nothing(advantage, reward_PG, shift):
    torch.testing.assert_close(advantage(reward_PG + shift), advantage(reward_PG), atol=1e-9, rtol=1e-9)


@given(reward_PG=rewards, scale=st.floats(0.1, 10))
def test_without_eps_a_positive_factor_on_the_rewards_changes_nothing(reward_PG, scale):
    advantage = group(1, 0.0)
    torch.testing.assert_close(advantage(reward_PG * scale), advantage(reward_PG), atol=1e-9, rtol=1e-9)


@every
@given(reward_PG=rewards)
def test_advantages_sum_to_zero_and_keep_the_order(advantage, reward_PG):
    advantage_PG = advantage(reward_PG)
    torch.testing.assert_close(advantage_PG.sum(1), torch.zeros(len(reward_PG)).double(), atol=1e-12, rtol=0)
    higher = reward_PG[:, :, None] > reward_PG[:, None, :]
    assert (advantage_PG[:, :, None] > advantage_PG[:, None, :])[higher].all()


@every_group
@given(reward_PG=rewards)
def test_advantages_of_a_group_have_unit_spread(advantage, reward_PG):
    advantage_PG = advantage(reward_PG)
    std_P = advantage_PG.std(1, correction=advantage.ddof)[has_spread(reward_PG)]
    reward_std_P = reward_PG.std(1, correction=advantage.ddof)[has_spread(reward_PG)]
    torch.testing.assert_close(std_P, reward_std_P / (reward_std_P + advantage.eps), atol=1e-9, rtol=0)


@pytest.mark.parametrize("advantage", [PAPER, MEAN, LEAVE_ONE_OUT], ids=lambda a: a.name)
def test_every_token_of_a_completion_has_the_advantage_of_its_completion(advantage):
    reward_PG = torch.tensor([[1.0, 0, 0], [2.0, 3.0, 5.0]])
    lengths = [3, 1, 2, 1, 1, 4]
    expected = advantage(reward_PG).flatten().tolist()
    rows, returns = advantage.estimate(reward_PG, lengths)
    assert [len(row) for row in rows] == lengths
    assert [set(row) for row in rows] == [{a} for a in expected]
    assert returns == []
    with pytest.raises(ValueError, match="zip"):
        advantage.estimate(reward_PG, lengths[:-1])


# --- generalised advantage estimation


def gae(**changes):
    values = {"gamma": 1.0, "lam": 0.95, "normalize": False, "critic": "trunk", "value_lr": 1e-3, "value_weight": 0.1}
    return GAE(name="gae", **values | {"value_clip": None} | changes)


def estimate(config, rewards, values):
    """The rewards as those of one group."""
    return config.estimate(torch.tensor([rewards], dtype=torch.float64), [len(value) for value in values], values)


REWARDS, VALUES = [1.0, 0.0], [[0.25, 0.5, 0.75], [0.5]]


def test_lambda_one_without_discount_is_the_return_less_the_value():
    advantages, returns = estimate(gae(lam=1.0), REWARDS, VALUES)
    assert advantages == [[0.75, 0.5, 0.25], [-0.5]]
    assert returns == [[1.0, 1.0, 1.0], [0.0]]


def test_lambda_zero_is_the_error_of_one_token():
    advantages, returns = estimate(gae(lam=0.0, gamma=0.5), REWARDS, VALUES)
    assert advantages == [[0.5 * 0.5 - 0.25, 0.5 * 0.75 - 0.5, 1 - 0.75], [-0.5]]
    assert returns == [[0.25, 0.375, 1.0], [0.0]]


def test_gae_by_hand():
    """δ = 0.25, 0.25, 0.25 and γλ = 1/2: 0.25, 0.25 + 0.125, 0.25 + 0.125 + 0.0625 from the end."""
    advantages, returns = estimate(gae(lam=0.5), REWARDS, VALUES)
    assert advantages == [[0.4375, 0.375, 0.25], [-0.5]]
    assert returns == [[0.6875, 0.875, 1.0], [0.0]]


def definition(reward, value, gamma, lam):
    """Σ_k (γλ)^k δ_{t+k}, with δ_t = r_t + γ V_{t+1} − V_t, the reward at the last token and no value after it."""
    following = [*value[1:], 0.0]
    rewards = [0.0] * (len(value) - 1) + [reward]
    delta = [r + gamma * ahead - v for r, ahead, v in zip(rewards, following, value, strict=True)]
    return [sum((gamma * lam) ** k * delta[t + k] for k in range(len(value) - t)) for t in range(len(value))]


unit = st.floats(0, 1)
completions = st.lists(
    st.tuples(st.floats(-2, 2), st.lists(st.floats(-2, 2), min_size=1, max_size=8)), min_size=1, max_size=5
)


@given(completions=completions, gamma=unit, lam=unit)
def test_gae_is_its_definition(completions, gamma, lam):
    rewards, values = map(list, zip(*completions, strict=True))
    advantages, returns = estimate(gae(gamma=gamma, lam=lam), rewards, values)
    for reward, value, advantage, target in zip(rewards, values, advantages, returns, strict=True):
        assert advantage == pytest.approx(definition(reward, value, gamma, lam), abs=1e-9)
        assert target == pytest.approx([a + v for a, v in zip(advantage, value, strict=True)], abs=1e-12)


@given(completions=completions, lam=unit)
def test_normalised_advantages_have_mean_0_and_spread_1_over_the_tokens_of_a_step(completions, lam):
    rewards, values = map(list, zip(*completions, strict=True))
    plain, plain_returns = estimate(gae(lam=lam), rewards, values)
    scaled, returns = estimate(gae(lam=lam, normalize=True), rewards, values)
    assert returns == plain_returns  # what the value model is fitted to keeps its scale
    assert [len(a) for a in scaled] == [len(v) for v in values]
    flat, flat_plain = np.concatenate(scaled), np.concatenate(plain)
    assert flat.mean() == pytest.approx(0, abs=1e-6)
    if flat_plain.std() > 1e-3:
        assert flat.std() == pytest.approx(1, abs=1e-4)
        assert flat == pytest.approx((flat_plain - flat_plain.mean()) / flat_plain.std(), abs=1e-4)


def test_a_reward_that_is_not_a_number_reaches_its_tokens():
    for normalize in (False, True):
        advantages, _ = estimate(gae(normalize=normalize), [math.nan, 0.0], VALUES)
        assert all(math.isnan(a) for a in advantages[0])


def test_gae_needs_values():
    with pytest.raises(AssertionError):
        gae().estimate(torch.zeros(1, 2), [1, 1])
    with pytest.raises(ValueError, match="zip"):
        estimate(gae(), [1.0, 0.0, 1.0], VALUES)


# --- configuration


def test_which_estimate_is_per_token():
    assert {name for name, cls in ADVANTAGES.items() if cls.per_token} == {"gae"}
    for name, cls in ADVANTAGES.items():
        assert type(compose([f"advantage={name}"]).advantage) is cls


GOOD = {
    "group": {"ddof": 1, "eps": 1e-4},
    "gae": {
        "gamma": 1.0, "lam": 0.95, "normalize": True, "critic": "trunk",
        "value_lr": 1e-3, "value_weight": 0.1, "value_clip": None,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "field", "value", "told"),
    [
        ("group", "ddof", 2, "in [0, 1]"),
        ("group", "ddof", -1, "in [0, 1]"),
        ("group", "ddof", 0.5, "a whole number"),
        ("group", "eps", -1e-9, "in [0, inf)"),
        ("group", "eps", float("nan"), "in [0, inf)"),
        ("group", "eps", float("inf"), "in [0, inf)"),
        ("gae", "gamma", 1.1, "in [0, 1]"),
        ("gae", "lam", -0.1, "in [0, 1]"),
        ("gae", "normalize", 1, "true or false"),
        ("gae", "critic", "none", "one of trunk, separate"),
        ("gae", "value_lr", 0.0, "in (0, inf)"),
        ("gae", "value_weight", 0.0, "in (0, inf)"),
        ("gae", "value_clip", 0.0, "in (0, inf)"),
    ],
)
def test_bad_fields_are_refused(name, field, value, told):
    values = {"name": name, **GOOD[name], field: value}
    for make in (lambda values: ADVANTAGES[name](**values), lambda values: build(Advantage, values)):
        with pytest.raises(ConfigError, match=re.escape(f"advantage.{field} must be {told}, got {value!r}")):
            make(values)


def test_an_unknown_estimator_is_refused_with_the_list():
    told = "unknown advantage gea (did you mean gae?); known: group, mean, leave_one_out, gae"
    with pytest.raises(ConfigError, match=re.escape(told)):
        build(Advantage, {"name": "gea"})
