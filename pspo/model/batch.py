"""Prompts and completions as tensors: the one place for padding, masks and shared prompts.

Shape suffixes: R rows of S positions in the decoder, B completions of T positions, N completion tokens laid end to end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Bundle = tuple[list[int], Sequence[list[int]]]
"""A prompt and the completions that share one copy of it, as token ids."""


@dataclass(frozen=True)
class Batch:
    """Prompts with their completions, right-padded."""

    shared: bool  # whether two completions share one copy of their prompt
    input_ids_RS: Tensor  # a prompt and, after it, the completions that share it, each without its last token
    position_RS: Tensor  # positions in the text: every completion's follow its prompt's
    owner_RS: Tensor  # 0 for a prompt, 1, 2, ... for the completions behind it, −1 for padding
    source_BT: Tensor  # index in R·S of the hidden state that predicts completion token t
    token_ids_BT: Tensor  # the completions, then padding
    mask_BT: Tensor  # true on completion tokens, the stop token included

    @property
    def attention(self) -> Tensor:
        """(R, S), 1 where there is a token; with shared prompts (R, 1, S, S), true where position S sees another.

        A position sees what comes before it of its prompt and of its own completion. Padding sees itself, as a softmax
        over nothing is not a number.
        """
        if not self.shared:
            return (self.owner_RS >= 0).long()
        owner, position = self.owner_RS, self.position_RS
        same = (owner[:, None] == 0) | (owner[:, None] == owner[:, :, None])
        return (same & (position[:, None] <= position[:, :, None]))[:, None]


def make_batch(bundles: Sequence[Bundle], pad_id: int, device: torch.device) -> Batch:
    """Pad bundles to one batch, one row for each; its completions stand in their order.

    Each completion sees its prompt and itself, so the numbers are those of rows of their own (as in arXiv 2506.05433).
    """
    completions = [completion for _, behind in bundles for completion in behind]
    shape_RS = (len(bundles), max(len(prompt) + sum(len(c) - 1 for c in behind) for prompt, behind in bundles))
    shape_BT = (len(completions), max(map(len, completions)))
    input_ids_RS, position_RS = np.full(shape_RS, pad_id), np.zeros(shape_RS, dtype=np.int64)
    owner_RS = np.full(shape_RS, -1)
    source_BT, token_ids_BT = np.zeros(shape_BT, dtype=np.int64), np.full(shape_BT, pad_id)
    b = 0
    for row, (prompt, behind) in enumerate(bundles):
        start, end = row * shape_RS[1], len(prompt)
        input_ids_RS[row, :end], position_RS[row, :end], owner_RS[row, :end] = prompt, np.arange(end), 0
        for owner, completion in enumerate(behind, start=1):
            inner = len(completion) - 1
            place = slice(end, end + inner)
            input_ids_RS[row, place], owner_RS[row, place] = completion[:-1], owner
            position_RS[row, place] = len(prompt) + np.arange(inner)
            source_BT[b, : inner + 1] = [start + len(prompt) - 1, *range(start + end, start + end + inner)]
            token_ids_BT[b, : inner + 1] = completion
            end += inner
            b += 1
    mask_BT = np.arange(shape_BT[1]) < np.array([[len(c)] for c in completions])
    arrays = (input_ids_RS, position_RS, owner_RS, source_BT, token_ids_BT, mask_BT)
    tensors = [torch.from_numpy(array).to(device) for array in arrays]
    return Batch(any(len(behind) > 1 for _, behind in bundles), *tensors)


def scatter(mask_BT: Tensor, values_N: Tensor) -> Tensor:
    """Values of the completion tokens laid end to end -> (B, T), 0 where masked."""
    return values_N.new_zeros(mask_BT.shape).masked_scatter(mask_BT, values_N)
