"""Prompts and completions as tensors; completions that share their prompt."""

import pytest
import torch

from pspo.model.batch import make_batch, pad_to
from pspo.model.logprob import token_logprobs

CPU = torch.device("cpu")
PROMPTS = [[11, 12, 13, 14], [11, 12, 13, 14], [11, 12, 13, 14], [21], [31, 32], [31, 32]]
COMPLETIONS = [[41, 42, 2], [43], [44, 45, 46, 47, 2], [48, 2], [49, 50, 51], [52, 2]]


def test_by_hand():
    batch = make_batch([[5, 6, 7], [8]], [[1, 2], [3, 4, 9]], pad_id=0, device=CPU)
    assert batch.input_ids_RS.tolist() == [[5, 6, 7, 1], [8, 3, 4, 0]]  # the last tokens predict nothing
    assert batch.position_RS.tolist() == [[0, 1, 2, 3], [0, 1, 2, 0]]
    assert batch.attention.tolist() == [[True] * 4, [True] * 3 + [False]]
    assert batch.token_ids_BT.tolist() == [[1, 2, 0], [3, 4, 9]]
    assert batch.mask_BT.tolist() == [[True, True, False], [True, True, True]]
    assert batch.source_BT[batch.mask_BT].tolist() == [2, 3, 4, 5, 6]
    assert batch.num_tokens == 7


def test_a_shared_prompt_by_hand():
    batch = make_batch([[5, 6], [5, 6], [8]], [[1, 2], [3, 4, 9], [7]], pad_id=0, device=CPU, sizes=[2, 1])
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
    assert batch.num_tokens == 6


def test_the_token_after_each_position_is_the_one_it_predicts():
    batch = make_batch(PROMPTS, COMPLETIONS, pad_id=0, device=CPU)
    before = torch.cat([torch.tensor([prompt[-1], *c[:-1]]) for prompt, c in zip(PROMPTS, COMPLETIONS, strict=True)])
    assert torch.equal(batch.input_ids_RS.flatten()[batch.source_BT[batch.mask_BT]], before)
    assert batch.token_ids_BT[batch.mask_BT].tolist() == [token for c in COMPLETIONS for token in c]
    assert batch.attention.sum() == batch.num_tokens == sum(map(len, PROMPTS + COMPLETIONS)) - len(COMPLETIONS)


@pytest.mark.parametrize("sizes", [[3, 1, 2], [1, 2, 1, 1, 1], [2, 1, 1, 2], [1] * 6])
@pytest.mark.parametrize("attention", ["grouped", "sdpa"])
def test_sharing_a_prompt_changes_neither_value_nor_gradient(tiny_policy, sizes, attention):
    policy = tiny_policy(torch.float64, exact=True)
    policy.model.set_attn_implementation(attention)
    found = []
    for how in (None, sizes):
        batch = make_batch(PROMPTS, COMPLETIONS, 0, CPU, how)
        policy.model.zero_grad()
        scored = token_logprobs(policy.model, batch, 0.8, entropy_gradient=True)
        (scored.logprob_BT**2 + scored.entropy_BT).sum().backward()
        gradients = [p.grad.clone() for p in policy.trainable().values()]
        found.append([scored.logprob_BT.detach(), scored.entropy_BT.detach(), *gradients])
    torch.testing.assert_close(found[1], found[0], atol=1e-12, rtol=1e-12)
    assert all(gradient.isfinite().all() for gradient in found[1])


def test_pad_to():
    padded_BT = pad_to([[1.5], [2.0, 3.0]], torch.empty(2, 3), torch.float64)
    assert padded_BT.dtype == torch.float64
    assert padded_BT.tolist() == [[1.5, 0, 0], [2, 3, 0]]
