"""Prompts and completions as tensors: the one place for padding, masks and shared prompts.

Shape suffixes: R rows of S positions in the decoder, B completions of T positions, N completion tokens laid end to end.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from pspo.model.attention import BLOCK_POSITIONS, blocks, dense, what_sees_what

Bundle = tuple[list[int], Sequence[list[int]]]
"""A prompt and the completions that share one copy of it, as token ids."""


@dataclass(frozen=True)
class Batch:
    """Texts, each a prompt and the completions that share it, in padded rows or one behind the other in one row."""

    layout: Literal["apart", "shared", "packed"]  # one completion a row; several behind a prompt; all texts in a row
    input_ids_RS: Tensor  # a prompt and, after it, the completions that share it, each without its last token
    position_RS: Tensor  # positions in the text: every completion's follow its prompt's
    text_RS: Tensor  # 0, 1, 2, ... for the texts in their order, −1 for padding
    owner_RS: Tensor  # 0 for a prompt, 1, 2, ... for the completions behind it, −1 for padding
    source_BT: Tensor  # index in R·S of the hidden state that predicts completion token t
    token_ids_BT: Tensor  # the completions, then padding
    mask_BT: Tensor  # true on completion tokens, the stop token included

    @property
    def attention(self) -> Tensor | BlockMask:
        """(R, S), 1 where there is a token; of shared prompts (R, 1, S, S), of packed texts the same in blocks."""
        if self.layout == "apart":
            return (self.owner_RS >= 0).long()
        mask = blocks if self.layout == "packed" else dense
        return mask(what_sees_what(self.text_RS, self.owner_RS, self.position_RS), self.input_ids_RS)


def make_batch(bundles: Sequence[Bundle], pad_id: int, device: torch.device, packed: bool = False) -> Batch:
    """Bundles as one batch; its completions stand in their order.

    Each completion sees its prompt and itself, so the numbers are those of rows of their own (as in arXiv 2506.05433).
    A bundle is a row, padded to the longest; ``packed``, all are one row, padded to whole blocks of attention.
    """
    completions = [completion for _, behind in bundles for completion in behind]
    lengths = [len(prompt) + sum(len(c) - 1 for c in behind) for prompt, behind in bundles]
    shape_RS = (len(bundles), max(lengths))
    starts = [row * shape_RS[1] for row in range(len(bundles))]
    if packed:
        shape_RS = (1, -(-sum(lengths) // BLOCK_POSITIONS) * BLOCK_POSITIONS)
        starts = list(itertools.accumulate(lengths, initial=0))
    shape_BT = (len(completions), max(map(len, completions)))
    input_ids, position = np.full(shape_RS, pad_id).reshape(-1), np.zeros(shape_RS, dtype=np.int64).reshape(-1)
    text, owner = np.full(shape_RS, -1).reshape(-1), np.full(shape_RS, -1).reshape(-1)
    source_BT, token_ids_BT = np.zeros(shape_BT, dtype=np.int64), np.full(shape_BT, pad_id)
    b = 0
    for number, (start, length, (prompt, behind)) in enumerate(zip(starts, lengths, bundles, strict=False)):
        end = start + len(prompt)
        text[start : start + length] = number
        input_ids[start:end], position[start:end], owner[start:end] = prompt, np.arange(len(prompt)), 0
        for place, completion in enumerate(behind, start=1):
            inner = len(completion) - 1
            own = slice(end, end + inner)
            input_ids[own], owner[own], position[own] = completion[:-1], place, len(prompt) + np.arange(inner)
            source_BT[b, : inner + 1] = [start + len(prompt) - 1, *range(end, end + inner)]
            token_ids_BT[b, : inner + 1] = completion
            end += inner
            b += 1
    mask_BT = np.arange(shape_BT[1]) < np.array([[len(c)] for c in completions])
    by_position = (array.reshape(shape_RS) for array in (input_ids, position, text, owner))
    tensors = [torch.from_numpy(array).to(device) for array in (*by_position, source_BT, token_ids_BT, mask_BT)]
    shared = any(len(behind) > 1 for _, behind in bundles)
    return Batch("packed" if packed else "shared" if shared else "apart", *tensors)


def scatter(mask_BT: Tensor, values_N: Tensor) -> Tensor:
    """Values of the completion tokens laid end to end -> (B, T), 0 where masked."""
    return values_N.new_zeros(mask_BT.shape).masked_scatter(mask_BT, values_N)
