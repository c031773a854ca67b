import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pspo.advantage import Advantage, has_spread
from pspo.schema import ConfigError, build

PAPER = Advantage(ddof=1, eps=1e-4)
rewards = st.lists(
    st.lists(st.sampled_from([0.0, 0.05, 0.1, 0.3, 0.85, 1.0]), min_size=5, max_size=5), min_size=1, max_size=4
).map(lambda rows: torch.tensor(rows, dtype=torch.float64))
every = pytest.mark.parametrize("advantage", [Advantage(ddof=d, eps=e) for d in (0, 1) for e in (0.0, 1e-4)], ids=repr)


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
    advantage_PG = Advantage(ddof=ddof, eps=eps)(torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 0]]))
    assert advantage_PG.dtype == torch.float64
    high, low = expected
    assert advantage_PG[0].tolist() == pytest.approx([high, low, low, low], rel=1e-12)
    assert advantage_PG[1].tolist() == pytest.approx([low, low, high, low], rel=1e-12)


@every
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.05, 0.1 * 3, 1 / 3, -0.2, 1e9, 1e-300])
@pytest.mark.parametrize("size", [2, 3, 4, 7, 64])
def test_equal_rewards_give_exactly_zero(advantage, reward, size):
    reward_PG = torch.full((2, size), reward, dtype=torch.float64)
    assert torch.equal(advantage(reward_PG), torch.zeros(2, size, dtype=torch.float64))


def test_only_the_group_of_equal_rewards_is_zero():
    reward_PG = torch.tensor([[0.1 * 3] * 3, [0.0, 0.0, 1.0]], dtype=torch.float64)
    assert has_spread(reward_PG).tolist() == [False, True]
    advantage_PG = Advantage(ddof=1, eps=0.0)(reward_PG)
    assert not advantage_PG[0].any()
    assert advantage_PG[1].all()


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("others", [0.0, float("nan")])
def test_a_reward_that_is_not_a_number_is_not_taken_for_no_spread(reward, others):
    """Such an advantage stops the update; 0 would hide it."""
    assert not PAPER(torch.tensor([[reward, others, 1.0]])).isfinite().any()
    assert has_spread(torch.tensor([[reward, others, 1.0]])).all()


@every
@given(reward_PG=rewards, seed=st.integers(0, 1000))
def test_permuting_a_group_permutes_its_advantages(advantage, reward_PG, seed):
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(advantage(reward_PG[:, order]), advantage(reward_PG)[:, order], atol=1e-12, rtol=1e-12)
    assert torch.equal(advantage(reward_PG.flip(0)), advantage(reward_PG).flip(0))


@given(reward_PG=rewards, shift=st.sampled_from([-0.5, 0.25, 1.0, 8.0]))
def test_a_shift_of_a_groups_rewards_changes_nothing(reward_PG, shift):
    torch.testing.assert_close(PAPER(reward_PG + shift), PAPER(reward_PG), atol=1e-9, rtol=1e-9)


@given(reward_PG=rewards, scale=st.floats(0.1, 10))
def test_without_eps_a_positive_factor_on_the_rewards_changes_nothing(reward_PG, scale):
    advantage = Advantage(ddof=1, eps=0.0)
    torch.testing.assert_close(advantage(reward_PG * scale), advantage(reward_PG), atol=1e-9, rtol=1e-9)


@every
@given(reward_PG=rewards)
def test_advantages_sum_to_zero_keep_the_order_and_have_unit_spread(advantage, reward_PG):
    advantage_PG = advantage(reward_PG)
    torch.testing.assert_close(advantage_PG.sum(1), torch.zeros(len(reward_PG)).double(), atol=1e-12, rtol=0)
    higher = reward_PG[:, :, None] > reward_PG[:, None, :]
    assert (advantage_PG[:, :, None] > advantage_PG[:, None, :])[higher].all()
    std_P = advantage_PG.std(1, correction=advantage.ddof)[has_spread(reward_PG)]
    reward_std_P = reward_PG.std(1, correction=advantage.ddof)[has_spread(reward_PG)]
    torch.testing.assert_close(std_P, reward_std_P / (reward_std_P + advantage.eps), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("ddof", 2, "in [0, 1]"),
        ("ddof", -1, "in [0, 1]"),
        ("ddof", 0.5, "a whole number"),
        ("eps", -1e-9, "in [0, inf)"),
        ("eps", float("nan"), "in [0, inf)"),
        ("eps", float("inf"), "in [0, inf)"),
    ],
)
def test_bad_fields_are_refused(field, value, told):
    for make in (lambda values: Advantage(**values), lambda values: build(Advantage, values)):
        with pytest.raises(ConfigError, match=re.escape(f"advantage.{field} must be {told}, got {value!r}")):
            make({"ddof": 1, "eps": 1e-4, field: value})
