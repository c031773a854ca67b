"""Log-probabilities of completion tokens: the one place for dtypes and chunking.

Shape suffixes: B completions, T completion positions, N completion tokens laid end to end, H hidden size, V vocabulary.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pspo.model.batch import Batch, scatter

CHUNK_LOGITS = 2**24
"""Logits that exist at one time: 64 MiB in float32, 110 positions of a 152k vocabulary; on a GPU 16 times as many."""


def token_logprobs(
    model: Any, batch: Batch, hidden_NH: Tensor, temperature: float, autocast: bool, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B, T) and entropies (B, T), in nats, of the completion tokens; 0 where masked.

    ``hidden_NH`` are the ``predicting_states`` of the batch. The log-probabilities are those of the temperature-scaled,
    untruncated policy: log softmax(logits / temperature)[token]. Only the hidden states that predict completion tokens
    reach the language-model head, a linear layer, in chunks whose logits are recomputed in the backward pass, so that
    no tensor of logits of the whole batch ever exists. Entropies have a gradient where ``entropy_gradient`` is set.
    """
    linear, token_N = model.get_output_embeddings(), batch.token_ids_BT[batch.mask_BT]
    rows = max(1, CHUNK_LOGITS * (16 if hidden_NH.is_cuda else 1) // len(linear.weight))
    head = _Head(temperature, autocast, entropy_gradient, min(rows, len(hidden_NH)))
    with torch.autocast(hidden_NH.device.type, enabled=False):  # which would take entropies in bfloat16
        columns = _Logprobs.apply(head, hidden_NH, linear.weight, linear.bias, token_N)  # type: ignore[no-untyped-call]
    logprob_BT, entropy_BT = (scatter(batch.mask_BT, value_N) for value_N in columns)
    return logprob_BT, entropy_BT


def predicting_states(decoder: Any, batch: Batch, autocast: bool = False) -> Tensor:
    """The last hidden states (N, H) at the positions that predict the completion tokens, row by row."""
    with autocast_to_bfloat16(batch.mask_BT.device, autocast):
        inputs = {"input_ids": batch.input_ids_RS, "position_ids": batch.position_RS}
        states_RSH: Tensor = decoder(**inputs, attention_mask=batch.attention, use_cache=False).last_hidden_state
    # Completions that share a prompt share a state; the backward pass of [...] adds theirs up in any order of threads.
    return states_RSH.flatten(0, 1).index_select(0, batch.source_BT[batch.mask_BT])


def autocast_to_bfloat16(device: torch.device, enabled: bool) -> contextlib.AbstractContextManager[Any]:
    """Matrix products in bfloat16 on float32 masters, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if enabled else contextlib.nullcontext()


def raised(logits: Tensor) -> Tensor:
    """Logits in float32 at the least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@dataclass(frozen=True)
class _Head:
    """How a linear head's logits are computed: at a temperature, ``rows`` hidden states at a time."""

    temperature: float
    autocast: bool
    entropy_gradient: bool
    rows: int

    def cast(self, weight_VH: Tensor) -> Tensor:
        """The weight in the dtype of its products."""
        return weight_VH.detach().to(torch.bfloat16 if self.autocast else weight_VH.dtype)

    def chunks(
        self, weight_VH: Tensor, bias_V: Tensor | None, hidden_NH: Tensor, *columns: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, list[Tensor]]]:
        """Of each chunk z = logits / temperature, softmax(z), and the rows of ``hidden_NH`` and of the columns.

        ``weight_VH`` is ``cast``. The two matrices (rows, V) are buffers that the next chunk overwrites.
        """
        dtype, scale = weight_VH.dtype, 1 / self.temperature
        shape, raised_dtype = (self.rows, len(weight_VH)), torch.promote_types(dtype, torch.float32)
        logits_NV, softmax_NV = (weight_VH.new_empty(shape, dtype=raised_dtype) for _ in range(2))
        for hidden, *others in zip(*(torch.split(c, self.rows) for c in (hidden_NH, *columns)), strict=True):
            low, z = hidden.to(dtype), logits_NV[: len(hidden)]
            if z.dtype == dtype:
                torch.mm(low * scale, weight_VH.T, out=z)
            else:
                torch.mul(low @ weight_VH.T, scale, out=z)
            if bias_V is not None:
                z.add_(bias_V.detach().to(z.dtype) / self.temperature)
            yield z, torch.softmax(z, -1, out=softmax_NV[: len(z)]), [low, *others]


class _Logprobs(torch.autograd.Function):
    """Log-probabilities and entropies under a linear head, of which the backward pass keeps no more than (N,).

    With z = W h / T, p = softmax(z) and H its entropy: ∂ log p_k / ∂z = 1_k − p and ∂H / ∂z = −p (log p + H).
    """

    @staticmethod
    def forward(
        ctx: Any, head: _Head, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, token_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropies = [], []
        for z, p, (_, token) in head.chunks(head.cast(weight_VH), bias_V, hidden_NH, token_N):
            norm = z.amax(-1) - p.amax(-1).log()  # log Σ exp z, without another pass of exponentials
            logprobs.append(z.gather(-1, token[:, None]).squeeze(-1) - norm)
            entropies.append(norm - torch.linalg.vecdot(p, z))
        logprob_N, entropy_N = torch.cat(logprobs), torch.cat(entropies)
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, token_N, entropy_N)
        ctx.head = head
        if not head.entropy_gradient:
            ctx.mark_non_differentiable(entropy_N)
        return logprob_N, entropy_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_logprob_N: Tensor, by_entropy_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, bias_V, token_N, entropy_N = ctx.saved_tensors
        head, cast_VH = ctx.head, ctx.head.cast(weight_VH)
        by_hidden_NH = torch.empty_like(hidden_NH)
        by_weight_VH = torch.zeros_like(weight_VH) if ctx.needs_input_grad[2] else None
        by_bias_V = torch.zeros_like(bias_V) if ctx.needs_input_grad[3] else None
        columns = (by_hidden_NH, token_N, entropy_N, by_logprob_N, by_entropy_N)
        for z, p, (low, by_hidden, token, *numbers) in head.chunks(cast_VH, bias_V, hidden_NH, *columns):
            token_N1, (entropy_N1, by_logprob_N1, by_entropy_N1) = token[:, None], (x[:, None] for x in numbers)
            if head.entropy_gradient:
                log_p = torch.log_softmax(z, -1, out=z)
                p.mul_(log_p.add_(entropy_N1).mul_(by_entropy_N1).add_(by_logprob_N1))
                p.scatter_add_(-1, token_N1, -by_logprob_N1)
                factor_N1 = torch.full_like(by_logprob_N1, -1 / head.temperature)
            else:
                p.scatter_add_(-1, token_N1, torch.full_like(by_logprob_N1, -1))
                factor_N1 = by_logprob_N1 / -head.temperature  # in ∂z = factor (p − 1_k), on the smaller matrix
            by_z = p.to(cast_VH.dtype)
            by_hidden.copy_((by_z @ cast_VH) * factor_N1)
            if by_weight_VH is not None:
                a, b = by_z.T, low * factor_N1.to(low.dtype)
                if by_weight_VH.dtype == a.dtype:
                    by_weight_VH.addmm_(a, b)  # without another matrix of that size
                else:
                    by_weight_VH += a @ b
            if by_bias_V is not None:
                by_bias_V += (by_z * factor_N1).sum(0)
        return None, by_hidden_NH, by_weight_VH, by_bias_V, None
