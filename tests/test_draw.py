"""How one token is drawn from given uniform numbers: the distribution, the nucleus, the edges."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from pspo.base.stream import generator
from pspo.rollout.samplers.own import draw

LAST = 1 - 2**-53  # the largest number that the generator gives


def nucleus(probability, top_p):
    """By hand: the most probable tokens, of equal ones the first, until they hold top_p; as probabilities."""
    kept, total = np.zeros(len(probability)), 0.0
    for token in sorted(range(len(probability)), key=lambda i: (-probability[i], i)):
        if total >= top_p:
            break
        kept[token] = probability[token]
        total += probability[token]
    return kept / kept.sum()


PROBABILITY = np.array([0.05, 0.4, 0.0, 0.1, 0.3, 0.15])


def logits_of(probability, rows, dtype=torch.float64):
    return torch.log(torch.tensor(np.asarray(probability), dtype=dtype)).expand(rows, -1)


DISTRIBUTIONS = [
    # By hand: squares 0.0025, 0.16, 0.01, 0.09, 0.0225 over their sum 0.285; the nuclei of 0.4, 0.3, 0.15, 0.1, 0.05.
    (1.0, 1.0, [0.05, 0.4, 0, 0.1, 0.3, 0.15]),
    (0.5, 1.0, [0.0025 / 0.285, 0.16 / 0.285, 0, 0.01 / 0.285, 0.09 / 0.285, 0.0225 / 0.285]),
    (1.0, 0.6, [0, 4 / 7, 0, 0, 3 / 7, 0]),
    (1.0, 0.72, [0, 0.4 / 0.85, 0, 0, 0.3 / 0.85, 0.15 / 0.85]),
    (1.0, 0.3, [0, 1, 0, 0, 0, 0]),
    (0.5, 0.9, [0, 0.16 / 0.2725, 0, 0, 0.09 / 0.2725, 0.0225 / 0.2725]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("temperature", "top_p", "expected"), DISTRIBUTIONS)
def test_draws_have_the_distribution_worked_out_by_hand(temperature, top_p, expected, dtype):
    num = 200_000
    uniform = torch.from_numpy(generator(1, 2).random(num))
    token, logprob = draw(logits_of(PROBABILITY, num, dtype), uniform, temperature, top_p)
    counts, expected = np.bincount(token, minlength=6), np.array(expected)
    assert counts[expected == 0].sum() == 0
    if (expected > 0).sum() > 1:
        assert scipy.stats.chisquare(counts[expected > 0], num * expected[expected > 0]).pvalue > 1e-4
    assert logprob.dtype == dtype
    tempered = PROBABILITY ** (1 / temperature) / (PROBABILITY ** (1 / temperature)).sum()
    np.testing.assert_allclose(logprob, np.log(tempered[token]), atol=1e-6 if dtype == torch.float32 else 1e-12)


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=12).filter(any),
    st.floats(0.01, 1.0),
    st.sampled_from([0.5, 1.0, 1.7]),
)
def test_evenly_spread_numbers_hit_every_token_in_proportion(weights, top_p, temperature):
    """Inverting the distribution function is exact: of N evenly spread numbers each token gets N p, plus or minus 1."""
    num = 4000
    tempered = np.array(weights) ** (1 / temperature)
    expected = nucleus(tempered / tempered.sum(), top_p)
    uniform = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    token, _ = draw(logits_of(weights, num), uniform, temperature, top_p)
    counts = np.bincount(token, minlength=len(weights))
    if np.abs(np.cumsum(np.sort(tempered / tempered.sum())[::-1]) - top_p).min() > 1e-9 or top_p == 1:
        assert np.abs(counts - num * expected).max() <= 1 + 1e-6
        assert counts[expected == 0].sum() == 0


@pytest.mark.parametrize(("top_p", "kept"), [(0.25 - 1e-9, 1), (0.25 + 1e-9, 2), (0.5 - 1e-9, 2), (0.75 + 1e-9, 4)])
def test_of_equally_probable_tokens_the_nucleus_takes_no_more_than_it_needs(top_p, kept):
    uniform = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    token, _ = draw(torch.zeros(400, 4, dtype=torch.float64), uniform, 1.0, top_p)
    assert sorted(set(token.tolist())) == list(range(kept))


def test_the_nucleus_ends_where_it_reaches_top_p():
    """0.5 + 0.25 is 0.75 without rounding: the third token is not needed, and a hair more needs it."""
    logits = torch.log2(torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64)) * math.log(2)
    for top_p, last in ((0.5 - 1e-12, 0), (0.75 - 1e-12, 1), (0.75 + 1e-12, 2), (0.875 + 1e-12, 3)):
        assert draw(logits, torch.tensor([LAST], dtype=torch.float64), 1.0, top_p)[0].item() == last


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("top_p", [1e-9, 0.5, 0.9, 1.0])
def test_tokens_without_probability_are_never_drawn(dtype, top_p):
    """Not at the ends of the vocabulary, and not at an exact edge of the distribution function."""
    probability = np.array([0, 0, 0.25, 0, 0.5, 0, 0.25, 0, 0])
    edges = [0.0, 2**-53, 0.25, 0.75, np.nextafter(0.25, 0), np.nextafter(0.75, 0), np.nextafter(0.75, 1), LAST]
    uniform = torch.tensor(edges, dtype=torch.float64)
    token, logprob = draw(logits_of(probability, len(edges), dtype), uniform, 1.0, top_p)
    assert (probability[token] > 0).all()
    assert logprob.isfinite().all()
    if top_p == 1:
        assert token[0] == 2
        assert token[-1] == 6


@given(st.integers(0, 2**32), st.integers(1, 300))
def test_the_largest_number_draws_the_last_possible_token(seed, size):
    random = np.random.default_rng(seed)
    logits = torch.from_numpy(random.normal(0, 5, size))
    logits[torch.from_numpy(random.random(size) < 0.3)] = -torch.inf
    if logits.isfinite().any():
        possible = logits.double().softmax(-1).nonzero().squeeze(-1)
        token, _ = draw(logits.expand(2, -1), torch.tensor([0.0, LAST], dtype=torch.float64), 1.0, 1.0)
        assert token.tolist() == [possible[0], possible[-1]]


@pytest.mark.parametrize("scale", [0.0, 1.0, 20.0])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_a_vocabulary_of_152_thousand(scale, top_p):
    vocabulary, rows = 151_936, 4
    logits = scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0))
    uniform = torch.tensor([0.0, 0.3, 0.9999999, LAST], dtype=torch.float64)
    token, logprob = draw(logits, uniform, 1.0, top_p)
    for row in range(rows):
        exact = torch.log_softmax(logits[row].double(), -1).exp().numpy()
        kept = nucleus(exact, top_p)
        upper = kept.cumsum()[token[row]]
        assert kept[token[row]] > 0 or abs(exact[token[row]] - exact[kept > 0].min()) < 1e-9
        assert upper - kept[token[row]] - 1e-6 <= uniform[row] <= upper + 1e-6
        assert logprob[row].item() == pytest.approx(np.log(exact[token[row]]), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_a_large_vocabulary_are_exact_to_a_thousandth_of_a_token(dtype):
    vocabulary, wanted = 151_936, torch.tensor([0, 1, 76_543, 100_001, 151_000, 151_935])
    for within in (0.001, 0.999):
        uniform = (wanted.double() + within) / vocabulary
        token, _ = draw(torch.zeros(len(wanted), vocabulary, dtype=dtype), uniform, 1.0, 1.0)
        assert token.tolist() == wanted.tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
@pytest.mark.parametrize("vocabulary", [5, 5000])
def test_logits_that_are_not_numbers_draw_a_token_and_say_so(temperature, top_p, vocabulary):
    """The update then refuses the step in one sentence; an index outside the vocabulary would crash a GPU before."""
    logits = torch.full((2, vocabulary), torch.nan)
    logits[1] = torch.arange(vocabulary)
    logits[1, 3] = torch.inf
    token, logprob = draw(logits, torch.tensor([0.0, LAST], dtype=torch.float64), temperature, top_p)
    assert ((token >= 0) & (token < vocabulary)).all()
    assert logprob.isnan().all()


def test_temperature_zero_takes_the_most_probable_token():
    uniform = torch.from_numpy(generator(3).random(8))
    token, logprob = draw(logits_of(PROBABILITY, 8), uniform, 0.0, 1.0)
    assert token.tolist() == [1] * 8
    assert logprob.tolist() == pytest.approx([np.log(0.4)] * 8)
