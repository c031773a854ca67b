"""Supervised learning, one loop for every model: next-token cross-entropy on the completions of given texts."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pspo.host import interrupt
from pspo.model.batch import Batch
from pspo.model.logprob import predicting_states, token_logprobs


def train(
    model: Any, optimizer: torch.optim.Optimizer, steps: Iterable[tuple[Sequence[Batch], float]], *,
    autocast: bool, max_grad_norm: float,
) -> Iterator[float]:  # fmt: skip
    """Take one optimizer step for each (micro-batches, learning rate); yields the step's loss, in nats per token.

    The loss is −Σ log π(token) / tokens over the completion tokens of all micro-batches of the step, so it does not
    depend on how they are cut. Stops at a signal, between steps. Raises FloatingPointError before an optimizer step
    whose loss or gradient is not finite.
    """
    for batches, lr in steps:
        interrupt.check()
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        num_tokens, total = sum(int(batch.mask_BT.sum()) for batch in batches), 0.0
        for batch in batches:
            loss = -_logprobs(model, batch, autocast).sum() / num_tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        if not (math.isfinite(total) and norm.isfinite()):
            raise FloatingPointError(f"loss {total}, gradient norm {norm.item()}: the optimizer step was not taken")
        optimizer.step()
        yield total


@torch.no_grad()
def mean_loss(model: Any, batches: Sequence[Batch], autocast: bool) -> float:
    """The loss of ``train`` on all batches, without a step."""
    total = sum(_logprobs(model, batch, autocast).double().sum().item() for batch in batches)
    return -total / sum(int(batch.mask_BT.sum()) for batch in batches)


def _logprobs(model: Any, batch: Batch, autocast: bool) -> Tensor:
    hidden_NH = predicting_states(model.get_decoder(), batch, autocast)
    return token_logprobs(model, batch, hidden_NH, temperature=1.0, autocast=autocast)[0]
