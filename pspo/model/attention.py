"""Whether completions may share one copy of their prompt in a model's attention."""

from typing import Any

import torch

from pspo.model.batch import make_batch
from pspo.model.logprob import predicting_states


@torch.inference_mode()
def can_share(model: Any) -> bool:
    """Whether the decoder takes any mask of what sees what, so that completions may share one copy of their prompt.

    Not where a layer has a window or a state, nor in flash attention. It is tried, without autocast: two completions
    that share one prompt, beside rows of their own, whose hidden states may differ by 1e-4 of their norm.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if not hasattr(config, "layer_types") else None
    if kinds != {"full_attention"} or window or config._attn_implementation not in ("eager", "sdpa"):
        return False
    prompt, completions = [1, 2, 3], [[4, 5, 0], [6, 7, 0]]
    try:
        apart, shared = (
            predicting_states(model.get_decoder(), make_batch(bundles, 0, model.device))
            for bundles in ([(prompt, [c]) for c in completions], [(prompt, completions)])
        )
    except (IndexError, RuntimeError, TypeError, ValueError):  # it knows no masks of four dimensions
        return False
    return bool((apart - shared).norm() <= 1e-4 * apart.norm())
