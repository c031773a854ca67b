"""Optimizers and the learning rate over the budget."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pspo.base.schema import Schema, key


@dataclass(frozen=True, kw_only=True)
class Optimizer(Schema, ABC, block="optimizer"):
    """Base of all optimizers: a learning rate, its schedule and a bound on the gradient norm."""

    name: str
    lr: float = key("highest learning rate", within="(0, inf)")
    warmup_steps: int = key("optimizer steps over which the learning rate rises linearly", within="[0, inf)")
    decay: Literal["constant", "linear"] = key("learning rate after the warm-up: constant, or linear to 0 at the end")
    max_grad_norm: float = key("the gradient is scaled down to this norm", within="(0, inf]")

    @abstractmethod
    def make(self, parameters: Iterable[Any]) -> torch.optim.Optimizer:
        """The torch optimizer of parameters or of parameter groups."""

    def lr_at(self, step: int, fraction: float, warmup_fraction: float) -> float:
        """The learning rate of optimizer step ``step`` (from 0), when ``fraction`` f of the budget is spent.

        lr · (step + 1) / W in the warm-up of W steps, then under linear decay lr · (1 − f) / (1 − warmup_fraction):
        transformers' linear schedule in any unit of budget, except that the learning rate of step 0 is lr / W, not 0.
        """
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        return self.lr if self.decay == "constant" else self.lr * (1 - fraction) / max(1 - warmup_fraction, 1e-12)

    def rates(self, first: int, updates: int, start: float, end: float, warmup: float) -> tuple[list[float], float]:
        """Learning rates of one rollout's optimizer steps, and the share of the budget spent at the warm-up's end.

        From optimizer step ``first`` on, the share of the budget spent rises from ``start`` to ``end`` over ``updates``
        optimizer steps. ``warmup`` is the second result of the rollout before.
        """
        if first <= self.warmup_steps and self.decay != "constant":  # a constant rate needs no share of the budget
            warmup = start + (end - start) * min(self.warmup_steps - first, updates) / updates
        spent = [start + (end - start) * i / updates for i in range(updates)]
        return [self.lr_at(first + i, spent[i], warmup) for i in range(updates)], warmup


@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101): scale-free, so a constant factor on the loss cancels."""

    beta1: float = key("decay of the mean of gradients", within="[0, 1)")
    beta2: float = key("decay of the mean of squared gradients", within="[0, 1)")
    eps: float = key("added to the root of the mean of squares", within="(0, inf)")
    weight_decay: float = key("decoupled weight decay", within="[0, inf)")

    def make(self, parameters: Iterable[Any]) -> torch.optim.Optimizer:
        betas = (self.beta1, self.beta2)
        return torch.optim.AdamW(parameters, self.lr, betas, self.eps, self.weight_decay, fused=True)


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """Stochastic gradient descent: under it the (1 − α) of linear smoothing is a factor on the learning rate."""

    momentum: float = key("decay of the mean of gradients; 0 is plain", within="[0, 1)")

    def make(self, parameters: Iterable[Any]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum)


OPTIMIZERS: dict[str, type[Optimizer]] = {"adamw": AdamW, "sgd": SGD}
Optimizer.kinds = OPTIMIZERS
