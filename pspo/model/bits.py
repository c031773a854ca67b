"""The policy of the reversal task: a tokenizer of "0" and "1" without an end, and a decoder with Flax's first weights.

As published (Kaddour 2026, arXiv 2604.06159): LayerNorm before each layer, learned positions, biases, a feed-forward of
four times the width with GELU, an untied head. GPTBigCode has this shape, and its weights are (out, in).
"""

import math

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM, PreTrainedTokenizerFast

from pspo.model.config import BitsArchitecture

POSITION_STD = 0.02
TRUNCATED_STD = 0.87962566103423978
"""Standard deviation of a normal distribution of standard deviation 1, cut at ±2, by which Flax divides."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each bit, no other; as it names no end of a text, every text is written to its full length."""
    tokenizer = Tokenizer(models.WordLevel({"0": 0, "1": 1}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[01]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    encoder: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False
    )
    return encoder


def make_model(architecture: BitsArchitecture, seed: int, attention: str) -> GPTBigCodeForCausalLM:
    """A decoder with weights drawn from ``seed``, in float32 on the CPU."""
    width = architecture.hidden_size
    config = GPTBigCodeConfig(
        vocab_size=2,
        n_positions=2 * architecture.num_bits,
        n_embd=width,
        n_layer=architecture.num_layers,
        n_head=architecture.num_heads,
        n_inner=4 * width,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        layer_norm_epsilon=1e-6,
        multi_query=False,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPTBigCodeForCausalLM(config)
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=POSITION_STD if name.endswith("wpe") else 1 / math.sqrt(width))
            elif isinstance(module, nn.Linear):  # LeCun's normal
                std = 1 / math.sqrt(module.in_features) / TRUNCATED_STD
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
    return model
