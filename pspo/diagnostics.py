"""What an objective does to the gradient, read at every inner step (epoch and minibatch) of a rollout.

The same numbers for every objective, so that their curves compare: all shares come from the weight w = −(∂loss/∂log π)
/ A of each token, which ``pspo.loss`` has read once. Shape suffixes: N completion tokens laid end to end.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pspo.base.schema import Schema, key, unknown
from pspo.loss import Weighed
from pspo.objective import OBJECTIVES, Objective

ELSEWHERE = ("epoch", "minibatch", "policy/entropy", "optimizer/grad_norm", "kl/before_k3")
"""Columns of diagnostics.jsonl that the metrics of a step have under another name, over all its tokens."""

QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
PROBE = 64
"""KL after an optimizer step is that before the next one, on its minibatch; after a rollout's last step there is none,
so one of so many rows of the rollout is looked at once more."""
EQUAL = 1e-5
"""Weights nearer to noclip's than this share of them are neither damped nor amplified: float32 rounding."""


@dataclass(frozen=True, kw_only=True)
class Diagnostics(Schema, block="diagnostics"):
    """How often a run looks at what its objective does; this changes nothing in what it learns."""

    every: int = key("steps from one record of all inner steps to the next; 0 for none", within="[0, inf)")
    counterfactual_every: int = key("steps from one counterfactual probe to the next; 0 for none", within="[0, inf)")
    counterfactual: list[str] = key("objectives, at their defaults, whose gradients a probe compares")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.counterfactual:
            if name not in OBJECTIVES:
                raise unknown(name, OBJECTIVES, "objective in diagnostics.counterfactual:")
        if self.counterfactual_every and not self.counterfactual:
            raise self.refuse("counterfactual_every", "needs diagnostics.counterfactual=[noclip,clip,...]")


class InnerStep:
    """One optimizer step's tokens, collected over micro-batches; ``result`` tells of all of them at once."""

    def __init__(self) -> None:
        self._tokens: list[Tensor] = []

    def join(self, other: "InnerStep") -> None:
        """Add all micro-batches of another."""
        self._tokens += other._tokens

    def add(self, weighed: Weighed, advantage_BT: Tensor, entropy_BT: Tensor, mask_BT: Tensor) -> None:
        """Add one micro-batch."""
        columns = (weighed.log_ratio_BT, weighed.token_log_ratio_BT, weighed.gradient_BT, advantage_BT, entropy_BT)
        self._tokens.append(torch.stack([values.detach()[mask_BT].double() for values in columns]))

    def result(self) -> dict[str, float]:
        """The metrics; without a token of one sign its quantiles are left out, without any the weights as well."""
        log_ratio_N, token_log_ratio_N, gradient_N, advantage_N, entropy_N = (
            torch.cat(self._tokens, dim=1).cpu().numpy()
        )
        ratio_N, token_ratio_N = np.exp(log_ratio_N), np.exp(token_log_ratio_N)
        taught_N = advantage_N != 0
        found = {
            "ratio/ess": ratio_N.sum() ** 2 / np.square(ratio_N).sum() / len(ratio_N),
            "ratio/tv": np.abs(token_ratio_N - 1).mean() / 2,
            "kl/before_k1": -token_log_ratio_N.mean(),
            "kl/before_k3": (token_ratio_N - 1 - token_log_ratio_N).mean(),
            "policy/entropy": entropy_N.mean(),
        }
        if taught_N.any():
            weight_N, noclip_N = -gradient_N[taught_N] / advantage_N[taught_N], ratio_N[taught_N]
            found |= {
                "weight/zero_rate": (weight_N == 0).mean(),
                "weight/damped_rate": ((weight_N > 0) & (weight_N < noclip_N * (1 - EQUAL))).mean(),
                "weight/amplified_rate": (weight_N > noclip_N * (1 + EQUAL)).mean(),
                "weight/reversed_rate": (weight_N < 0).mean(),
                "weight/mass_kept": np.abs(gradient_N).sum() / np.abs(ratio_N * advantage_N).sum(),
            }
        for name, chosen_N in (("positive", advantage_N > 0), ("negative", advantage_N < 0)):
            if chosen_N.any():
                found |= _quantiles(f"ratio/{name}", np.sort(ratio_N[chosen_N]))
        return {name: float(value) for name, value in found.items()}


def kl_after(logprobs: Sequence[Sequence[float]], old_logprobs: Sequence[Sequence[float]]) -> dict[str, float]:
    """KL(old‖new) on the rows of the probe, k1 = E[−log r] and k3 = E[r − 1 − log r], after the last optimizer step."""
    pairs = [pair for row in zip(logprobs, old_logprobs, strict=True) for pair in zip(*row, strict=True)]
    shifts = [min(max(new - old, -20.0), 20.0) for new, old in pairs]
    return {
        "kl/after_k1": -sum(shifts) / len(shifts),
        "kl/after_k3": sum(math.expm1(d) - d for d in shifts) / len(shifts),
    }


class Distance:
    """‖Δθ‖ from one optimizer step to the next, over all parameters."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._before = self._flat()

    def result(self) -> float:
        """How far the parameters are from where they were at the last call, or at first."""
        before, self._before = self._before, self._flat()
        parts = torch.split(before.sub_(self._before), 2**24)  # in float64, but not all at one time
        return float(torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]).norm())

    def _flat(self) -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self._parameters])


def compare(
    gradient_of: Callable[[Objective], Tensor], active: Objective, others: Sequence[Objective]
) -> dict[str, float]:
    """Norms of the other objectives' gradients on the same batch and policy, and their cosines with the active one."""
    reference = gradient_of(active).double()
    found = {"counterfactual/active_norm": reference.norm().item()}
    for other in others:
        gradient = gradient_of(other).double()
        size = gradient.norm().item()
        found[f"counterfactual/{other.name}_norm"] = size
        scale = size * found["counterfactual/active_norm"]
        found[f"counterfactual/{other.name}_cosine"] = gradient.dot(reference).item() / scale if scale else math.nan
    return found


@dataclass
class Record:
    """What one step's inner steps showed.

    Attributes:
        others: objectives for a counterfactual probe at the last inner step; none is due where it is empty.
        rows: one for each inner step.
        probe: the outcome of the counterfactual probe.
    """

    others: list[Objective] = field(default_factory=list)
    rows: list[dict[str, float]] = field(default_factory=list)
    probe: dict[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, float]:
        """The mean of every metric over the inner steps, the largest of maxima; not what is logged over all tokens."""
        names = dict.fromkeys(name for row in self.rows for name in row if name not in ELSEWHERE)
        found = {}
        for name in names:
            values = [row[name] for row in self.rows if name in row]
            found[name] = max(values) if name.endswith("_max") else sum(values) / len(values)
        return found | self.probe


def _quantiles(name: str, ordered_N: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float]:
    places = np.array([*QUANTILES, 1.0]) * (len(ordered_N) - 1)
    *quantiles, largest = np.interp(places, np.arange(len(ordered_N)), ordered_N).tolist()
    names = [f"{name}_q{round(100 * q):02d}" for q in QUANTILES]
    return dict(zip(names, quantiles, strict=True)) | {f"{name}_max": largest}
