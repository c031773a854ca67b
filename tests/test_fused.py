"""Our layers of the Llama family beside the library's: values and gradients."""

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from pspo import fused, layout
from pspo.model import (
    attention,  # noqa: F401 - registers grouped
    logprob,
)
from pspo.model.batch import make_batch

CPU = torch.device("cpu")
BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "attn_implementation": "grouped",
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
FAMILY = {
    "qwen2": lambda: transformers.Qwen2Config(**BASE),
    "llama": lambda: transformers.LlamaConfig(**BASE),
    "llama, wide heads": lambda: transformers.LlamaConfig(**BASE, head_dim=16),
    "llama, one key head": lambda: transformers.LlamaConfig(**BASE | {"num_key_value_heads": 1}),
    "llama, one layer": lambda: transformers.LlamaConfig(**BASE | {"num_hidden_layers": 1}),
    "llama, yarn": lambda: transformers.LlamaConfig(**BASE, rope_parameters=YARN),
}
OTHERS = {
    "qwen3": lambda: transformers.Qwen3Config(**BASE),
    "mistral": lambda: transformers.MistralConfig(**BASE),
    "gelu": lambda: transformers.LlamaConfig(**BASE, hidden_act="gelu"),
    "biases beyond the attention": lambda: transformers.LlamaConfig(**BASE, attention_bias=True),
    "angles that grow with the text": lambda: transformers.LlamaConfig(
        **BASE, rope_parameters={"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    ),
    "a window": lambda: transformers.Qwen2Config(
        **BASE, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
}
PROMPTS = [[1], [2, 3, 4], [2, 3, 4], [5, 6], [7, 8, 9, 10, 11, 12], [7, 8, 9, 10, 11, 12]]
COMPLETIONS = [[21], [22, 23], [24], [25, 26, 27, 28, 29, 30, 31], [32, 33, 34], [35, 36]]


def made(config, dtype=torch.float64):
    """A model whose norms and biases are as random as the rest, and whose norms are in the model's dtype."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    return model


def told(model, **how):
    """States and the gradients of all parameters, of a loss that weighs every number differently."""
    batch = make_batch(PROMPTS, COMPLETIONS, 0, CPU, **how)
    model.zero_grad()
    hidden = logprob.predicting_states(model.get_decoder(), batch)
    weight = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)
    (hidden * weight + hidden.square() / 7).sum().backward()
    return hidden.detach(), {name: p.grad.clone() for name, p in model.get_decoder().named_parameters()}


@pytest.mark.parametrize("how", [{}, {"sizes": [1, 2, 1, 2]}])
@pytest.mark.parametrize("name", FAMILY)
def test_states_and_gradients_are_the_librarys(name, how):
    model = made(FAMILY[name]())
    assert fused.trains(model.get_decoder(), autocast=False)
    (expected, by_expected), (got, by_got) = told(model), told(model, end_to_end=True, **how)
    torch.testing.assert_close(got, expected, atol=1e-11, rtol=1e-11)
    for parameter, gradient in by_expected.items():
        torch.testing.assert_close(by_got[parameter], gradient, atol=1e-11, rtol=1e-11)
        assert gradient.abs().max() > 1e-3, parameter


def test_in_float32_they_are_equal_to_rounding():
    model = made(FAMILY["qwen2"](), torch.float32)
    (expected, by_expected), (got, by_got) = told(model), told(model, end_to_end=True)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    for parameter, gradient in by_expected.items():
        assert (by_got[parameter] - gradient).norm() < 1e-5 * gradient.norm(), parameter


@given(
    sizes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=7),
    shared=st.booleans(),
    block=st.sampled_from([0, 20, 10**9]),
)
def test_how_readers_are_cut_into_blocks_changes_nothing(sizes, shared, block):
    if shared:
        sizes = [(sizes[0][0], completion) for _, completion in sizes]
    tokens = torch.randint(64, (len(sizes), 20), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [row[:p] for row, (p, _) in zip(tokens, sizes, strict=True)]
    completions = [row[p : p + c] for row, (p, c) in zip(tokens, sizes, strict=True)]
    prompts = [prompts[0]] * len(sizes) if shared else prompts
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "BLOCK", block)
        padded, cut = (
            logprob.predicting_states(QWEN2.get_decoder(), make_batch(prompts, completions, 0, CPU, some, ours))
            for some, ours in ((None, False), ([len(sizes)] if shared else None, True))
        )
    torch.testing.assert_close(cut, padded, atol=1e-11, rtol=1e-11)


QWEN2 = made(FAMILY["qwen2"]())


def test_second_derivatives_are_refused():
    batch = make_batch(PROMPTS, COMPLETIONS, 0, CPU, end_to_end=True)
    hidden = logprob.predicting_states(QWEN2.get_decoder(), batch)
    (first,) = torch.autograd.grad(hidden.square().sum(), QWEN2.get_input_embeddings().weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_of_the_family_is_left_to_the_library(name):
    assert not fused.takes(made(OTHERS[name]()).get_decoder())


def test_other_settings_are_left_to_the_library(tiny_policy):
    model = tiny_policy(attention="grouped").model
    assert fused.trains(model.get_decoder(), autocast=False)
    assert not fused.trains(model.get_decoder(), autocast=True)
    assert not fused.trains(model.get_decoder(), autocast=False, recomputes=True)
    for other in ("eager", "sdpa"):
        assert not fused.trains(tiny_policy(attention=other).model.get_decoder(), False)
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules="all-linear"), model)
    assert not fused.takes(model.get_decoder())
