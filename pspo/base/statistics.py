"""Means and maxima over all tokens of a step, the Wilson interval of a proportion, and pass@k."""

import math

import torch
from torch import Tensor


class Statistics:
    """Accumulates metrics as sums, counts and maxima on the device, so that a mean is over all tokens of the step."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # (sum, count) by name
        self._maxima: dict[str, Tensor] = {}

    def mean(self, name: str, values: Tensor, mask: Tensor) -> None:
        total, count = values.detach()[mask].double().sum(), mask.sum(dtype=torch.float64)
        self._sums[name] = self._sums.get(name, 0) + torch.stack([total, count])

    def max(self, name: str, values: Tensor, mask: Tensor) -> None:
        largest = torch.where(mask, values.detach().double(), -math.inf).max()
        self._maxima[name] = torch.maximum(self._maxima.get(name, largest), largest)

    def add(self, other: "Statistics") -> None:
        for name, total in other._sums.items():
            self._sums[name] = self._sums.get(name, 0) + total
        for name, largest in other._maxima.items():
            self._maxima[name] = torch.maximum(self._maxima.get(name, largest), largest)

    def cpu(self) -> "Statistics":
        """The same numbers in the CPU's memory."""
        moved = Statistics()
        moved._sums, moved._maxima = ({n: x.cpu() for n, x in of.items()} for of in (self._sums, self._maxima))
        return moved

    def result(self) -> dict[str, float]:
        means = {name: (total / count.clamp(min=1)).item() for name, (total, count) in self._sums.items()}
        return means | {name: largest.item() for name, largest in self._maxima.items()}


def wilson_interval(num_correct: float, num_total: float, z: float = 1.959963984540054) -> tuple[float, float]:
    """The Wilson score interval of a proportion, 95 % by default (Wilson 1927, JASA 22:209).

    (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n) with p = num_correct / n.
    """
    p = num_correct / num_total
    spread = z * math.sqrt(p * (1 - p) / num_total + (z / (2 * num_total)) ** 2)
    centre, scale = p + z**2 / (2 * num_total), 1 + z**2 / num_total
    low = 0.0 if num_correct == 0 else (centre - spread) / scale
    high = 1.0 if num_correct == num_total else (centre + spread) / scale
    return low, high


def pass_at_k(n: int, c: int, k: int) -> float:
    """The unbiased estimate of the probability that one of k answers is correct, from c correct of n answers.

    1 − C(n − c, k) / C(n, k), for k up to n (Chen et al. 2021, arXiv 2107.03374, eq. 1).
    """
    return 1 - math.comb(n - c, k) / math.comb(n, k)
