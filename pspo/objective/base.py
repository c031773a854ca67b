"""The interface of every objective.

An objective is a dataclass that one can call: its fields are its configuration, ``__post_init__`` its validation and
``__call__`` its formula, per token. It knows no batch, no reduction, no optimiser and no logger.

Shape suffixes: B completions, T token positions.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

from torch import Tensor

from pspo.schema import Schema, unknown


@dataclass(frozen=True, kw_only=True)
class ObjectiveInput:
    """What an objective sees of a batch; every tensor has shape (B, T) and ``mask_BT`` is true on completion tokens.

    Attributes:
        logprob_BT: log π_θ(a_t|s_t), with gradient.
        old_logprob_BT: log π_old(a_t|s_t), constant.
        log_ratio_BT: log r_t = log π_θ − log π_old, clamped once by ``pspo.logprob.log_ratio``.
        advantage_BT: A, constant.
        mask_BT: which positions count.
    """

    logprob_BT: Tensor
    old_logprob_BT: Tensor
    log_ratio_BT: Tensor
    advantage_BT: Tensor
    mask_BT: Tensor

    @property
    def ratio_BT(self) -> Tensor:
        """The importance ratio r_t = π_θ(a_t|s_t) / π_old(a_t|s_t)."""
        return self.log_ratio_BT.exp()


@dataclass(frozen=True, kw_only=True)
class Objective(Schema, ABC, block="objective"):
    """Base of all objectives: ``objective(x)`` is the loss per token, to be minimised, of shape (B, T)."""

    name: str
    takes_alpha: ClassVar[bool] = False

    @classmethod
    def select(cls, values: Mapping[str, Any]) -> type[Self]:
        """The class that ``objective.name`` names. Raises ConfigError with the list of objectives."""
        from pspo.objective import OBJECTIVES  # the table imports the classes that import this module

        if values.get("name") not in OBJECTIVES:
            raise unknown(str(values.get("name")), OBJECTIVES, "objective")
        return cast(type[Self], OBJECTIVES[values["name"]])

    @abstractmethod
    def __call__(self, x: ObjectiveInput) -> Tensor:
        """Loss per token, shape (B, T)."""
