"""Where a batch's tokens stand: end to end for products, without padding; in blocks of like length for the attention.

Shape suffixes: R rows of S positions, Q queries of a row, M tokens end to end, D head width.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pspo.batch import Batch, sees

Counts = np.ndarray[Any, np.dtype[np.int64]]


class Blocks:
    """Heads of tokens as blocks (rows · key heads, heads of each · places, D), one for each run of consecutive rows.

    A place without a token holds the token ``empty``, or what comes after the last.
    """

    def __init__(
        self,
        counts_R: Counts,
        sizes: list[int],
        heads: int,
        keys: int,
        device: torch.device,
        empty: int | None = None,
    ) -> None:
        num_tokens, head, starts_R = int(counts_R.sum()), np.arange(heads), _starts(counts_R)
        empty = num_tokens if empty is None else empty
        to, back = [], np.empty((num_tokens, heads), dtype=np.int64)
        self.spans: list[tuple[slice, int]] = []
        row = end = 0
        for size in sizes:
            starts, counts = starts_R[row : row + size, None], counts_R[row : row + size, None]
            place = np.arange(counts.max())
            token = np.where(place < counts, starts + place, empty)
            to.append((token[:, None] * heads + head[:, None]).ravel())
            stands = end + (np.arange(size)[:, None, None] * heads + head) * len(place) + place[:, None]
            back[token[place < counts]] = stands[place < counts]
            self.spans.append((slice(end, end + len(to[-1])), size * keys))
            row, end = row + size, end + len(to[-1])
        self.places = end
        self.to, self.back = torch.from_numpy(np.concatenate(to)).to(device), torch.from_numpy(back).to(device)

    def __iter__(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """For each block, what takes its part of (places, D)."""
        return (partial(_part, span, batches) for span, batches in self.spans)

    def take(self, tokens: Tensor, width: int) -> Tensor:
        """(M, heads · D), or one row more, to (places, D)."""
        return tokens.view(-1, width).index_select(0, self.to)

    def give(self, laid: Tensor) -> Tensor:
        """(places, D) to (M, heads · D)."""
        return laid.index_select(0, self.back.flatten()).view(len(self.back), -1)


class Queries(NamedTuple):
    """Where queries stand, and for each block what is added to their scores, (rows, Q, S)."""

    blocks: Blocks
    masks: list[Tensor]


class Plan:
    """How the tokens of a batch stand in the blocks of its attention.

    Attributes:
        tokens: where in R·S they are.
        wanted: which of them the last layer is asked for: from the end of each prompt on.
        source: which of those predicts each completion token.
        keys: where their keys stand; their values stand alike.
        all_queries: where queries stand.
        wanted_queries: where those of the wanted tokens stand, by themselves.
    """

    def __init__(self, batch: Batch, keys: int, groups: int, dtype: torch.dtype) -> None:
        device, (_, length) = batch.input_ids_RS.device, batch.input_ids_RS.shape
        sizes, counts_R, first_R = batch.blocks or [], np.array(batch.length_R), np.array(batch.first_R)
        there = np.arange(length) < counts_R[:, None]
        self.tokens = torch.from_numpy(np.flatnonzero(there)).to(device)
        wanted = (np.arange(length) >= first_R[:, None])[there]
        self.wanted = torch.from_numpy(np.flatnonzero(wanted)).to(device)
        source_N = batch.source_BT[batch.mask_BT]
        shift_R = torch.from_numpy(_starts(counts_R - first_R) - first_R).to(device)
        self.source = shift_R[source_N // length] + source_N % length
        self.keys = Blocks(counts_R, sizes, keys, keys, device)
        self.all_queries, self.wanted_queries = (
            Queries(
                Blocks(counts_R - begin_R, sizes, keys * groups, keys, device),
                _masks(batch, begin_R, counts_R, sizes, dtype),
            )
            for begin_R in (np.zeros_like(first_R), first_R)
        )
        token, head = self.keys.to // keys, self.keys.to % keys
        self._to = torch.cat([token * 2 * keys + head, token * 2 * keys + keys + head])
        self._back = torch.cat([self.keys.back, self.keys.back + self.keys.places], dim=1).flatten()

    def take_pair(self, pair: Tensor, width: int) -> Tensor:
        """Keys and values (M + 1, 2 · key heads · D) to the keys' places, then the values', (2 · places, D)."""
        return pair.view(-1, width).index_select(0, self._to)

    def give_pair(self, laid: Tensor) -> Tensor:
        """And back, (M, 2 · key heads · D)."""
        return laid.index_select(0, self._back).view(len(self.tokens), -1)


def _masks(batch: Batch, begin_R: Counts, counts_R: Counts, sizes: list[int], dtype: torch.dtype) -> list[Tensor]:
    """For each block 0 where a query, from the ``begin_R``-th of its row on, sees a key, else the lowest number."""
    masks, row, device = [], 0, batch.owner_RS.device
    for size in sizes:
        rows = slice(row, row + size)
        places = int(counts_R[rows].max())
        asked = begin_R[rows, None] + np.arange((counts_R - begin_R)[rows].max())
        asked_RQ = torch.from_numpy(asked.clip(max=places - 1)).to(device)
        owner_RS, position_RS = batch.owner_RS[rows, :places], batch.position_RS[rows, :places]
        unseen = ~sees(owner_RS.gather(1, asked_RQ), position_RS.gather(1, asked_RQ), owner_RS, position_RS)
        masks.append(torch.zeros_like(unseen, dtype=dtype).masked_fill_(unseen, torch.finfo(dtype).min))
        row += size
    return masks


def _starts(counts: Counts) -> Counts:
    return np.cumsum(counts) - counts


def _part(span: slice, batches: int, laid: Tensor) -> Tensor:
    return laid[span].view(batches, -1, laid.shape[-1])
