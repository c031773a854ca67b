"""Properties that every objective must hold: a new one is one more ``Case``, and its bad fields in ``BAD``."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pspo.logprob import LOG_RATIO_CLAMP, log_ratio
from pspo.objective import OBJECTIVES, PSPO, Clip, NoClip, Objective, ObjectiveInput
from pspo.optimizer import SGD, AdamW
from pspo.schema import ConfigError, build

#              r,    A
TOKENS = [
    (1.00, +1.0),
    (0.50, +2.0),
    (0.50, -2.0),
    (1.50, +2.0),
    (1.50, -2.0),
    (1.10, -1.0),
    (0.90, +1.0),
    (4.00, +0.5),
    (0.25, -0.5),
    (2.00, +0.0),
]


@dataclass(frozen=True)
class Case:
    """One objective with what is known of it, worked out by hand.

    Attributes:
        loss: per token of ``TOKENS``.
        gradient: ∂loss/∂logprob of each.
        weight: w(r, A), the table of gradient weights in docs/objectives.md.
        at_one: w(1).
        up: w(r → ∞) for A > 0.
        down: w(r → 0) for A < 0.
    """

    objective: Objective
    loss: list[float]
    gradient: list[float]
    weight: Callable[[float, float], float]
    at_one: float
    up: float
    down: float


CASES = [
    Case(
        NoClip(name="noclip"),
        loss=[-1.0, -1.0, 1.0, -3.0, 3.0, 1.1, -0.9, -2.0, 0.125, 0.0],
        gradient=[-1.0, -1.0, 1.0, -3.0, 3.0, 1.1, -0.9, -2.0, 0.125, 0.0],
        weight=lambda r, a: r,
        at_one=1.0,
        up=math.inf,
        down=0.0,
    ),
    Case(
        Clip(name="clip", eps_low=0.2, eps_high=0.28),
        loss=[-1.0, -1.0, 1.6, -2.56, 3.0, 1.1, -0.9, -0.64, 0.4, 0.0],
        gradient=[-1.0, -1.0, 0.0, 0.0, 3.0, 1.1, -0.9, 0.0, 0.0, 0.0],
        weight=lambda r, a: 0.0 if (a > 0 and r > 1.28) or (a < 0 and r < 0.8) else r,
        at_one=1.0,
        up=0.0,
        down=0.0,
    ),
    Case(
        PSPO(name="pspo", alpha=0.1),
        loss=[-1.0, -1.1, 1.1, -2.9, 2.9, 1.09, -0.91, -1.85, 0.1625, 0.0],
        gradient=[-0.9, -0.9, 0.9, -2.7, 2.7, 0.99, -0.81, -1.8, 0.1125, 0.0],
        weight=lambda r, a: 0.9 * r,
        at_one=0.9,
        up=math.inf,
        down=0.0,
    ),
]

BAD = [
    *[("pspo", {"alpha": 0.1}, "alpha", value, "[0, 1)") for value in (1.0, 1, 2.0, -0.1, math.inf, math.nan)],
    *[
        ("clip", {"eps_low": 0.2, "eps_high": 0.2}, "eps_low", value, "(0, 1]")
        for value in (0.0, -0.2, 1.5, math.inf, math.nan)
    ],
    *[
        ("clip", {"eps_low": 0.2, "eps_high": 0.2}, "eps_high", value, "(0, inf)")
        for value in (0.0, 0, -0.2, math.inf, math.nan)
    ],
]

every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.objective.name)


def inputs(log_ratios, advantages, dtype=torch.float64, mask=None):
    """One row of tokens (or rows of them) at the given log-ratios, with logprob a leaf that takes a gradient."""
    log_ratio_BT = torch.as_tensor(log_ratios, dtype=dtype).view(-1, torch.as_tensor(log_ratios).shape[-1])
    advantage_BT = torch.as_tensor(advantages, dtype=dtype).expand_as(log_ratio_BT)
    logprob_BT = torch.full_like(log_ratio_BT, -2.0).requires_grad_()
    return ObjectiveInput(
        logprob_BT=logprob_BT,
        old_logprob_BT=logprob_BT.detach() - log_ratio_BT,
        log_ratio_BT=log_ratio_BT + logprob_BT - logprob_BT.detach(),
        advantage_BT=advantage_BT,
        mask_BT=torch.ones_like(log_ratio_BT, dtype=torch.bool) if mask is None else mask,
    )


def loss_and_gradient(objective, x):
    loss_BT = objective(x)
    assert loss_BT.shape == x.logprob_BT.shape
    (gradient_BT,) = torch.autograd.grad(loss_BT.sum(), x.logprob_BT)
    return loss_BT.detach(), gradient_BT


def weight(objective, r, a):
    """w(r) = −(∂loss/∂logprob) / A."""
    return -loss_and_gradient(objective, inputs([math.log(r)], [a]))[1].item() / a


def fixed():
    return inputs([math.log(r) for r, _ in TOKENS], [a for _, a in TOKENS])


def random_inputs(rows=6, tokens=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    log_ratio_BT, advantage_BT = torch.randn(2, rows, tokens, dtype=torch.float64, generator=generator)
    return inputs(log_ratio_BT, advantage_BT, mask=torch.rand(rows, tokens, generator=generator) < 0.7)


# --- every objective


def test_the_table_has_every_objective():
    assert {case.objective.name: type(case.objective) for case in CASES} == OBJECTIVES


@every
def test_loss_and_gradient_by_hand(case):
    loss_BT, gradient_BT = loss_and_gradient(case.objective, fixed())
    assert loss_BT[0].tolist() == pytest.approx(case.loss, abs=1e-9)
    assert gradient_BT[0].tolist() == pytest.approx(case.gradient, abs=1e-9)


@every
@given(r=st.floats(0.01, 100), a=st.floats(0.01, 10), sign=st.sampled_from([-1, 1]))
def test_gradient_weight(case, r, a, sign):
    for edge in (0.8, 1.28):
        r = r * 1.001 if abs(r - edge) < 1e-9 else r  # on a kink either side's weight will do
    assert weight(case.objective, r, sign * a) == pytest.approx(case.weight(r, sign * a), rel=1e-9)


@every
def test_gradient_weight_at_its_limits(case):
    up, down = weight(case.objective, 1e8, 1.0), weight(case.objective, 1e-8, -1.0)
    assert up > 1e7 if case.up == math.inf else up == pytest.approx(case.up, abs=1e-6)
    assert down == pytest.approx(case.down, abs=1e-6)


@every
def test_at_ratio_one_the_gradient_is_that_of_noclip_times_the_documented_factor(case):
    x = inputs(torch.zeros(4, 3), torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    expected_BT = loss_and_gradient(NoClip(name="noclip"), x)[1]
    torch.testing.assert_close(
        loss_and_gradient(case.objective, x)[1], case.at_one * expected_BT, atol=1e-12, rtol=1e-12
    )


@every
@pytest.mark.parametrize(("dtype", "reach"), [(torch.float64, 100.0), (torch.float32, LOG_RATIO_CLAMP)])
def test_finite_at_extreme_log_ratios(case, dtype, reach):
    x = inputs([-reach, -reach, reach, reach, -reach, reach], [3.0, -3.0, 3.0, -3.0, 0.0, 0.0], dtype)
    for values in loss_and_gradient(case.objective, x):
        assert values.dtype == dtype
        assert values.isfinite().all()


@every
def test_finite_behind_the_clamp_however_far_the_policies_are_apart(case):
    logprob_BT = torch.tensor([[-1e4, 0.0, -300.0, 300.0]], requires_grad=True)
    old_logprob_BT = torch.tensor([[0.0, -1e4, 0.0, -300.0]])
    x = replace(
        inputs(torch.zeros(4), torch.tensor([1.0, -1.0, -1.0, 1.0]), torch.float32),
        logprob_BT=logprob_BT,
        old_logprob_BT=old_logprob_BT,
        log_ratio_BT=log_ratio(logprob_BT, old_logprob_BT),
    )
    for values in loss_and_gradient(case.objective, x):
        assert values.isfinite().all()


@every
def test_rows_may_be_permuted(case):
    x, order = random_inputs(), torch.tensor([3, 1, 5, 0, 2, 4])
    names = ("logprob_BT", "old_logprob_BT", "log_ratio_BT", "advantage_BT", "mask_BT")
    permuted = ObjectiveInput(**{name: getattr(x, name)[order] for name in names})
    assert torch.equal(case.objective(permuted), case.objective(x)[order])


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
    spoilt_loss_BT = case.objective(spoilt)
    (spoilt_gradient_BT,) = torch.autograd.grad(spoilt_loss_BT[x.mask_BT].sum(), x.logprob_BT)
    assert torch.equal(spoilt_loss_BT[x.mask_BT], loss_BT[x.mask_BT])
    assert torch.equal(spoilt_gradient_BT[x.mask_BT], gradient_BT[x.mask_BT])
    assert not spoilt_gradient_BT[~x.mask_BT].any()


@every
def test_gradient_is_the_derivative(case):
    log_ratio_T = torch.tensor([-1.3, -0.5, -0.1, 0.0, 0.1, 0.4, 1.2], dtype=torch.float64)
    for a in (1.7, -0.6):
        x = inputs(log_ratio_T, [a])
        ahead, behind = (case.objective(inputs(log_ratio_T + step, [a])).detach() for step in (1e-6, -1e-6))
        torch.testing.assert_close(loss_and_gradient(case.objective, x)[1], (ahead - behind) / 2e-6, rtol=1e-7, atol=0)


# --- configuration


@pytest.mark.parametrize(("name", "good", "field", "value", "within"), BAD)
def test_bad_fields_are_refused(name, good, field, value, within):
    build(Objective, {"name": name, **good})
    message = re.escape(f"objective.{field} must be in {within}, got {value!r}")
    with pytest.raises(ConfigError, match=message):
        OBJECTIVES[name](name=name, **{**good, field: value})
    with pytest.raises(ConfigError, match=re.escape(f"objective.{field} must be in {within}, got {float(value)!r}")):
        build(Objective, {"name": name, **good, field: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "pspo", "alpha": "0.1"}, "objective.alpha must be a number, got '0.1'"),
        ({"name": "pspo"}, "objective.alpha has no value; set it with objective.alpha=<value>"),
        ({"name": "clip", "eps_low": 0.2, "eps_high": 0.2, "alpha": 0.1}, "unknown key objective.alpha"),
        ({"name": "psop", "alpha": 0.1}, "unknown objective psop (did you mean pspo?); known: "),
        ({}, "unknown objective None; known: "),
    ],
)
def test_bad_blocks_are_refused(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        build(Objective, values)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_takes_alpha_says_whether_there_is_an_alpha(name):
    assert OBJECTIVES[name].takes_alpha == ("alpha" in OBJECTIVES[name].__dataclass_fields__)


# --- clip


@given(
    r=st.floats(0.01, 20),
    a=st.floats(-5, 5).filter(lambda a: abs(a) > 1e-3),
    eps_low=st.floats(0.01, 0.99),
    eps_high=st.floats(0.01, 3),
)
def test_clip_has_zero_gradient_exactly_where_the_policy_has_gone_far_enough(r, a, eps_low, eps_high):
    low, high = 1 - eps_low, 1 + eps_high
    if min(abs(r - low), abs(r - high)) < 1e-9:
        return
    gradient = loss_and_gradient(Clip(name="clip", eps_low=eps_low, eps_high=eps_high), inputs([math.log(r)], [a]))[
        1
    ].item()
    assert (gradient == 0) == ((a > 0 and r > high) or (a < 0 and r < low))


@given(r=st.floats(0.01, 20), a=st.floats(-5, 5))
def test_clip_is_a_lower_bound_of_noclip(r, a):
    x = inputs([math.log(r)], [a])
    assert Clip(name="clip", eps_low=0.2, eps_high=0.2)(x).item() >= NoClip(name="noclip")(x).item() - 1e-12


# --- pspo

alphas = st.floats(0, 0.99)


@pytest.mark.parametrize("alpha", [0.0, 0.05, 0.1, 0.5, 0.9])
def test_gradient_of_pspo_is_that_of_noclip_times_one_minus_alpha(alpha):
    x = random_inputs()
    expected_BT = (1 - alpha) * loss_and_gradient(NoClip(name="noclip"), x)[1]
    torch.testing.assert_close(loss_and_gradient(PSPO(name="pspo", alpha=alpha), x)[1], expected_BT, rtol=1e-14, atol=0)


def test_pspo_without_smoothing_is_noclip():
    for got, expected in zip(
        loss_and_gradient(PSPO(name="pspo", alpha=0.0), random_inputs()),
        loss_and_gradient(NoClip(name="noclip"), random_inputs()),
        strict=True,
    ):
        assert torch.equal(got, expected)


def smoothed_ratio(ratio, alpha):
    """r̃, read from the loss at A = 1."""
    return -PSPO(name="pspo", alpha=alpha)(inputs(ratio.log(), 1.0)).detach().view(-1)


@given(alpha=alphas, r=st.floats(1e-6, 1e6))
def test_smoothed_ratio_is_at_least_alpha_and_nearer_to_one(alpha, r):
    smoothed = smoothed_ratio(torch.tensor([r], dtype=torch.float64), alpha).item()
    assert smoothed >= alpha
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
    assert kl(mixed, old) <= (1 - alpha) * kl(new, old) + 1e-13
    assert kl(old, mixed) <= (1 - alpha) * kl(old, new) + 1e-13


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
    expected = trajectory(NoClip(name="noclip"), PLAIN_SGD)
    got = trajectory(PSPO(name="pspo", alpha=alpha), replace(PLAIN_SGD, lr=PLAIN_SGD.lr / (1 - alpha)))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    assert (trajectory(PSPO(name="pspo", alpha=alpha), PLAIN_SGD)[-1] - expected[-1]).norm() > 1e-3


@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_under_adamw_alpha_does_nothing(alpha):
    expected, got = (trajectory(o, ADAMW)[-1] for o in (NoClip(name="noclip"), PSPO(name="pspo", alpha=alpha)))
    assert 0 < (got - expected).norm() / expected.norm() < 1e-4
    clipped = trajectory(Clip(name="clip", eps_low=0.01, eps_high=0.01), ADAMW)[-1]
    assert (clipped - expected).norm() / expected.norm() > 1e-3
