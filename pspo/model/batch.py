"""Prompts and completions as tensors: the one place for padding, masks and shared prompts.

Shape suffixes: R rows of S positions that the decoder is run on, B completions, T completion positions, N completion
tokens laid end to end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Prompts with their completions, right-padded.

    Attributes:
        input_ids_RS: a prompt and, after it, one completion or several that share it, each without its last token.
        position_RS: places in the text: those of every completion follow its prompt's.
        owner_RS: 0 for a prompt, 1, 2, ... for the completions behind it, −1 for padding.
        source_BT: where in R·S the hidden state stands that predicts completion token t.
        token_ids_BT: the completions, then padding.
        mask_BT: true on completion tokens, the stop token included.
        shared: whether any completions stand behind one copy of their prompt.
        length_R: how many tokens each row has.
        end_to_end: whether the tokens are run so (``fused``), without padding, and not R·S as it is.
    """

    input_ids_RS: Tensor
    position_RS: Tensor
    owner_RS: Tensor
    source_BT: Tensor
    token_ids_BT: Tensor
    mask_BT: Tensor
    shared: bool
    length_R: list[int]
    end_to_end: bool = False

    @property
    def num_tokens(self) -> int:
        """Positions that are not padding."""
        return sum(self.length_R)

    @property
    def num_padded(self) -> int:
        """Positions that are run."""
        return self.num_tokens if self.end_to_end else self.input_ids_RS.numel()

    @property
    def attention(self) -> Tensor:
        """(R, S), true where there is a token; or, with shared prompts, (R, 1, S, S), true where one is seen."""
        if not self.shared:
            return self.owner_RS >= 0
        return sees(self.owner_RS, self.position_RS, self.owner_RS, self.position_RS)[:, None]


def sees(owner_RQ: Tensor, position_RQ: Tensor, owner_RS: Tensor, position_RS: Tensor) -> Tensor:
    """Which of the places S a place of Q sees, (R, Q, S): those before it of its prompt and of its own completion.

    Padding sees itself, as a softmax over nothing is not a number.
    """
    theirs = (owner_RS[:, None] == 0) | (owner_RS[:, None] == owner_RQ[:, :, None])
    return theirs & (position_RS[:, None] <= position_RQ[:, :, None])


def make_batch(
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    pad_id: int,
    device: torch.device,
    sizes: Sequence[int] | None = None,
    end_to_end: bool = False,
) -> Batch:
    """Pad prompts and completions, as lists of token ids, to one batch.

    ``sizes`` says how many consecutive completions stand behind one copy of the prompt that they have in common; each
    sees its prompt and itself, so the numbers are those of rows of their own (as in arXiv 2506.05433). None gives each
    a row of its own. ``end_to_end`` as in ``Batch``.
    """
    sizes_R = [1] * len(prompts) if sizes is None else list(sizes)
    first_R = np.cumsum([0, *sizes_R])[:-1].tolist()
    length_R = [
        len(prompts[f]) + sum(len(c) - 1 for c in completions[f : f + n]) for f, n in zip(first_R, sizes_R, strict=True)
    ]
    shape_RS, shape_BT = (len(sizes_R), max(length_R)), (len(completions), max(map(len, completions)))
    input_ids_RS, position_RS = np.full(shape_RS, pad_id), np.zeros(shape_RS, dtype=np.int64)
    owner_RS = np.full(shape_RS, -1)  # 0 for the prompt; 1, 2, ... for its completions
    source_BT, token_ids_BT = np.zeros(shape_BT, dtype=np.int64), np.full(shape_BT, pad_id)
    for row, (first, size) in enumerate(zip(first_R, sizes_R, strict=True)):
        prompt, start = prompts[first], row * shape_RS[1]
        end = len(prompt)
        input_ids_RS[row, :end], position_RS[row, :end], owner_RS[row, :end] = prompt, np.arange(end), 0
        for order, b in enumerate(range(first, first + size), start=1):
            completion = completions[b]
            inner = len(completion) - 1
            place = slice(end, end + inner)
            input_ids_RS[row, place], owner_RS[row, place] = completion[:-1], order
            position_RS[row, place] = len(prompt) + np.arange(inner)
            source_BT[b, : inner + 1] = [start + len(prompt) - 1, *range(start + end, start + end + inner)]
            token_ids_BT[b, : inner + 1] = completion
            end += inner
    mask_BT = torch.arange(shape_BT[1]) < torch.tensor([[len(c)] for c in completions])
    return Batch(
        torch.from_numpy(input_ids_RS).to(device),
        torch.from_numpy(position_RS).to(device),
        torch.from_numpy(owner_RS).to(device),
        torch.from_numpy(source_BT).to(device),
        torch.from_numpy(token_ids_BT).to(device),
        mask_BT.to(device),
        sizes is not None,
        length_R,
        end_to_end,
    )


def pad_to(rows: list[list[float]], like_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of numbers, padded with zeros to the shape and device of ``like_BT``."""
    mask_BT = torch.arange(like_BT.shape[1]) < torch.tensor([[len(row)] for row in rows])
    return scatter(mask_BT, torch.tensor([value for row in rows for value in row], dtype=dtype)).to(like_BT.device)


def scatter(mask_BT: Tensor, values_N: Tensor) -> Tensor:
    """Values of the completion tokens laid end to end -> (B, T), 0 where masked."""
    return values_N.new_zeros(mask_BT.shape).masked_scatter(mask_BT, values_N)
