"""Where tokens stand: end to end, and in the blocks of the attention."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from pspo.batch import make_batch
from pspo.layout import Blocks, Plan

CPU = torch.device("cpu")


def test_blocks_by_hand():
    blocks = Blocks(np.array([2, 1, 1]), [2, 1], heads=2, keys=1, device=CPU)  # tokens 0 1 | 2 and 3
    tokens = torch.tensor([[0, 10], [1, 11], [2, 12], [3, 13], [-1, -1]])  # two heads of width 1, and what comes after
    laid = blocks.take(tokens, 1)
    first, second = (block(laid) for block in blocks)
    assert first.squeeze(-1).tolist() == [[0, 1, 10, 11], [2, -1, 12, -1]]
    assert second.squeeze(-1).tolist() == [[3, 13]]
    assert torch.equal(blocks.give(laid), tokens[:-1])


def test_places_without_a_token_may_hold_any():
    blocks = Blocks(np.array([2, 1]), [2], heads=1, keys=1, device=CPU, empty=0)
    assert blocks.take(torch.tensor([[5], [6], [7]]), 1).flatten().tolist() == [5, 6, 7, 5]


@given(
    runs=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=4),
    keys=st.integers(1, 3),
    groups=st.integers(1, 3),
    width=st.integers(1, 4),
)
def test_what_is_taken_is_given_back(runs, keys, groups, width):
    counts = np.array([count for run in runs for count in run])
    blocks = Blocks(counts, [len(run) for run in runs], keys * groups, keys, CPU)
    tokens = torch.randn(int(counts.sum()) + 1, keys * groups * width)
    tokens[-1] = 0
    laid = blocks.take(tokens, width)
    assert torch.equal(blocks.give(laid), tokens[:-1])
    shapes = [tuple(block(laid).shape) for block in blocks]
    assert shapes == [(len(run) * keys, groups * max(run), width) for run in runs]
    assert laid.count_nonzero() == tokens.count_nonzero()  # a place without a token holds what comes after: zeros


def test_a_plan_by_hand():
    batch = make_batch([[5, 6, 7], [8]], [[1, 2], [3, 4, 9]], pad_id=0, device=CPU, blocks=[2])
    plan = Plan(batch, keys=1, groups=2, dtype=torch.float64)  # rows 5 6 7 1 and 8 3 4
    assert plan.tokens.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert plan.wanted.tolist() == [2, 3, 4, 5, 6]
    assert plan.source.tolist() == [0, 1, 2, 3, 4]
    all_queries, wanted = plan.all_queries, plan.wanted_queries
    assert (all_queries.masks[0] == 0).int().tolist() == [
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]],
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]],  # the last is no token's
    ]
    assert (wanted.masks[0] == 0).int().tolist() == [
        [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]],
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]],
    ]
    pair = torch.arange(16.0).view(8, 2)  # a key and a value for each token, and what comes after
    laid = plan.take_pair(pair, 1).flatten().tolist()
    assert laid == [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15]
    assert torch.equal(plan.give_pair(torch.tensor(laid)[:, None]), pair[:7])


def test_the_source_of_completions_that_share_a_prompt():
    prompts, completions = [[5, 6], [5, 6], [8]], [[1, 2], [3, 4, 9], [7]]
    batch = make_batch(prompts, completions, pad_id=0, device=CPU, sizes=[2, 1], blocks=[1, 1])
    plan = Plan(batch, keys=1, groups=1, dtype=torch.float32)  # rows 5 6 1 3 4 and 8
    assert plan.wanted.tolist() == [1, 2, 3, 4, 5]
    assert plan.source.tolist() == [0, 1, 0, 2, 3, 4]
    assert [tuple(mask.shape) for side in (plan.all_queries, plan.wanted_queries) for mask in side.masks] == [
        (1, 5, 5), (1, 1, 1), (1, 4, 5), (1, 1, 1),
    ]  # fmt: skip
