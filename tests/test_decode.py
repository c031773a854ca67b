"""The fused decoder beside the library's own forward."""

import dataclasses

import pytest
import torch
import transformers

from pspo import rollout
from pspo.dataset import Problem, Prompt
from pspo.model import Policy
from pspo.model.logprob import autocast_to_bfloat16
from pspo.rollout import sample
from pspo.rollout.samplers.decode import Fused, Library, make_decoder

CPU = torch.device("cpu")
PROMPTS = [[11, 12, 13, 14], [21], [31, 32, 33, 34, 35, 36, 37], [41, 42]]
PROMPT_OF = torch.tensor([0, 0, 0, 1, 2, 2, 3])
BASE = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILY = {
    "qwen2": lambda: transformers.Qwen2Config(**BASE, tie_word_embeddings=True),
    "llama": lambda: transformers.LlamaConfig(**BASE),
    "llama, wide heads": lambda: transformers.LlamaConfig(**BASE, head_dim=16),
    "llama, llama3 positions": lambda: transformers.LlamaConfig(**BASE, rope_parameters=LLAMA3),
}
OTHERS = {
    "llama, biases": lambda: transformers.LlamaConfig(**BASE, attention_bias=True),
    "llama, gelu": lambda: transformers.LlamaConfig(**BASE, hidden_act="gelu"),
    "mistral": lambda: transformers.MistralConfig(**BASE),
    "qwen3": lambda: transformers.Qwen3Config(**BASE),
    "qwen2, a window": lambda: transformers.Qwen2Config(
        **BASE, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "llama, dynamic positions": lambda: transformers.LlamaConfig(
        **BASE, rope_parameters={"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    ),
}


def made(config, tokenizer, dtype=torch.float64, autocast=False):
    config.pad_token_id, config.eos_token_id, config.bos_token_id, config._attn_implementation = 0, 2, None, "grouped"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)  # the library begins at 0
    return Policy(model, tokenizer, [2], autocast=autocast, gradient_checkpointing=False)


@torch.inference_mode()
def told(decoder, autocast=False):
    """Logits of the first token, of two more, and of two after some rows have left."""
    with autocast_to_bfloat16(CPU, autocast):
        found = [decoder.start(PROMPTS, PROMPT_OF, 8)]
        found += [decoder.step(torch.arange(50, 57) + t) for t in range(2)]
        decoder.keep(torch.tensor([1, 3, 5]))
        return [*found, *(decoder.step(torch.arange(60, 63) + t) for t in range(2))]


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 5e-6), (torch.float32, 1e-4)])
def test_logits_are_the_librarys(tiny_tokenizer, name, dtype, tolerance):
    """The library works out norms and angles in float32 in either dtype."""
    policy = made(FAMILY[name](), tiny_tokenizer, dtype)
    assert isinstance(make_decoder(policy), Fused)
    for got, expected in zip(told(Fused(policy)), told(Library(policy)), strict=True):
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
        assert expected.std() > 0.3


def test_in_bfloat16_logits_are_about_as_near_to_the_true_ones_as_the_librarys(tiny_tokenizer):
    policy = made(FAMILY["qwen2"](), tiny_tokenizer, torch.float32, autocast=True)
    exact = dataclasses.replace(policy, autocast=False)
    for true, *both in zip(told(Library(exact)), told(Fused(policy), True), told(Library(policy), True), strict=True):
        ours, theirs = ((logits.float() - true).abs().mean() for logits in both)
        assert 0 < ours < min(2 * theirs, 0.02 * true.std())  # two partial sums in bfloat16


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_of_the_family_is_left_to_the_library(tiny_tokenizer, name):
    assert isinstance(make_decoder(made(OTHERS[name](), tiny_tokenizer)), Library)


def test_adapters_are_left_to_the_library(tiny_policy):
    peft = pytest.importorskip("peft")
    policy = tiny_policy()
    assert Fused.takes(policy.model)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules="all-linear"), policy.model)
    assert not Fused.takes(policy.model)


def test_weights_changed_since_are_those_that_decode(tiny_policy):
    policy = tiny_policy(torch.float64, exact=True)
    before = told(make_decoder(policy))[-1]
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.mul_(1.1)
    after = told(make_decoder(policy))[-1]
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, told(Library(policy))[-1], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("dtype", "differing"), [(torch.float64, 0), (torch.float32, 0.001)])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.8, 0.9), (0.0, 1.0)])
def test_completions_are_those_of_the_library(tiny_policy, monkeypatch, dtype, differing, temperature, top_p):
    policy = tiny_policy(dtype, exact=dtype == torch.float64)
    policy = dataclasses.replace(policy, stop_ids=list(range(2, 128, 16)))
    prompts = [Prompt(Problem(f"p{i}", "", "", ""), ids) for i, ids in enumerate(PROMPTS)]
    settings = {"group_size": 1 if temperature == 0 else 64, "max_new_tokens": 16, "max_rows": 100}
    found = []
    for decoder in (Fused, Library):
        monkeypatch.setattr(rollout, "make_decoder", decoder)
        found.append(sample(policy, prompts, seed=[1], temperature=temperature, top_p=top_p, **settings))
    unlike = [a for a, b in zip(*found, strict=True) if a.token_ids != b.token_ids]
    assert len(unlike) <= differing * len(found[0])
    if dtype == torch.float64:
        for a, b in zip(*found, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-10)
