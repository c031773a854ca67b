"""Prompts and completions as tensors; completions that share their prompt."""

import pytest
import torch

from pspo.model.attention import BY_MASK, dense, what_sees_what
from pspo.model.batch import make_batch
from pspo.model.logprob import predicting_states, token_logprobs
from pspo.update.rows import Row, column

CPU = torch.device("cpu")
ROWS = [
    ([11, 12, 13, 14], [41, 42, 2]),
    ([11, 12, 13, 14], [43]),
    ([11, 12, 13, 14], [44, 45, 46, 47, 2]),
    ([21], [48, 2]),
    ([31, 32], [49, 50, 51]),
    ([31, 32], [52, 2]),
]


def bundled(sizes):
    """The rows, so many at a time behind one copy of their prompt."""
    rows = iter(ROWS)
    taken = [[next(rows) for _ in range(size)] for size in sizes]
    return [(part[0][0], [completion for _, completion in part]) for part in taken]


def test_by_hand():
    batch = make_batch([([5, 6, 7], [[1, 2]]), ([8], [[3, 4, 9]])], pad_id=0, device=CPU)
    assert batch.input_ids_RS.tolist() == [[5, 6, 7, 1], [8, 3, 4, 0]]  # the last tokens predict nothing
    assert batch.position_RS.tolist() == [[0, 1, 2, 3], [0, 1, 2, 0]]
    assert batch.attention.tolist() == [[True] * 4, [True] * 3 + [False]]
    assert batch.token_ids_BT.tolist() == [[1, 2, 0], [3, 4, 9]]
    assert batch.mask_BT.tolist() == [[True, True, False], [True, True, True]]
    assert batch.source_BT[batch.mask_BT].tolist() == [2, 3, 4, 5, 6]
    assert batch.owner_RS.tolist() == [[0, 0, 0, 1], [0, 1, 1, -1]]
    assert batch.layout == "apart"


def test_a_shared_prompt_by_hand():
    batch = make_batch([([5, 6], [[1, 2], [3, 4, 9]]), ([8], [[7]])], pad_id=0, device=CPU)
    assert batch.input_ids_RS.tolist() == [[5, 6, 1, 3, 4], [8, 0, 0, 0, 0]]
    assert batch.position_RS.tolist() == [[0, 1, 2, 2, 3], [0, 0, 0, 0, 0]]
    assert batch.attention[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],  # a completion does not see the one before it
        [1, 1, 0, 1, 1],
    ]
    assert batch.attention[1, 0].any(-1).all()  # padding sees something
    assert not batch.attention[1, 0, 0, 1:].any()  # and nobody sees padding
    assert batch.source_BT[batch.mask_BT].tolist() == [1, 2, 1, 3, 4, 5]
    assert batch.owner_RS.tolist() == [[0, 0, 1, 2, 2], [0, -1, -1, -1, -1]]
    assert batch.layout == "shared"


def test_packed_texts_stand_in_one_row_and_do_not_see_each_other():
    apart, packed = (make_batch([([5, 6], [[1, 2], [3, 4, 9]]), ([8], [[7, 7]])], 0, CPU, way) for way in (False, True))
    assert packed.layout == "packed"
    assert packed.input_ids_RS.shape == (1, 128)
    assert packed.input_ids_RS[0, :8].tolist() == [5, 6, 1, 3, 4, 8, 7, 0]
    assert packed.text_RS[0, :8].tolist() == [0] * 5 + [1] * 2 + [-1]
    assert packed.owner_RS[0, :8].tolist() == [0, 0, 1, 2, 2, 0, 1, -1]
    seen = dense(what_sees_what(packed.text_RS, packed.owner_RS, packed.position_RS), packed.input_ids_RS)[0, 0]
    assert torch.equal(seen[:5, :5], apart.attention[0, 0])
    assert torch.equal(seen[5:7, 5:7], apart.attention[1, 0, :2, :2])
    assert not seen[5:7, :5].any() | seen[:5, 5:].any() | seen[:7, 7:].any()
    assert torch.equal(packed.attention.to_dense()[0, 0], torch.ones(1, 1))  # its one block
    assert torch.equal(packed.token_ids_BT, apart.token_ids_BT)


def test_blocks_in_which_nothing_is_seen_are_left_out():
    prompt, completions = [7] * 256, [[7] * 257] * 2
    batch = make_batch([(prompt, completions), (prompt, completions[:1])], 0, CPU, packed=True)
    blocks = [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]  # of the first text
    blocks += [[1, 1, 0, 0, 1, 0], [1, 1, 0, 0, 1, 1]]  # its second completion does not see the first
    seen = batch.attention.to_dense()[0, 0]
    assert seen[:6, :6].tolist() == blocks
    assert not seen[6:, :6].any() | seen[:6, 6:].any()


def packing(policy, device=CPU):
    """The policy as ``load`` has it for FlexAttention on a GPU."""
    policy.model.to(device).set_attn_implementation(BY_MASK)
    return policy


@pytest.mark.parametrize("autocast", [False, True])
def test_packed_texts_have_the_numbers_of_padded_rows(tiny_policy, autocast):
    model = packing(tiny_policy(attention="sdpa")).model
    found = []
    for packed in (False, True):
        batch = make_batch(bundled([3, 1, 2]), 0, CPU, packed)
        with torch.inference_mode(), torch.compiler.set_stance("force_eager"):  # without a compiler of C++
            hidden_NH = predicting_states(model.get_decoder(), batch, autocast)
            found.append(token_logprobs(model, batch, hidden_NH, 1.0, autocast)[0])
    bound = 2e-2 if autocast else 1e-5
    torch.testing.assert_close(found[1], found[0], atol=bound, rtol=bound)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_packed_texts_have_the_gradient_of_padded_rows(tiny_policy, autocast):
    policy = packing(tiny_policy(attention="sdpa"), torch.device("cuda"))
    found = []
    for packed in (False, True):
        batch = make_batch(bundled([3, 1, 2]) * 40, 0, policy.device, packed)
        policy.model.zero_grad()
        hidden_NH = predicting_states(policy.model.get_decoder(), batch, autocast)
        (token_logprobs(policy.model, batch, hidden_NH, 1.0, autocast)[0] ** 2).mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in policy.trainable().values()]))
    assert (found[1] - found[0]).norm() <= (3e-2 if autocast else 1e-3) * found[0].norm()


def test_the_token_after_each_position_is_the_one_it_predicts():
    for sizes in ([1] * 6, [3, 1, 2]):
        batch = make_batch(bundled(sizes), pad_id=0, device=CPU)
        before = [token for prompt, c in ROWS for token in (prompt[-1], *c[:-1])]
        assert batch.input_ids_RS.flatten()[batch.source_BT[batch.mask_BT]].tolist() == before
        assert batch.token_ids_BT[batch.mask_BT].tolist() == [token for _, c in ROWS for token in c]
        positions = sum(len(prompt) + sum(len(c) - 1 for c in behind) for prompt, behind in bundled(sizes))
        assert (batch.owner_RS >= 0).sum() == positions


@pytest.mark.parametrize("sizes", [[3, 1, 2], [1, 2, 1, 1, 1], [2, 1, 1, 2], [1] * 6])
def test_sharing_a_prompt_changes_neither_value_nor_gradient(tiny_policy, sizes):
    policy = tiny_policy(torch.float64, exact=True)
    found = []
    for how in ([1] * 6, sizes):
        batch = make_batch(bundled(how), 0, CPU)
        policy.model.zero_grad()
        hidden_NH = predicting_states(policy.model.get_decoder(), batch)
        logprob_BT, entropy_BT = token_logprobs(policy.model, batch, hidden_NH, 0.8, False, entropy_gradient=True)
        (logprob_BT**2 + entropy_BT).sum().backward()
        gradients = [p.grad.clone() for p in policy.trainable().values()]
        found.append([logprob_BT.detach(), entropy_BT.detach(), *gradients])
    torch.testing.assert_close(found[1], found[0], atol=1e-12, rtol=1e-12)
    assert all(gradient.isfinite().all() for gradient in found[1])


def test_sharing_a_prompt_changes_nothing_in_float32(tiny_policy):
    model = tiny_policy(attention="sdpa").model
    batches = [make_batch(bundled(sizes), 0, CPU) for sizes in ([1] * 6, [3, 1, 2])]
    states = [predicting_states(model.get_decoder(), batch) for batch in batches]
    found = [token_logprobs(model, *pair, 1.0, False)[0] for pair in zip(batches, states, strict=True)]
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)


def test_a_column_of_rows_is_padded_with_zeros():
    rows = [Row([1], [7], [1.5], []), Row([1], [7, 8], [2.0, 3.0], [])]
    padded_BT = column(rows, "old_logprobs", torch.empty(2, 3, dtype=torch.float64))
    assert padded_BT.dtype == torch.float64
    assert padded_BT.tolist() == [[1.5, 0, 0], [2, 3, 0]]
