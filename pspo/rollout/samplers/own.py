"""The sampler ``own``: completions from the trainer's own weights, so that old log-probabilities are exact.

Shape suffixes: R completions of T positions, B unfinished ones, P prompts of S positions, V vocabulary, K ranks.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from pspo.base.stream import generator
from pspo.dataset import Prompt
from pspo.host import interrupt
from pspo.host.memory import halving
from pspo.model import Policy
from pspo.model.logprob import autocast_to_bfloat16, raised
from pspo.rollout.sample import Completion, RolloutConfig, random_key
from pspo.rollout.samplers.cache import make_cache
from pspo.rollout.stop import StopStrings

COMPACT_BELOW_SHARE = 0.75
"""Finished rows leave the batch once fewer than this share of its rows is still being written."""

RANKED_TOKENS = 1024
"""Most probable tokens among which the nucleus is searched first, as a sort of a large vocabulary is slow."""


class OwnSampler:
    """Samples from the policy that is trained."""

    def __init__(self, policy: Policy, config: RolloutConfig) -> None:
        self.policy, self.config = policy, config

    def refresh(self, policy: Policy) -> None:
        """Sample with this policy's weights, which are not copied."""
        self.policy = policy

    def sleep(self) -> None:
        """Nothing: the weights are the trainer's, and the KV cache goes with each batch."""

    def under(self, config: RolloutConfig) -> "OwnSampler":
        """The same policy's sampler under other settings."""
        return OwnSampler(self.policy, config)

    def sample(
        self, prompts: Sequence[Prompt], group_size: int, seed: Sequence[int], *, greedy: bool = False
    ) -> list[Completion]:
        """As ``Sampler.sample``; prompts of like length are decoded together."""
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))
        rows = [(i, g) for i in by_length for g in range(group_size)]
        ids, length = [prompts[i].token_ids for i, _ in rows], self.config.max_new_tokens
        keys = [random_key(seed, prompts[i], g) for i, g in rows]
        uniform_RT = torch.tensor(np.array([generator(*key).random(length) for key in keys]))
        temperature, top_p = (0.0, 1.0) if greedy else (self.config.temperature, self.config.top_p)
        stop = StopStrings(self.config.stop, self.policy.tokenizer)

        def decoded(max_rows: int) -> list[tuple[list[int], list[float], bool]]:
            parts = [slice(start, start + max_rows) for start in range(0, len(rows), max_rows)]
            batches = (decode(self.policy, ids[part], uniform_RT[part], temperature, top_p, stop) for part in parts)
            return [row for batch in batches for row in batch]

        advice = "or set model.autocast=true, or a smaller model"
        written, _ = halving("rollout.max_rows", self.config.max_rows, advice, decoded)
        completions = {}
        for (i, g), (token_ids, logprobs, finished) in zip(rows, written, strict=True):
            completions[i, g] = Completion(prompts[i], g, token_ids, logprobs, finished, stop.text(token_ids))
        return [completions[place] for place in sorted(completions)]


@torch.inference_mode()
def decode(
    policy: Policy,
    prompts: Sequence[list[int]],
    uniform_RT: Tensor,
    temperature: float,
    top_p: float,
    stop: StopStrings,
) -> list[tuple[list[int], list[float], bool]]:
    """Write one row for each prompt, one token per step: token ids, log-probabilities in nats, whether it is finished.

    Neighbouring rows with equal prompts share one prefill. Prompts are left-padded; finished rows leave the batch.
    """
    device, (num_rows, length_T) = policy.device, uniform_RT.shape
    stop_ids, uniform_RT = torch.tensor(policy.stop_ids, device=device), uniform_RT.to(device)
    token_RT = torch.full((num_rows, length_T), policy.pad_id, device=device)
    logprob_RT = torch.zeros(num_rows, length_T, dtype=torch.float64, device=device)
    row_B = torch.arange(num_rows, device=device)  # index in R of each row of the batch
    alive_B = torch.ones(num_rows, dtype=torch.bool, device=device)
    ids, attention, prompt_of_B = _left_padded(policy, prompts)
    cache = make_cache(policy.model.config)
    with autocast_to_bfloat16(device, policy.autocast), _cast_once(policy) as head:
        logits_BV = head(_states(policy, cache, ids, attention))[prompt_of_B]
        cache.batch_select_indices(prompt_of_B)
        attention = attention[prompt_of_B]
        for t in range(length_T):
            interrupt.check()
            token_B, logprob_B = draw(logits_BV, uniform_RT[row_B, t], temperature, top_p)
            token_RT[row_B, t], logprob_RT[row_B, t] = token_B, logprob_B.double()
            if t + 1 == length_T:
                break
            alive_B &= torch.isin(token_B, stop_ids, invert=True)
            if stop.strings:
                alive_B &= ~torch.tensor(stop.completed(token_RT[row_B, : t + 1]), device=device)
            num_alive = int(alive_B.sum())
            if num_alive == 0:
                break
            if num_alive < COMPACT_BELOW_SHARE * len(alive_B):
                cache.batch_select_indices(keep_B := alive_B.nonzero().squeeze(-1))
                row_B, token_B, alive_B, attention = (x[keep_B] for x in (row_B, token_B, alive_B, attention))
            attention = F.pad(attention, (0, 1), value=1)
            logits_BV = head(_states(policy, cache, token_B[:, None], attention))
    rows = _until_stop(token_RT, logprob_RT, stop_ids)
    return [stop.cut(*row) for row in rows] if stop.strings else rows


def _left_padded(policy: Policy, prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and attention mask of the prompts, each run of equal prompts once, and the prompt of each row."""
    first = [n for n, prompt in enumerate(prompts) if n == 0 or prompt != prompts[n - 1]]
    prompt_of_R = torch.from_numpy(np.searchsorted(first, np.arange(len(prompts)), side="right") - 1)
    ids = [torch.tensor(prompts[n]) for n in first]
    ids_PS = pad_sequence(ids, batch_first=True, padding_value=policy.pad_id, padding_side="left")
    attention_PS = pad_sequence([torch.ones_like(x) for x in ids], batch_first=True, padding_side="left")
    return ids_PS.to(policy.device), attention_PS.to(policy.device), prompt_of_R.to(policy.device)


@contextlib.contextmanager
def _cast_once(policy: Policy) -> Iterator[Callable[[Tensor], Tensor]]:
    """The language-model head; under autocast, which else casts every weight for every token, linear weights are cast.

    An embedding is looked up in float32, also where it is tied to the head.
    """
    head = policy.model.get_output_embeddings()
    if not policy.autocast:
        yield head
        return
    linears = [module for module in policy.model.get_decoder().modules() if isinstance(module, torch.nn.Linear)]
    weights = [module.weight.data for module in linears]
    with torch.inference_mode(False), torch.no_grad():  # of an inference tensor no parameter is made
        weight_VH = head.weight.to(torch.bfloat16)
        try:
            for module in linears:
                module.weight.data = module.weight.data.to(torch.bfloat16)
            with torch.inference_mode():
                yield functools.partial(F.linear, weight=weight_VH, bias=head.bias)
        finally:
            for module, weight in zip(linears, weights, strict=True):
                module.weight.data = weight


def _states(policy: Policy, cache: DynamicCache, input_ids: Tensor, attention: Tensor) -> Tensor:
    """The hidden states (B, H) that predict the next token of every row; appends ``input_ids`` to the KV cache."""
    position_ids = (attention.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
    inputs = {"input_ids": input_ids, "attention_mask": attention, "position_ids": position_ids}
    decoder = policy.model.get_decoder()
    states_BSH: Tensor = decoder(**inputs, past_key_values=cache, use_cache=True).last_hidden_state
    return states_BSH[:, -1]


def _until_stop(token_RT: Tensor, logprob_RT: Tensor, stop_ids: Tensor) -> list[tuple[list[int], list[float], bool]]:
    """Each row up to its first stop token; whole and finished where there is no stop token."""
    stops_RT = torch.isin(token_RT, stop_ids)
    finished_R = stops_RT.any(1) | (len(stop_ids) == 0)
    length_R = torch.where(stops_RT.any(1), stops_RT.int().argmax(1) + 1, token_RT.shape[1])
    columns = (column.tolist() for column in (token_RT, logprob_RT, length_R, finished_R))
    return [(ids[:n], logprobs[:n], finished) for ids, logprobs, n, finished in zip(*columns, strict=True)]


def draw(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """One token a row by inverting the distribution function at ``uniform_B``, and its untruncated log-probability.

    The nucleus is the smallest set of most probable tokens whose probability reaches ``top_p`` (Holtzman et al. 2020,
    arXiv 1904.09751). Temperature 0 takes the most probable token; its log-probability is that of temperature 1.
    """
    logits_BV = raised(logits_BV)
    if temperature not in (0, 1):
        logits_BV = logits_BV / temperature
    probability_BV = logits_BV.softmax(-1)
    norm_B = logits_BV.amax(-1) - probability_BV.amax(-1).log()
    if temperature == 0:
        token_B = logits_BV.argmax(-1)
    else:
        token_B = _invert(_nucleus(probability_BV, top_p) if top_p < 1 else probability_BV, uniform_B)
    return token_B, logits_BV.gather(-1, token_B[:, None]).squeeze(-1) - norm_B


def _invert(weight_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The first token up to which the weights sum to more than ``uniform_B`` of their total.

    Sums are in float64, whose error is far below a token's share of a large vocabulary. A token without weight is never
    taken, unless weights are not numbers.
    """
    cumulative_BV = weight_BV.cumsum(-1, dtype=torch.float64)
    end_B1 = cumulative_BV[:, -1:]
    target_B1 = torch.minimum(uniform_B[:, None] * end_B1, torch.nextafter(end_B1, torch.zeros_like(end_B1)))
    token_B = torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(-1)
    return token_B.clamp(max=weight_BV.shape[-1] - 1)  # sums that are not numbers have no such place


def _nucleus(probability_BV: Tensor, top_p: float) -> Tensor:
    """The probabilities, 0 outside of the nucleus; of equally probable tokens at its edge the first are inside."""
    ranked_BK = probability_BV.topk(min(RANKED_TOKENS, probability_BV.shape[-1]), dim=-1).values.double()
    if bool((ranked_BK.sum(-1) < top_p).any()):
        ranked_BK = probability_BV.sort(dim=-1, descending=True).values.double()
    size_B1 = (ranked_BK.cumsum(-1) - ranked_BK < top_p).sum(-1, keepdim=True).clamp(min=1)
    edge_B1 = ranked_BK.gather(-1, size_B1 - 1)
    above_BV, at_BV = probability_BV > edge_B1, probability_BV == edge_B1
    room_B1 = size_B1 - above_BV.sum(-1, keepdim=True)
    at_BV &= at_BV.cumsum(-1, dtype=torch.int32) <= room_B1
    return probability_BV.masked_fill(~(above_BV | at_BV), 0)
