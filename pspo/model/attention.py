"""Attention over texts that share a prompt: one rule of what sees what, dense for SDPA or in blocks for FlexAttention.

Dense attention has a mask and scores of R·S² positions, so texts stand in rows of similar length, padded. FlexAttention
(Dong et al. 2024, arXiv 2412.05496) leaves out the blocks in which nothing sees anything, so that all texts stand in
one row behind each other, without padding and without a mask of S². Its backward pass needs a GPU.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BY_MASK = "pspo_sdpa_or_flex"
"""The name, as transformers' ``attn_implementation``, of SDPA that is FlexAttention where the mask is of blocks."""

BLOCK_POSITIONS = 128
"""Positions of a block of FlexAttention's mask, its default."""

Rule = Callable[[Any, Any, Any, Any], Any]
"""Whether, in row b and head h, position q sees position k: a ``mask_mod`` of FlexAttention."""


def what_sees_what(text_RS: Tensor, owner_RS: Tensor, position_RS: Tensor) -> Rule:
    """A position sees what comes before it of its text's prompt (owner 0) and of its own completion, and itself.

    Padding, owner −1, sees padding, as a softmax over nothing is not a number; nothing else sees padding.
    """

    def sees(b: Any, h: Any, q: Any, k: Any) -> Any:
        same = (owner_RS[b, k] == owner_RS[b, q]) | (owner_RS[b, k] == 0)
        return same & (text_RS[b, k] == text_RS[b, q]) & (position_RS[b, k] <= position_RS[b, q])

    return sees


def dense(rule: Rule, like_RS: Tensor) -> Tensor:
    """The rule as a mask (R, 1, S, S)."""
    row, index = (torch.arange(size, device=like_RS.device) for size in like_RS.shape)
    mask: Tensor = rule(row[:, None, None], None, index[:, None], index)
    return mask[:, None]


def blocks(rule: Rule, like_RS: Tensor) -> BlockMask:
    """The rule as FlexAttention's mask; made by a compiled function on a GPU, where no mask of S² ever exists."""
    make = torch.compile(create_block_mask) if like_RS.is_cuda else create_block_mask
    rows, positions = like_RS.shape
    mask: BlockMask = make(rule, rows, None, positions, positions, like_RS.device, BLOCK_POSITIONS)
    return mask


def _by_mask(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """SDPA or, where the mask is of blocks, FlexAttention: in the dtype of the values, as autocast has SDPA."""
    if isinstance(attention_mask, BlockMask):
        query, key = query.to(value.dtype), key.to(value.dtype)
        return flex_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(BY_MASK, _by_mask)
AttentionMaskInterface.register(BY_MASK, sdpa_mask)
