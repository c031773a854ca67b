"""Continuous batching: a fixed number of slots, each taken by the next row as soon as the one before has ended.

For GPUs, where it is launches and waits that cost: shapes stay as they are from step to step, so that a step, its draw
included, is one CUDA graph, and nothing waits for the GPU but a look at who has ended every ``LOOK`` steps. Shape
suffixes: B slots, R rows and one more for slots that hold none, T completion positions and one more that nobody reads,
P prompts, S places in a text, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from pspo import interrupt
from pspo.decode import Fused, once
from pspo.draw import draw
from pspo.logprob import autocast_to_bfloat16
from pspo.model import Policy

LOOK = 8
"""Steps from one look at who has ended to the next."""

PLACES = 128
"""The attention reads so many places more whenever a text may have outgrown those that it reads."""

SHRINK_BELOW = 0.5
"""With no row left to take a slot, the batch shrinks once fewer than this share of its slots is being written."""


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
        logits_PV, length = self.read(prompts), max(map(len, prompts))
        for cache, pair in zip(self.cache, self.prompts, strict=True):
            for kept, half in zip(cache, pair, strict=True):
                kept[slot_B, :, :length] = half.view(len(prompts), -1, *half.shape[1:])[prompt_of_B]
        return logits_PV[prompt_of_B]

    def put(self, token_B: Tensor, place_B: Tensor, until: int) -> Tensor:
        """Put a token at a place below ``until`` in every slot; the logits (B, V) of the next."""
        x, cis, unseen_BS = self.embed[token_B], self.cis_SD[place_B], self.places[:until] > place_B[:, None]
        for cache, w in zip(self.cache, self.layers, strict=True):
            x = self._layer(w, x, cis, partial(self._look_back, cache, place_B, unseen_BS))
        return self._logits(x)

    def keep(self, slot_B: Tensor) -> None:
        """Drop all slots but these."""
        self.cache = [cache[:, slot_B] for cache in self.cache]

    def _look_back(self, cache: Tensor, place_B: Tensor, unseen_BS: Tensor, query: Tensor, pair: Tensor) -> Tensor:
        (keys, groups, width, _), (slots, until) = self.shape, unseen_BS.shape
        cache[:, torch.arange(slots, device=cache.device), :, place_B] = pair.view(slots, 2, keys, width)
        key, value = cache[..., :until, :].flatten(1, 2)
        score = query.view(slots * keys, groups, width) @ key.mT
        score.view(slots, -1, until).masked_fill_(unseen_BS[:, None], -torch.inf)
        weight = score.softmax(-1, torch.promote_types(self.dtype, torch.float32)).to(self.dtype)
        found: Tensor = (weight @ value).view(slots, -1)
        return found


class Batch:
    """What the slots are at, in buffers that a step changes in place."""

    def __init__(
        self, decoder: Slots, uniform_RT: Tensor, stop_ids: Tensor, pad_id: int, temperature: float, top_p: float
    ) -> None:
        self.decoder, self.stop_ids, self.how, device = decoder, stop_ids, (temperature, top_p), uniform_RT.device
        self.uniform_RT = torch.nn.functional.pad(uniform_RT, (0, 1, 0, 1))
        rows, self.length_T = uniform_RT.shape
        self.token_RT = torch.full(self.uniform_RT.shape, pad_id, device=device)
        self.logprob_RT = torch.zeros(self.uniform_RT.shape, dtype=torch.float64, device=device)
        slots = decoder.cache[0].shape[1]
        self.row_B = torch.full((slots,), rows, device=device)
        self.token_B, self.place_B, self.drawn_B = (self.row_B * 0 for _ in range(3))
        self.ended_B = torch.ones(slots, dtype=torch.bool, device=device)
        self.graphs: dict[int, Callable[[], None]] = {}

    def take(self, slot_B: Tensor, row_B: Tensor, length_B: Tensor, logits_BV: Tensor) -> None:
        """Rows, with prompts of these lengths, begin in slots with the first token that they draw."""
        self.row_B[slot_B], self.place_B[slot_B], self.drawn_B[slot_B] = row_B, length_B - 1, 0
        self.ended_B[slot_B] = False
        self._draw(logits_BV, slot_B)

    def step(self, until: int) -> None:
        """One token more in every slot, of texts that are shorter than ``until``."""
        if until not in self.graphs:
            work = partial(self._step, until)
            self.graphs[until] = work if self.row_B.device.type == "cpu" or self._waits else _Graph(work)
        self.graphs[until]()

    def keep(self, slot_B: Tensor) -> None:
        """Drop all slots but these."""
        self.graphs.clear()
        self.decoder.keep(slot_B)
        for name in ("row_B", "token_B", "place_B", "drawn_B", "ended_B"):
            setattr(self, name, getattr(self, name)[slot_B])

    @property
    def _waits(self) -> bool:
        """Whether a draw looks at what it has found, which no graph can."""
        temperature, top_p = self.how
        return temperature > 0 and top_p < 1

    def _step(self, until: int) -> None:
        self._draw(self.decoder.put(self.token_B, self.place_B, until), slice(None))

    def _draw(self, logits_BV: Tensor, at: Tensor | slice) -> None:
        row, drawn, ended = self.row_B[at], self.drawn_B[at], self.ended_B[at]
        token, logprob = draw(logits_BV, self.uniform_RT[row, drawn], *self.how)
        column = torch.where(ended, self.length_T, drawn)
        self.token_RT[row, column], self.logprob_RT[row, column] = token, logprob.double()
        self.ended_B[at] = ended | torch.isin(token, self.stop_ids) | (drawn + 1 >= self.length_T)
        self.token_B[at] = token
        self.place_B[at] = (self.place_B[at] + 1).clamp(max=len(self.decoder.places) - 1)
        self.drawn_B[at] = (drawn + 1).clamp(max=self.length_T)


class _Graph:
    """Work without results, on buffers that stay: run as it is at first, then recorded and from then on replayed."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.work, self.graph, self.warm = work, torch.cuda.CUDAGraph(), False

    def __call__(self) -> None:
        if not self.warm:
            self.work()
            self.warm = True
            return
        if self.work is not self.graph.replay:
            with torch.cuda.graph(self.graph):
                self.work()
            self.work = self.graph.replay
        self.work()


@torch.inference_mode()
def decode(
    policy: Policy, prompts: Sequence[list[int]], uniform_RT: Tensor, temperature: float, top_p: float, num_slots: int
) -> tuple[Tensor, Tensor]:
    """Continuous batching in ``num_slots`` slots; see ``rollout.Decode``."""
    with autocast_to_bfloat16(policy.device, policy.autocast):
        return _decode(policy, prompts, uniform_RT, temperature, top_p, num_slots)


def _decode(
    policy: Policy, prompts: Sequence[list[int]], uniform_RT: Tensor, temperature: float, top_p: float, num_slots: int
) -> tuple[Tensor, Tensor]:
    device, (rows, length_T) = policy.device, uniform_RT.shape
    decoder = Slots(policy, min(num_slots, rows), max(map(len, prompts)) + length_T)
    stop_ids = torch.tensor(policy.stop_ids, device=device)
    batch = Batch(decoder, uniform_RT, stop_ids, policy.pad_id, temperature, top_p)
    waiting, free, ends = deque(range(rows)), list(range(min(num_slots, rows))), [0] * min(num_slots, rows)
    while True:
        if waiting and free:
            taken = [waiting.popleft() for _ in free[: len(waiting)]]
            slot_B = torch.tensor(free[: len(taken)], device=device)
            unlike, prompt_of_B = once([prompts[row] for row in taken])
            logits_BV = decoder.fill(slot_B, unlike, prompt_of_B.to(device))
            lengths = [len(prompts[row]) for row in taken]
            batch.take(slot_B, torch.tensor(taken, device=device), torch.tensor(lengths, device=device), logits_BV)
            for slot, length in zip(free, lengths, strict=False):
                ends[slot] = length + 1
        for _ in range(LOOK):
            interrupt.check()
            ends = [min(end + 1, len(decoder.places)) for end in ends]
            batch.step(min(-(-max(ends) // PLACES) * PLACES, len(decoder.places)))
        ended = batch.ended_B.tolist()
        free = [slot for slot, has_ended in enumerate(ended) if has_ended]
        alive = [slot for slot, has_ended in enumerate(ended) if not has_ended]
        if not waiting and not alive:
            return batch.token_RT[:-1, :-1], batch.logprob_RT[:-1, :-1]
        if not waiting and len(alive) < SHRINK_BELOW * len(ended):
            batch.keep(torch.tensor(alive, device=device))
            free, ends = [], [ends[slot] for slot in alive]
