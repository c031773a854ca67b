"""One token a row from given uniform numbers: how a sampler draws.

Shape suffixes: B rows, V vocabulary, N blocks of K tokens, R ranked tokens.
"""

import torch
from torch import Tensor

BLOCK_TOKENS = 128
"""Tokens whose probabilities are summed at a time before one of them is looked for."""

ONE_BLOCK_TOKENS = 1024
"""Vocabulary up to which the probabilities of all tokens are summed at once."""

RANKED_TOKENS = 1024
"""The nucleus is looked for among this many of the most probable tokens before it is looked for among all."""


def draw(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """One token a row by inverting the distribution function at ``uniform_B``, and its untruncated log-probability.

    The nucleus is the smallest set of most probable tokens whose probability reaches ``top_p`` (Holtzman et al. 2020,
    arXiv 1904.09751). Temperature 0 takes the most probable token; its log-probability is that of temperature 1.
    """
    logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    if temperature not in (0, 1):
        logits_BV = logits_BV / temperature
    probability_BV = logits_BV.softmax(-1)
    norm_B = logits_BV.amax(-1) - probability_BV.amax(-1).log()
    if temperature == 0:
        token_B = logits_BV.argmax(-1)
    else:
        token_B = _invert(_nucleus(probability_BV, top_p) if top_p < 1 else probability_BV, uniform_B)
    return token_B, logits_BV.gather(-1, token_B[:, None]).squeeze(-1) - norm_B


def _invert(weight_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The first token up to which the weights sum to more than ``uniform_B`` of their total.

    Sums are in float64, whose error is far below a token's share of a large vocabulary: over all tokens where the
    vocabulary is small, else first over blocks of tokens, then inside the block that holds the token. A token without
    weight is never taken, unless weights are not numbers.
    """
    if weight_BV.shape[-1] <= ONE_BLOCK_TOKENS:
        cumulative_BV = weight_BV.cumsum(-1, dtype=torch.float64)
        return _first_above(cumulative_BV, uniform_B[:, None] * cumulative_BV[:, -1:]).squeeze(-1)
    padded_BV = torch.nn.functional.pad(weight_BV, (0, -weight_BV.shape[-1] % BLOCK_TOKENS))
    block_BNK = padded_BV.view(len(weight_BV), -1, BLOCK_TOKENS)
    cumulative_BN = block_BNK.sum(-1, dtype=torch.float64).cumsum(-1)
    target_B1 = uniform_B[:, None] * cumulative_BN[:, -1:]
    chosen_B1 = _first_above(cumulative_BN, target_B1)
    inside_BK = block_BNK.gather(1, chosen_B1[..., None].expand(-1, -1, BLOCK_TOKENS)).squeeze(1).double().cumsum(-1)
    before_B1 = cumulative_BN.gather(-1, (chosen_B1 - 1).clamp(min=0)).masked_fill(chosen_B1 == 0, 0)
    found_B1 = chosen_B1 * BLOCK_TOKENS + _first_above(inside_BK, (target_B1 - before_B1).clamp(min=0))
    return found_B1.squeeze(-1).clamp(max=weight_BV.shape[-1] - 1)


def _first_above(cumulative_BK: Tensor, target_B1: Tensor) -> Tensor:
    """Where a sum first exceeds the target, and at the latest where it reaches its end."""
    end_B1 = cumulative_BK[:, -1:]
    before_end_B1 = torch.nextafter(end_B1, torch.zeros_like(end_B1))
    found_B1 = torch.searchsorted(cumulative_BK, torch.minimum(target_B1, before_end_B1), right=True)
    return found_B1.clamp(max=cumulative_BK.shape[-1] - 1)  # sums that are not numbers have no such place


def _nucleus(probability_BV: Tensor, top_p: float) -> Tensor:
    """The probabilities, 0 outside of the nucleus; of equally probable tokens at its edge it takes the first.

    Among the most probable tokens if they hold ``top_p`` in every row, as a sort of a large vocabulary costs more than
    all else, else among all.
    """
    num_tokens = probability_BV.shape[-1]
    ranked_BR = probability_BV.topk(min(RANKED_TOKENS, num_tokens), dim=-1).values.double()
    if bool((ranked_BR.sum(-1) < top_p).any()):
        ranked_BR = probability_BV.sort(dim=-1, descending=True).values.double()
    size_B1 = (ranked_BR.cumsum(-1) - ranked_BR < top_p).sum(-1, keepdim=True).clamp(min=1)
    edge_B1 = ranked_BR.gather(-1, size_B1 - 1)
    above_BV, at_BV = probability_BV > edge_B1, probability_BV == edge_B1
    room_B1 = size_B1 - above_BV.sum(-1, keepdim=True)
    at_BV &= at_BV.cumsum(-1, dtype=torch.int32) <= room_B1
    return probability_BV.masked_fill(~(above_BV | at_BV), 0)
