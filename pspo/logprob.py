"""Log-probabilities of completion tokens: the one place for masks, dtypes, chunking and the clamp of log-ratios.

Shape suffixes: B rows, S positions of prompt and completion, T completion positions, N completion tokens of the batch
laid end to end, H hidden size, V vocabulary.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOG_RATIO_CLAMP = 20.0
"""Log-ratios are clamped to ±20 before any objective sees them; claims of exactness hold inside."""

CHUNK_LOGITS = 2**24
"""Logits that exist at one time: 64 MiB in float32, so 110 positions of a 152k vocabulary."""


@dataclass(frozen=True)
class Batch:
    """Prompts and completions, right-padded; ``mask_BT`` is true on completion tokens.

    Attributes:
        input_ids_BS: prompt and completion, then padding.
        attention_BS: true where ``input_ids_BS`` is not padding.
        position_BT: where in S the hidden state stands that predicts completion token t.
        token_ids_BT: the completion, then padding.
        mask_BT: true on completion tokens, the stop token included.
    """

    input_ids_BS: Tensor
    attention_BS: Tensor
    position_BT: Tensor
    token_ids_BT: Tensor
    mask_BT: Tensor


def make_batch(prompts: list[list[int]], completions: list[list[int]], pad_id: int, device: torch.device) -> Batch:
    """Pad rows of token ids to one batch."""
    num_rows = len(prompts)
    length_S = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    length_T = max(len(c) for c in completions)
    input_ids_BS = torch.full((num_rows, length_S), pad_id)
    token_ids_BT = torch.full((num_rows, length_T), pad_id)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        input_ids_BS[row, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
        token_ids_BT[row, : len(completion)] = torch.tensor(completion)
    prompt_length_B1 = torch.tensor([[len(p)] for p in prompts])
    length_B1 = torch.tensor([[len(c)] for c in completions])
    mask_BT = torch.arange(length_T) < length_B1
    position_BT = (prompt_length_B1 - 1 + torch.arange(length_T)).clamp(max=length_S - 1)
    attention_BS = torch.arange(length_S) < prompt_length_B1 + length_B1
    return Batch(*(t.to(device) for t in (input_ids_BS, attention_BS, position_BT, token_ids_BT, mask_BT)))


def pad_to(rows: list[list[float]], like_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of numbers, padded with zeros to the shape and device of ``like_BT``."""
    padded_BT = torch.zeros(like_BT.shape, dtype=dtype)
    for row, values in enumerate(rows):
        padded_BT[row, : len(values)] = torch.tensor(values, dtype=dtype)
    return padded_BT.to(like_BT.device)


@dataclass(frozen=True)
class Scored:
    """What a policy says of a batch's completion tokens; masked positions are 0.

    Attributes:
        logprob_BT: log-probabilities, with gradient.
        entropy_BT: entropies in nats, with gradient where asked for.
        hidden_NH: the hidden states that predicted the tokens.
    """

    logprob_BT: Tensor
    entropy_BT: Tensor
    hidden_NH: Tensor


def token_logprobs(
    model: Any, batch: Batch, temperature: float, autocast: bool = False, entropy_gradient: bool = False
) -> Scored:
    """Log-probabilities and entropies of the completion tokens.

    They are those of the temperature-scaled, untruncated policy: log softmax(logits / temperature)[token]. Only the
    hidden states that predict completion tokens reach the language-model head, in chunks whose logits are recomputed
    in the backward pass, so that no tensor of logits of the whole batch ever exists.
    """
    head, tokens = model.get_output_embeddings(), batch.token_ids_BT[batch.mask_BT]
    with autocast_to_bfloat16(batch.mask_BT.device, autocast):
        hidden_NH = predicting_states(model.get_decoder(), batch)
        logprob_N, entropy_N = _chunked(head, hidden_NH, tokens, temperature, entropy_gradient, model.config.vocab_size)
    return Scored(scatter(batch.mask_BT, logprob_N), scatter(batch.mask_BT, entropy_N), hidden_NH)


def predicting_states(decoder: Any, batch: Batch) -> Tensor:
    """The last hidden states (N, H) at the positions that predict the completion tokens, row by row."""
    states = decoder(input_ids=batch.input_ids_BS, attention_mask=batch.attention_BS.long(), use_cache=False)
    row_N, column_N = batch.mask_BT.nonzero(as_tuple=True)
    hidden_NH: Tensor = states.last_hidden_state[row_N, batch.position_BT[row_N, column_N]]
    return hidden_NH


def scatter(mask_BT: Tensor, values_N: Tensor) -> Tensor:
    """Values of the completion tokens laid end to end -> (B, T), 0 where masked."""
    return values_N.new_zeros(mask_BT.shape).masked_scatter(mask_BT, values_N)


def log_ratio(logprob_BT: Tensor, old_logprob_BT: Tensor) -> Tensor:
    """Log r = log π_θ − log π_old, clamped to ±``LOG_RATIO_CLAMP``; beyond it the gradient is zero."""
    return (logprob_BT - old_logprob_BT).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)


def autocast_to_bfloat16(device: torch.device, enabled: bool) -> contextlib.AbstractContextManager[Any]:
    """Matrix products in bfloat16 on float32 masters, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if enabled else contextlib.nullcontext()


def _chunked(
    head: torch.nn.Module,
    hidden_NH: Tensor,
    token_N: Tensor,
    temperature: float,
    entropy_gradient: bool,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    size = max(1, CHUNK_LOGITS // vocab_size)
    pieces = []
    for hidden, token in zip(torch.split(hidden_NH, size), torch.split(token_N, size), strict=True):
        arguments = (head, hidden, token, temperature, entropy_gradient)
        pieces.append(
            # One chunk is no more than what recomputation would hold again, so it keeps its logits.
            checkpoint(_logprob_entropy, *arguments, use_reentrant=False, preserve_rng_state=False)
            if len(hidden_NH) > size
            else _logprob_entropy(*arguments)
        )
    return torch.cat([p[0] for p in pieces]), torch.cat([p[1] for p in pieces])


def _logprob_entropy(
    head: torch.nn.Module, hidden_NH: Tensor, token_N: Tensor, temperature: float, entropy_gradient: bool
) -> tuple[Tensor, Tensor]:
    logits_NV = head(hidden_NH)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) / temperature
    logprob_NV = logits_NV.log_softmax(-1)
    with contextlib.nullcontext() if entropy_gradient else torch.no_grad():
        entropy_N = -(logprob_NV.exp() * logprob_NV).sum(-1)
    return logprob_NV.gather(-1, token_N[:, None]).squeeze(-1), entropy_N
