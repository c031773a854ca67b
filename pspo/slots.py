"""Continuous batching: a fixed number of slots, each taken by the next row as soon as the one before has ended.

For GPUs, where it is launches and waits that cost: shapes stay as they are from step to step, so that a step is a CUDA
graph, and the GPU is waited for only every ``LOOK`` steps, to see who has ended and to fill slots. A row whose nucleus
is too wide to be drawn from in a graph stands still until then. Shape suffixes: B slots, R rows and one more for slots
that hold none, T completion positions and one more that nobody reads, P prompts, S places in a text, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pspo.host import interrupt
from pspo.model import Policy
from pspo.rollout.samplers.decode import Fused, once
from pspo.rollout.samplers.draw import draw, draw_ranked

LOOK = 8
"""Steps from one look at who has ended, or stands still, to the next."""

PLACES = 128
"""The attention reads so many places more whenever a text may have outgrown those that it reads."""

SHRINK_BELOW = 0.5
"""With no row left to take a slot, the batch shrinks once fewer than this share of its slots is being written."""

SMALL = {"cpu": 1, "cuda": 64}
"""So few slots stay: on a GPU a step of fewer is hardly shorter, and its graph would have to be recorded anew."""

READ = 2**15
"""Places of prompts, padded, that are read at one time."""


class Slots(Fused):
    """The fused decoder with a cache for whole texts, of which slots are filled anew."""

    def __init__(self, policy: Policy, num_slots: int, room: int) -> None:
        super().__init__(policy)
        shape = 2, num_slots, self.shape.keys, room, self.shape.width
        self.cache = [torch.zeros(shape, dtype=self.dtype, device=policy.device) for _ in self.layers]
        self.places = torch.arange(room, device=policy.device)
        self.cis_SD = self._angles(room)

    def fill(self, slot_B: Tensor, prompts: Sequence[list[int]], prompt_of_B: Tensor) -> Tensor:
        """Read each prompt once and keep it in slots; the logits (B, V) of their first tokens."""
        length, found = max(map(len, prompts)), []
        some = max(1, READ // length)
        for first in range(0, len(prompts), some):
            chosen = prompts[first : first + some]
            found.append(self.read(chosen))
            mine = (prompt_of_B >= first) & (prompt_of_B < first + some)
            to_B, from_B, until = slot_B[mine], prompt_of_B[mine] - first, max(map(len, chosen))
            for cache, pair in zip(self.cache, self.prompts, strict=True):
                for kept, half in zip(cache, pair, strict=True):
                    kept[to_B, :, :until] = half.view(len(chosen), -1, *half.shape[1:])[from_B]
            self.prompts.clear()
        return torch.cat(found)[prompt_of_B]

    def put(self, token_B: Tensor, place_B: Tensor, until: int) -> Tensor:
        """Put a token at a place below ``until`` in every slot; the logits (B, V) of the next."""
        x, cis, unseen_BS = self.embed[token_B], self.cis_SD[place_B], self.places[:until] > place_B[:, None]
        for cache, w in zip(self.cache, self.layers, strict=True):
            x = self._layer(w, x, cis, partial(self._look_back, cache, place_B, unseen_BS))
        return self._logits(x)

    def keep(self, slot_B: Tensor) -> None:
        """Drop all slots but these."""
        for layer, cache in enumerate(self.cache):
            self.cache[layer] = cache[:, slot_B]

    def _look_back(self, cache: Tensor, place_B: Tensor, unseen_BS: Tensor, query: Tensor, pair: Tensor) -> Tensor:
        (keys, groups, width, _), (slots, until) = self.shape, unseen_BS.shape
        cache[:, torch.arange(slots, device=cache.device), :, place_B] = pair.view(slots, 2, keys, width)
        key, value = cache[..., :until, :].flatten(1, 2)
        score = query.view(slots * keys, groups, width) @ key.mT
        score.view(slots, -1, until).masked_fill_(unseen_BS[:, None], -torch.inf)
        weight = score.softmax(-1, torch.promote_types(self.dtype, torch.float32)).to(self.dtype)
        found: Tensor = (weight @ value).view(slots, -1)
        return found


class State:
    """What the slots are at, in buffers that a step changes in place."""

    def __init__(
        self, decoder: Slots, uniform_RT: Tensor, stop_ids: Sequence[int], pad_id: int, temperature: float, top_p: float
    ) -> None:
        self.decoder, self.how, device = decoder, (temperature, top_p), uniform_RT.device
        self.stop_ids = torch.tensor(stop_ids, device=device)
        self.uniform_RT = torch.nn.functional.pad(uniform_RT, (0, 1, 0, 1))
        rows, self.length_T = uniform_RT.shape
        self.token_RT = torch.full(self.uniform_RT.shape, pad_id, device=device)
        self.logprob_RT = torch.zeros(self.uniform_RT.shape, dtype=torch.float64, device=device)
        slots, head = decoder.cache[0].shape[1], decoder.head[0]
        self.row_B = torch.full((slots,), rows, device=device)
        self.token_B, self.place_B, self.drawn_B = (torch.zeros_like(self.row_B) for _ in range(3))
        self.ended_B = torch.ones_like(self.row_B, dtype=torch.bool)
        self.stands_B = torch.zeros_like(self.ended_B)
        self.logits_BV = torch.empty(slots, len(head), dtype=head.dtype, device=device)
        self.graphs: dict[int, Callable[[], None]] = {}
        self.pool = self._new_pool()

    def begin(self, slot_B: Tensor, row_B: Tensor, length_B: Tensor, logits_BV: Tensor) -> None:
        """Rows, with prompts of these lengths, take slots and draw their first tokens."""
        self.row_B[slot_B], self.place_B[slot_B], self.drawn_B[slot_B] = row_B, length_B - 1, 0
        self.ended_B[slot_B] = False
        self._draw(logits_BV, slot_B)

    def step(self, until: int) -> None:
        """One token more in every slot that does not stand still, of texts that are shorter than ``until``."""
        if until not in self.graphs:
            work = partial(self._step, until)
            self.graphs[until] = work if self.pool is None else Graph(work, self.pool)
        self.graphs[until]()

    def look(self) -> tuple[dict[int, int], int]:
        """How far the text of each slot goes that is being written, and how many rows stood still until now."""
        ended, stands, place = torch.stack([self.ended_B.long(), self.stands_B.long(), self.place_B]).tolist()
        still = [slot for slot, stood in enumerate(stands) if stood]
        if still:
            slot_B = torch.tensor(still, device=self.row_B.device)
            self._draw(self.logits_BV[slot_B], slot_B)
            return self.look()[0], len(still)
        return {slot: last + 1 for slot, last in enumerate(place) if not ended[slot]}, 0

    def keep(self, slot_B: Tensor) -> None:
        """Drop all slots but these, and with them all graphs; a pool ends with its last one."""
        self.graphs.clear()
        self.pool = self._new_pool()
        self.decoder.keep(slot_B)
        for name in ("row_B", "token_B", "place_B", "drawn_B", "ended_B", "stands_B", "logits_BV"):
            setattr(self, name, getattr(self, name)[slot_B])

    def _new_pool(self) -> Any:
        """Memory for all graphs, as they never run side by side; None where there are none."""
        return torch.cuda.graph_pool_handle() if self.row_B.is_cuda else None

    def _step(self, until: int) -> None:
        self.logits_BV.copy_(self.decoder.put(self.token_B, self.place_B, until))
        uniform_B = self.uniform_RT[self.row_B, self.drawn_B]
        token_B, logprob_B, wide_B = draw_ranked(self.logits_BV, uniform_B, *self.how)
        if wide_B is not None:
            self.stands_B.copy_(wide_B & ~self.ended_B)
        self._take(slice(None), token_B, logprob_B)

    def _draw(self, logits_BV: Tensor, slot_B: Tensor) -> None:
        uniform_B = self.uniform_RT[self.row_B[slot_B], self.drawn_B[slot_B]]
        self.stands_B[slot_B] = False
        self._take(slot_B, *draw(logits_BV, uniform_B, *self.how))

    def _take(self, at: Tensor | slice, token_B: Tensor, logprob_B: Tensor) -> None:
        """Write the tokens of rows that go on, and move these."""
        drawn_B, goes_B = self.drawn_B[at], ~(self.ended_B[at] | self.stands_B[at])
        row_B, column_B = self.row_B[at], drawn_B.masked_fill(~goes_B, self.length_T)
        self.token_RT[row_B, column_B], self.logprob_RT[row_B, column_B] = token_B, logprob_B.double()
        stops_B = (token_B[:, None] == self.stop_ids).any(-1) | (drawn_B + 1 >= self.length_T)
        self.ended_B[at] |= goes_B & stops_B
        self.token_B[at] = token_B.where(goes_B, self.token_B[at])
        self.place_B[at] += goes_B
        self.drawn_B[at] += goes_B


class Graph:
    """Work without results, on buffers that stay: run as it is at first, then recorded and from then on replayed."""

    def __init__(self, work: Callable[[], None], pool: Any) -> None:
        self.work, self.pool, self.calls = work, pool, 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == 1:
            self.work()
            return
        if self.calls == 2:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=self.pool, capture_error_mode="thread_local"):
                self.work()
        self.graph.replay()


@torch.inference_mode()
def decode(
    policy: Policy, prompts: Sequence[list[int]], uniform_RT: Tensor, temperature: float, top_p: float, num_slots: int
) -> tuple[Tensor, Tensor]:
    """Continuous batching in ``num_slots`` slots; see ``rollout.Decode``.

    Rows that take slots at one time share what is read of their prompt; one that comes later has it read again.
    """
    rows, length_T = uniform_RT.shape
    decoder = Slots(policy, min(num_slots, rows), max(map(len, prompts)) + length_T)
    state = State(decoder, uniform_RT, policy.stop_ids, policy.pad_id, temperature, top_p)
    try:
        _write(state, prompts)
    finally:
        state.graphs.clear()  # they hold the state, and it the cache
    return state.token_RT[:-1, :-1], state.logprob_RT[:-1, :-1]


def _write(state: State, prompts: Sequence[list[int]]) -> None:
    device, room, waiting = state.row_B.device, len(state.decoder.places), deque(range(len(prompts)))
    while True:
        (ends, stood), slots = state.look(), len(state.row_B)
        steps = 1 if 2 * stood > len(ends) else min(LOOK, state.length_T - 1)  # flat ones are drawn from at looks alone
        if not waiting and not ends:
            return
        if not waiting and slots > SMALL[device.type] and len(ends) < SHRINK_BELOW * slots:
            state.keep(torch.tensor(list(ends), device=device))
            ends = dict(enumerate(ends.values()))
        free = [slot for slot in range(slots) if slot not in ends][: len(waiting)]
        if free:
            taken = [waiting.popleft() for _ in free]
            slot_B, row_B = torch.tensor(free, device=device), torch.tensor(taken, device=device)
            length_B = torch.tensor([len(prompts[row]) for row in taken], device=device)
            unlike, prompt_of_B = once([prompts[row] for row in taken])
            state.begin(slot_B, row_B, length_B, state.decoder.fill(slot_B, unlike, prompt_of_B.to(device)))
            ends |= {slot: len(prompts[row]) + 1 for slot, row in zip(free, taken, strict=True)}
        for _ in range(steps):
            interrupt.check()
            state.step(min(-(-max(ends.values()) // PLACES) * PLACES, room))
            ends = {slot: min(end + 1, room) for slot, end in ends.items()}
