import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config, Qwen2ForCausalLM

from pspo.model import logprob
from pspo.model.batch import make_batch
from pspo.model.logprob import autocast_to_bfloat16, predicting_states, token_logprobs
from pspo.objective import LOG_RATIO_CLAMP, log_ratio

CPU = torch.device("cpu")
PROMPTS = [[5, 9, 7], [8], [11, 12, 13, 14, 15], [20, 21]]
COMPLETIONS = [[30, 31, 32, 2], [2], [40, 41], [50, 51, 52, 53, 54, 2]]


def batch_of(prompts=PROMPTS, completions=COMPLETIONS, pad_id=0):
    return make_batch([(p, [c]) for p, c in zip(prompts, completions, strict=True)], pad_id, CPU)


def scored(model, batch, temperature, autocast=False, entropy_gradient=False):
    """Log-probabilities and entropies (B, T) from the model's own hidden states."""
    with autocast_to_bfloat16(CPU, autocast):
        hidden_NH = predicting_states(model.get_decoder(), batch)
    return token_logprobs(model, batch, hidden_NH, temperature, autocast, entropy_gradient)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def by_the_library(model, prompt, completion, temperature):
    """Log-probs and entropies of one row without padding, from the logits of the library's own forward."""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].double() / temperature
    logprob_SV = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    entropy_T = torch.distributions.Categorical(logits=logprob_SV).entropy()
    return logprob_SV[range(len(completion)), completion], entropy_T


# --- log-probabilities


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_equal_to_log_softmax_of_the_librarys_logits(tiny_policy, temperature):
    model = tiny_policy(torch.float64, exact=True).model
    batch = batch_of()
    logprob_BT, entropy_BT = scored(model, batch, temperature)
    assert logprob_BT.dtype == entropy_BT.dtype == torch.float64
    for b, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        expected_T, expected_entropy_T = by_the_library(model, prompt, completion, temperature)
        torch.testing.assert_close(logprob_BT[b, : len(completion)], expected_T, atol=1e-10, rtol=0)
        torch.testing.assert_close(entropy_BT[b, : len(completion)], expected_entropy_T, atol=1e-10, rtol=0)


def test_the_gradient_of_shared_prompts_has_the_same_bits_every_time_with_two_threads():
    batch = make_batch([([5, 6], [[7, 8]] * 2048)], 0, CPU)
    states_RSH = torch.randn(
        *batch.input_ids_RS.shape, 128, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        hidden_NH = predicting_states(lambda **_: SimpleNamespace(last_hidden_state=states_RSH), batch)
        weight_NH = torch.randn(hidden_NH.shape, generator=torch.Generator().manual_seed(1))
        repeated = [torch.autograd.grad(hidden_NH, states_RSH, weight_NH, retain_graph=True)[0] for _ in range(200)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(gradient_RSH, repeated[0]) for gradient_RSH in repeated)


def test_gradient_is_that_of_the_librarys_logits(tiny_policy):
    model = tiny_policy(torch.float64, exact=True).model
    batch = batch_of()
    scored(model, batch, 0.7)[0].sum().backward()
    got = gradients(model)
    sum(by_the_library(model, p, c, 0.7)[0].sum() for p, c in zip(PROMPTS, COMPLETIONS, strict=True)).backward()
    for name, expected in gradients(model).items():
        torch.testing.assert_close(got[name], expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("positions", [1, 5, 100])
def test_gradient_of_the_entropy_is_that_of_the_librarys_logits(tiny_policy, monkeypatch, positions):
    """Where it is asked for, in one chunk and in several; else there is none."""
    model = tiny_policy(torch.float64, exact=True).model
    monkeypatch.setattr(logprob, "CHUNK_LOGITS", positions * model.config.vocab_size)
    batch = batch_of()
    assert not scored(model, batch, 0.7)[1].requires_grad
    entropy_BT = scored(model, batch, 0.7, entropy_gradient=True)[1]
    assert not entropy_BT[~batch.mask_BT].any()
    entropy_BT.sum().backward()
    got = gradients(model)
    sum(by_the_library(model, p, c, 0.7)[1].sum() for p, c in zip(PROMPTS, COMPLETIONS, strict=True)).backward()
    assert max(g.abs().max() for g in got.values()) > 1e-3
    for name, expected in gradients(model).items():
        torch.testing.assert_close(got[name], expected, atol=1e-10, rtol=1e-10)


def test_hidden_states_are_those_that_predicted_the_tokens(tiny_policy):
    model = tiny_policy(torch.float64, exact=True).model
    batch = batch_of()
    hidden_NH = predicting_states(model.get_decoder(), batch)
    logprob_BT, _ = token_logprobs(model, batch, hidden_NH, 0.7, False)
    logits_NV = model.get_output_embeddings()(hidden_NH) / 0.7
    tokens_N1 = batch.token_ids_BT[batch.mask_BT][:, None]
    expected_N = logits_NV.log_softmax(-1).gather(-1, tokens_N1).squeeze(-1)
    torch.testing.assert_close(logprob_BT[batch.mask_BT], expected_N, atol=1e-12, rtol=0)
    assert torch.equal(logprob.scatter(batch.mask_BT, expected_N)[batch.mask_BT], expected_N)


def test_masked_positions_are_zero_and_nothing_else_is(tiny_policy):
    batch = batch_of()
    logprob_BT, entropy_BT = scored(tiny_policy().model, batch, 1.0)
    assert torch.equal(logprob_BT < 0, batch.mask_BT)
    assert torch.equal(entropy_BT > 0, batch.mask_BT)
    assert not logprob_BT[~batch.mask_BT].any()
    assert not entropy_BT[~batch.mask_BT].any()
    assert entropy_BT.max() <= math.log(128) + 1e-5
    assert not entropy_BT.requires_grad


def test_padding_and_last_tokens_get_no_gradient(tiny_policy):
    """Padding reaches nothing, and the last token of a completion predicts nothing."""
    model, embedded = tiny_policy(torch.float64, exact=True).model, []
    batch = batch_of()
    hook = model.get_input_embeddings().register_forward_hook(lambda *args: embedded.append(args[-1]))
    logprob_BT = scored(model, batch, 1.0)[0]
    hook.remove()
    gradient_BS = torch.autograd.grad(logprob_BT.sum(), embedded[0])[0].abs().amax(-1)
    length_B1 = torch.tensor([[len(p) + len(c)] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])
    assert torch.equal(gradient_BS > 0, torch.arange(gradient_BS.shape[1]) < length_B1 - 1)


@pytest.mark.parametrize("pad_id", [0, 2, 77])
def test_what_stands_in_the_padding_is_of_no_account(tiny_policy, pad_id):
    model = tiny_policy(torch.float64, exact=True).model
    expected, got = (scored(model, batch, 1.0) for batch in (batch_of(), batch_of(pad_id=pad_id)))
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_float32_is_near_float64_and_bfloat16_heads_are_raised(tiny_policy):
    batch = batch_of()
    exact_BT = scored(tiny_policy(torch.float64, exact=True).model, batch, 1.0)[0]
    model = tiny_policy(torch.float32).model
    plain_BT = scored(model, batch, 1.0)[0]
    mixed_BT, entropy_BT = scored(model, batch, 1.0, autocast=True)
    assert plain_BT.dtype == mixed_BT.dtype == entropy_BT.dtype == torch.float32
    torch.testing.assert_close(plain_BT.double(), exact_BT, atol=1e-5, rtol=0)
    torch.testing.assert_close(mixed_BT.double(), exact_BT, atol=0.05, rtol=0)


# --- chunks


@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("positions", [1, 3, 5, 12])
def test_chunks_change_neither_value_nor_gradient(tiny_policy, monkeypatch, positions, entropy_gradient):
    model = tiny_policy(torch.float64, exact=True).model
    batch = batch_of()
    results = []
    for chunk in (2**24, positions * model.config.vocab_size):
        monkeypatch.setattr(logprob, "CHUNK_LOGITS", chunk)
        logprob_BT, entropy_BT = scored(model, batch, 0.7, entropy_gradient=entropy_gradient)
        (logprob_BT**2 + entropy_BT**2).sum().backward()
        results.append([logprob_BT.detach(), entropy_BT.detach(), *gradients(model).values()])
    torch.testing.assert_close(results[1], results[0], atol=1e-12, rtol=1e-12)


def test_a_chunk_holds_at_least_one_position(tiny_policy, monkeypatch):
    batch = batch_of()
    model = tiny_policy(torch.float64, exact=True).model
    expected_BT = scored(model, batch, 1.0)[0]
    monkeypatch.setattr(logprob, "CHUNK_LOGITS", 1)
    torch.testing.assert_close(scored(model, batch, 1.0)[0], expected_BT, atol=1e-12, rtol=0)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


def test_logits_of_a_large_vocabulary_neither_exist_at_once_nor_are_kept(monkeypatch):
    vocabulary, num_tokens = 151_936, 64
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config)
    batch = batch_of([[1, 2]] * 4, [list(range(100, 100 + num_tokens // 4))] * 4)
    seen = {}
    for chunk in (2**22, 2**24):
        monkeypatch.setattr(logprob, "CHUNK_LOGITS", chunk)
        kept = []
        with Largest() as largest:
            with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.shape) or t, lambda t: t):
                logprob_BT = scored(model, batch, 1.0)[0]
            logprob_BT.sum().backward()
        seen[chunk] = largest.elements, sum(shape.numel() for shape in kept if shape[-1:] == (vocabulary,))
    assert seen == {2**22: (2**22 // vocabulary * vocabulary, 0), 2**24: (num_tokens * vocabulary, 0)}


# --- log-ratios


def test_log_ratio_is_clamped_to_its_bound_and_has_no_gradient_beyond():
    logprob_BT = torch.tensor([[-100.0, -1.0, 0.0, 100.0]], dtype=torch.float64, requires_grad=True)
    log_ratio_BT = log_ratio(logprob_BT, torch.zeros(1, 4, dtype=torch.float64))
    assert log_ratio_BT.tolist() == [[-LOG_RATIO_CLAMP, -1.0, 0.0, LOG_RATIO_CLAMP]]
    assert torch.autograd.grad(log_ratio_BT.sum(), logprob_BT)[0].tolist() == [[0, 1, 1, 0]]


def test_a_log_ratio_that_is_not_a_number_stays_so():
    """The clamp hides infinities, which the update looks for by itself, and no NaN."""
    assert log_ratio(torch.tensor([math.nan]), torch.zeros(1)).isnan().all()
