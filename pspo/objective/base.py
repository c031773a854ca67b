"""The interface of every objective: a dataclass whose fields are its configuration and whose call is its formula.

It knows no batch, no reduction, no optimiser and no logger. Shape suffixes: B completions, T token positions.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pspo.base import user_code
from pspo.base.schema import Schema, build, key

LOG_RATIO_CLAMP = 20.0
"""Log-ratios are clamped to ±20 before any objective sees them; claims of exactness hold inside."""


def log_ratio(logprob_BT: Tensor, old_logprob_BT: Tensor) -> Tensor:
    """Log r = log π_θ − log π_old, clamped to ±``LOG_RATIO_CLAMP``; beyond it the gradient is zero."""
    return (logprob_BT - old_logprob_BT).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)


@dataclass(frozen=True, kw_only=True)
class ObjectiveInput:
    """The tensors of a batch that an objective may use, each of shape (B, T)."""

    logprob_BT: Tensor  # log π_θ(a_t|s_t), with gradient
    old_logprob_BT: Tensor  # log π_old(a_t|s_t), constant
    log_ratio_BT: Tensor  # at the level of loss.importance: log r_t = log π_θ − log π_old, clamped, or a completion's
    advantage_BT: Tensor  # A, constant; the same at all tokens of a completion but under an estimator per token (GAE)
    mask_BT: Tensor  # true on completion tokens
    target_BT: Tensor | None = None  # what ``Objective.target`` made of the whole optimizer batch, constant

    @classmethod
    def at_tokens(cls, logprob_BT: Tensor, old_logprob_BT: Tensor, advantage_BT: Tensor, mask_BT: Tensor) -> Self:
        """The input at ``loss.importance=token``; where masked the ratio is 1."""
        old_BT = torch.where(mask_BT, old_logprob_BT, logprob_BT.detach())
        return cls(
            logprob_BT=logprob_BT,
            old_logprob_BT=old_BT,
            log_ratio_BT=log_ratio(logprob_BT, old_BT),
            advantage_BT=advantage_BT.to(logprob_BT.dtype),
            mask_BT=mask_BT,
        )

    @property
    def ratio_BT(self) -> Tensor:
        """The importance ratio r_t = π_θ(a_t|s_t) / π_old(a_t|s_t), or the ratio of a completion."""
        return self.log_ratio_BT.exp()

    def sequence_sum(self, values_BT: Tensor) -> Tensor:
        """Σ_t over the completion's tokens, repeated at each token: (B, T)."""
        return torch.where(self.mask_BT, values_BT, 0.0).sum(-1, keepdim=True).expand_as(values_BT)

    def sequence_mean(self, values_BT: Tensor) -> Tensor:
        """1/L Σ_t over the completion's L tokens, repeated at each token: (B, T)."""
        return self.sequence_sum(values_BT) / self.mask_BT.sum(-1, keepdim=True).clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class Objective(Schema, ABC, block="objective"):
    """Base of all objectives: ``objective(x)`` is the loss per token, to be minimised, of shape (B, T)."""

    name: str
    linear: ClassVar[bool] = False
    """Whether the loss is linear in the ratio, so that smoothing the ratio is a factor on the gradient."""
    whole_completions: ClassVar[bool] = False
    """Whether the formula has one advantage for a whole completion, so that an advantage per token does not fit."""
    needs_batch: ClassVar[bool] = False
    """Whether ``target`` is made of a whole optimizer batch, with whole groups, before anything is differentiated."""

    steered: ClassVar[Mapping[str, tuple[str, str]]] = {}
    """Field that a run moves between steps -> the field with its target, or null, and the metric to bring there."""

    @property
    def token_only(self) -> str:
        """Why the objective makes sense at ``loss.importance=token`` alone; empty where it does at every level."""
        return ""

    def source_files(self) -> list[Path]:
        """The user's own file that holds the class, for the digest in a run's identity."""
        return user_code.source_files(getattr(self, "function", ""))

    @abstractmethod
    def __call__(self, x: ObjectiveInput) -> Tensor:
        """Loss per token, shape (B, T)."""

    def target(self, x: ObjectiveInput, group_B: Tensor) -> Tensor:
        """Where ``needs_batch``: ``x.target_BT`` of an optimizer batch of completions of the groups ``group_B``."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Place(Schema, block="objective"):
    """The file or module that holds a user's objective; the objective's own fields are further keys of the block."""

    name: str
    function: str = key("your Objective class: path/to/file.py:Name or package.module:Name", path=True)


def own_class(values: Mapping[str, Any]) -> type[Schema]:
    """The class of ``objective=custom`` with the key ``objective.function`` as one more field. Raises ConfigError."""
    if values.get("function", "???") == "???":
        return Place  # whose construction says that the key is missing
    place = build(Place, {name: values[name] for name in ("name", "function") if name in values})
    objective = user_code.find(place, "function")
    if not (isinstance(objective, type) and issubclass(objective, Objective)):
        raise place.refuse("function", "must be a subclass of pspo.objective.Objective, a frozen dataclass")
    return make_dataclass(objective.__name__, [], bases=(objective, Place), frozen=True, kw_only=True)
