"""Properties that every objective must hold: a new one is one more ``Case`` and a row of ``WITHIN``."""

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import cosh, exp, inf, nan, sqrt

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.optimize import brentq

from pspo.base.schema import ConfigError, as_dict, build
from pspo.config import compose
from pspo.objective import LOG_RATIO_CLAMP, OBJECTIVES, Objective, ObjectiveInput, default_objective, log_ratio
from pspo.optimizer import SGD, AdamW

LOGPROB = -2.0  # of every token of ``inputs``

# Completions of one token each: r, A
TOKENS = [
    (1.00, +1.0), (0.50, +2.0), (0.50, -2.0), (1.50, +2.0), (1.50, -2.0), (1.10, -1.0), (0.90, +1.0), (4.00, +0.5),
    (0.25, -0.5), (2.00, +0.0), (6.00, -0.5),
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One objective with what is known of it, worked out by hand.

    Attributes:
        gradient: ∂loss/∂logprob of each of ``TOKENS``.
        weight: w(r, A), the table of gradient weights in docs/objectives.md.
        loss: of each of ``TOKENS``; None for sg[w] A log π, whose loss is that gradient times log π.
        at_one: w(1).
        up: w(r → ∞) for A > 0.
        down: w(r → 0) for A < 0.
        bound: the largest w(r > 1) for A < 0.
        order: where there is no bound, the power of r that w(r → ∞) follows for A < 0; None for the logarithm.
    """

    objective: Objective
    gradient: list[float]
    weight: Callable[[float, float], float]
    loss: list[float] | None = None
    at_one: float = 1.0
    up: float = 0.0
    down: float = 0.0
    bound: float = inf
    order: float | None = 1.0


def make(name, **fields):
    return OBJECTIVES[name](name=name, **fields)


def clip(eps_low=0.2, eps_high=0.28, dual=None, two_sided=None, band="ratio", delta=0.05):
    bounds = {"dual": dual, "two_sided": two_sided, "band": band, "delta": delta}
    return make("clip", eps_low=eps_low, eps_high=eps_high, **bounds)


def dppo(divergence, delta, cap, symmetric=False, log_ratio_weight=0.0):
    more = {"symmetric": symmetric, "log_ratio_weight": log_ratio_weight}
    return make("dppo", divergence=divergence, delta=delta, cap=cap, **more)


def cispo(cap, floor=0.0):
    return make("cispo", cap=cap, floor=floor)


def cfpo(eps, mass=False):
    return make("cfpo", eps=eps, mass=mass)


def clip_weight(r, a):
    return 0.0 if (a > 0 and r > 1.28) or (a < 0 and r < 0.8) else r


def sigmoid(x):
    return 1 / (1 + exp(-x))


def binary_kl(p, q):
    """KL of Bernoulli(p) and Bernoulli(q), each outcome by itself."""
    pairs = ((p, q), (1 - p, 1 - q))
    return sum(0.0 if one == 0 else inf if other == 0 else one * math.log(one / other) for one, other in pairs)


def dppo_masks(divergence, delta, new, old, a):
    """Whether DPPO leaves the token out."""
    if divergence == "tv":
        return (a > 0 and new > old + delta) or (a < 0 and new < old - delta)
    return ((a > 0 and new > old) or (a < 0 and new < old)) and binary_kl(old, new) > delta


def dppo_weight(divergence, delta, cap):
    return lambda r, a: 0.0 if dppo_masks(divergence, delta, exp(LOGPROB), min(1, exp(LOGPROB) / r), a) else min(r, cap)


def kl_bound(p, delta, edge):
    """The ratio between 1 and ``edge`` where KL(p‖r p) is δ, or the edge where it never is."""
    near = 1 + (edge - 1) * (1 - 1e-12)
    beyond = binary_kl(p, near * p) > delta
    return brentq(lambda r: binary_kl(p, r * p) - delta, 1, near, xtol=1e-14) if beyond else edge


BANDS = {  # of p = π_old, with δ 0.05, ε_low 0.05, ε_high 0.28
    "kl": lambda p: (kl_bound(p, 0.05, 0.0), kl_bound(p, 0.05, 1 / p)),
    "tv": lambda p: (1 - 0.05 / p, 1 + 0.05 / p),
    "chi2": lambda p: (1 - sqrt(0.05 * (1 - p) / p), 1 + sqrt(0.05 * (1 - p) / p)),
    "dcpo": lambda p: ((1 + sqrt(max(0, 1 - 0.2 / p))) / 2, min(10, (1 + sqrt(1 + 1.12 / p)) / 2)),
}


def banded(band):
    """The case of one band of clip."""

    def bounds(r):
        return BANDS[band](min(1, exp(LOGPROB) / r))

    def weight(r, a):
        low, high = bounds(r)
        return 0.0 if (a > 0 and r > high) or (a < 0 and r < low) else r

    held = [min(max(r, bounds(r)[0]), bounds(r)[1]) for r, _ in TOKENS]
    return Case(
        clip(eps_low=0.05, band=band), weight=weight,
        loss=[-min(r * a, h * a) for h, (r, a) in zip(held, TOKENS, strict=True)],
        gradient=[-a * weight(r, a) for r, a in TOKENS],
    )  # fmt: skip


def drpo_weight(r, a):
    """With ε = 0.1."""
    return r * (1 - math.copysign(10, a) * min(1, exp(LOGPROB) / r) * (r - 1))


def aspo_weight(r, a):
    if (a > 0 and r > 1.2) or (a < 0 and r < 0.8):
        return 0.0
    return min(1 / r if a > 0 else r, 3.0)


def gppo_weight(r, a):
    return 1.28 if a > 0 and r > 1.28 else 0.4 if a < 0 and r < 0.8 else r


def maspo_weight(r, a):
    """With σ = 1, a = 1/2 and β = 0.1, where π_old = π / r."""
    if (a > 0 and r > 1) or (a < 0 and r < 1):
        width = min(max(sqrt(r / exp(LOGPROB)), 1), 10) * (1 + 0.1 * a if a > 0 else 1 / (1 - 0.1 * a))
        return r * exp(-(((r - 1) / width) ** 2) / 2)
    return r


E2 = exp(2)
SQUEEZE = [exp(-0.36 / E2), exp(-0.25 / (4.32 * E2)), exp(-9 / (8.82 * E2)), exp(-1.2403125 / E2)]  # of maspo

CASES = [
    Case(make("noclip"), weight=lambda r, a: r, up=inf,
         loss=[-1.0, -1.0, 1.0, -3.0, 3.0, 1.1, -0.9, -2.0, 0.125, 0.0, 3.0],
         gradient=[-1.0, -1.0, 1.0, -3.0, 3.0, 1.1, -0.9, -2.0, 0.125, 0.0, 3.0]),
    Case(clip(), weight=clip_weight,
         loss=[-1.0, -1.0, 1.6, -2.56, 3.0, 1.1, -0.9, -0.64, 0.4, 0.0, 3.0],
         gradient=[-1.0, -1.0, 0.0, 0.0, 3.0, 1.1, -0.9, 0.0, 0.0, 0.0, 3.0]),
    Case(clip(dual=3.0), weight=lambda r, a: 0.0 if a < 0 and r > 3 else clip_weight(r, a), bound=3.0,
         loss=[-1.0, -1.0, 1.6, -2.56, 3.0, 1.1, -0.9, -0.64, 0.4, 0.0, 1.5],
         gradient=[-1.0, -1.0, 0.0, 0.0, 3.0, 1.1, -0.9, 0.0, 0.0, 0.0, 0.0]),
    Case(clip(two_sided=4.0), weight=lambda r, a: 0.0 if a < 0 and r > 4 else clip_weight(r, a), bound=4.0,
         loss=[-1.0, -1.0, 1.6, -2.56, 3.0, 1.1, -0.9, -0.64, 0.4, 0.0, 2.0],
         gradient=[-1.0, -1.0, 0.0, 0.0, 3.0, 1.1, -0.9, 0.0, 0.0, 0.0, 0.0]),
    Case(make("pspo", alpha=0.1), weight=lambda r, a: 0.9 * r, at_one=0.9, up=inf,
         loss=[-1.0, -1.1, 1.1, -2.9, 2.9, 1.09, -0.91, -1.85, 0.1625, 0.0, 2.75],
         gradient=[-0.9, -0.9, 0.9, -2.7, 2.7, 0.99, -0.81, -1.8, 0.1125, 0.0, 2.7]),
    Case(make("pspo_geometric", alpha=0.5), weight=lambda r, a: 0.5 * sqrt(r), at_one=0.5, up=inf, order=0.5,
         loss=[-1, -sqrt(2), sqrt(2), -sqrt(6), sqrt(6), sqrt(1.1), -sqrt(0.9), -1, 0.25, 0, sqrt(1.5)],
         gradient=[-0.5, -sqrt(0.5), sqrt(0.5), -sqrt(1.5), sqrt(1.5), sqrt(0.275), -sqrt(0.225), -0.5, 0.125, 0,
                   sqrt(0.375)]),
    Case(make("pspo_clip", alpha=0.1, eps_low=0.2, eps_high=0.28), at_one=0.9,
         weight=lambda r, a: 0.9 * r if clip_weight(0.9 * r + 0.1, a) else 0.0,
         loss=[-1.0, -1.1, 1.6, -2.56, 2.9, 1.09, -0.91, -0.64, 0.4, 0.0, 2.75],
         gradient=[-0.9, -0.9, 0.0, 0.0, 2.7, 0.99, -0.81, 0.0, 0.0, 0.0, 2.7]),
    Case(make("pspo_relative", alpha=0.5), weight=lambda r, a: 2 * r / (1 + r) ** 2, at_one=0.5, bound=0.5,
         loss=[-1, -4 / 3, 4 / 3, -2.4, 2.4, 1.1 / 1.05, -0.9 / 0.95, -0.8, 0.2, 0, 6 / 7],
         gradient=[-0.5, -8 / 9, 8 / 9, -0.96, 0.96, 2.2 / 4.41, -1.8 / 3.61, -0.16, 0.16, 0, 6 / 49]),
    Case(make("pspo_proportional", delta=0.2, alpha_max=2.0), up=-inf,
         weight=lambda r, a: (1 - min(max(math.copysign(5, a) * (r - 1), 0), 2)) * r,
         loss=[-1.0, -1.0, 3.0, -1.0, 3.0, 1.1, -0.9, 1.0, 0.875, 0.0, 3.0],
         gradient=[-1.0, -1.0, -1.0, 3.0, 3.0, 1.1, -0.9, 2.0, -0.125, 0.0, 3.0]),
    *(banded(band) for band in BANDS),
    Case(make("gppo", eps_low=0.2, eps_high=0.28, beta_low=0.5, beta_high=1.0), weight=gppo_weight, up=1.28, down=0.4,
         loss=[-1.0, -1.0, 0.8, -2.56, 3.0, 1.1, -0.9, -0.64, 0.2, 0.0, 3.0],
         gradient=[-1.0, -1.0, 0.8, -2.56, 3.0, 1.1, -0.9, -0.64, 0.2, 0.0, 3.0]),
    Case(make("aspo", eps_low=0.2, eps_high=0.2, cap=3.0), weight=aspo_weight, bound=3.0,
         gradient=[-1.0, -4.0, 0.0, 0.0, 3.0, 1.1, -1 / 0.9, 0.0, 0.0, 0.0, 1.5]),
    Case(make("dro", beta=0.5), weight=lambda r, a: 1 - 0.5 / a * math.log(r), up=-inf, down=-inf, order=None,
         loss=[0.25 * math.log(r) ** 2 - a * math.log(r) for r, a in TOKENS],
         gradient=[0.5 * math.log(r) - a for r, a in TOKENS]),
    Case(make("r2vpo", lam=0.25, delta=None), weight=lambda r, a: r * (1 - 0.5 * (r - 1) / a), up=-inf, order=2.0,
         loss=[-1.0, -0.9375, 1.0625, -2.9375, 3.0625, 1.1025, -0.8975, 0.25, 0.265625, 0.25, 9.25],
         gradient=[-1.0, -1.125, 0.875, -2.625, 3.375, 1.155, -0.945, 4.0, 0.03125, 1.0, 18.0]),
    Case(cispo(5.0, floor=0.75), weight=lambda r, a: min(max(r, 0.75), 5.0), up=5.0, down=0.75, bound=5.0,
         gradient=[-1.0, -1.5, 1.5, -3.0, 3.0, 1.1, -0.9, -2.0, 0.375, 0.0, 2.5]),
    Case(cispo(5.0), weight=lambda r, a: min(r, 5.0), up=5.0, bound=5.0,
         gradient=[-1.0, -1.0, 1.0, -3.0, 3.0, 1.1, -0.9, -2.0, 0.125, 0.0, 2.5]),
    Case(make("sapo", tau_positive=1.0, tau_negative=1.05),
         weight=lambda r, a: r / cosh((1.0 if a > 0 else 1.05) * (r - 1) / 2) ** 2,
         bound=1.536255633647241,  # at r = 1.9917, where 1 = τ r tanh(τ (r − 1) / 2)
         loss=[-2, -8 * sigmoid(-0.5), 8 * sigmoid(-0.525) / 1.05, -8 * sigmoid(0.5), 8 * sigmoid(0.525) / 1.05,
               4 * sigmoid(0.105) / 1.05, -4 * sigmoid(-0.1), -2 * sigmoid(3), 2 * sigmoid(-0.7875) / 1.05, 0,
               2 * sigmoid(5.25) / 1.05],
         gradient=[-1, -1 / cosh(0.25) ** 2, 1 / cosh(0.2625) ** 2, -3 / cosh(0.25) ** 2, 3 / cosh(0.2625) ** 2,
                   1.1 / cosh(0.0525) ** 2, -0.9 / cosh(0.05) ** 2, -2 / cosh(1.5) ** 2, 0.125 / cosh(0.39375) ** 2, 0,
                   3 / cosh(2.625) ** 2]),
    Case(make("gmpo", eps=0.4),
         weight=lambda r, a: 0.0 if (a > 0 and r > exp(0.4)) or (a < 0 and r < exp(-0.4)) else r,
         loss=[-1, -1, 2 * exp(-0.4), -2 * exp(0.4), 3, 1.1, -0.9, -0.5 * exp(0.4), 0.5 * exp(-0.4), 0, 3],
         gradient=[-1.0, -1.0, 0.0, 0.0, 3.0, 1.1, -0.9, 0.0, 0.0, 0.0, 3.0]),
    Case(cfpo(0.2), weight=lambda r, a: r * (1 - math.copysign(5, a) * (r - 1)), up=-inf, order=2.0,
         loss=[-1.0, 0.25, 2.25, -1.75, 4.25, 1.125, -0.875, 9.25, 0.828125, 0.0, 34.25],
         gradient=[-1.0, -3.5, -1.5, 4.5, 10.5, 1.65, -1.35, 28.0, -0.34375, 0.0, 78.0]),
    Case(cfpo(0.1, mass=True), weight=drpo_weight, up=-inf,
         loss=[5 * exp(LOGPROB) / r * abs(a) * (r - 1) ** 2 - r * a for r, a in TOKENS],
         gradient=[-a * drpo_weight(r, a) for r, a in TOKENS]),
    Case(dppo("tv", 0.1, 5.0, symmetric=True), bound=1 / (1 - 0.1 * exp(2)),
         weight=lambda r, a: 0.0 if abs(exp(LOGPROB) - min(1, exp(LOGPROB) / r)) > 0.1 else min(r, 5.0),
         gradient=[-1.0, 0.0, 0.0, -3.0, 3.0, 1.1, -0.9, 0.0, 0.0, 0.0, 0.0]),
    Case(dppo("tv", 0.1, 5.0), weight=dppo_weight("tv", 0.1, 5.0), bound=5.0,
         gradient=[-1.0, -1.0, 0.0, -3.0, 3.0, 1.1, -0.9, 0.0, 0.0, 0.0, 2.5]),
    Case(dppo("kl", 0.05, 20.0), weight=dppo_weight("kl", 0.05, 20.0), bound=20.0,
         gradient=[-1.0, -1.0, 0.0, -3.0, 3.0, 1.1, -0.9, 0.0, 0.0, 0.0, 3.0]),
    Case(make("maspo", sigma=1.0, mass=0.5, risk=0.1), weight=maspo_weight,
         loss=[-1, -1, SQUEEZE[0], -3 * SQUEEZE[1], 3, 1.1, -0.9, -2 * SQUEEZE[2], SQUEEZE[3] / 8, 0, 3],
         gradient=[-1, -1, SQUEEZE[0], -3 * SQUEEZE[1], 3, 1.1, -0.9, -2 * SQUEEZE[2], SQUEEZE[3] / 8, 0, 3]),
    Case(make("topr"), weight=lambda r, a: 1.0 if a > 0 else min(r, 1.0), up=1.0, bound=1.0,
         gradient=[-1.0, -2.0, 1.0, -2.0, 2.0, 1.0, -1.0, -0.5, 0.125, 0.0, 0.5]),
    Case(make("vespo", k_positive=2.0, lambda_positive=3.0, k_negative=3.0, lambda_negative=2.0),
         weight=lambda r, a: exp(3 - 3 * r) * r**2 if a > 0 else exp(2 - 2 * r) * r**3, bound=3.375 * exp(-1),
         gradient=[-1, -0.5 * exp(1.5), 0.25 * exp(1), -4.5 * exp(-1.5), 6.75 * exp(-1), 1.331 * exp(-0.2),
                   -0.81 * exp(0.3), -8 * exp(-9), exp(1.5) / 128, 0, 108 * exp(-10)]),
]  # fmt: skip

# Completions of several tokens, for the objectives that weigh whole completions: r of the tokens, A
COMPLETIONS = [((0.5, 1.5, 2.0), +2.0), ((0.5, 1.5, 2.0), -1.0), ((1.25, 0.5), -1.0)]
G = [0.5 ** (1 / 3) * exp(0.8 / 3), 3 ** (1 / 3) * exp(-0.4 / 3), sqrt(1.25) * exp(-0.2)]  # gmpo's geometric means
V = [2.25 * exp(-1.5), 3.375 * exp(-1), 0.625**3 * exp(0.75)]  # vespo's φ(1.5), φ(1.5), φ(0.625)

WHOLE = {  # of each completion, w of each token and the loss of each
    "gmpo": [([G[0], 0, 0], [-2 * G[0]] * 3), ([0, G[1], G[1]], [G[1]] * 3), ([G[2], 0], [G[2]] * 2)],
    "topr": [([1] * 3, [4] * 3), ([1] * 3, [-2] * 3), ([0.625] * 2, [-1.25] * 2)],
    "vespo": [([V[0]] * 3, [4 * V[0]] * 3), ([V[1]] * 3, [-2 * V[1]] * 3), ([V[2]] * 2, [-2 * V[2]] * 2)],
}

WITHIN = {
    tuple(field.split(".")): within
    for within, fields in {
        "[0, 1)": "pspo.alpha pspo_geometric.alpha pspo_clip.alpha pspo_relative.alpha",
        "(0, 1]": "clip.eps_low pspo_clip.eps_low gppo.eps_low aspo.eps_low",
        "[0, 1]": "cispo.floor",
        "(0, inf)": "clip.eps_high pspo_clip.eps_high sapo.tau_positive sapo.tau_negative gmpo.eps cfpo.eps dppo.delta "
        "vespo.k_positive vespo.lambda_positive vespo.k_negative vespo.lambda_negative pspo_proportional.delta "
        "pspo_proportional.alpha_max clip.delta gppo.eps_high aspo.eps_high r2vpo.lam r2vpo.delta dro.beta tpo.eta",
        "(1, inf)": "clip.dual clip.two_sided",
        "[1, inf)": "cispo.cap dppo.cap aspo.cap",
        "(0, 10]": "maspo.sigma",
        "[0, inf)": "maspo.mass maspo.risk gppo.beta_low gppo.beta_high dppo.log_ratio_weight",
    }.items()
    for field in fields.split()
}


def outside(within):
    """Values just outside an interval, infinity, and no number at all."""
    low, high = (float(end) for end in within[1:-1].split(","))
    ends = [low] * (within[0] == "(") + [high] * (within[-1] == ")")
    return [low - 0.2, high + 0.2, inf, nan, *ends, *(int(end) for end in ends if end < inf)]


def label(case):
    values = as_dict(case.objective)
    chosen = [name for name in ("dual", "two_sided", "symmetric", "floor") if values.get(name)]
    chosen += ["mass"] * (values.get("mass") is True)
    chosen += [values[name] for name in ("divergence", "band") if name in values]
    return "-".join([values["name"], *chosen])


every = pytest.mark.parametrize("case", CASES, ids=label)
nonzero = st.floats(-5, 5).filter(lambda a: abs(a) > 1e-3)
ratios = st.floats(0.01, 20)
alphas = st.floats(0, 0.99)


def inputs(log_ratios, advantages, dtype=torch.float64, mask=None):
    """Completions of one token each, or of a row each, with logprob a leaf that takes a gradient."""
    log_ratio_BT = torch.as_tensor(log_ratios, dtype=dtype)
    log_ratio_BT = log_ratio_BT[:, None] if log_ratio_BT.ndim == 1 else log_ratio_BT
    logprob_BT = torch.full_like(log_ratio_BT, LOGPROB).requires_grad_()
    return ObjectiveInput(
        logprob_BT=logprob_BT,
        old_logprob_BT=logprob_BT.detach() - log_ratio_BT,
        log_ratio_BT=log_ratio_BT + logprob_BT - logprob_BT.detach(),
        advantage_BT=torch.as_tensor(advantages, dtype=dtype).reshape(-1, 1).expand_as(log_ratio_BT),
        mask_BT=torch.ones_like(log_ratio_BT, dtype=torch.bool) if mask is None else mask,
    )


def at_logprobs(logprobs, old_logprobs, advantages, dtype=torch.float64):
    """Completions of one token, with these log-probabilities."""
    logprob_BT, old_logprob_BT = (torch.tensor(values, dtype=dtype)[:, None] for values in (logprobs, old_logprobs))
    given = {"logprob_BT": logprob_BT.requires_grad_(), "old_logprob_BT": old_logprob_BT}
    return replace(
        inputs([0.0] * len(logprobs), advantages, dtype), **given, log_ratio_BT=log_ratio(logprob_BT, old_logprob_BT)
    )


def at_probabilities(new, old, a):
    """One token, with these probabilities; for log 0 stands a number that any KL notices."""
    return at_logprobs(*([math.log(p) if p else -1e12] for p in (new, old)), a)


def loss_and_gradient(objective, x):
    loss_BT = objective(x)
    assert loss_BT.shape == x.logprob_BT.shape
    total = torch.where(x.mask_BT, loss_BT, 0.0).sum()
    (gradient_BT,) = torch.autograd.grad(total, x.logprob_BT, retain_graph=True)  # x may serve more than once
    return loss_BT.detach(), gradient_BT


def weights(objective, log_ratios, a):
    """w(r) = −(∂loss/∂logprob) / A, of completions of one token."""
    return -loss_and_gradient(objective, inputs(log_ratios, a))[1][:, 0] / a


def weight(objective, r, a):
    return weights(objective, [math.log(r)], a).item()


def assert_close(got, expected):
    """Equal but for the rounding of float64, which depends on the processor and on a number's place in its tensor."""
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def assert_same(got, expected, x):
    """The same loss and the same gradient."""
    for one, other in zip(loss_and_gradient(got, x), loss_and_gradient(expected, x), strict=True):
        assert_close(one, other)


def random_inputs(rows=6, tokens=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    log_ratio_BT = torch.randn(rows, tokens, dtype=torch.float64, generator=generator)
    advantage_B = torch.randn(rows, dtype=torch.float64, generator=generator)
    return inputs(log_ratio_BT, advantage_B, mask=torch.rand(rows, tokens, generator=generator) < 0.7)


# --- every objective


def test_the_table_has_every_objective():
    assert {case.objective.name for case in CASES} == {name for name, o in OBJECTIVES.items() if not o.needs_batch}
    assert len({label(case) for case in CASES}) == len(CASES)


@every
def test_loss_and_gradient_by_hand(case):
    x = inputs([math.log(r) for r, _ in TOKENS], [a for _, a in TOKENS])
    loss_BT, gradient_BT = loss_and_gradient(case.objective, x)
    expected = [LOGPROB * gradient for gradient in case.gradient] if case.loss is None else case.loss
    assert loss_BT[:, 0].tolist() == pytest.approx(expected, abs=1e-9)
    assert gradient_BT[:, 0].tolist() == pytest.approx(case.gradient, abs=1e-9)


@every
@given(r=st.floats(0.01, 100), a=st.floats(0.01, 10), sign=st.sampled_from([-1, 1]))
def test_gradient_weight(case, r, a, sign):
    a *= sign
    if case.weight(0.999999 * r, a) != pytest.approx(case.weight(1.000001 * r, a), rel=1e-2, abs=1e-3):
        r *= 1.001  # at a jump either side's weight will do
    assert weight(case.objective, r, a) == pytest.approx(case.weight(r, a), rel=1e-9, abs=1e-13)


@every
def test_gradient_weight_at_its_limits(case):
    for w, limit in ((weight(case.objective, 1e8, 1.0), case.up), (weight(case.objective, 1e-20, -1.0), case.down)):
        unbounded = 5 if case.order is None else 1e3
        assert w * math.copysign(1, limit) > unbounded if abs(limit) == inf else w == pytest.approx(limit, abs=1e-6)


@every
def test_gradient_weight_of_wrong_tokens_that_became_likely(case):
    w = weights(case.objective, torch.linspace(0, 8, 4001) * math.log(10), -1.0)
    if case.order is None:
        assert (w[-1] - w[-501]).item() == pytest.approx((w[-501] - w[-1001]).item(), rel=1e-5)
    elif case.bound == inf:
        assert math.log10(w[-1] / w[-501]) == pytest.approx(case.order, abs=1e-5)
    else:
        assert 0.99 * case.bound < w.max() <= case.bound * (1 + 1e-9)


@every
def test_at_ratio_one_the_gradient_is_that_of_noclip_times_the_documented_factor(case):
    x = inputs(torch.zeros(4, 3), torch.randn(4, generator=torch.Generator().manual_seed(0)))
    expected_BT = case.at_one * loss_and_gradient(make("noclip"), x)[1]
    torch.testing.assert_close(loss_and_gradient(case.objective, x)[1], expected_BT, atol=1e-12, rtol=1e-12)


@every
@pytest.mark.parametrize("length", [1, 64])
@pytest.mark.parametrize(("dtype", "reach"), [(torch.float64, 100.0), (torch.float32, LOG_RATIO_CLAMP)])
def test_finite_at_extreme_log_ratios(case, dtype, reach, length):
    rows = torch.tensor([[-reach], [-reach], [reach], [reach], [-reach], [reach]]).expand(-1, length)
    for values in loss_and_gradient(case.objective, inputs(rows, [3.0, -3.0, 3.0, -3.0, 0.0, 0.0], dtype)):
        assert values.dtype == dtype
        assert values.isfinite().all()


@every
def test_finite_behind_the_clamp_however_far_the_policies_are_apart(case):
    logprobs, old_logprobs = [-1e4, 0.0, -300.0, 300.0, 0.0], [0.0, -1e4, 0.0, -300.0, 0.0]
    for a in (1.0, -1.0):
        for values in loss_and_gradient(case.objective, at_logprobs(logprobs, old_logprobs, a, torch.float32)):
            assert values.isfinite().all()


@every
def test_rows_may_be_permuted(case):
    x, order = random_inputs(), torch.tensor([3, 1, 5, 0, 2, 4])
    permuted = ObjectiveInput(**{name: value[order] for name, value in vars(x).items() if value is not None})
    assert_close(case.objective(permuted), case.objective(x)[order])


@every
def test_masked_tokens_do_not_reach_the_others(case):
    x = random_inputs()
    loss_BT, gradient_BT = loss_and_gradient(case.objective, x)
    spoilt = replace(
        x,
        log_ratio_BT=torch.where(x.mask_BT, x.log_ratio_BT, 7.0),
        advantage_BT=torch.where(x.mask_BT, x.advantage_BT, -99.0),
        old_logprob_BT=torch.where(x.mask_BT, x.old_logprob_BT, -99.0),
    )
    spoilt_loss_BT, spoilt_gradient_BT = loss_and_gradient(case.objective, spoilt)
    assert_close(spoilt_loss_BT[x.mask_BT], loss_BT[x.mask_BT])
    assert_close(spoilt_gradient_BT, gradient_BT)
    assert not spoilt_gradient_BT[~x.mask_BT].any()


@every
def test_gradient_is_the_derivative_but_of_what_is_held_constant(case):
    log_ratio_B = torch.tensor([-1.3, -0.5, -0.1, 0.0, 0.1, 0.45, 1.2], dtype=torch.float64)
    for a in (1.7, -0.6):
        x = inputs(log_ratio_B, a)
        loss_BT, gradient_BT = loss_and_gradient(case.objective, x)
        if case.loss is None:  # sg[w] A log π
            expected_BT = loss_BT / LOGPROB
        elif case.objective.name in ("maspo", "gppo"):  # sg[F] r A, and where gppo clips sg[β (1 ± ε) / r] r A
            expected_BT = loss_BT
        elif case.objective.name == "pspo_proportional":  # −((1 − sg[α]) r + sg[α]) A
            alpha_B = (math.copysign(5, a) * (log_ratio_B.exp() - 1)).clamp(0, 2)
            expected_BT = loss_BT + a * alpha_B.reshape(loss_BT.shape)
        else:
            old = (LOGPROB - log_ratio_B).tolist()
            moved = (at_logprobs([LOGPROB + step] * len(old), old, a) for step in (1e-6, -1e-6))
            ahead, behind = (case.objective(x).detach() for x in moved)
            expected_BT = (ahead - behind) / 2e-6
        torch.testing.assert_close(gradient_BT, expected_BT, rtol=1e-7, atol=1e-9)


@every
def test_linear_says_whether_the_weight_is_in_proportion_to_the_ratio(case):
    log_ratio_B = torch.linspace(-4, 4, 41, dtype=torch.float64)
    proportional = all(
        torch.allclose(weights(case.objective, log_ratio_B, a), case.at_one * log_ratio_B.exp(), rtol=1e-9, atol=0)
        for a in (1.0, -1.0)
    )
    assert proportional == case.objective.linear


@every
def test_whole_completions_says_whether_tokens_reach_each_other(case):
    x, y = inputs([[-0.1, 0.1, 0.1]], -1.0), inputs([[-0.1, 0.1, -0.2]], -1.0)
    reach = not torch.allclose(case.objective(x)[:, :2], case.objective(y)[:, :2], rtol=1e-9, atol=0)
    assert reach == case.objective.whole_completions


# --- whole completions


@pytest.mark.parametrize("case", [case for case in CASES if case.objective.whole_completions], ids=label)
def test_completions_by_hand(case):
    padded = [[math.log(r) for r in row] + [9.0] * (4 - len(row)) for row, _ in COMPLETIONS]
    mask_BT = torch.tensor([[t < len(row) for t in range(4)] for row, _ in COMPLETIONS])
    x = inputs(padded, [a for _, a in COMPLETIONS], mask=mask_BT)
    for row, (_, a), loss_T, gradient_T, (w, loss) in zip(
        mask_BT, COMPLETIONS, *loss_and_gradient(case.objective, x), WHOLE[case.objective.name], strict=True
    ):
        assert loss_T[row].tolist() == pytest.approx(loss, abs=1e-9)
        assert gradient_T[row].tolist() == pytest.approx([-a * each for each in w], abs=1e-9)
        assert not gradient_T[~row].any()


def test_sums_and_means_are_over_a_completions_own_tokens():
    mask_BT = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()
    values_BT = torch.tensor([[1.0, 2.0, 6.0, nan], [inf, -inf, 4.0, nan], [nan, inf, -inf, 1.0]]).requires_grad_()
    x = inputs(torch.zeros(3, 4), 1.0, mask=mask_BT)
    assert x.sequence_sum(values_BT).tolist() == [[9.0] * 4, [4.0] * 4, [0.0] * 4]
    assert x.sequence_mean(values_BT).tolist() == [[3.0] * 4, [4.0] * 4, [0.0] * 4]
    for reduce, expected in ((x.sequence_sum, [1.0, 1.0, 1.0]), (x.sequence_mean, [1 / 3, 1 / 3, 1 / 3])):
        (gradient_BT,) = torch.autograd.grad(reduce(values_BT)[:, 0].sum(), values_BT)
        assert gradient_BT[0].tolist() == pytest.approx([*expected, 0.0])
        assert gradient_BT[1:].tolist() == [[0.0, 0.0, 1.0, 0.0], [0.0] * 4]


# --- configuration


def test_every_number_has_an_interval():
    numbers = {
        (name, f.name): f.metadata.get("within")
        for name, cls in OBJECTIVES.items()
        for f in dataclasses.fields(cls)
        if f.type in (int, float, float | None)
    }
    assert numbers == WITHIN


@pytest.mark.parametrize(("name", "field"), WITHIN)
def test_bad_fields_are_refused(name, field):
    within = WITHIN[name, field]
    good = as_dict(default_objective(name))
    assert build(Objective, good) == make(**good)
    message = re.escape(f"objective.{field} must be in {within}, got ")
    for value in outside(within):
        with pytest.raises(ConfigError, match=message + re.escape(repr(value))):
            make(**{**good, field: value})
        with pytest.raises(ConfigError, match=message + re.escape(repr(float(value)))):
            build(Objective, {**good, field: value})


PLAIN_CLIP = as_dict(clip())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "pspo", "alpha": "0.1"}, "objective.alpha must be a number, got '0.1'"),
        ({"name": "pspo"}, "objective.alpha has no value; set it with objective.alpha=<value>"),
        ({**PLAIN_CLIP, "alpha": 0.1}, "unknown key objective.alpha"),
        ({"name": "psop", "alpha": 0.1}, "unknown objective psop (did you mean pspo?); known: "),
        ({}, "unknown objective None; known: "),
        ({**PLAIN_CLIP, "dual": "3"}, "objective.dual must be a number or null, got '3'"),
        ({**PLAIN_CLIP, "dual": 3, "two_sided": 4}, "objective.two_sided=4.0: and objective.dual=3.0 bound the same"),
        ({**PLAIN_CLIP, "two_sided": 1.28}, "objective.two_sided=1.28: must be above 1 + objective.eps_high = 1.28"),
        (
            {**PLAIN_CLIP, "band": "hellinger"},
            "objective.band must be one of ratio, tv, kl, chi2, dcpo, got 'hellinger'",
        ),
        ({**PLAIN_CLIP, "two_sided": 1.1}, "objective.two_sided=1.1: must be above 1 + objective.eps_high = 1.28"),
        (
            {**as_dict(dppo("tv", 0.1, 20.0)), "divergence": "js"},
            "objective.divergence must be one of tv, kl, got",
        ),
    ],
)
def test_bad_blocks_are_refused(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        build(Objective, values)


# --- clip


@given(r=ratios, a=nonzero, eps_low=st.floats(0.01, 0.99), eps_high=st.floats(0.01, 3))
def test_clip_has_zero_gradient_exactly_where_the_policy_has_gone_far_enough(r, a, eps_low, eps_high):
    low, high = 1 - eps_low, 1 + eps_high
    assume(min(abs(r - low), abs(r - high)) > 1e-9)
    assert (weight(clip(eps_low, eps_high), r, a) == 0) == ((a > 0 and r > high) or (a < 0 and r < low))


@given(r=ratios, a=st.floats(-5, 5))
def test_clip_is_a_lower_bound_of_noclip(r, a):
    x = inputs([math.log(r)], [a])
    assert clip()(x).item() >= make("noclip")(x).item() - 1e-12


@given(r=ratios, a=nonzero, bound=st.floats(1.3, 10))
def test_bounds_of_clip_change_only_wrong_tokens_beyond_them(r, a, bound):
    assume(abs(r - bound) > 1e-9)
    x = inputs([math.log(r)], [a])
    for bounded in (clip(dual=bound), clip(two_sided=bound)):
        if a < 0 and r > bound:
            assert [value.item() for value in loss_and_gradient(bounded, x)] == pytest.approx([-bound * a, 0])
        else:
            assert_same(bounded, clip(), x)


# --- pspo


@pytest.mark.parametrize("alpha", [0.0, 0.05, 0.1, 0.5, 0.9])
def test_gradient_of_pspo_is_that_of_noclip_times_one_minus_alpha(alpha):
    x = random_inputs()
    expected_BT = (1 - alpha) * loss_and_gradient(make("noclip"), x)[1]
    assert_close(loss_and_gradient(make("pspo", alpha=alpha), x)[1], expected_BT)


def test_without_smoothing_nothing_changes():
    x = random_inputs()
    assert_same(make("pspo", alpha=0.0), make("noclip"), x)
    assert_same(make("pspo_geometric", alpha=0.0), make("noclip"), x)
    assert_same(make("pspo_clip", alpha=0.0, eps_low=0.2, eps_high=0.28), clip(), x)


def smoothed_ratio(ratio, alpha):
    """r̃, read from the loss at A = 1."""
    return -make("pspo", alpha=alpha)(inputs(ratio.log(), 1.0)).detach().view(-1)


@given(alpha=alphas, r=st.floats(1e-6, 1e6))
def test_smoothed_ratio_is_at_least_alpha_and_nearer_to_one(alpha, r):
    smoothed = smoothed_ratio(torch.tensor([r], dtype=torch.float64), alpha).item()
    assert smoothed >= alpha * (1 - 1e-12)
    assert abs(smoothed - 1) == pytest.approx((1 - alpha) * abs(r - 1), rel=1e-9, abs=1e-12)


@given(alpha=alphas, seed=st.integers(0, 10**6), spread=st.floats(0.1, 5), size=st.integers(2, 40))
def test_smoothing_contracts_distributions(alpha, seed, spread, size):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(2, size, dtype=torch.float64, generator=generator)
    new, old = logits.softmax(-1)
    mixed = smoothed_ratio(new / old, alpha) * old

    def distance(p, q):
        return (p - q).abs().sum().item() / 2

    def kl(p, q):
        return (p * (p / q).log()).sum().item()

    assert mixed.sum().item() == pytest.approx(1, abs=1e-12)
    assert distance(mixed, old) == pytest.approx((1 - alpha) * distance(new, old), rel=1e-9, abs=1e-14)
    assert kl(mixed, old) <= (1 - alpha) * kl(new, old) + 1e-12
    assert kl(old, mixed) <= (1 - alpha) * kl(old, new) + 1e-12


@given(alpha=st.floats(0.01, 0.99), r=ratios, factor=st.floats(1.01, 100), a=nonzero)
def test_geometric_smoothing_is_sublinear(alpha, r, factor, a):
    objective = make("pspo_geometric", alpha=alpha)
    growth = weight(objective, factor * r, a) / weight(objective, r, a)
    assert 1 < growth < factor
    assert growth == pytest.approx(factor ** (1 - alpha), rel=1e-9)


@given(alpha=st.floats(0, 0.7), r=ratios, a=nonzero, eps_low=st.floats(0.01, 0.29), eps_high=st.floats(0.01, 3))
def test_smoothed_clip_is_a_wider_clip(alpha, r, a, eps_low, eps_high):
    low, high = eps_low / (1 - alpha), eps_high / (1 - alpha)
    assume(min(abs(r - 1 + low), abs(r - 1 - high)) > 1e-9)
    smoothed = make("pspo_clip", alpha=alpha, eps_low=eps_low, eps_high=eps_high)
    assert weight(smoothed, r, a) == pytest.approx((1 - alpha) * weight(clip(low, high), r, a), rel=1e-9)


# --- what stands in the place of the clip


@given(r=st.floats(1e-6, 1e6), a=nonzero, cap=st.floats(1, 100))
def test_cispo_leaves_no_token_without_a_gradient(r, a, cap):
    assert weight(cispo(cap), r, a) == pytest.approx(min(r, cap), rel=1e-9)


@given(distance=st.floats(1e-3, 0.99), positive=st.floats(0.1, 5), negative=st.floats(0.1, 5), a=nonzero)
def test_sapo_is_symmetric_about_one_and_never_above_noclip(distance, positive, negative, a):
    objective = make("sapo", tau_positive=positive, tau_negative=negative)
    above, below = (weight(objective, r, a) / r for r in (1 + distance, 1 - distance))
    assert above == pytest.approx(below, rel=1e-9)
    assert 0 < above < 1
    mirrored = make("sapo", tau_positive=negative, tau_negative=positive)
    assert above == pytest.approx(weight(mirrored, 1 + distance, -a) / (1 + distance), rel=1e-9)


@given(r=ratios, a=nonzero, eps=st.floats(0.05, 3))
def test_cfpo_pulls_back_to_the_edge_of_its_band(r, a, eps):
    objective, edge = cfpo(eps), 1 + math.copysign(eps, a)
    assume(abs(r - edge) > 1e-4)
    descent = a * weight(objective, r, a)  # the sign in which log π is moved
    assert (descent > 0) == (r < edge)
    if edge > 0:
        best, here = (objective(inputs([math.log(at)], a)).item() for at in (edge, r))
        assert best < here


probabilities = st.sampled_from([0.0, 1.0]) | st.floats(1e-6, 1 - 1e-6)


@pytest.mark.parametrize("divergence", ["tv", "kl"])
@given(new=probabilities, old=probabilities, a=nonzero, delta=st.floats(0.01, 0.5))
def test_dppo_masks_what_moves_away_beyond_delta(divergence, new, old, a, delta):
    got = binary_kl(old, new) if divergence == "kl" else abs(new - old)
    assume(abs(got - delta) > 1e-9)
    x = at_probabilities(new, old, a)
    gradient = loss_and_gradient(dppo(divergence, delta, 20.0), x)[1].item()
    expected = 0.0 if dppo_masks(divergence, delta, new, old, a) else min(x.ratio_BT.item(), 20.0)
    assert gradient == pytest.approx(-a * expected, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize(
    ("new", "old", "a", "tv", "kl"),
    [
        (0.50, 0.30, +1.0, 0.0, 0.0),  # KL = 0.3 ln 0.6 + 0.7 ln 1.4 = 0.0823
        (0.50, 0.30, -1.0, 5 / 3, 5 / 3),
        (0.30, 0.50, -1.0, 0.0, 0.0),  # KL = 0.5 ln (25/15) + 0.5 ln (25/35) = 0.0872
        (0.60, 0.46, +1.0, 30 / 23, 30 / 23),  # KL = 0.0397
        (0.001, 0.1, -1.0, 0.01, 0.0),  # KL = 0.1 ln 100 + 0.9 ln (900/999) = 0.366
        (0.10, 0.001, +1.0, 20.0, 0.0),  # KL = 0.001 ln 0.01 + 0.999 ln (999/900) = 0.0997
        (1.00, 0.90, +1.0, 10 / 9, 0.0),  # KL is infinite
        (0.90, 1.00, -1.0, 0.9, 0.0),  # KL = ln (10/9) = 0.105
        (1.00, 1.00, -1.0, 1.0, 1.0),
    ],
)
def test_dppo_by_hand(new, old, a, tv, kl):
    for divergence, delta, expected in (("tv", 0.15, tv), ("kl", 0.05, kl)):
        objective = dppo(divergence, delta, 20.0)
        gradient = loss_and_gradient(objective, at_probabilities(new, old, a))[1].item()
        assert gradient == pytest.approx(-a * expected, abs=1e-9)


inside = st.floats(1e-4, 1 - 1e-4)


@pytest.mark.parametrize("divergence", ["tv", "kl"])
@given(new=inside, old=inside, a=nonzero, delta=st.floats(0.01, 0.5))
def test_the_tv_and_kl_bands_of_clip_are_the_masks_of_dppo(divergence, new, old, a, delta):
    got = binary_kl(old, new) if divergence == "kl" else abs(new - old)
    assume(abs(got - delta) > 1e-9)
    x = at_probabilities(new, old, a)
    gradient = loss_and_gradient(clip(band=divergence, delta=delta), x)[1].item()
    assert (gradient == 0) == dppo_masks(divergence, delta, new, old, a)
    assert gradient in (0, pytest.approx(-a * new / old, rel=1e-9))


@pytest.mark.parametrize("band", BANDS)
def test_bands_by_hand(band):
    expected = {"kl": (0.313, 2.201), "tv": (0.5, 1.5), "chi2": (0.329, 1.671), "dcpo": (0.5, 2.246)}[band]
    bounds = clip(band=band).bounds(torch.tensor([[0.1]], dtype=torch.float64).log())
    assert [bound.item() for bound in bounds] == pytest.approx(expected, abs=5e-4)


def test_on_mass_drpo_at_its_published_eps_is_noclip_within_8_percent():
    objective = default_objective("cfpo")
    drpo = replace(objective, mass=True, eps=12.5)
    for p in (1e-6, 0.1, 0.9, 0.999):
        for r in (1e-3, 0.5, 1.0, 0.999 / p):
            for a in (1.0, -1.0):
                x = at_probabilities(r * p, p, a)
                factor = -loss_and_gradient(drpo, x)[1].item() / a / r
                assert 0.92 <= factor <= 1.08


def test_the_penalty_of_ipo_pulls_back_whatever_the_advantage():
    x = inputs([math.log(2), -math.log(2), math.log(1.5)], [0.0, 0.0, 1.0])
    plain, ipo = dppo("tv", 0.1, 20.0, symmetric=True), dppo("tv", 0.1, 20.0, symmetric=True, log_ratio_weight=1e-3)
    for number, expected_BT in ((0, 1e-3 * x.log_ratio_BT.square()), (1, 2e-3 * x.log_ratio_BT)):
        assert_close(loss_and_gradient(ipo, x)[number] - loss_and_gradient(plain, x)[number], expected_BT.detach())


HAND_RATIOS = (0.25, 0.5, 0.8, 1.0, 1.25, 2.0, 4.0)
HAND_TABLE = [  # at p = 0.1; of docs/objectives.md of the specification, computed independently
    (make("dro", beta=1.0), 1, [2.386, 1.693, 1.223, 1, 0.777, 0.307, -0.386]),
    (make("dro", beta=1.0), -1, [-0.386, 0.307, 0.777, 1, 1.223, 1.693, 2.386]),
    (default_objective("gppo"), 1, [0.25, 0.5, 0.8, 1, 1.2, 1.2, 1.2]),
    (default_objective("gppo"), -1, [0.8, 0.8, 0.8, 1, 1.25, 2, 4]),
    (default_objective("aspo"), 1, [3, 2, 1.25, 1, 0, 0, 0]),
    (default_objective("aspo"), -1, [0, 0, None, 1, 1.25, 2, 3]),  # 0.8 is on the edge of the band
    (cfpo(0.15, mass=True), 1, [0.375, 0.667, 0.907, 1, 1.042, 0.667, -4]),
    (default_objective("r2vpo"), 1, [0.438, 0.75, 0.96, 1, 0.938, 0, -8]),
    (default_objective("r2vpo"), -1, [0.0625, 0.25, 0.64, 1, 1.5625, 4, 16]),
    (default_objective("pspo_relative"), 1, [0.2630, 0.4986, 0.7497, 0.9, 1.0708, 1.4876, 2.1302]),
    (dppo("tv", 0.1, 20.0, symmetric=True), 1, [0.25, 0.5, 0.8, 1, 1.25, None, 0]),  # 2 is on the edge of the mask
]


@pytest.mark.parametrize(("objective", "a", "expected"), HAND_TABLE, ids=lambda value: getattr(value, "name", None))
def test_weights_at_an_old_probability_of_a_tenth(objective, a, expected):
    for r, w in zip(HAND_RATIOS, expected, strict=True):
        if w is not None:
            got = -loss_and_gradient(objective, at_probabilities(0.1 * r, 0.1, float(a)))[1].item() / a
            assert got == pytest.approx(w, abs=6e-4), r


# --- tpo, whose groups are whole


def tpo_input(new, old, advantages, lengths):
    """Completions whose whole log-probabilities are these, spread evenly over their tokens."""
    mask_BT = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    share_B1 = 1 / torch.tensor(lengths, dtype=torch.float64)[:, None]
    new_BT, old_BT = (torch.tensor(v, dtype=torch.float64)[:, None] * share_B1 * mask_BT for v in (new, old))
    leaf_BT = new_BT.requires_grad_()
    advantage_BT = torch.tensor(advantages, dtype=torch.float64)[:, None].expand(mask_BT.shape)
    return ObjectiveInput.at_tokens(leaf_BT, old_BT, advantage_BT, mask_BT)


def tpo_coefficients(x, groups, eta=1.0):
    target_BT = make("tpo", eta=eta).target(x, torch.tensor(groups)).detach()
    return (-loss_and_gradient(make("tpo", eta=eta), replace(x, target_BT=target_BT))[1])[:, 0].tolist()


def test_tpo_by_hand():
    """Two groups of two; p_old 1/2, 1/2 and 3/4, 1/4; rewards (1, 0) whiten to (1, −1); the second has no spread."""
    new, old = [math.log(3), 0.0, math.log(2), 0.0], [-1.0, -1.0, math.log(3) - 2, -2.0]
    x = tpo_input(new, old, [0.5, -0.5, 0.0, 0.0], [1, 3, 2, 2])
    q = sigmoid(2)  # e / (e + 1/e)
    assert tpo_coefficients(x, [7, 7, 3, 3]) == pytest.approx(
        [q - 0.75, 0.75 - q, 0.75 - 2 / 3, 2 / 3 - 0.75], abs=1e-12
    )
    assert tpo_coefficients(x, [7, 7, 3, 3], eta=2.0)[0] == pytest.approx(sigmoid(1) - 0.75, abs=1e-12)


def test_tpo_is_the_gradient_of_its_cross_entropy_and_vanishes_at_the_target():
    x = tpo_input([-1.0, -2.0, -0.5, -3.0], [-1.5, -2.5, -0.7, -2.0], [1.2, -0.3, -0.4, -0.5], [2, 4, 3, 1])
    a_G = torch.tensor([1.2, -0.3, -0.4, -0.5], dtype=torch.float64)
    u_G = (a_G - a_G.mean()) / a_G.std(correction=0)
    q_G = (x.sequence_sum(x.old_logprob_BT)[:, 0].log_softmax(0) + u_G).softmax(0)
    entropy = -(q_G * x.sequence_sum(x.logprob_BT)[:, 0].log_softmax(0)).sum()
    (expected_BT,) = torch.autograd.grad(entropy, x.logprob_BT)
    assert tpo_coefficients(x, [0] * 4) == pytest.approx((-expected_BT[:, 0]).tolist(), abs=1e-12)
    for scaled in (3 * a_G + 1, a_G / 7):  # any advantage of a group is its rewards up to shift and scale
        other = replace(x, advantage_BT=scaled[:, None].expand_as(x.advantage_BT))
        assert tpo_coefficients(other, [0] * 4) == pytest.approx((-expected_BT[:, 0]).tolist(), abs=1e-12)
    at_target = tpo_input(
        q_G.log().tolist(), x.sequence_sum(x.old_logprob_BT)[:, 0].tolist(), a_G.tolist(), [2, 4, 3, 1]
    )
    assert tpo_coefficients(at_target, [0] * 4) == pytest.approx([0] * 4, abs=1e-12)


@pytest.mark.parametrize(
    ("sigma", "mass", "risk", "old", "a", "width"),
    [
        (1.0, 0.3, 0.0, 1.0, +1.0, 1.0),  # σ itself
        (0.5, 0.5, 0.0, 0.04, +1.0, 2.5),  # 0.5 / 0.2
        (2.0, 1.0, 0.0, 0.001, +1.0, 10.0),  # 2000, held at 10
        (1.0, 0.0, 0.5, 0.1, +1.0, 1.5),
        (1.0, 0.0, 0.5, 0.1, +2.0, 2.0),  # βA = 1, where 1 / (1 − βA) has its pole
        (1.0, 0.0, 0.5, 0.1, +6.0, 4.0),  # and beyond
        (1.0, 0.0, 1.0, 0.1, +50.0, 10.0),  # 51, held at 10
        (1.0, 0.0, 0.5, 0.1, -2.0, 0.5),
        (4.0, 0.0, 1.0, 0.1, -50.0, 0.4),  # 1 / 51, held at 0.1
        (0.5, 0.5, 0.5, 0.04, -2.0, 1.25),
    ],
)
def test_width_of_maspo(sigma, mass, risk, old, a, width):
    r = 1.5 if a > 0 else 0.5
    x = at_probabilities(r * old, old, a)
    got = -loss_and_gradient(make("maspo", sigma=sigma, mass=mass, risk=risk), x)[1].item() / a
    assert got == pytest.approx(r * exp(-((0.5 / width) ** 2) / 2), rel=1e-9)


@given(k=st.floats(0.1, 8), rate=st.floats(0.1, 8), r=ratios, sign=st.sampled_from([1.0, -1.0]))
def test_weight_of_vespo_peaks_at_k_over_lambda(k, rate, r, sign):
    own, other = ("positive", "negative") if sign > 0 else ("negative", "positive")
    fields = {f"k_{own}": k, f"lambda_{own}": rate, f"k_{other}": 1.0, f"lambda_{other}": 1.0}
    objective, peak = make("vespo", **fields), k / rate
    assert weight(objective, peak, sign) == pytest.approx(exp(rate - k) * peak**k, rel=1e-9)
    assert weight(objective, r, sign) <= weight(objective, peak, sign) * (1 + 1e-9)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_vespo_takes_no_ratio_for_smaller_than_1e_8(sign):
    objective = make("vespo", k_positive=0.125, lambda_positive=0.5, k_negative=0.125, lambda_negative=0.5)
    assert weight(objective, 1e-20, sign) == pytest.approx(0.1 * exp(0.5 - 0.5e-8), rel=1e-9)


# --- what smoothing does under an optimizer: a softmax policy, two updates on each of the same fixed rollouts

ADAMW = AdamW(
    name="adamw", lr=1e-2, warmup_steps=0, decay="constant", max_grad_norm=math.inf,
    beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, sharded=False,
)  # fmt: skip
PLAIN_SGD = SGD(name="sgd", lr=0.5, warmup_steps=0, decay="constant", max_grad_norm=math.inf, momentum=0.0)


def trajectory(objective, optimizer, num_rollouts=100, num_actions=8, num_samples=32):
    """The logits after each of ``2 * num_rollouts`` updates."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.nn.Parameter(torch.randn(4, num_actions, dtype=torch.float64, generator=generator))
    made = optimizer.make([logits])
    steps = []
    for _ in range(num_rollouts):
        action_BT = torch.randint(num_actions, (4, num_samples), generator=generator)
        advantage_BT = torch.randn(4, num_samples, dtype=torch.float64, generator=generator)
        old_logprob_BT = logits.detach().log_softmax(-1).gather(-1, action_BT)
        for _ in range(2):
            logprob_BT = logits.log_softmax(-1).gather(-1, action_BT)
            x = ObjectiveInput(
                logprob_BT=logprob_BT,
                old_logprob_BT=old_logprob_BT,
                log_ratio_BT=log_ratio(logprob_BT, old_logprob_BT),
                advantage_BT=advantage_BT,
                mask_BT=torch.ones_like(action_BT, dtype=torch.bool),
            )
            made.zero_grad()
            objective(x).mean().backward()
            made.step()
            steps.append(logits.detach().clone())
    return torch.stack(steps)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_under_sgd_alpha_is_a_factor_on_the_learning_rate(alpha):
    expected = trajectory(make("noclip"), PLAIN_SGD)
    got = trajectory(make("pspo", alpha=alpha), replace(PLAIN_SGD, lr=PLAIN_SGD.lr / (1 - alpha)))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    assert (trajectory(make("pspo", alpha=alpha), PLAIN_SGD)[-1] - expected[-1]).norm() > 1e-3


@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_under_adamw_alpha_does_nothing(alpha):
    expected, got = (trajectory(o, ADAMW)[-1] for o in (make("noclip"), make("pspo", alpha=alpha)))
    assert 0 < (got - expected).norm() / expected.norm() < 1e-4
    clipped = trajectory(clip(0.01, 0.01), ADAMW)[-1]
    assert (clipped - expected).norm() / expected.norm() > 1e-3


# A user's own class

CAPPED = """
from dataclasses import dataclass
from pspo.base.schema import key
from pspo.objective import Objective

@dataclass(frozen=True, kw_only=True)
class Capped(Objective):
    cap: float = key("c: largest ratio that still has a gradient", within="[1, inf)")

    def __call__(self, x):
        return -x.ratio_BT.clamp(max=self.cap) * x.advantage_BT

class Other:
    pass
"""


def test_a_class_in_a_file_of_ones_own_is_an_objective(tmp_path):
    (tmp_path / "mine.py").write_text(CAPPED)
    config = compose(["objective=custom", f"objective.function={tmp_path}/mine.py:Capped", "objective.cap=2"])
    assert as_dict(config.objective) == {"name": "custom", "cap": 2.0, "function": f"{tmp_path}/mine.py:Capped"}
    assert config.objective.source_files() == [tmp_path / "mine.py"]
    ratio_BT = torch.tensor([[0.5, 2.0, 4.0]], dtype=torch.float64)
    log_ratio_BT = ratio_BT.log().requires_grad_()
    one_BT = torch.ones_like(ratio_BT)
    x = ObjectiveInput(
        logprob_BT=log_ratio_BT, old_logprob_BT=0 * one_BT, log_ratio_BT=log_ratio_BT, advantage_BT=one_BT,
        mask_BT=one_BT.bool(),
    )  # fmt: skip
    assert config.objective(x).tolist() == [[-0.5, pytest.approx(-2.0), -2.0]]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["mine.py:Capped"], "objective.cap has no value; set it with objective.cap=<value>"),
        (["mine.py:Capped", "objective.cap=0.5"], r"objective.cap must be in \[1, inf\), got 0.5"),
        (["mine.py:Capped", "objective.cup=2"], "unknown key objective.cup .*did you mean objective.cap"),
        (["mine.py:Other"], "must be a subclass of pspo.objective.Objective"),
        (["mine.py:Missing"], "has no function or class Missing"),
        (["absent.py:Capped"], "there is no file"),
    ],
)
def test_what_is_wrong_with_a_class_of_ones_own_is_told(tmp_path, words, told):
    (tmp_path / "mine.py").write_text(CAPPED)
    with pytest.raises(ConfigError, match=told):
        compose(["objective=custom", f"objective.function={tmp_path}/{words[0]}", *words[1:]])
