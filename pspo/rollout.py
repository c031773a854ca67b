"""The sampler: completions from the current policy, each from random numbers of its own.

Shape suffixes: B rows, V vocabulary, T completion positions.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pspo import interrupt
from pspo.dataset import Problem, Prompt
from pspo.decode import make_decoder
from pspo.logprob import autocast_to_bfloat16
from pspo.memory import halving
from pspo.model import Policy
from pspo.schema import Schema, key
from pspo.stream import generator

COMPACT_BELOW = 0.75
"""Finished rows leave the batch once fewer than this share of its rows is still being written."""

LOOK = {"cpu": 1, "cuda": 8}
"""Tokens from one look at which rows are finished to the next; each waits for the GPU."""

BLOCK = 128
"""Tokens whose probabilities are summed at a time before one of them is looked for."""

RANKED = 1024
"""The nucleus is looked for among so many of the most probable tokens before all are sorted."""


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
    by_length = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].token_ids), i))
    rows = [(i, g) for i in by_length for g in range(group_size)]

    def some_at_a_time(most: int) -> list[Completion]:
        completions: dict[tuple[int, int], Completion] = {}
        for start in range(0, len(rows), most):
            chosen = rows[start : start + most]
            random_BT = np.stack([uniforms([*seed, *_words(prompts[i].problem), g], max_new_tokens) for i, g in chosen])
            decoded = _decode(policy, [prompts[i].token_ids for i, _ in chosen], random_BT, temperature, top_p)
            for (i, g), (token_ids, logprobs, finished) in zip(chosen, decoded, strict=True):
                text = policy.tokenizer.decode(token_ids, skip_special_tokens=True)
                completions[i, g] = Completion(prompts[i], g, token_ids, logprobs, finished, text)
        return [completions[i, g] for i in range(len(prompts)) for g in range(group_size)]

    return halving("rollout.max_rows", max_rows, "or set model.autocast=true, or a smaller model", some_at_a_time)[0]


def uniforms(words: Sequence[int], count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """``count`` numbers uniform in [0, 1) from a counter-based generator keyed by ``words`` (Philox, Salmon 2011)."""
    return generator(*words).random(count)


def draw(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """One token a row by inverting the distribution function at ``uniform_B``, and its untruncated log-probability.

    The nucleus is the smallest set of most probable tokens whose probability reaches ``top_p`` (Holtzman et al. 2020,
    arXiv 1904.09751). Temperature 0 takes the most probable token; its log-probability is that of temperature 1.
    """
    logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32)) / (temperature or 1.0)
    probability_BV = logits_BV.softmax(-1)
    norm_B = logits_BV.amax(-1) - probability_BV.amax(-1).log()
    if temperature == 0:
        token_B = logits_BV.argmax(-1)
    else:
        if top_p < 1:
            probability_BV.masked_fill_(_outside(probability_BV, top_p), 0)
        token_B = _invert(probability_BV, uniform_B)
    return token_B, logits_BV.gather(-1, token_B[:, None]).squeeze(-1) - norm_B


def _invert(weight_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The first token up to which the weights sum to more than ``uniform_B`` of their total.

    Sums are in float64, whose error is far below a token's share of a large vocabulary: first over blocks of tokens,
    then inside the one that holds the token. A token without weight is never taken, unless weights are not numbers.
    """
    block_BNK = torch.nn.functional.pad(weight_BV, (0, -weight_BV.shape[-1] % BLOCK)).view(len(weight_BV), -1, BLOCK)
    cumulative_BN = block_BNK.sum(-1, dtype=torch.float64).cumsum(-1)
    target_B1 = uniform_B[:, None] * cumulative_BN[:, -1:]
    chosen_B1 = _first_above(cumulative_BN, target_B1)
    inside_BK = block_BNK.gather(1, chosen_B1[..., None].expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(-1)
    before_B1 = cumulative_BN.gather(-1, (chosen_B1 - 1).clamp(min=0)).where(chosen_B1 > 0, 0.0)
    found_B1 = chosen_B1 * BLOCK + _first_above(inside_BK, (target_B1 - before_B1).clamp(min=0))
    return found_B1.squeeze(-1).clamp(max=weight_BV.shape[-1] - 1)


def _first_above(cumulative_BK: Tensor, target_B1: Tensor) -> Tensor:
    """Where a sum first exceeds the target, and at the latest where it reaches its end."""
    found_B1 = torch.searchsorted(cumulative_BK, target_B1, right=True)
    return torch.minimum(found_B1, (cumulative_BK < cumulative_BK[:, -1:]).sum(-1, keepdim=True))


def _outside(probability_BV: Tensor, top_p: float) -> Tensor:
    """Which tokens are not in the nucleus; of equally probable ones at its edge it takes the first.

    A sort of a large vocabulary costs more than all else, so the ``RANKED`` most probable are looked at first.
    """
    num_tokens = probability_BV.shape[-1]
    ranked_BR = probability_BV.topk(min(RANKED, num_tokens), dim=-1).values
    if num_tokens > RANKED and (ranked_BR.sum(-1) < top_p).any():
        ranked_BR = probability_BV.sort(dim=-1, descending=True).values
    ranked_BR = ranked_BR.double()
    size_B1 = (ranked_BR.cumsum(-1) - ranked_BR < top_p).sum(-1, keepdim=True).clamp(min=1)
    edge_B1 = ranked_BR.gather(-1, size_B1 - 1)
    above_BV, at_BV = probability_BV > edge_B1, probability_BV == edge_B1
    room_B1 = size_B1 - above_BV.sum(-1, keepdim=True)
    if (at_BV.sum(-1, keepdim=True) > room_B1).any():
        at_BV &= at_BV.cumsum(-1) <= room_B1
    return ~(above_BV | at_BV)


@torch.inference_mode()
def _decode(
    policy: Policy,
    prompts: list[list[int]],
    random_BT: np.ndarray[Any, np.dtype[np.float64]],
    temperature: float,
    top_p: float,
) -> list[tuple[list[int], list[float], bool]]:
    """Token ids, log-probabilities and whether it finished, for each row.

    Neighbours with the same prompt share its prefill; then one token at a time for the rows still alive.
    """
    device, (num_rows, length_T) = policy.device, random_BT.shape
    first = [row for row in range(num_rows) if row == 0 or prompts[row] != prompts[row - 1]]
    prompt_of = torch.tensor(np.searchsorted(first, np.arange(num_rows), side="right") - 1, device=device)
    uniform_BT = torch.from_numpy(random_BT).to(device)
    stop_ids = torch.tensor(policy.stop_ids, device=device)
    token_BT = torch.full((num_rows, length_T), policy.pad_id, device=device)
    logprob_BT = torch.zeros(num_rows, length_T, dtype=torch.float64, device=device)
    row_of = torch.arange(num_rows, device=device)  # which row of the result each row of the batch writes
    alive = torch.ones(num_rows, dtype=torch.bool, device=device)
    with autocast_to_bfloat16(device, policy.autocast):
        decoder = make_decoder(policy)
        logits = decoder.start([prompts[row] for row in first], prompt_of, length_T)
        for t in range(length_T):
            interrupt.check()
            token, logprob = draw(logits, uniform_BT[row_of, t], temperature, top_p)
            token_BT[row_of, t], logprob_BT[row_of, t] = token, logprob.double()
            if t + 1 == length_T:
                break
            alive &= torch.isin(token, stop_ids, invert=True)
            if (t + 1) % LOOK[device.type] == 0:
                num_alive = int(alive.sum())
                if num_alive == 0:
                    break
                if num_alive < COMPACT_BELOW * len(alive):
                    keep = alive.nonzero().squeeze(-1)
                    decoder.keep(keep)
                    row_of, token, alive = row_of[keep], token[keep], alive[keep]
            logits = decoder.step(token)
    stops_BT = torch.isin(token_BT, stop_ids)  # a row that has stopped may have been written on
    length_B = torch.where(stops_BT.any(1), stops_BT.int().argmax(1) + 1, length_T)
    return [
        (tokens[:length], logprobs[:length], finished)
        for tokens, logprobs, length, finished in zip(
            token_BT.tolist(), logprob_BT.tolist(), length_B.tolist(), stops_BT.any(1).tolist(), strict=True
        )
    ]


def _words(problem: Problem) -> tuple[int, int]:
    """A problem's name as two words of a random key."""
    digest = hashlib.blake2b(problem.id.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:], "big")
