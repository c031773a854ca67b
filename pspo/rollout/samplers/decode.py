"""One token after another for many rows: the decoders behind the sampler.

``Library`` runs any Hugging Face decoder as it is. ``Fused`` runs those of the Llama family, Qwen2 among them, with the
same weights, less work around them and a cache that is allocated once. Shape suffixes: B rows, P prompts, S places in a
text, H hidden size, V vocabulary, K key heads, G query heads of each, D head width.
"""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from pspo import fused
from pspo.base.console import log
from pspo.fused import Weights
from pspo.layout import Blocks
from pspo.model import Policy
from pspo.model.logprob import autocast_to_bfloat16

BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Of the attention to prompts: not cuDNN's, which plans anew for every shape."""

FEW = 400
"""Multiplications of one product of a batch below which PyTorch has a plain loop for it on a CPU, as measured: up to
2.5 times slower than a sum."""


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


def once(prompts: Sequence[list[int]]) -> tuple[list[list[int]], Tensor]:
    """Prompts, each run of equal ones once, and which of those each is."""
    first = [n for n, prompt in enumerate(prompts) if n == 0 or prompt != prompts[n - 1]]
    of = np.searchsorted(first, np.arange(len(prompts)), side="right") - 1
    return [prompts[n] for n in first], torch.from_numpy(of)


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
        with autocast_to_bfloat16(self.policy.device, self.policy.autocast):
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
    """Decoding for the Llama family, by the products of ``pspo.fused``.

    Keys and values of a prompt stand once for all rows that begin with it, those of the rows' own tokens in a cache
    that is allocated once, at the same place for all rows. Products are in bfloat16 under autocast, from a copy of the
    weights that lives as long as this.
    """

    @staticmethod
    def takes(model: Any) -> bool:
        """Whether the model is of the family, and plain.

        In float64 only where it is trained by our layers too, as the library's norms are in float32 in any dtype.
        """
        known = fused.takes(model.get_decoder()) and type(model.get_output_embeddings()) is torch.nn.Linear
        return known and (model.dtype != torch.float64 or model.config._attn_implementation == "grouped")

    def __init__(self, policy: Policy) -> None:
        self.policy, decoder, head = policy, policy.model.get_decoder(), policy.model.get_output_embeddings()
        self.dtype = torch.bfloat16 if policy.autocast else policy.model.dtype
        self.shape, self.embed, self.norm = (
            fused.shape_of(decoder),
            decoder.embed_tokens.weight,
            fused.scale(decoder.norm),
        )
        self.layers = [Weights(*self._cast(*fused.weights(layer))) for layer in decoder.layers]
        self.head = self._cast(head.weight, head.bias)

    def start(self, prompts: Sequence[list[int]], prompt_of_B: Tensor, num_tokens: int) -> Tensor:
        device, length, (keys, _, width, _) = self.policy.device, max(map(len, prompts)), self.shape
        length_P, places = torch.tensor([len(p) for p in prompts], device=device), torch.arange(length, device=device)
        self.cis_SD = self._angles(length + num_tokens)
        logits_PV = self.read(prompts)
        unseen_PS = places >= length_P[:, None]
        self.unseen_P1S = torch.zeros_like(unseen_PS, dtype=self.dtype).masked_fill_(unseen_PS, -torch.inf)[:, None]
        shape = 2, len(prompt_of_B), keys, num_tokens, width
        self.own, self.filled = [self.embed.new_empty(shape, dtype=self.dtype) for _ in self.layers], 0
        self.place_B = length_P[prompt_of_B]
        self._stand(prompt_of_B.cpu().numpy())
        return logits_PV[prompt_of_B]

    def read(self, prompts: Sequence[list[int]]) -> Tensor:
        """Keep the prompts' keys and values, (P · key heads, S, D) of each layer; the logits (P, V) that follow."""
        device, length, count = self.policy.device, max(map(len, prompts)), len(prompts)
        ids_PS = torch.tensor([p + [self.policy.pad_id] * (length - len(p)) for p in prompts], device=device)
        self.prompts: list[tuple[Tensor, Tensor]] = []
        x, cis = self.embed[ids_PS.flatten()], self.cis_SD[:length].repeat(count, 1, 1)
        last_P = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        seen_PS, last = torch.arange(length, device=device) <= last_P[:, None], self.layers[-1]
        with sdpa_kernel(BACKENDS):
            for w in self.layers[:-1]:
                x = self._layer(w, x, cis, partial(self._read, count, None))
            wanted_P = last_P + torch.arange(0, count * length, length, device=device)
            x = self._layer(last, x, cis, partial(self._read, count, seen_PS[:, None, None]), wanted_P)
        return self._logits(x)

    def step(self, token_B: Tensor) -> Tensor:
        x, cis = self.embed[token_B], self.cis_SD[self.place_B]
        for layer, w in enumerate(self.layers):
            x = self._layer(w, x, cis, partial(self._ask, layer))
        self.place_B, self.filled = self.place_B + 1, self.filled + 1
        return self._logits(x)

    def _layer(
        self,
        w: Weights,
        x: Tensor,
        cis: Tensor,
        attend: Callable[[Tensor, Tensor], Tensor],
        wanted: Tensor | None = None,
    ) -> Tensor:
        """One layer, of tokens end to end or of those wanted; ``attend`` finds what queries see, given all keys."""
        keys, _, width, eps = self.shape
        n = fused.normed(x, eps)[0].to(self.dtype)
        pair = F.linear(n, w.pair, w.pair_bias)
        self._turn(pair[:, : keys * width], cis)
        if wanted is not None:
            n, x, cis = n[wanted], x[wanted], cis[wanted]
        query = F.linear(n, w.query, w.query_bias)
        self._turn(query, cis)
        x = self._onto(x, attend(query, pair), w.out)
        gate, up = F.linear(fused.normed(x, eps)[0].to(self.dtype), w.gate_up).chunk(2, -1)
        return self._onto(x, F.silu(gate).mul_(up), w.down)

    def _onto(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        return torch.addmm(x, y, weight.T) if x.dtype == y.dtype else x + F.linear(y, weight)

    def _read(self, count: int, seen: Tensor | None, query: Tensor, pair: Tensor) -> Tensor:
        """The attention of prompts' tokens to what is before them, or to what is seen; keeps their keys and values."""
        keys, groups, width, _ = self.shape
        heads = query.view(count, -1, keys * groups, width).transpose(1, 2)
        key, value = pair.view(count, -1, 2, keys, width).permute(2, 0, 3, 1, 4).contiguous()
        self.prompts.append((key.flatten(0, 1), value.flatten(0, 1)))
        how: dict[str, Any] = {"is_causal": True} if seen is None else {"attn_mask": seen}
        found = F.scaled_dot_product_attention(heads, key, value, **how, scale=1.0, enable_gqa=True)
        return found.transpose(1, 2).reshape(len(query), -1)

    def _ask(self, layer: int, query: Tensor, pair: Tensor) -> Tensor:
        """The attention of one token a row, to its prompt together with all rows of it, and to the row's own tokens."""
        (keys, groups, width, _), (prompt_key, prompt_value) = self.shape, self.prompts[layer]
        rows, told, until = len(pair), self.unseen_P1S.shape[-1], self.filled + 1
        self.own[layer][:, :, :, self.filled] = pair.view(rows, 2, keys, width).transpose(0, 1)
        key, value = self.own[layer][..., :until, :].flatten(1, 2)
        on_prompt = self.blocks.take(query, width).view(len(prompt_key), -1, width) @ prompt_key.mT
        on_prompt.view(len(self.unseen_P1S), -1, told).add_(self.unseen_P1S)
        on_own = query.view(rows * keys, groups, width) @ key.mT
        score = torch.cat([self.blocks.give(on_prompt.view(-1, told)).view(*on_own.shape[:2], told), on_own], -1)
        weight = score.softmax(-1, torch.promote_types(self.dtype, torch.float32)).to(self.dtype)
        by_prompt = weight.view(-1, told + until)[:, :told].index_select(0, self.blocks.to)
        found = self.blocks.give((by_prompt.view(len(prompt_key), -1, told) @ prompt_value).view(-1, width))
        on_own = weight[..., told:]
        few = groups * until * width < FEW
        own = (on_own[..., None] * value[:, None]).sum(-2) if few else on_own @ value
        return found.add_(own.view(rows, -1))

    def _angles(self, length: int) -> Tensor:
        places = torch.arange(length, device=self.policy.device)
        return fused.angles(self.policy.model.get_decoder(), self.embed, places)

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear((fused.normed(x, self.shape.eps)[0] * self.norm).to(self.dtype), *self.head)

    def keep(self, row_B: Tensor) -> None:
        for layer, own in enumerate(self.own):
            left = own.new_empty((2, len(row_B), *own.shape[2:]))
            left[..., : self.filled, :] = own[:, row_B, :, : self.filled]
            self.own[layer] = left
        self.place_B = self.place_B[row_B]
        prompt_of = self.prompt_of[row_B.cpu().numpy()]
        alive, prompt_of = np.unique(prompt_of, return_inverse=True)
        if len(alive) < len(self.unseen_P1S):
            alive_P = torch.from_numpy(alive).to(row_B.device)
            self.unseen_P1S = self.unseen_P1S[alive_P]

            def kept(stands: Tensor) -> Tensor:
                return stands.view(-1, self.shape.keys, *stands.shape[1:])[alive_P].flatten(0, 1)

            self.prompts = [(kept(key), kept(value)) for key, value in self.prompts]
        self._stand(prompt_of)

    def _stand(self, prompt_of: Any) -> None:
        """Rows of one prompt ask it together."""
        self.prompt_of, (keys, groups, *_) = prompt_of, self.shape
        counts_P, rows = np.bincount(prompt_of)[:, None], len(prompt_of)
        place = np.arange(counts_P.max())
        row_PS = np.where(place < counts_P, np.cumsum(counts_P)[:, None] - counts_P + place, rows)
        self.blocks = Blocks([row_PS], rows, keys * groups, keys, self.policy.device, zeros=False)

    def _turn(self, heads: Tensor, cis: Tensor) -> None:
        if heads.dtype == torch.bfloat16:  # there are no complex numbers of it
            raised = heads.float()
            fused.turn(raised, cis, self.shape.width)
            heads.copy_(raised)
        else:
            fused.turn(heads, cis, self.shape.width)

    def _cast(self, *tensors: Tensor | None) -> tuple[Any, ...]:
        return tuple(None if tensor is None else tensor.to(self.dtype) for tensor in tensors)
