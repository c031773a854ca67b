"""Optimizers and the learning rate over the budget."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch

from pspo.base.schema import Schema, key
from pspo.host import ranks


@dataclass(frozen=True, kw_only=True)
class Optimizer(Schema, ABC, block="optimizer"):
    """Base of all optimizers: a learning rate, its schedule and a bound on the gradient norm."""

    scale_free: ClassVar[bool] = True
    """Whether a constant factor on the loss cancels."""

    name: str
    lr: float = key("highest learning rate", within="(0, inf)")
    warmup_steps: int = key("optimizer steps over which the learning rate rises linearly", within="[0, inf)")
    decay: Literal["constant", "linear"] = key("learning rate after the warm-up: constant, or linear to 0 at the end")
    max_grad_norm: float = key("the gradient is scaled down to this norm", within="(0, inf]")

    @abstractmethod
    def make(self, parameters: Iterable[Any]) -> torch.optim.Optimizer:
        """The torch optimizer of parameters, of pairs of name and parameter, or of groups of them."""

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
    sharded: bool = key("each rank holds the state of its part of the parameters: equal numbers", before=False)

    def make(self, parameters: Iterable[Any]) -> torch.optim.Optimizer:
        about: dict[str, Any] = {
            "betas": (self.beta1, self.beta2),
            "eps": self.eps,
            "weight_decay": self.weight_decay,
            "fused": True,
        }
        if self.sharded and ranks.count() > 1:  # ZeRO's first stage (Rajbhandari et al. 2020, arXiv 1910.02054)
            from torch.distributed.optim import ZeroRedundancyOptimizer  # which compiles scripts

            groups = [group | {"params": [p for _, p in group["params"]]} for group in parameters]
            return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, lr=self.lr, **about)
        return torch.optim.AdamW(parameters, self.lr, **about)


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """Stochastic gradient descent: under it the (1 − α) of linear smoothing is a factor on the learning rate."""

    scale_free: ClassVar[bool] = False

    momentum: float = key("decay of the mean of gradients; 0 is plain", within="[0, 1)")

    def make(self, parameters: Iterable[Any]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum)


@dataclass(frozen=True, kw_only=True)
class Muon(AdamW):
    """Orthogonalised momentum for matrices (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), else AdamW.

    Both have the rate ``lr``. By ``adjust_lr_fn=original`` Muon's update of a matrix is scaled by √max(1, out / in);
    the out of an embedding, which maps one-hot vectors, are its columns. ``match_rms_adamw`` scales it to the size of
    AdamW's updates, 0.2 √max(out, in), so that AdamW's rates serve (Liu et al. 2025, arXiv 2502.16982).
    """

    momentum: float = key("decay of Muon's mean of gradients (Nesterov's)", within="[0, 1)")
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = key("scale of Muon's updates, as torch.optim.Muon names it")
    matrices: str = key("regular expression of the names of the parameters for Muon, if they are matrices")
    embeddings: str = key("regular expression of the names of those matrices that are embeddings")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("matrices", "embeddings"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                raise self.refuse(name, f"is no regular expression: {error}") from error

    def make(self, parameters: Iterable[Any]) -> torch.optim.Optimizer:
        if self.sharded:
            raise self.refuse("sharded", "goes with optimizer=adamw")
        by_adamw: list[dict[str, Any]] = []
        by_muon: list[dict[str, Any]] = []
        for group in parameters:
            rest, factor = [], group.get("lr_factor", 1.0)
            for name, parameter in group["params"]:
                if parameter.ndim != 2 or not re.fullmatch(self.matrices, name):
                    rest.append((name, parameter))
                    continue
                rows, columns = parameter.shape
                is_turned = self.adjust_lr_fn == "original" and re.fullmatch(self.embeddings, name)
                scale = math.sqrt(max(1.0, columns / rows) / max(1.0, rows / columns)) if is_turned else 1.0
                by_muon.append({"params": [(name, parameter)], "lr_factor": factor * scale})
            by_adamw += [group | {"params": rest}] if rest else []
        if not by_muon:
            raise self.refuse("matrices", "no trained matrix has such a name; mend it, or choose optimizer=adamw")
        about = {"weight_decay": self.weight_decay, "momentum": self.momentum, "adjust_lr_fn": self.adjust_lr_fn}
        muon = torch.optim.Muon(by_muon, self.lr, **about)  # type: ignore[arg-type]
        return cast(torch.optim.Optimizer, Joint([*([super().make(by_adamw)] if by_adamw else []), muon]))


class Joint:
    """Several optimizers as one."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """All groups, in the order of the optimizers."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, own in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(own)


def whole_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state; of one that is sharded all ranks call this, and rank 0 alone gets its whole state."""
    if hasattr(optimizer, "consolidate_state_dict"):
        optimizer.consolidate_state_dict()
        return optimizer.state_dict() if ranks.is_first() else {}
    return optimizer.state_dict()


OPTIMIZERS: dict[str, type[Optimizer]] = {"adamw": AdamW, "sgd": SGD, "muon": Muon}
Optimizer.kinds = OPTIMIZERS
