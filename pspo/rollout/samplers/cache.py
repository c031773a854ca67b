"""The KV cache of the sampler ``own``: the library's, whose keys and values have room for tokens to come."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

GROWTH = 1.25
"""Positions of new memory, as a multiple of those in use, whenever a layer is full."""


def make_cache(config: PreTrainedConfig) -> DynamicCache:
    """An empty cache; layers with a sliding window or a state are the library's own."""
    cache = DynamicCache(config=config)
    make: Any = RoomyLayer
    cache.layers = [make() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values (B, heads, S, D) with room behind them, so that a token is written without a copy of all others.

    Keys have the values' dtype, as attention casts them under autocast.
    """

    memory: list[Tensor] | None = None  # of which keys and values are views; None where they have no room

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the states of new positions; returns the keys and values of all."""
        used = self.get_seq_length()
        end = used + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(value_states, value_states)
        if self.memory is None or self.memory[0].shape[-2] < end:
            held: Any = zip((self.keys, self.values), (key_states, value_states), strict=True)
            room = int(end * GROWTH) - used
            self.memory = [torch.cat([own, own.new_empty(*x.shape[:2], room, x.shape[3])], -2) for own, x in held]
        for memory, states in zip(self.memory, (key_states, value_states), strict=True):
            memory[:, :, used:end] = states
        keys, values = (memory[:, :, :end] for memory in self.memory)
        self.keys, self.values = keys, values
        return keys, values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only."""
        super().batch_select_indices(indices)
        self.memory = None
