"""Log-probabilities of completion tokens: the one place for dtypes, chunking and the clamp of log-ratios.

Shape suffixes: B completions, T completion positions, N completion tokens laid end to end, H hidden size, V vocabulary.
"""

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pspo.model.batch import Batch, scatter

LOG_RATIO_CLAMP = 20.0
"""Log-ratios are clamped to ±20 before any objective sees them; claims of exactness hold inside."""

CHUNK_LOGITS = 2**24
"""Logits that exist at one time: 64 MiB in float32, 110 positions of a 152k vocabulary; on a GPU 16 times as many."""


def token_logprobs(
    model: Any,
    batch: Batch,
    hidden_NH: Tensor,
    temperature: float,
    autocast: bool = False,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B, T) and entropies (B, T), in nats, of the completion tokens; 0 where masked.

    ``hidden_NH`` are the ``predicting_states`` of the batch. The log-probabilities are those of the temperature-scaled,
    untruncated policy: log softmax(logits / temperature)[token]. Only the hidden states that predict completion tokens
    reach the language-model head, in chunks whose logits are recomputed in the backward pass, so that no tensor of
    logits of the whole batch ever exists. Entropies have a gradient where ``entropy_gradient`` asks for it.
    """
    head, token_N = model.get_output_embeddings(), batch.token_ids_BT[batch.mask_BT]
    size = max(1, CHUNK_LOGITS * (16 if hidden_NH.is_cuda else 1) // model.config.get_text_config().vocab_size)
    if type(head) is torch.nn.Linear:
        with torch.autocast(hidden_NH.device.type, enabled=False):  # which would take entropies in bfloat16
            logprob_N, entropy_N = _Linear.apply(  # type: ignore[no-untyped-call]
                hidden_NH, head.weight, head.bias, token_N, temperature, autocast, entropy_gradient, size
            )
    else:
        plain = functools.partial(checkpoint, _plain, head, use_reentrant=False, preserve_rng_state=False)
        with autocast_to_bfloat16(hidden_NH.device, autocast):
            chunks = zip(torch.split(hidden_NH, size), torch.split(token_N, size), strict=True)
            pieces = [plain(hidden, token, temperature, entropy_gradient) for hidden, token in chunks]
        logprob_N, entropy_N = (torch.cat(column) for column in zip(*pieces, strict=True))
    return scatter(batch.mask_BT, logprob_N), scatter(batch.mask_BT, entropy_N)


def predicting_states(decoder: Any, batch: Batch, autocast: bool = False) -> Tensor:
    """The last hidden states (N, H) at the positions that predict the completion tokens, row by row."""
    attention = batch.attention
    if attention.ndim == 2:
        attention = attention.long()
    elif decoder.config._attn_implementation != "sdpa":  # the library adds other masks to the scores
        lowest = torch.finfo(decoder.dtype).min
        attention = torch.zeros_like(attention, dtype=decoder.dtype).masked_fill_(~attention, lowest)
    with autocast_to_bfloat16(batch.mask_BT.device, autocast):
        states = decoder(
            input_ids=batch.input_ids_RS, attention_mask=attention, position_ids=batch.position_RS, use_cache=False
        )
    hidden_NH: Tensor = states.last_hidden_state.flatten(0, 1)[batch.source_BT[batch.mask_BT]]
    return hidden_NH


def log_ratio(logprob_BT: Tensor, old_logprob_BT: Tensor) -> Tensor:
    """Log r = log π_θ − log π_old, clamped to ±``LOG_RATIO_CLAMP``; beyond it the gradient is zero."""
    return (logprob_BT - old_logprob_BT).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)


def autocast_to_bfloat16(device: torch.device, enabled: bool) -> contextlib.AbstractContextManager[Any]:
    """Matrix products in bfloat16 on float32 masters, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if enabled else contextlib.nullcontext()


def raised(logits: Tensor) -> Tensor:
    """Logits in float32 at the least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _plain(
    head: torch.nn.Module, hidden_NH: Tensor, token_N: Tensor, temperature: float, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (N,) of one chunk, for a head that is more than a matrix: one with adapters."""
    logprob_NV = raised(head(hidden_NH)).div(temperature).log_softmax(-1)
    with contextlib.nullcontext() if with_gradient else torch.no_grad():
        entropy_N = -(logprob_NV.exp() * logprob_NV).sum(-1)
    return logprob_NV.gather(-1, token_N[:, None]).squeeze(-1), entropy_N


class _Linear(torch.autograd.Function):
    """Log-probabilities and entropies under a linear head, of which the backward pass keeps no more than (N,).

    With z = W h / T, p = softmax(z) and H its entropy: ∂ log p_k / ∂z = 1_k − p and ∂H / ∂z = −p (log p + H). A chunk's
    logits and probabilities stand in two buffers, allocated once.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, token_N: Tensor, temperature: float,
        autocast: bool, with_gradient: bool, size: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        head = _Head(weight_VH, bias_V, temperature, autocast, min(size, len(hidden_NH)))
        logprob_N, entropy_N = (hidden_NH.new_empty(len(token_N), dtype=head.raised) for _ in range(2))
        columns = (hidden_NH, token_N, logprob_N, entropy_N)
        for hidden, token, logprob, entropy in zip(*(torch.split(c, size) for c in columns), strict=True):
            z = head.logits(hidden.to(head.dtype))
            p = torch.softmax(z, -1, out=head.rooms[1][: len(z)])  # cheaper than an exp: it works on rows in the cache
            norm = z.amax(-1) - p.amax(-1).log()
            torch.sub(z.gather(-1, token[:, None]).squeeze(-1), norm, out=logprob)
            torch.sub(norm, torch.linalg.vecdot(p, z), out=entropy)
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, token_N, entropy_N)
        ctx.settings = temperature, autocast, with_gradient, size
        if not with_gradient:
            ctx.mark_non_differentiable(entropy_N)
        return logprob_N, entropy_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_logprob_N: Tensor, by_entropy_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, bias_V, token_N, entropy_N = ctx.saved_tensors
        temperature, autocast, with_gradient, size = ctx.settings
        head = _Head(weight_VH, bias_V, temperature, autocast, min(size, len(hidden_NH)))
        by_hidden_NH = torch.empty_like(hidden_NH)
        by_weight_VH = torch.zeros_like(weight_VH) if ctx.needs_input_grad[1] else None
        by_bias_V = torch.zeros_like(bias_V) if bias_V is not None and ctx.needs_input_grad[2] else None
        columns = (hidden_NH, by_hidden_NH, token_N, entropy_N, by_logprob_N, by_entropy_N)
        for hidden, by_hidden, token, entropy, by_logprob, by_entropy in zip(
            *(torch.split(c, size) for c in columns), strict=True
        ):
            low = hidden.to(head.dtype)
            z = head.logits(low)
            factor_N1 = by_logprob[:, None] / -temperature  # in ∂z = factor (p − 1_k), it goes with the smaller matrix
            by_z = torch.softmax(z, -1, out=head.rooms[1][: len(z)])
            if with_gradient:
                log_p = torch.log_softmax(z, -1, out=z)
                by_z.mul_(log_p.add_(entropy[:, None]).mul_(by_entropy[:, None]).add_(by_logprob[:, None]))
                by_z.scatter_add_(-1, token[:, None], -by_logprob[:, None])
                factor_N1 = torch.full_like(factor_N1, -1 / temperature)
            else:
                by_z.scatter_add_(-1, token[:, None], torch.full_like(factor_N1, -1))
            by_z = by_z.to(head.dtype)
            by_hidden.copy_((by_z @ head.weight_VH) * factor_N1)
            if by_weight_VH is not None:
                a, b = by_z.T, low * factor_N1.to(head.dtype)
                if by_weight_VH.dtype == head.dtype:
                    by_weight_VH.addmm_(a, b)  # without another matrix of that size
                else:
                    by_weight_VH += a @ b
            if by_bias_V is not None:
                by_bias_V += (by_z * factor_N1).sum(0)
        return by_hidden_NH, by_weight_VH, by_bias_V, None, None, None, None, None


class _Head:
    """A linear head in the dtype of its products, with room for two chunks of logits."""

    def __init__(self, weight_VH: Tensor, bias_V: Tensor | None, temperature: float, autocast: bool, rows: int) -> None:
        self.dtype = torch.bfloat16 if autocast else weight_VH.dtype
        self.raised = torch.promote_types(weight_VH.dtype, torch.float32)
        self.weight_VH = weight_VH.detach().to(self.dtype)
        self.bias_V = None if bias_V is None else bias_V.detach().to(self.raised) / temperature
        self.scale = 1 / temperature
        self.rooms = [weight_VH.new_empty((rows, len(weight_VH)), dtype=self.raised) for _ in range(2)]

    def logits(self, low_NH: Tensor) -> Tensor:
        """Logits of a chunk by the temperature, in the first room, at least in float32."""
        z = self.rooms[0][: len(low_NH)]
        if z.dtype == self.dtype:
            torch.mm(low_NH * self.scale, self.weight_VH.T, out=z)
        else:
            torch.mul(low_NH @ self.weight_VH.T, self.scale, out=z)
        return z if self.bias_V is None else z.add_(self.bias_V)
