"""The sampler ``own``: completions from the trainer's own weights, by the model's own forward pass.

Old log-probabilities are exact, as behaviour policy and trainer are one set of weights in one process. Shape suffixes:
R rows (completions) of a batch, B rows that are still being written, V vocabulary, T completion positions.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from pspo.base.stream import generator
from pspo.dataset import Prompt
from pspo.host import interrupt
from pspo.host.memory import halving
from pspo.model import Policy
from pspo.model.logprob import autocast_to_bfloat16
from pspo.rollout.sample import Completion, RolloutConfig
from pspo.rollout.samplers.draw import draw

LOOK_EVERY_TOKENS = {"cpu": 1, "cuda": 16}
"""Tokens from one look at which rows are finished to the next; each look waits for the GPU."""

COMPACT_BELOW_SHARE = 0.75
"""Finished rows leave the batch once fewer than this share of its rows is still being written."""


class OwnSampler:
    """Samples from the policy that is trained."""

    def __init__(self, policy: Policy, config: RolloutConfig) -> None:
        self.policy, self.config = policy, config

    def refresh(self, policy: Policy) -> None:
        """Sample with this policy's weights, which are not copied."""
        self.policy = policy

    def sample(
        self, prompts: Sequence[Prompt], group_size: int, seed: Sequence[int], *, greedy: bool = False
    ) -> list[Completion]:
        """As ``Sampler.sample``; prompts of like length are decoded together."""
        if not prompts:
            return []
        by_length = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].token_ids), i))
        rows = [(i, g) for i in by_length for g in range(group_size)]
        ids, length = [prompts[i].token_ids for i, _ in rows], self.config.max_new_tokens
        uniform_RT = torch.from_numpy(np.stack([_uniforms(seed, prompts[i], g, length) for i, g in rows]))
        temperature, top_p = (0.0, 1.0) if greedy else (self.config.temperature, self.config.top_p)

        def decoded(max_rows: int) -> list[tuple[list[int], list[float], bool]]:
            parts = [slice(start, start + max_rows) for start in range(0, len(rows), max_rows)]
            batches = (decode(self.policy, ids[part], uniform_RT[part], temperature, top_p) for part in parts)
            return [row for batch in batches for row in batch]

        advice = "or set model.autocast=true, or a smaller model"
        written, _ = halving("rollout.max_rows", self.config.max_rows, advice, decoded)
        completions = {}
        for (i, g), (token_ids, logprobs, finished) in zip(rows, written, strict=True):
            text = self.policy.tokenizer.decode(token_ids, skip_special_tokens=True)
            completions[i, g] = Completion(prompts[i], g, token_ids, logprobs, finished, text)
        return [completions[place] for place in sorted(completions)]


def _uniforms(
    seed: Sequence[int], prompt: Prompt, sample: int, count: int
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """The uniform numbers in [0, 1) of one completion, one for each of its tokens."""
    digest = hashlib.blake2b(prompt.problem.id.encode(), digest_size=8).digest()
    words = int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:], "big")
    return generator(*seed, *words, prompt.place, sample).random(count)


@torch.inference_mode()
def decode(
    policy: Policy, prompts: Sequence[list[int]], uniform_RT: Tensor, temperature: float, top_p: float
) -> list[tuple[list[int], list[float], bool]]:
    """Write one row for each prompt, one token per step: token ids, log-probabilities in nats, whether it is finished.

    Neighbouring rows with equal prompts share one prefill. Prompts are left-padded; finished rows leave the batch.
    """
    device, (num_rows, length_T) = policy.device, uniform_RT.shape
    stop_ids, uniform_RT = torch.tensor(policy.stop_ids, device=device), uniform_RT.to(device)
    token_RT = torch.full((num_rows, length_T), policy.pad_id, device=device)
    logprob_RT = torch.zeros(num_rows, length_T, dtype=torch.float64, device=device)
    row_B = torch.arange(num_rows, device=device)  # which row each of the batch is
    alive_B = torch.ones(num_rows, dtype=torch.bool, device=device)
    ids, attention, prompt_of_B = _left_padded(policy, prompts)
    cache = DynamicCache(config=policy.model.config)
    with autocast_to_bfloat16(device, policy.autocast):  # one context, which keeps its bfloat16 weights to its end
        logits_BV = _logits(policy, cache, ids, attention)[prompt_of_B]
        cache.batch_select_indices(prompt_of_B)
        attention = attention[prompt_of_B]
        for t in range(length_T):
            interrupt.check()
            token_B, logprob_B = draw(logits_BV, uniform_RT[row_B, t], temperature, top_p)
            token_RT[row_B, t], logprob_RT[row_B, t] = token_B, logprob_B.double()
            if t + 1 == length_T:
                break
            alive_B &= torch.isin(token_B, stop_ids, invert=True)
            if (t + 1) % LOOK_EVERY_TOKENS[device.type] == 0:
                num_alive = int(alive_B.sum())
                if num_alive == 0:
                    break
                if num_alive < COMPACT_BELOW_SHARE * len(alive_B):
                    keep = alive_B.nonzero().squeeze(-1)
                    cache.batch_select_indices(keep)
                    row_B, token_B, alive_B, attention = (x[keep] for x in (row_B, token_B, alive_B, attention))
            attention = F.pad(attention, (0, 1), value=1)
            logits_BV = _logits(policy, cache, token_B[:, None], attention)
    return _until_stop(token_RT, logprob_RT, stop_ids)


def _left_padded(policy: Policy, prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and attention mask of the prompts, each run of equal prompts once, and the prompt of each row."""
    first = [n for n, prompt in enumerate(prompts) if n == 0 or prompt != prompts[n - 1]]
    prompt_of = np.searchsorted(first, np.arange(len(prompts)), side="right") - 1
    width = max(map(len, prompts))
    ids = [[policy.pad_id] * (width - len(prompts[n])) + prompts[n] for n in first]
    attention = [[0] * (width - len(prompts[n])) + [1] * len(prompts[n]) for n in first]
    ids_PS, attention_PS, prompt_of_R = (torch.tensor(x, device=policy.device) for x in (ids, attention, prompt_of))
    return ids_PS, attention_PS, prompt_of_R


def _logits(policy: Policy, cache: DynamicCache, input_ids: Tensor, attention: Tensor) -> Tensor:
    """The logits (B, V) of the next token of every row; appends ``input_ids`` to the KV cache."""
    position_ids = (attention.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
    output = policy.model(
        input_ids=input_ids,
        attention_mask=attention,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits_BV: Tensor = output.logits[:, -1]
    return logits_BV


def _until_stop(token_RT: Tensor, logprob_RT: Tensor, stop_ids: Tensor) -> list[tuple[list[int], list[float], bool]]:
    """Each row up to its first stop token."""
    stops_RT = torch.isin(token_RT, stop_ids)
    finished_R = stops_RT.any(1)
    length_R = torch.where(finished_R, stops_RT.int().argmax(1) + 1, token_RT.shape[1])
    columns = (column.tolist() for column in (token_RT, logprob_RT, length_R, finished_R))
    return [(ids[:n], logprobs[:n], finished) for ids, logprobs, n, finished in zip(*columns, strict=True)]
