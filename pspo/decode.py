"""One token after another for many rows: the decoders behind the sampler.

``Library`` runs any Hugging Face decoder as it is. ``Fused`` runs those of the Llama family, Qwen2 among them, with the
same weights, less work around them and a cache that is allocated once. Shape suffixes: B rows, P prompts, S places in a
text, H hidden size, V vocabulary, K key heads, G query heads of each, D head width.
"""

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from pspo.console import log
from pspo.model import Policy

FAMILY = ("LlamaForCausalLM", "Qwen2ForCausalLM")
ROPE = ("default", "linear", "llama3", "yarn")  # tables that do not depend on how long the text is


class Decoder(Protocol):
    """What the sampler asks of a decoder, under inference mode."""

    def start(self, prompts: Sequence[list[int]], prompt_of_B: Tensor, num_tokens: int) -> Tensor:
        """Read each prompt once, for all rows that begin with it; the logits (B, V) of the first token."""

    def step(self, token_B: Tensor) -> Tensor:
        """Append a token to every row; the logits (B, V) of the next."""

    def keep(self, row_B: Tensor) -> None:
        """Drop all rows but these."""


def make_decoder(policy: Policy) -> Decoder:
    """The fastest decoder that this model has."""
    if Fused.takes(policy.model):
        return Fused(policy)
    _say(type(policy.model).__name__)
    return Library(policy)


@functools.cache
def _say(name: str) -> None:
    log.warning("%s, as it is here, is decoded by the library's own forward, which is slower than ours", name)


class Library:
    """The model's own forward, left-padded, with the library's growing cache: what ``Fused`` is tested against."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.cache = policy, DynamicCache(config=policy.model.config)

    def start(self, prompts: Sequence[list[int]], prompt_of_B: Tensor, num_tokens: int) -> Tensor:
        width = max(map(len, prompts))
        ids = [[self.policy.pad_id] * (width - len(prompt)) + prompt for prompt in prompts]
        there = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        device = self.policy.device
        self.attention = torch.tensor(there, device=device)
        logits = self._forward(torch.tensor(ids, device=device))[prompt_of_B]
        self.keep(prompt_of_B)
        return logits

    def step(self, token_B: Tensor) -> Tensor:
        self.attention = F.pad(self.attention, (0, 1), value=1)
        return self._forward(token_B[:, None])

    def keep(self, row_B: Tensor) -> None:
        self.cache.batch_select_indices(row_B)
        self.attention = self.attention[row_B]

    def _forward(self, input_ids: Tensor) -> Tensor:
        position_ids = (self.attention.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        logits: Tensor = self.policy.model(
            input_ids=input_ids,
            attention_mask=self.attention,
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1]


class Fused:
    """Decoding for the Llama family: RMSNorm, rotary positions, grouped queries, gated feed-forward.

    The prompts go through the model's own forward. Every row starts at the left of the cache, so rows differ in how
    far they are. Products are in bfloat16 under autocast, from a copy of the weights that lives as long as this.
    """

    @staticmethod
    def takes(model: Any) -> bool:
        """Whether the model is of the family, and plain: no adapters, no windows, positions whatever the length."""
        if type(model).__name__ not in FAMILY:
            return False
        config = model.config
        linear = all(
            type(module) is torch.nn.Linear
            for name, module in model.named_modules()
            if name.endswith(("_proj", "lm_head"))
        )
        rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        return linear and rope in ROPE and set(getattr(config, "layer_types", ["full_attention"])) == {"full_attention"}

    def __init__(self, policy: Policy) -> None:
        self.policy, self.config = policy, policy.model.config
        decoder = policy.model.get_decoder()
        self.dtype = torch.bfloat16 if policy.autocast else policy.model.dtype
        self.embed, self.norm = decoder.embed_tokens.weight, decoder.norm
        self.head = self._joined(policy.model.get_output_embeddings())
        self.layers = [
            (
                layer.input_layernorm,
                self._joined(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                self._joined(layer.self_attn.o_proj),
                layer.post_attention_layernorm,
                self._joined(layer.mlp.gate_proj, layer.mlp.up_proj),
                layer.mlp.act_fn,
                self._joined(layer.mlp.down_proj),
            )
            for layer in decoder.layers
        ]
        attention = decoder.layers[0].self_attn
        self.width, self.scaling = attention.head_dim, attention.scaling
        self.keys: int = self.config.num_key_value_heads

    def start(self, prompts: Sequence[list[int]], prompt_of_B: Tensor, num_tokens: int) -> Tensor:
        device, length = self.policy.device, max(map(len, prompts))
        ids_PS = torch.tensor([p + [self.policy.pad_id] * (length - len(p)) for p in prompts], device=device)
        length_P = torch.tensor([len(p) for p in prompts], device=device)
        cache, decoder = DynamicCache(config=self.config), self.policy.model.get_decoder()
        there_PS = torch.arange(length, device=device) < length_P[:, None]
        hidden = decoder(input_ids=ids_PS, attention_mask=there_PS.long(), past_key_values=cache, use_cache=True)
        last_PH = hidden.last_hidden_state[torch.arange(len(prompts), device=device), length_P - 1]
        rows, room = len(prompt_of_B), length + num_tokens
        self.cache: list[tuple[Tensor, ...]] = []
        for layer in cache.layers:
            pair = (last_PH.new_zeros((rows, self.keys, room, self.width), dtype=self.dtype) for _ in range(2))
            self.cache.append(tuple(pair))
            for kept, read in zip(self.cache[-1], (layer.keys, layer.values), strict=True):  # type: ignore[union-attr]
                kept[:, :, :length] = read[prompt_of_B]  # type: ignore[index]
        places = torch.arange(room, device=device)
        self.cos_SD, self.sin_SD = (table[0] for table in decoder.rotary_emb(last_PH, places[None]))
        self.place_B, self.filled, self.row_B = length_P[prompt_of_B], length, torch.arange(rows, device=device)
        return self._product(last_PH, self.head)[prompt_of_B]

    def step(self, token_B: Tensor) -> Tensor:
        x_BH, rows, half = self.embed[token_B], len(token_B), self.width // 2
        cos, sin = self.cos_SD[self.place_B, None, :half], self.sin_SD[self.place_B, None, :half]
        self.filled += 1
        unseen = torch.arange(self.filled, device=x_BH.device) > self.place_B[:, None]
        for (norm, qkv, out, norm_after, gate_up, activation, down), (keys, values) in zip(
            self.layers, self.cache, strict=True
        ):
            heads = self._product(norm(x_BH), qkv).view(rows, -1, self.width)
            turned, value = heads[:, : -self.keys], heads[:, -self.keys :]
            a, b = turned[..., :half], turned[..., half:]
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(self.dtype)
            keys[self.row_B, :, self.place_B] = turned[:, -self.keys :]
            values[self.row_B, :, self.place_B] = value
            query = (turned[:, : -self.keys] * self.scaling).reshape(rows, self.keys, -1, self.width)
            score = query @ keys[:, :, : self.filled].transpose(-1, -2)
            score.masked_fill_(unseen[:, None, None], -torch.inf)
            weight = score.softmax(-1, torch.promote_types(self.dtype, torch.float32)).to(self.dtype)
            x_BH = x_BH + self._product((weight @ values[:, :, : self.filled]).reshape(rows, -1), out)
            gate, up = self._product(norm_after(x_BH), gate_up).chunk(2, dim=-1)
            x_BH = x_BH + self._product(activation(gate) * up, down)
        self.place_B = self.place_B + 1
        return self._product(self.norm(x_BH), self.head)

    def keep(self, row_B: Tensor) -> None:
        self.cache = [tuple(kept[row_B] for kept in layer) for layer in self.cache]
        self.place_B, self.row_B = self.place_B[row_B], self.row_B[: len(row_B)]

    def _joined(self, *linears: torch.nn.Linear) -> tuple[Tensor, Tensor | None]:
        """Several linear layers of one input as one, in the dtype of the products."""
        weight = torch.cat([linear.weight for linear in linears]) if len(linears) > 1 else linears[0].weight
        if linears[0].bias is None:
            return weight.to(self.dtype), None
        return weight.to(self.dtype), torch.cat([linear.bias for linear in linears]).to(self.dtype)

    def _product(self, x: Tensor, linear: tuple[Tensor, Tensor | None]) -> Tensor:
        return F.linear(x.to(self.dtype), *linear)
