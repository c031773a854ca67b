"""The interface of every objective.

An objective is a dataclass that one can call: its fields are its configuration, ``__post_init__`` its validation and
``__call__`` its formula, per token. It knows no batch, no reduction, no optimiser and no logger.

Shape suffixes: B completions, T token positions.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor

from pspo.base import user_code
from pspo.base.schema import Schema

SEQUENCE_LEVELS = ("sequence", "sequence_token")
"""The values of ``loss.importance`` whose ratio is a completion's, not a token's."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveInput:
    """The tensors of a batch that an objective may use, each of shape (B, T).

    Attributes:
        logprob_BT: log π_θ(a_t|s_t), with gradient.
        old_logprob_BT: log π_old(a_t|s_t), constant.
        log_ratio_BT: log of the importance ratio at the level of ``loss.importance``: of one token, log r_t = log π_θ −
            log π_old, clamped once by ``pspo.model.logprob.log_ratio``, or of a completion.
        advantage_BT: A, constant; the same at all tokens of a completion, except under an estimator per token (GAE).
        mask_BT: true on completion tokens.
    """

    logprob_BT: Tensor
    old_logprob_BT: Tensor
    log_ratio_BT: Tensor
    advantage_BT: Tensor
    mask_BT: Tensor

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
    takes_alpha: ClassVar[bool] = False
    linear: ClassVar[bool] = False
    """Whether the loss is linear in the ratio, so that smoothing the ratio is a factor on the gradient."""
    not_at: ClassVar[Mapping[str, str]] = {}
    """Importance levels at which the objective makes no sense, each with the reason, for ``pspo.loss``."""
    whole_completions: ClassVar[bool] = False
    """Whether the formula has one advantage for a whole completion, so that an advantage per token does not fit."""

    def source_files(self) -> list[Path]:
        """The user's own file that holds the class, for the digest in a run's identity."""
        return user_code.source_files(getattr(self, "function", ""))

    def with_alpha(self, alpha: float) -> Self:
        """The same objective with another alpha; only where ``takes_alpha``."""
        return replace(self, alpha=alpha)  # type: ignore[call-arg]

    @abstractmethod
    def __call__(self, x: ObjectiveInput) -> Tensor:
        """Loss per token, shape (B, T)."""
