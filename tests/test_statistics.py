import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, norm

from pspo.base.statistics import Statistics, wilson_interval

numbers = st.lists(st.tuples(st.floats(-100, 100), st.booleans()), min_size=1, max_size=30)


# --- sums over counts


def test_a_mean_is_over_all_tokens_and_not_over_pieces():
    statistics = Statistics()
    statistics.mean("x", torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, True, True]))
    statistics.mean("x", torch.tensor([10.0, 99.0]), torch.tensor([True, False]))
    assert statistics.result() == {"x": 4.0}


@given(pieces=st.lists(numbers, min_size=1, max_size=6))
def test_cutting_changes_nothing(pieces):
    cut, whole = Statistics(), Statistics()
    everything = [number for piece in pieces for number in piece]
    for statistics, parts in ((cut, pieces), (whole, [everything])):
        for part in parts:
            values, mask = (torch.tensor(column) for column in zip(*part, strict=True))
            statistics.mean("mean", values.double(), mask)
            statistics.max("max", values.double(), mask)
    kept = [value for value, counts in everything if counts]
    expected = {"mean": sum(kept) / max(len(kept), 1), "max": max(kept, default=-math.inf)}
    for statistics in (cut, whole):
        assert statistics.result() == pytest.approx(expected, abs=1e-4)
    assert cut.result() == pytest.approx(whole.result(), rel=1e-12, abs=1e-10)


def test_what_is_masked_is_of_no_account_even_if_it_is_not_a_number():
    statistics = Statistics()
    values, mask = torch.tensor([[1.0, math.nan], [math.inf, 5.0]]), torch.tensor([[True, False], [False, True]])
    statistics.mean("mean", values, mask)
    statistics.max("max", values, mask)
    assert statistics.result() == {"mean": 3.0, "max": 5.0}


def test_what_is_not_masked_is_not_hidden():
    statistics = Statistics()
    for values in ([1.0, math.nan], [2.0, 3.0]):
        statistics.mean("mean", torch.tensor(values), torch.ones(2, dtype=torch.bool))
        statistics.max("max", torch.tensor(values), torch.ones(2, dtype=torch.bool))
    assert all(math.isnan(value) for value in statistics.result().values())


def test_sums_are_in_float64_and_hold_no_graph():
    statistics = Statistics()
    values = torch.full((10,), 0.1, dtype=torch.float32, requires_grad=True)
    for _ in range(1000):
        statistics.mean("x", values, torch.ones(10, dtype=torch.bool))
    assert statistics.result()["x"] == pytest.approx(values[0].item(), rel=1e-12)


def test_nothing_seen_is_nothing_told():
    assert Statistics().result() == {}


# --- intervals

Z = norm.ppf(0.975)


@pytest.mark.parametrize(
    ("num_correct", "num_total", "expected"),
    [
        # Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3: the score method.
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_published_intervals(num_correct, num_total, expected):
    assert wilson_interval(num_correct, num_total) == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize("n", [1, 2, 10, 1319])
def test_none_and_all_by_hand(n):
    assert wilson_interval(0, n) == pytest.approx((0.0, Z**2 / (n + Z**2)), rel=1e-12)
    assert wilson_interval(n, n) == pytest.approx((n / (n + Z**2), 1.0), rel=1e-12)
    assert wilson_interval(0, n)[0] == 0
    assert wilson_interval(n, n)[1] == 1


@given(n=st.integers(1, 2000), share=st.floats(0, 1), confidence=st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_equal_to_scipy(n, share, confidence):
    k = round(share * n)
    expected = binomtest(k, n).proportion_ci(confidence_level=confidence, method="wilson")
    got = wilson_interval(k, n, z=float(norm.ppf(0.5 + confidence / 2)))
    assert got == pytest.approx((expected.low, expected.high), rel=1e-9, abs=1e-12)


@given(n=st.integers(1, 2000), share=st.floats(0, 1))
def test_holds_the_proportion_lies_in_the_unit_interval_and_is_symmetric(n, share):
    k = round(share * n)
    low, high = wilson_interval(k, n)
    assert 0 <= low <= k / n <= high <= 1
    assert wilson_interval(n - k, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_the_default_is_95_per_cent():
    assert wilson_interval(7, 20) == pytest.approx(wilson_interval(7, 20, z=Z), rel=1e-12)
