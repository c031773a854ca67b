"""Attention by plain matrix products, faster on a CPU than the library's ways; and whether prompts may be shared.

Registered under the library's attention interface as ``grouped``. Shape suffixes: B rows, K key heads, G query heads of
each, Q query and S key positions, D head width.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from pspo.model.batch import make_batch
from pspo.model.logprob import autocast_to_bfloat16, predicting_states


def grouped(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """softmax(q kᵀ · scaling) v with the query heads of one key head in one product, so no key is copied.

    ``query`` is (B, K·G, Q, D), ``key`` and ``value`` (B, K, S, D); ``attention_mask``, broadcast to (B, 1, Q, S), is
    true where a position is seen, or is added to the scores. The softmax is at least in float32.
    """
    rows, heads, length, _width = query.shape
    keys, groups = key.shape[1], heads // key.shape[1]
    query_BKXD = (query * scaling).reshape(rows, keys, groups * length, -1)
    score_BKXS = query_BKXD @ key.transpose(-1, -2)
    if attention_mask is not None:
        score_BKGQS = score_BKXS.view(rows, keys, groups, length, -1)
        if attention_mask.dtype == torch.bool:
            score_BKGQS.masked_fill_(~attention_mask[:, :, None], torch.finfo(score_BKXS.dtype).min)
        else:
            score_BKGQS.add_(attention_mask[:, :, None])
    weight_BKXS = score_BKXS.softmax(-1, torch.promote_types(score_BKXS.dtype, torch.float32)).to(value.dtype)
    found = (weight_BKXS @ value).view(rows, heads, length, -1)
    return found.transpose(1, 2).contiguous(), None


def _mask(**asked: Any) -> Tensor | None:
    return sdpa_mask(**asked | {"allow_is_causal_skip": False})  # never left out for a kernel that knows it is causal


AttentionInterface.register("grouped", grouped)
AttentionMaskInterface.register("grouped", _mask)


@torch.inference_mode()
def can_share(model: Any, autocast: bool) -> bool:
    """Whether the decoder takes any mask of what sees what, so that completions may share one copy of their prompt.

    Not where a layer has a window or a state, nor in flash attention. It is tried: two completions behind one prompt,
    beside rows of their own.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if not hasattr(config, "layer_types") else None
    if kinds != {"full_attention"} or window or config._attn_implementation not in ("grouped", "eager", "sdpa"):
        return False
    prompts, completions = [[1, 2, 3]] * 2, [[4, 5, 0], [6, 7, 0]]
    tolerance = 1e-2 if autocast else 1e-4
    try:
        with autocast_to_bfloat16(model.device, autocast):
            apart, shared = (
                predicting_states(model.get_decoder(), make_batch(prompts, completions, 0, model.device, sizes))
                for sizes in (None, [2])
            )
    except (IndexError, RuntimeError, TypeError, ValueError):  # it knows no masks of four dimensions
        return False
    return torch.allclose(apart, shared, rtol=tolerance, atol=tolerance)
