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
from pspo.model import Policy
from pspo.schema import Schema, key
from pspo.stream import generator

COMPACT_BELOW = 0.75
"""Finished rows leave the batch once fewer than this share of its rows is still being written."""


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
    the batch, nor on its order. Prompts of like length are decoded together. Raises Interrupted between two tokens.
    """
    by_length = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].token_ids), i))
    rows = [(i, g) for i in by_length for g in range(group_size)]
    completions: dict[tuple[int, int], Completion] = {}
    for start in range(0, len(rows), max_rows):
        chosen = rows[start : start + max_rows]
        random_BT = np.stack([uniforms([*seed, *_words(prompts[i].problem), g], max_new_tokens) for i, g in chosen])
        decoded = _decode(policy, [prompts[i].token_ids for i, _ in chosen], random_BT, temperature, top_p)
        for (i, g), (token_ids, logprobs, finished) in zip(chosen, decoded, strict=True):
            text = policy.tokenizer.decode(token_ids, skip_special_tokens=True)
            completions[i, g] = Completion(prompts[i], g, token_ids, logprobs, finished, text)
    return [completions[i, g] for i in range(len(prompts)) for g in range(group_size)]


def uniforms(words: Sequence[int], count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """``count`` numbers uniform in [0, 1) from a counter-based generator keyed by ``words`` (Philox, Salmon 2011)."""
    return generator(*words).random(count)


def draw(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """One token a row by inverting the distribution function at ``uniform_B``, and its untruncated log-probability.

    The nucleus is the smallest set of most probable tokens whose probability reaches ``top_p`` (Holtzman et al. 2020,
    arXiv 1904.09751). Temperature 0 takes the most probable token; its log-probability is that of temperature 1.
    """
    logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    logprob_BV = (logits_BV / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        token_B = logits_BV.argmax(-1)
    else:
        # Sums over a large vocabulary need float64 to keep their error far below a token's probability.
        probability_BV = logprob_BV.double().exp()
        if top_p < 1:
            sorted_BV, order_BV = probability_BV.sort(dim=-1, descending=True, stable=True)
            outside_BV = sorted_BV.cumsum(-1) - sorted_BV >= top_p
            probability_BV = probability_BV.masked_fill(
                torch.zeros_like(outside_BV).scatter(-1, order_BV, outside_BV), 0
            )
        cumulative_BV = probability_BV.cumsum(-1)
        total_B1 = cumulative_BV[:, -1:]
        token_B = torch.searchsorted(cumulative_BV, uniform_B[:, None] * total_B1, right=True).squeeze(-1)
        token_B = torch.minimum(token_B, (cumulative_BV < total_B1).sum(-1))  # a token even where logits are NaN
    return token_B, logprob_BV.gather(-1, token_B[:, None]).squeeze(-1)


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
    length_B = torch.full((num_rows,), length_T, device=device)
    finished_B = torch.zeros(num_rows, dtype=torch.bool, device=device)
    row_of = torch.arange(num_rows, device=device)  # which row of the result each row of the batch writes
    with autocast_to_bfloat16(device, policy.autocast):
        decoder = make_decoder(policy)
        logits = decoder.start([prompts[row] for row in first], prompt_of, length_T)
        for t in range(length_T):
            interrupt.check()
            token, logprob = draw(logits, uniform_BT[row_of, t], temperature, top_p)
            alive = ~finished_B[row_of]
            token_BT[row_of[alive], t] = token[alive]
            logprob_BT[row_of[alive], t] = logprob[alive].double()
            stopped = alive & torch.isin(token, stop_ids)
            finished_B[row_of[stopped]] = True
            length_B[row_of[stopped]] = t + 1
            alive = alive & ~stopped
            num_alive = int(alive.sum())
            if num_alive == 0 or t + 1 == length_T:
                break
            if num_alive < COMPACT_BELOW * len(alive):
                keep = alive.nonzero().squeeze(-1)
                decoder.keep(keep)
                row_of, token = row_of[keep], token[keep]
            logits = decoder.step(token)
    lengths = length_B.tolist()
    return [
        (tokens[:length], logprobs[:length], finished)
        for tokens, logprobs, length, finished in zip(
            token_BT.tolist(), logprob_BT.tolist(), lengths, finished_B.tolist(), strict=True
        )
    ]


def _words(problem: Problem) -> tuple[int, int]:
    """A problem's name as two words of a random key."""
    digest = hashlib.blake2b(problem.id.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:], "big")
