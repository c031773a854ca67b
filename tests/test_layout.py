"""Where tokens stand: end to end, and in the blocks of the attention."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pspo import layout
from pspo.layout import Blocks, Plan, _cut
from pspo.model.batch import make_batch

CPU = torch.device("cpu")


def test_blocks_by_hand():
    tokens = [np.array([[0, 1], [2, 4]]), np.array([[3]])]  # two blocks, and token 4 is none
    blocks = Blocks(tokens, 4, heads=2, keys=1, device=CPU)
    rows = torch.tensor([[0, 10], [1, 11], [2, 12], [3, 13], [-1, -1]])  # two heads of width 1, and what comes after
    laid = blocks.take(rows, 1)
    first, second = (block(laid) for block in blocks)
    assert first.squeeze(-1).tolist() == [[0, 1, 10, 11], [2, -1, 12, -1]]
    assert second.squeeze(-1).tolist() == [[3, 13]]
    assert torch.equal(blocks.give(laid), rows[:-1])


def test_places_without_a_token_may_hold_any():
    blocks = Blocks([np.array([[0, 1], [2, 3]])], 3, heads=1, keys=1, device=CPU, zeros=False)
    rows = torch.tensor([[5], [6], [7]])
    laid = blocks.take(rows, 1)
    assert laid.flatten().tolist()[:3] == [5, 6, 7]
    assert torch.equal(blocks.give(laid), rows)


@given(
    runs=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=4),
    keys=st.integers(1, 3),
    groups=st.integers(1, 3),
    width=st.integers(1, 4),
)
def test_what_is_taken_is_given_back(runs, keys, groups, width):
    counts = np.array([count for run in runs for count in run])
    starts, num_tokens, tokens, row = np.cumsum(counts) - counts, int(counts.sum()), [], 0
    for run in runs:
        place, rows = np.arange(max(run)), slice(row, row + len(run))
        tokens.append(np.where(place < counts[rows, None], starts[rows, None] + place, num_tokens))
        row += len(run)
    blocks = Blocks(tokens, num_tokens, keys * groups, keys, CPU)
    states = torch.randn(num_tokens + 1, keys * groups * width)
    states[-1] = 0
    laid = blocks.take(states, width)
    assert torch.equal(blocks.give(laid), states[:-1])
    shapes = [tuple(block(laid).shape) for block in blocks]
    assert shapes == [(len(run) * keys, groups * max(run), width) for run in runs]
    assert laid.count_nonzero() == states.count_nonzero()  # a place without a token holds what comes after: zeros


def seen(queries):
    return [(mask == 0).int().tolist() for mask in queries.masks]


def test_a_plan_by_hand(monkeypatch):
    """Prompts 5 6 and 8, behind the first completions 1 2 and 3 4 9, behind the other 7: tokens 5 6 1 3 4 8."""
    monkeypatch.setattr(layout, "BLOCK", 100)
    prompts, completions = [[5, 6], [5, 6], [8]], [[1, 2], [3, 4, 9], [7]]
    batch = make_batch(prompts, completions, pad_id=0, device=CPU, sizes=[2, 1], end_to_end=True)
    plan = Plan(batch, keys=1, groups=2, dtype=torch.float64)
    assert plan.tokens.tolist() == [0, 1, 2, 3, 4, 5]
    assert plan.wanted.tolist() == [1, 2, 3, 4, 5]
    assert plan.source.tolist() == [0, 1, 0, 2, 3, 4]
    # the prompts in one block, in the other the completions; of equal length the first; 6 is none
    assert plan.keys.to.tolist() == [5, 6, 0, 1, *[0, 1, 2, 6], *[0, 1, 3, 4]]
    assert plan.keys.spans == [(slice(0, 4), 2), (slice(4, 12), 2)]
    queries, asked = plan.all_queries, plan.wanted_queries
    assert seen(queries) == [[[[1, 0], [1, 1]]] * 2, [[[1, 1, 1, 0], [1, 1, 1, 1]]] * 2]
    assert queries.blocks.to.tolist() == [
        10,
        12,
        11,
        13,
        0,
        2,
        1,
        3,
        *[4, 12, 5, 13],
        *[6, 8, 7, 9],
    ]  # two heads of each
    assert seen(asked) == [[[[1, 0]], [[1, 1]]], [[[1, 1, 1, 0], [1, 1, 1, 1]]] * 2]
    assert asked.blocks.to.tolist() == [8, 9, 0, 1, *[2, 10, 3, 11], *[4, 6, 5, 7]]


def test_keys_and_values_get_back_the_sum_over_their_places():
    batch = make_batch([[5, 6], [5, 6]], [[1, 2], [3, 4, 9]], pad_id=0, device=CPU, sizes=[2], end_to_end=True)
    plan = Plan(batch, keys=2, groups=1, dtype=torch.float64)  # of 5 6, of 1 and of 3 4
    pair = torch.randn(6, 4, dtype=torch.float64)  # keys of two heads, then their values
    pair[-1] = 0
    laid = plan.take_pair(pair, 1)
    assert len(laid) == 2 * len(plan.keys.to)
    times = torch.tensor([3, 3, 1, 1, 1], dtype=torch.float64)[:, None]  # the prompt is read by itself and by two more
    torch.testing.assert_close(plan.give_pair(laid), times * pair[:-1])


def test_one_long_prompt_widens_no_other_ones_block():
    count, total = np.full(200, 32), np.array([60] * 199 + [2000])
    assert [len(chosen) for chosen in _cut(count, total)] == [199, 1]


def test_completions_of_one_token_read_nothing():
    batch = make_batch([[5, 6], [8]], [[1], [2]], pad_id=0, device=CPU, end_to_end=True)
    plan = Plan(batch, keys=1, groups=1, dtype=torch.float64)
    assert plan.wanted.tolist() == [1, 2]
    assert plan.source.tolist() == [0, 1]
    assert len(plan.keys.spans) == 1


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=12), st.sampled_from([0, 7, 40]))
def test_blocks_of_readers_are_those_that_cost_least(sizes, block):
    count, total = np.array([c for c, _ in sizes]), np.array([c + before for c, before in sizes])

    def cost(blocks):
        return sum(len(chosen) * count[chosen].max() * total[chosen].max() + block for chosen in blocks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "BLOCK", block)
        patch.setattr(layout, "ALIKE", 4)
        found = _cut(count, total)
    order = np.concatenate(found)
    assert sorted(order) == list(range(len(sizes)))
    assert (np.diff(count[order]) >= 0).all()
    steps = np.flatnonzero(np.diff(count[order]) | np.diff(total[order] // 4)) + 1
    every = (
        np.split(order, [s for s, taken in zip(steps, choice, strict=True) if taken])
        for choice in itertools.product([False, True], repeat=len(steps))
    )
    assert cost(found) == min(map(cost, every))
