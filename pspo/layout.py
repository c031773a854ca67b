"""Where a batch's tokens stand: end to end for products, without padding; in blocks of like length for the attention.

Shape suffixes: R rows of S positions, Q queries of a reader, which reads S, M tokens end to end, D head width.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pspo.model.batch import Batch

Array = np.ndarray[Any, np.dtype[np.int64]]

BLOCK = 4096
"""What one more block of the attention costs, in scores."""

ALIKE = 32
"""Readers of as many queries are told apart by their keys in steps of so many."""


class Blocks:
    """Heads of tokens as blocks (rows · key heads, heads of each · places, D), one for each matrix of tokens.

    A place without a token holds number ``num_tokens``, a row of zeros behind the others; or, without ``zeros``, any.
    """

    def __init__(
        self, tokens: list[Array], num_tokens: int, heads: int, keys: int, device: torch.device, *, zeros: bool = True
    ) -> None:
        places = [(token_RS[:, None] * heads + np.arange(heads)[:, None]).ravel() for token_RS in tokens]
        ends = np.cumsum([len(p) for p in places])
        self.spans = [
            (slice(end - len(p), end), len(token_RS) * keys)
            for token_RS, p, end in zip(tokens, places, ends, strict=True)
        ]
        to, back = np.concatenate(places), np.empty((num_tokens + 1) * heads, dtype=np.int64)
        back[to] = np.arange(len(to))
        self.heads = heads
        self.to = torch.from_numpy(to if zeros else to.clip(max=num_tokens * heads - 1)).to(device)
        self.back = torch.from_numpy(back[: num_tokens * heads]).to(device)

    def __iter__(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """For each block, what takes its part of (places, D)."""
        return (partial(_part, span, batches) for span, batches in self.spans)

    def take(self, tokens: Tensor, width: int) -> Tensor:
        """(M, heads · D), or one row more, to (places, D)."""
        return tokens.view(-1, width).index_select(0, self.to)

    def give(self, laid: Tensor) -> Tensor:
        """(places, D) to (M, heads · D), where each token has one place."""
        return laid.index_select(0, self.back).view(-1, self.heads * laid.shape[-1])


class Readers(NamedTuple):
    """Runs of tokens: each reads ``before`` tokens from ``first`` on, then its own, ``length`` from ``start`` on."""

    first: Array
    before: Array
    start: Array
    length: Array


class Queries(NamedTuple):
    """Where queries stand, and for each block what is added to their scores, (readers, Q, S)."""

    blocks: Blocks
    masks: list[Tensor]


class Plan:
    """How the tokens of a batch stand in its attention.

    A prompt is a reader, and so is every completion, which reads its prompt first and then itself.

    Attributes:
        tokens: where in R·S they are.
        wanted: which of them the last layer is asked for: the last of each prompt, and all of the completions.
        source: which of those predicts each completion token.
        keys: where the keys stand that are read, a prompt's once for each of its readers; the values stand alike.
        all_queries: where queries stand.
        wanted_queries: where those of the wanted tokens stand, by themselves.
    """

    def __init__(self, batch: Batch, keys: int, groups: int, dtype: torch.dtype) -> None:
        device, owner_RS = batch.input_ids_RS.device, batch.owner_RS.cpu().numpy()
        there_RS = owner_RS >= 0
        owner_M, row_M = owner_RS[there_RS], there_RS.nonzero()[0]
        start = np.flatnonzero(np.diff(owner_M, prepend=-1) | np.diff(row_M, prepend=-1))
        count, is_prompt = np.diff(start, append=len(owner_M)), owner_M[start] == 0
        row, skipped = np.cumsum(is_prompt) - 1, np.where(is_prompt, count - 1, 0)
        first, before = start[is_prompt][row], np.where(is_prompt, 0, count[is_prompt][row])
        readers = Readers(first, before, start, count)
        wanted = Readers(first, before + skipped, start + skipped, count - skipped)
        kinds = np.flatnonzero(is_prompt), np.flatnonzero(~is_prompt)
        blocks = [kind[chosen] for kind in kinds for chosen in _cut(count[kind], (before + count)[kind])]
        wanted_M = owner_M > 0
        wanted_M[wanted.start] = True
        number_RS = np.zeros(owner_RS.shape, dtype=np.int64)
        number_RS[there_RS] = number_M = np.cumsum(wanted_M) - 1
        self.tokens, self.wanted, number = (
            torch.from_numpy(found).to(device)
            for found in (np.flatnonzero(there_RS), np.flatnonzero(wanted_M), number_RS.ravel())
        )
        self.source = number[batch.source_BT[batch.mask_BT]]
        kind = keys * groups, keys, dtype, device
        self.all_queries = _queries(readers, blocks, np.arange(len(owner_M)), *kind)
        self.wanted_queries = _queries(wanted, blocks, number_M, *kind)
        self.keys = Blocks(_read(readers, blocks, len(owner_M)), len(owner_M), keys, keys, device)
        token, head = self.keys.to // keys, self.keys.to % keys
        self._to = torch.cat([token * 2 * keys + head, token * 2 * keys + keys + head])
        to = self._to.cpu().numpy()
        places = np.argsort(to, kind="stable")
        offsets = np.searchsorted(to[places], np.arange(len(owner_M) * 2 * keys + 1))
        self._places = torch.from_numpy(places[: offsets[-1]]).to(device)
        self._offsets = torch.from_numpy(offsets[:-1]).to(device)

    def take_pair(self, pair: Tensor, width: int) -> Tensor:
        """Keys and values (M + 1, 2 · key heads · D) to the keys' places, then the values', (2 · places, D)."""
        return pair.view(-1, width).index_select(0, self._to)

    def give_pair(self, laid: Tensor) -> Tensor:
        """And back, (M, 2 · key heads · D): for each token the sum over its places."""
        return F.embedding_bag(self._places, laid, self._offsets, mode="sum").view(len(self.tokens), -1)


def _queries(
    readers: Readers,
    blocks: list[Array],
    number_M: Array,
    heads: int,
    keys: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Queries:
    """Queries of readers whose tokens have these numbers."""
    tokens, masks, num_asked = [], [], int(readers.length.sum())
    for chosen in blocks:
        _, before, start, count = (of[chosen, None] for of in readers)
        q, s = np.arange(count.max()), np.arange((before + count).max())
        tokens.append(np.where(q < count, number_M[start] + q, num_asked))
        unseen = torch.from_numpy(s > (before + q)[..., None]).to(device)
        masks.append(torch.zeros_like(unseen, dtype=dtype).masked_fill_(unseen, torch.finfo(dtype).min))
    return Queries(Blocks(tokens, num_asked, heads, keys, device), masks)


def _read(readers: Readers, blocks: list[Array], num_tokens: int) -> list[Array]:
    """For each block the tokens that its readers read, (readers, S), and where there are no more ``num_tokens``."""
    tokens = []
    for chosen in blocks:
        first, before, start, count = (of[chosen, None] for of in readers)
        s = np.arange((before + count).max())
        own = np.where(s < before + count, start + s - before, num_tokens)
        tokens.append(np.where(s < before, first + s, own))
    return tokens


def _cut(count: Array, total: Array) -> list[Array]:
    """Readers of so many queries and keys as blocks of like size: those that cost least, scores of padding included.

    Blocks are runs of readers sorted by ``count`` and ``total``, cut nowhere between those that are alike but for
    fewer than ``ALIKE`` keys.
    """
    order = np.lexsort((total, count))
    begins = np.flatnonzero(np.diff(count[order], prepend=-1) | np.diff(total[order] // ALIKE, prepend=-1))
    queries, keys, ends = count[order][begins], np.maximum.reduceat(total[order], begins), [*begins, len(order)]
    cost, cuts = np.zeros(len(ends)), [0]
    for end in range(1, len(ends)):
        widest = np.maximum.accumulate(keys[:end][::-1])[::-1]
        costs = cost[:end] + (ends[end] - begins[:end]) * queries[end - 1] * widest
        cuts.append(int(costs.argmin()))
        cost[end] = costs[cuts[end]] + BLOCK
    blocks: list[Array] = []
    end = len(begins)
    while end:
        blocks.insert(0, order[ends[cuts[end]] : ends[end]])
        end = cuts[end]
    return blocks


def _part(span: slice, batches: int, laid: Tensor) -> Tensor:
    return laid[span].view(batches, -1, laid.shape[-1])
