"""What an objective does to the gradient, read at every inner step (epoch and minibatch) of a rollout.

All shares come from the weight w = −(∂loss/∂log π) / A of each token. Shape suffix: N tokens laid end to end.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pspo.base.schema import Schema, key, unknown
from pspo.objective import OBJECTIVES, Objective, ObjectiveInput, log_ratio

ELSEWHERE = ("epoch", "minibatch", "policy/entropy", "optimizer/grad_norm", "kl/before_k3")
"""Columns of diagnostics.jsonl that the metrics of a step have under another name, over all its tokens."""

QUANTILES = {"q01": 0.01, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q99": 0.99}
ROWS_PER_PROBE_ROW = 64
"""KL after optimizer step i is measured before step i + 1, on the minibatch of step i + 1. After the last optimizer
step of a rollout one of this many rows is scored once more."""

EQUAL_SHARE = 1e-5
"""Weights nearer to noclip's than this share of them are neither damped nor amplified: float32 rounding."""

STRIDE, EXACT_UP_TO_PARAMETERS = 53, 2**20
"""‖Δθ‖ is estimated from every 53rd coordinate, 1.9 % of them (a prime, which no width of a layer is a multiple of),
and measured on all coordinates of a policy of up to 2²⁰ parameters."""


@dataclass(frozen=True, kw_only=True)
class DiagnosticsConfig(Schema, block="diagnostics"):
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


def kl_old_new(when: str, log_ratio_N: Any) -> dict[str, float]:
    """KL(old‖new) on sampled tokens ``before`` or ``after`` an inner step: k1 = E[−log r], k3 = E[r − 1 − log r]."""
    k1_N, k3_N = -log_ratio_N, np.expm1(log_ratio_N) - log_ratio_N
    return {f"kl/{when}_k1": float(k1_N.mean()), f"kl/{when}_k3": float(k3_N.mean())}


def kl_after(logprobs: Sequence[Sequence[float]], old_logprobs: Sequence[Sequence[float]]) -> dict[str, float]:
    """KL(old‖new) on the rows of the probe, after the last optimizer step."""
    new_N, old_N = (torch.tensor(list(chain(*rows)), dtype=torch.float64) for rows in (logprobs, old_logprobs))
    return kl_old_new("after", log_ratio(new_N, old_N).numpy())


def inner_metrics(tokens: Sequence[Tensor]) -> dict[str, float]:
    """Metrics of one inner step from its tokens, each micro-batch's (6, N) as ``Record.add`` stacks them.

    Without a token of one sign of A that sign's quantiles are left out, without any A ≠ 0 the weights as well.
    """
    stacked = torch.cat(list(tokens), dim=1).cpu().numpy()
    log_ratio_N, token_log_ratio_N, gradient_N, whole_N, advantage_N, entropy_N = stacked
    ratio_N, trains_N, mass = np.exp(log_ratio_N), advantage_N != 0, np.abs(whole_N).sum()
    metrics = {
        "ratio/ess": ratio_N.sum() ** 2 / np.square(ratio_N).sum() / len(ratio_N),
        "ratio/tv": np.abs(np.expm1(token_log_ratio_N)).mean() / 2,
        **kl_old_new("before", token_log_ratio_N),
        "policy/entropy": entropy_N.mean(),
        "gradient/zero_advantage_share": np.abs(whole_N[~trains_N]).sum() / mass if mass else 0.0,
    }
    if trains_N.any():
        weight_N, noclip_N = -gradient_N[trains_N] / advantage_N[trains_N], ratio_N[trains_N]
        metrics |= {
            "weight/zero_rate": (weight_N == 0).mean(),
            "weight/damped_rate": ((weight_N > 0) & (weight_N < noclip_N * (1 - EQUAL_SHARE))).mean(),
            "weight/amplified_rate": (weight_N > noclip_N * (1 + EQUAL_SHARE)).mean(),
            "weight/reversed_rate": (weight_N < 0).mean(),
            "weight/mass_kept": np.abs(gradient_N[trains_N]).sum() / np.abs(ratio_N * advantage_N).sum(),
        }
    for name, chosen_N in (("positive", advantage_N > 0), ("negative", advantage_N < 0)):
        if chosen_N.any():
            values = np.quantile(ratio_N[chosen_N], [*QUANTILES.values(), 1.0])
            metrics |= {f"ratio/{name}_{q}": value for q, value in zip([*QUANTILES, "max"], values, strict=True)}
    return {name: float(value) for name, value in metrics.items()}


def sample_coordinates(parameters: Sequence[Tensor]) -> list[Tensor]:
    """A copy of a fixed sample of the parameters' coordinates: every ``STRIDE``-th, or all of a tiny policy."""
    stride = STRIDE if sum(p.numel() for p in parameters) > EXACT_UP_TO_PARAMETERS else 1
    return [p.detach().flatten()[::stride].clone() for p in parameters]


def update_norm(before: Sequence[Tensor], parameters: Sequence[Tensor]) -> float:
    """‖Δθ‖ since ``before = sample_coordinates(parameters)``: √(coordinates / sampled ones) · ‖Δ of the sample‖."""
    pairs = zip(sample_coordinates(parameters), before, strict=True)
    moved = [(new - old).double().square().sum() for new, old in pairs]
    share = sum(p.numel() for p in parameters) / sum(old.numel() for old in before)
    return math.sqrt(share * float(torch.stack(moved).sum()))


def counterfactual(
    gradient_of: Callable[[Objective], Tensor], active: Objective, others: Sequence[Objective]
) -> dict[str, float]:
    """Norms of the other objectives' gradients on the same batch and policy, and their cosines with the active one."""
    reference = gradient_of(active).double()
    metrics = {"counterfactual/active_norm": reference.norm().item()}
    for other in others:
        gradient = gradient_of(other).double()
        metrics[f"counterfactual/{other.name}_norm"] = gradient.norm().item()
        scale = gradient.norm() * reference.norm()  # 0 / 0 is no number
        metrics[f"counterfactual/{other.name}_cosine"] = (gradient.dot(reference) / scale).item()
    return metrics


@dataclass
class Record:
    """The metrics of one step's inner steps."""

    others: list[Objective] = field(default_factory=list)  # for a counterfactual probe at the last inner step, if any
    rows: list[dict[str, float]] = field(default_factory=list)  # one row of metrics for each inner step
    probe: dict[str, float] = field(default_factory=dict)  # the outcome of the counterfactual probe
    tokens: list[Tensor] = field(default_factory=list)  # (6, N) for each micro-batch of the current inner step

    def add(self, x: ObjectiveInput, gradient_BT: Tensor, whole_BT: Tensor, entropy_BT: Tensor) -> None:
        """Add one micro-batch: what the objective saw, its gradient by the log-probabilities, and that with the KL."""
        token_log_ratio_BT = log_ratio(x.logprob_BT, x.old_logprob_BT)
        columns = (x.log_ratio_BT, token_log_ratio_BT, gradient_BT, whole_BT, x.advantage_BT, entropy_BT)
        self.tokens.append(torch.stack([values.detach()[x.mask_BT].double() for values in columns]))

    def end_inner_step(self, about: dict[str, float]) -> None:
        """Turn the tokens into a row; KL after the last optimizer step is KL before this one, on this minibatch."""
        metrics = inner_metrics(self.tokens)
        self.tokens.clear()
        if self.rows:
            self.rows[-1] |= {f"kl/after_{k}": metrics[f"kl/before_{k}"] for k in ("k1", "k3")}
        self.rows.append(about | metrics)

    def summary(self) -> dict[str, float]:
        """The mean of every metric over the inner steps, the largest of maxima; without the columns ``ELSEWHERE``."""
        names = dict.fromkeys(name for row in self.rows for name in row if name not in ELSEWHERE)
        columns = {name: [row[name] for row in self.rows if name in row] for name in names}
        largest = {name: max(values) for name, values in columns.items() if name.endswith("_max")}
        return {name: sum(values) / len(values) for name, values in columns.items()} | largest | self.probe
