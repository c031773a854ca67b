"""One token a row, from numbers that are given: how the sampler draws.

Shape suffixes: B rows, V vocabulary, N blocks of K tokens, R ranked tokens.
"""

import torch
from torch import Tensor

BLOCK = 128
"""Tokens whose probabilities are summed at a time before one of them is looked for."""

FEW = 1024
"""Tokens up to which all of their probabilities are summed."""

RANKED = 1024
"""The nucleus is looked for among so many of the most probable tokens before it is among all."""


def draw(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """One token a row by inverting the distribution function at ``uniform_B``, and its untruncated log-probability.

    The nucleus is the smallest set of most probable tokens whose probability reaches ``top_p`` (Holtzman et al. 2020,
    arXiv 1904.09751). Temperature 0 takes the most probable token; its log-probability is that of temperature 1.
    """
    token_B, logprob_B, wide_B = draw_ranked(logits_BV, uniform_B, temperature, top_p)
    if wide_B is not None and wide_B.any():
        row_B, everything = wide_B.nonzero().squeeze(-1), logits_BV.shape[-1]
        token_B[row_B], logprob_B[row_B], _ = draw_ranked(
            logits_BV[row_B], uniform_B[row_B], temperature, top_p, everything
        )
    return token_B, logprob_B


def draw_ranked(
    logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float, ranked: int = RANKED
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As ``draw``, of nuclei among the ``ranked`` most probable tokens, without a wait for a GPU.

    A sort of a large vocabulary costs more than all else. The third is which rows have a wider nucleus, and their
    tokens mean nothing; None where no row can have one.
    """
    logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    if temperature not in (0, 1):
        logits_BV = logits_BV / temperature
    probability_BV, wide_B = logits_BV.softmax(-1), None
    norm_B = logits_BV.amax(-1) - probability_BV.amax(-1).log()
    if temperature == 0:
        token_B = logits_BV.argmax(-1)
    else:
        if top_p < 1:
            outside_BV, wide_B = _outside(probability_BV, top_p, ranked)
            probability_BV.masked_fill_(outside_BV, 0)
        token_B = _invert(probability_BV, uniform_B)
    return token_B, logits_BV.gather(-1, token_B[:, None]).squeeze(-1) - norm_B, wide_B


def _invert(weight_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The first token up to which the weights sum to more than ``uniform_B`` of their total.

    Sums are in float64, whose error is far below a token's share of a large vocabulary: over all tokens where they are
    few, else first over blocks of tokens, then inside the one that holds the token. A token without weight is never
    taken, unless weights are not numbers.
    """
    if weight_BV.shape[-1] <= FEW:
        cumulative_BV = weight_BV.cumsum(-1, dtype=torch.float64)
        return _first_above(cumulative_BV, uniform_B[:, None] * cumulative_BV[:, -1:]).squeeze(-1)
    block_BNK = torch.nn.functional.pad(weight_BV, (0, -weight_BV.shape[-1] % BLOCK)).view(len(weight_BV), -1, BLOCK)
    cumulative_BN = block_BNK.sum(-1, dtype=torch.float64).cumsum(-1)
    target_B1 = uniform_B[:, None] * cumulative_BN[:, -1:]
    chosen_B1 = _first_above(cumulative_BN, target_B1)
    inside_BK = block_BNK.gather(1, chosen_B1[..., None].expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(-1)
    before_B1 = cumulative_BN.gather(-1, (chosen_B1 - 1).clamp(min=0)).masked_fill(chosen_B1 == 0, 0)
    found_B1 = chosen_B1 * BLOCK + _first_above(inside_BK, (target_B1 - before_B1).clamp(min=0))
    return found_B1.squeeze(-1).clamp(max=weight_BV.shape[-1] - 1)


def _first_above(cumulative_BK: Tensor, target_B1: Tensor) -> Tensor:
    """Where a sum first exceeds the target, and at the latest where it reaches its end."""
    end_B1 = cumulative_BK[:, -1:]
    before_end_B1 = torch.nextafter(end_B1, torch.zeros_like(end_B1))
    found_B1 = torch.searchsorted(cumulative_BK, torch.minimum(target_B1, before_end_B1), right=True)
    return found_B1.clamp(max=cumulative_BK.shape[-1] - 1)  # sums that are not numbers have no such place


def _outside(probability_BV: Tensor, top_p: float, ranked: int) -> tuple[Tensor, Tensor | None]:
    """Which tokens are not in the nucleus, and which rows have more in it than were ranked.

    Of equally probable tokens at its edge the nucleus takes the first.
    """
    num_tokens = probability_BV.shape[-1]
    ranked_BR = probability_BV.topk(min(ranked, num_tokens), dim=-1).values.double()
    until_BR = ranked_BR.cumsum(-1)
    size_B1 = (until_BR - ranked_BR < top_p).sum(-1, keepdim=True).clamp(min=1)
    edge_B1 = ranked_BR.gather(-1, size_B1 - 1)
    above_BV, at_BV = probability_BV > edge_B1, probability_BV == edge_B1
    room_B1 = size_B1 - above_BV.sum(-1, keepdim=True)
    at_BV &= at_BV.cumsum(-1, dtype=torch.int32) <= room_B1
    return ~(above_BV | at_BV), until_BR[:, -1] < top_p if num_tokens > ranked else None
