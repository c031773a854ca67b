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

from pspo.base.schema import ConfigError, as_dict, build
from pspo.config import compose
from pspo.objective import LOG_RATIO_CLAMP, OBJECTIVES, Objective, ObjectiveInput, log_ratio
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
        bound: the largest w(r > 1) for A < 0.
        order: where there is no bound, the power of r that w(r → ∞) follows for A < 0.
    """

    objective: Objective
    gradient: list[float]
    weight: Callable[[float, float], float]
    loss: list[float] | None = None
    at_one: float = 1.0
    up: float = 0.0
    bound: float = inf
    order: float = 1.0


def make(name, **fields):
    return OBJECTIVES[name](name=name, **fields)


def clip(eps_low=0.2, eps_high=0.28, dual=None, two_sided=None):
    return make("clip", eps_low=eps_low, eps_high=eps_high, dual=dual, two_sided=two_sided)


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
    Case(make("pspo_proportional", delta=0.2, alpha_max=2.0), up=-inf,
         weight=lambda r, a: (1 - min(max(math.copysign(5, a) * (r - 1), 0), 2)) * r,
         loss=[-1.0, -1.0, 3.0, -1.0, 3.0, 1.1, -0.9, 1.0, 0.875, 0.0, 3.0],
         gradient=[-1.0, -1.0, -1.0, 3.0, 3.0, 1.1, -0.9, 2.0, -0.125, 0.0, 3.0]),
    Case(make("cispo", cap=5.0), weight=lambda r, a: min(r, 5.0), up=5.0, bound=5.0,
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
    Case(make("cfpo", eps=0.2), weight=lambda r, a: r * (1 - math.copysign(5, a) * (r - 1)), up=-inf, order=2.0,
         loss=[-1.0, 0.25, 2.25, -1.75, 4.25, 1.125, -0.875, 9.25, 0.828125, 0.0, 34.25],
         gradient=[-1.0, -3.5, -1.5, 4.5, 10.5, 1.65, -1.35, 28.0, -0.34375, 0.0, 78.0]),
    Case(make("dppo", divergence="tv", delta=0.1, cap=5.0), weight=dppo_weight("tv", 0.1, 5.0), bound=5.0,
         gradient=[-1.0, -1.0, 0.0, -3.0, 3.0, 1.1, -0.9, 0.0, 0.0, 0.0, 2.5]),
    Case(make("dppo", divergence="kl", delta=0.05, cap=20.0), weight=dppo_weight("kl", 0.05, 20.0), bound=20.0,
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
        "[0, 1)": "pspo.alpha pspo_geometric.alpha pspo_clip.alpha",
        "(0, 1]": "clip.eps_low pspo_clip.eps_low",
        "(0, inf)": "clip.eps_high pspo_clip.eps_high sapo.tau_positive sapo.tau_negative gmpo.eps cfpo.eps dppo.delta "
        "vespo.k_positive vespo.lambda_positive vespo.k_negative vespo.lambda_negative pspo_proportional.delta "
        "pspo_proportional.alpha_max",
        "(1, inf)": "clip.dual clip.two_sided",
        "[1, inf)": "cispo.cap dppo.cap",
        "(0, 10]": "maspo.sigma",
        "[0, inf)": "maspo.mass maspo.risk",
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
    bounds = [key for key in ("dual", "two_sided") if values.get(key)]
    return "-".join([values["name"], *bounds, *([values["divergence"]] if "divergence" in values else [])])


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
    assert {case.objective.name for case in CASES} == set(OBJECTIVES)
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
    up, down = weight(case.objective, 1e8, 1.0), weight(case.objective, 1e-20, -1.0)
    assert up * math.copysign(1, case.up) > 1e3 if abs(case.up) == inf else up == pytest.approx(case.up, abs=1e-6)
    assert down == pytest.approx(0, abs=1e-6)


@every
def test_gradient_weight_of_wrong_tokens_that_became_likely(case):
    w = weights(case.objective, torch.linspace(0, 8, 4001) * math.log(10), -1.0)
    if case.bound == inf:
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
    permuted = ObjectiveInput(**{name: value[order] for name, value in vars(x).items()})
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
        elif case.objective.name == "maspo":  # sg[F] r A
            expected_BT = loss_BT
        elif case.objective.name == "pspo_proportional":  # −((1 − sg[α]) r + sg[α]) A
            alpha_B = (math.copysign(5, a) * (log_ratio_B.exp() - 1)).clamp(0, 2)
            expected_BT = loss_BT + a * alpha_B.reshape(loss_BT.shape)
        else:
            ahead, behind = (case.objective(inputs(log_ratio_B + step, a)).detach() for step in (1e-6, -1e-6))
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
        (name, f.name): f.metadata.get("within") for name, cls in OBJECTIVES.items() for f in dataclasses.fields(cls)
    }
    assert {field: within for field, within in numbers.items() if field[1] not in ("name", "divergence")} == WITHIN


@pytest.mark.parametrize(("name", "field"), WITHIN)
def test_bad_fields_are_refused(name, field):
    within = WITHIN[name, field]
    good = as_dict(next(case.objective for case in CASES if case.objective.name == name))
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
        ({**PLAIN_CLIP, "two_sided": 1.1}, "objective.two_sided=1.1: must be above 1 + objective.eps_high = 1.28"),
        (
            {"name": "dppo", "divergence": "js", "delta": 0.1, "cap": 20},
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
    assert weight(make("cispo", cap=cap), r, a) == pytest.approx(min(r, cap), rel=1e-9)


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
    objective, edge = make("cfpo", eps=eps), 1 + math.copysign(eps, a)
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
    gradient = loss_and_gradient(make("dppo", divergence=divergence, delta=delta, cap=20.0), x)[1].item()
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
        objective = make("dppo", divergence=divergence, delta=delta, cap=20.0)
        gradient = loss_and_gradient(objective, at_probabilities(new, old, a))[1].item()
        assert gradient == pytest.approx(-a * expected, abs=1e-9)


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
    beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0,
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
