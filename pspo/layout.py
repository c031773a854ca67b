"""Where a batch's tokens stand: end to end for products, without padding; in blocks of like length for the attention.

Shape suffixes: R rows of S positions, Q queries of a reader, M tokens end to end, D head width.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pspo.batch import Batch

Array = np.ndarray[Any, np.dtype[np.int64]]

BLOCK = 4096
"""What one more block of the attention costs, in scores."""


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
        self.num_places, self.heads = len(to), heads
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


class Readers:
    """Runs of tokens, each of which looks at what is before it, at those of its run before it, and at itself.

    Attributes:
        queries: where their queries stand.
        keys: where the keys stand that they look at; the values stand alike.
        masks: for each block what is added to its scores, (readers, Q, S): 0, or the lowest number.
    """

    def __init__(self, first: Array, before: Array, start: Array, count: Array, asked_M: Array, **kind: Any) -> None:
        """Reader i looks at ``before[i]`` tokens from ``first[i]`` on, then at its own: ``count[i]`` from ``start[i]``.

        ``asked_M`` is where each token stands among those that ask.
        """
        keys, groups, dtype, device = kind["keys"], kind["groups"], kind["dtype"], kind["device"]
        queries, looked_at, self.masks = [], [], []
        num_tokens, num_asked = len(asked_M), int(count.sum())
        for chosen in _cut(count, before + count):
            b, c, q = before[chosen, None], count[chosen, None], np.arange(count[chosen].max())
            s = np.arange((b + c).max())
            own = np.where(s < b + c, start[chosen, None] + s - b, num_tokens)
            queries.append(np.where(q < c, asked_M[start[chosen]][:, None] + q, num_asked))
            looked_at.append(np.where(s < b, first[chosen, None] + s, own))
            unseen = torch.from_numpy(s > (b + q)[..., None]).to(device)
            self.masks.append(torch.zeros_like(unseen, dtype=dtype).masked_fill_(unseen, torch.finfo(dtype).min))
        self.queries = Blocks(queries, num_asked, keys * groups, keys, device)
        self.keys = Blocks(looked_at, num_tokens, keys, keys, device)
        token, head = self.keys.to // keys, self.keys.to % keys
        self._to = torch.cat([token * 2 * keys + head, token * 2 * keys + keys + head])
        to = self._to.cpu().numpy()
        places = np.argsort(to, kind="stable")
        offsets = np.searchsorted(to[places], np.arange(num_tokens * 2 * keys + 1))
        self._places = torch.from_numpy(places[: offsets[-1]]).to(device)
        self._offsets = torch.from_numpy(offsets[:-1]).to(device)

    def take_pair(self, pair: Tensor, width: int) -> Tensor:
        """Keys and values (M + 1, 2 · key heads · D) to the keys' places, then the values', (2 · places, D)."""
        return pair.view(-1, width).index_select(0, self._to)

    def give_pair(self, laid: Tensor) -> Tensor:
        """And back, (M, 2 · key heads · D): for each token the sum over its places."""
        found = F.embedding_bag(self._places, laid, self._offsets, mode="sum")
        return found.view(-1, 2 * self.keys.heads * laid.shape[-1])


class Plan:
    """How the tokens of a batch stand in its attention.

    A prompt is a reader, and so is every completion, which looks at its prompt first.

    Attributes:
        tokens: where in R·S they are.
        wanted: which of them the last layer is asked for: the last of each prompt, and all of the completions.
        source: which of those predicts each completion token.
        readers: of all tokens.
        wanted_readers: of the wanted ones by themselves.
    """

    def __init__(self, batch: Batch, keys: int, groups: int, dtype: torch.dtype) -> None:
        device, owner_RS = batch.input_ids_RS.device, batch.owner_RS.cpu().numpy()
        tokens = np.flatnonzero(owner_RS >= 0)
        owner_M, row_M, number_M = owner_RS.ravel()[tokens], tokens // owner_RS.shape[1], np.arange(len(tokens))
        start = np.flatnonzero((np.diff(row_M, prepend=-1) != 0) | (np.diff(owner_M, prepend=0) != 0))
        count, is_prompt = np.diff(start, append=len(tokens)), owner_M[start] == 0
        row = np.cumsum(is_prompt) - 1
        first, before = start[is_prompt][row], np.where(is_prompt, 0, count[is_prompt][row])
        wanted_M = owner_M > 0
        wanted_M[(start + count - 1)[is_prompt]] = True
        asked_M, kind = np.cumsum(wanted_M) - 1, {"keys": keys, "groups": groups, "dtype": dtype, "device": device}
        self.readers = Readers(first, before, start, count, number_M, **kind)
        skipped = np.where(is_prompt, count - 1, 0)
        self.wanted_readers = Readers(first, before + skipped, start + skipped, count - skipped, asked_M, **kind)
        asked_RS = np.zeros(owner_RS.size, dtype=np.int64)
        asked_RS[tokens] = asked_M
        self.tokens, self.wanted, asked = (
            torch.from_numpy(found).to(device) for found in (tokens, np.flatnonzero(wanted_M), asked_RS)
        )
        self.source = asked[batch.source_BT[batch.mask_BT]]


def _cut(count: Array, total: Array) -> list[Array]:
    """Readers of so many queries and keys as blocks of like size: those that cost least, scores of padding included.

    Blocks are runs of readers sorted by ``count``, cut nowhere between equal ones.
    """
    order = np.lexsort((total, count))
    begins = np.flatnonzero(np.diff(count[order], prepend=-1))
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
