"""The sampler: completions from the current policy, each from random numbers of its own.

Shape suffixes: R rows, B those of them in the batch, V vocabulary, T completion positions.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pspo import slots
from pspo.base.schema import Schema, key
from pspo.base.stream import generator
from pspo.dataset import Problem, Prompt
from pspo.host import interrupt
from pspo.host.memory import halving
from pspo.model import Policy
from pspo.rollout.samplers.decode import Fused, make_decoder, once
from pspo.rollout.samplers.draw import draw

LOOK = {"cpu": 1, "cuda": slots.LOOK}
"""Tokens from one look at which rows are finished to the next; each waits for the GPU."""

COMPACT_BELOW = 0.75
"""Finished rows leave the batch once fewer than this share of its rows is still being written."""


Decode = Callable[[Policy, Sequence[list[int]], Tensor, float, float, int], tuple[Tensor, Tensor]]
"""A way to write rows: (policy, their prompts, uniform numbers (R, T), temperature, top_p, rows at one time) to tokens
and log-probabilities, (R, T) each. What follows a stop token is anything; neighbours with one prompt share its reading.
"""


@dataclass(frozen=True, kw_only=True)
class Rollout(Schema, block="rollout"):
    """What is sampled in one step, and how."""

    prompts: int = key("prompts of one step", within="[1, inf)")
    group_size: int = key("completions of one prompt, compared with each other", within="[2, inf)")
    max_new_tokens: int = key("tokens after which a completion is cut off", within="[1, inf)")
    overlong_share: float = key(
        "over this last share of max_new_tokens a completion's reward falls linearly, by up to 1", within="[0, 1)"
    )
    max_redraws: int = key(
        "times that a step draws prompts in place of those whose rewards are all equal; 0 keeps them", within="[0, inf)"
    )
    temperature: float = key("logits are divided by it, in sampling and in training alike", within="(0, inf)")
    top_p: float = key("sample from the smallest set of tokens that holds this much probability", within="(0, 1]")
    max_rows: int = key("completions decoded at one time; bounds memory", within="[1, inf)")

    def overlong_penalty(self, length: int) -> float:
        """DAPO's soft punishment (arXiv 2503.14476, eq. 13): 0 down to −1 over the last share of ``max_new_tokens``.

        With a buffer of b = share · L_max tokens: 0 up to L_max − b, then ((L_max − b) − length) / b.
        """
        buffer = self.overlong_share * self.max_new_tokens
        return min(0.0, (self.max_new_tokens - buffer - length) / buffer) if buffer else 0.0


@dataclass(frozen=True)
class Completion:
    """One sampled answer.

    Attributes:
        prompt: what it answers.
        sample: its index in its group.
        token_ids: the tokens, the stop token included.
        logprobs: log π of each under the temperature-scaled, untruncated policy.
        finished: whether it ended with a stop token; else it was cut off at ``max_new_tokens``.
        text: the tokens decoded, without special tokens.
    """

    prompt: Prompt
    sample: int
    token_ids: list[int]
    logprobs: list[float]
    finished: bool
    text: str

    @property
    def problem(self) -> Problem:
        """The problem that it answers."""
        return self.prompt.problem


def sample(
    policy: Policy,
    prompts: Sequence[Prompt],
    *,
    seed: Sequence[int],
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    max_rows: int,
) -> list[Completion]:
    """``group_size`` completions of every prompt, grouped by prompt in the order given; temperature 0 is greedy.

    The random numbers of a completion depend on (seed, problem, sample index, position) alone: not on what else is in
    the batch, nor on its order. Prompts of like length are decoded together. Raises Interrupted between two tokens, and
    NoRoomError where neither ``max_rows`` nor half of them fit into memory.
    """
    if not prompts:
        return []
    by_length = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].token_ids), i))
    rows = [(i, g) for i in by_length for g in range(group_size)]

    ids = [prompts[i].token_ids for i, _ in rows]
    words = [[*seed, *_words(prompts[i].problem)] for i in by_length]
    random_RT = np.concatenate([uniforms(key, group_size, max_new_tokens) for key in words])
    uniform_RT, decode = torch.from_numpy(random_RT).to(policy.device), choose_decode(policy)

    def so_many_at_a_time(most: int) -> list[Completion]:
        decoded = _cut(policy, *decode(policy, ids, uniform_RT, temperature, top_p, most))
        completions = {}
        for (i, g), (token_ids, logprobs, finished) in zip(rows, decoded, strict=True):
            text = policy.tokenizer.decode(token_ids, skip_special_tokens=True)
            completions[i, g] = Completion(prompts[i], g, token_ids, logprobs, finished, text)
        return [completions[i, g] for i in range(len(prompts)) for g in range(group_size)]

    return halving("rollout.max_rows", max_rows, "or set model.autocast=true, or a smaller model", so_many_at_a_time)[0]


def uniforms(words: Sequence[int], samples: int, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(samples, count) numbers uniform in [0, 1), from a counter-based generator (Philox, Salmon 2011).

    ``words`` are its key, and a sample's index is the highest word of its counter: each has 2^192 blocks of its own.
    """
    random = generator(*words)
    bits, state = random.bit_generator, random.bit_generator.state
    rows = np.empty((samples, count))
    for sample, row in enumerate(rows):
        state["state"]["counter"][3] = sample
        bits.state = state
        random.random(out=row)
    return rows


def choose_decode(policy: Policy) -> Decode:
    """Continuous batching on a GPU, for models whose decoder is ours; else all rows of a batch in step."""
    if policy.lanes is not None:
        return in_lanes
    return slots.decode if policy.device.type == "cuda" and Fused.takes(policy.model) else in_step


def in_lanes(
    policy: Policy,
    prompts: Sequence[list[int]],
    uniform_RT: Tensor,
    temperature: float,
    top_p: float,
    max_rows: int,
) -> tuple[Tensor, Tensor]:
    """In step, prompts dealt out in turns to processes that share the work; see ``Decode``."""
    _, prompt_of_R = once(prompts)
    lanes = [(prompt_of_R % policy.lanes.count == n).nonzero().squeeze(-1) for n in range(policy.lanes.count)]
    lanes = [row_B for row_B in lanes if len(row_B)]
    parts = [
        (policy, [prompts[r] for r in row_B], uniform_RT[row_B], temperature, top_p, -(-max_rows // len(lanes)))
        for row_B in lanes
    ]
    found, back_R = policy.lanes.each(in_step, parts), torch.cat(lanes).argsort()
    return torch.cat([tokens for tokens, _ in found])[back_R], torch.cat([logprobs for _, logprobs in found])[back_R]


@torch.inference_mode()
def in_step(
    policy: Policy,
    prompts: Sequence[list[int]],
    uniform_RT: Tensor,
    temperature: float,
    top_p: float,
    max_rows: int,
) -> tuple[Tensor, Tensor]:
    """So many rows at a time, one token after the other for those still alive; see ``Decode``."""
    found = [
        _in_step(policy, prompts[start : start + max_rows], uniform, temperature, top_p)
        for start, uniform in zip(range(0, len(prompts), max_rows), torch.split(uniform_RT, max_rows), strict=True)
    ]
    return torch.cat([tokens for tokens, _ in found]), torch.cat([logprobs for _, logprobs in found])


def _in_step(
    policy: Policy, prompts: Sequence[list[int]], uniform_RT: Tensor, temperature: float, top_p: float
) -> tuple[Tensor, Tensor]:
    device, (num_rows, length_T) = policy.device, uniform_RT.shape
    unlike, prompt_of_R = once(prompts)
    stop_ids = torch.tensor(policy.stop_ids, device=device)
    token_RT = torch.full((num_rows, length_T), policy.pad_id, device=device)
    logprob_RT = torch.zeros(num_rows, length_T, dtype=torch.float64, device=device)
    row_B = torch.arange(num_rows, device=device)  # which row each of the batch is
    alive_B = torch.ones(num_rows, dtype=torch.bool, device=device)
    decoder = make_decoder(policy)
    logits_BV = decoder.start(unlike, prompt_of_R.to(device), length_T)
    for t in range(length_T):
        interrupt.check()
        token_B, logprob_B = draw(logits_BV, uniform_RT[row_B, t], temperature, top_p)
        token_RT[row_B, t], logprob_RT[row_B, t] = token_B, logprob_B.double()
        if t + 1 == length_T:
            break
        alive_B &= torch.isin(token_B, stop_ids, invert=True)
        if (t + 1) % LOOK[device.type] == 0:
            num_alive = int(alive_B.sum())
            if num_alive == 0:
                break
            if num_alive < COMPACT_BELOW * len(alive_B):
                keep = alive_B.nonzero().squeeze(-1)
                decoder.keep(keep)
                row_B, token_B, alive_B = row_B[keep], token_B[keep], alive_B[keep]
        logits_BV = decoder.step(token_B)
    return token_RT, logprob_RT


def _cut(policy: Policy, token_RT: Tensor, logprob_RT: Tensor) -> list[tuple[list[int], list[float], bool]]:
    """Each row up to its first stop token: ids, log-probabilities, and whether there is one."""
    stops_RT = torch.isin(token_RT, torch.tensor(policy.stop_ids, device=token_RT.device))
    finished_R = stops_RT.any(1)
    length_R = torch.where(finished_R, stops_RT.int().argmax(1) + 1, token_RT.shape[1])
    columns = (column.tolist() for column in (token_RT, logprob_RT, length_R, finished_R))
    return [(ids[:n], logprobs[:n], finished) for ids, logprobs, n, finished in zip(*columns, strict=True)]


def _words(problem: Problem) -> tuple[int, int]:
    """A problem's name as two words of a random key."""
    digest = hashlib.blake2b(problem.id.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:], "big")
