import math
import re
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training import configured

from pspo.base.schema import ConfigError
from pspo.base.statistics import Statistics
from pspo.config import compose
from pspo.loss import LossConfig, batch_loss, coefficients, kl
from pspo.objective import LOG_RATIO_CLAMP, OBJECTIVES, ObjectiveInput, default_objective

EVERY = [default_objective(name) for name in OBJECTIVES]
NOCLIP, CLIP = default_objective("noclip"), default_objective("clip")
LEVELS = ("token", "sequence", "sequence_token", "product")
AGGREGATIONS = ("token", "sequence", "sequence_sum", "constant")
MAX_LENGTH = 10

every = pytest.mark.parametrize("objective", EVERY, ids=lambda o: o.name)
every_aggregation = pytest.mark.parametrize("aggregation", AGGREGATIONS)
every_choice = pytest.mark.parametrize(
    ("objective", "config"),
    [
        pytest.param(o, level, id=f"{o.name}-{level}")
        for o in EVERY
        for level in LEVELS
        if level == "token" or not o.token_only
    ],
    indirect=["config"],
)


def settings(**changes):
    plain = {"importance": "token", "aggregation": "token", "kl": "none", "kl_weight": 0.0, "entropy_weight": 0.0}
    plain |= {
        "kl_target": None,
        "reference": "start",
        "gate": "none",
        "gate_eta": 1.0,
        "drop": "none",
        "drop_limit": None,
    }
    return LossConfig(**plain | {"mask_truncated": False} | changes)


@pytest.fixture
def config(request):
    return settings(importance=request.param)


PLAIN = settings()
ALL_TERMS = settings(kl="k3", kl_weight=0.3, entropy_weight=0.2)


@dataclass(frozen=True)
class Batch:
    """What the loss sees of a micro-batch beside log-probs and entropies, all of shape (B, T)."""

    old_logprob_BT: torch.Tensor
    advantage_BT: torch.Tensor
    mask_BT: torch.Tensor
    reference_BT: torch.Tensor | None = None


def tensors(rows=8, tokens=6, dtype=torch.float64, seed=0):
    """Log-probs and entropies (leaves), and a batch of ragged rows with old and reference log-probs."""
    generator = torch.Generator().manual_seed(seed)
    logprob_BT = -torch.rand(rows, tokens, dtype=torch.float64, generator=generator) * 3
    old_logprob_BT = logprob_BT + torch.randn(rows, tokens, dtype=torch.float64, generator=generator) * 0.4
    advantage_B1 = torch.randn(rows, 1, dtype=torch.float64, generator=generator)
    length_B = torch.randint(1, tokens + 1, (rows,), generator=generator)
    length_B[0] = tokens
    mask_BT = torch.arange(tokens) < length_B[:, None]
    reference_BT = logprob_BT + torch.randn(rows, tokens, dtype=torch.float64, generator=generator) * 0.4
    entropy_BT = torch.rand(rows, tokens, dtype=torch.float64, generator=generator) * 3
    batch = Batch(old_logprob_BT.to(dtype), advantage_B1.expand(rows, tokens), mask_BT, reference_BT.to(dtype))
    return logprob_BT.to(dtype).requires_grad_(), entropy_BT.to(dtype).requires_grad_(), batch


def mapped(batch, change):
    """The same batch with ``change`` made to each of its tensors."""
    return Batch(**{name: None if values is None else change(values) for name, values in vars(batch).items()})


def lengths_of(mask_BT):
    return mask_BT.sum(1).tolist()


def loss_of(config, objective, logprob_BT, entropy_BT, batch, statistics, beside=()):
    """``batch_loss`` of completions of an optimizer batch that has others, of the lengths ``beside``, as well."""
    coefficient_N = coefficients(config.aggregation, [*lengths_of(batch.mask_BT), *beside], MAX_LENGTH)
    tokens = ObjectiveInput.at_tokens(logprob_BT, batch.old_logprob_BT, batch.advantage_BT, batch.mask_BT)
    tokens = replace(tokens, target_BT=tokens.advantage_BT)  # for objectives that take one from the whole batch
    reference_BT = batch.reference_BT if config.kl != "none" else None
    coefficient_B1 = torch.tensor(coefficient_N[: len(logprob_BT)], dtype=torch.float64)[:, None]
    return batch_loss(config, objective, tokens, entropy_BT, reference_BT, coefficient_B1, statistics)


def evaluate(objective, logprob_BT, entropy_BT, batch, config=PLAIN, beside=()):
    """The loss, its gradients by log-probs and entropies, and the statistics."""
    statistics = Statistics()
    loss, *_ = loss_of(config, objective, logprob_BT, entropy_BT, batch, statistics, beside)
    gradient_BT, entropy_gradient_BT = torch.autograd.grad(
        loss, (logprob_BT, entropy_BT), allow_unused=True, materialize_grads=True
    )
    return loss.detach(), gradient_BT, entropy_gradient_BT, statistics.result()


def by_ratio(ratios, advantages, **changes):
    """Log-probs of −1 and ragged rows at the given ratios; advantages are one for a row, or a list for its tokens."""
    length_T = max(map(len, ratios))
    padded = torch.tensor([row + [99.0] * (length_T - len(row)) for row in ratios], dtype=torch.float64)
    mask_BT = torch.tensor([[t < len(row) for t in range(length_T)] for row in ratios])
    advantage_BT = torch.zeros_like(padded)
    for b, advantage in enumerate(advantages):
        values = advantage if isinstance(advantage, list) else [advantage] * len(ratios[b])
        advantage_BT[b, : len(values)] = torch.tensor(values, dtype=torch.float64)
    logprob_BT = torch.full_like(padded, -1.0).requires_grad_()
    batch = Batch(logprob_BT.detach() - padded.log(), advantage_BT, mask_BT)
    return logprob_BT, torch.zeros_like(padded).requires_grad_(), replace(batch, **changes)


TWO_ROWS = [[2.0, 0.5], [1.0, 1.5, 4.0]], [1.0, -2.0]


def test_by_hand():
    logprob_BT, entropy_BT, batch = by_ratio(*TWO_ROWS)
    entropy_BT = torch.tensor([[1.0, 2.0, 50.0], [0.5, 0.5, 1.0]], dtype=torch.float64, requires_grad=True)
    loss, gradient_BT, entropy_gradient_BT, result = evaluate(NOCLIP, logprob_BT, entropy_BT, batch, beside=[2, 3])
    # Σ −r A = −2 − 0.5 + 2 + 3 + 8 = 10.5; ten tokens in the whole optimizer batch, five of them here.
    assert loss.item() == pytest.approx(1.05, abs=1e-12)
    assert gradient_BT.flatten().tolist() == pytest.approx([-0.2, -0.05, 0, 0.2, 0.3, 0.8], abs=1e-12)
    assert not entropy_gradient_BT.any()
    # Σ r − 1 − log r = (9 − 5) − log(2 · 0.5 · 1 · 1.5 · 4) = 4 − log 6
    assert result == pytest.approx(
        {
            "loss/mean": 2.1,
            "policy/entropy_mean": 1.0,
            "policy/kl_old_new_k3": (4 - math.log(6)) / 5,
            "policy/ratio_variance": 10.5 / 5,  # 1 + 1/4 + 0 + 1/4 + 9
            "policy/ratio_max": 4.0,
            "policy/ratio_clamped_rate": 0.0,
        },
        abs=1e-12,
    )


# --- what every objective keeps, at every importance level


@every_choice
@pytest.mark.parametrize("terms", [PLAIN, ALL_TERMS], ids=["alone", "with all terms"])
def test_masked_tokens_count_for_nothing_and_get_no_gradient(objective, config, terms):
    config = replace(terms, importance=config.importance)
    logprob_BT, entropy_BT, batch = tensors()
    expected = evaluate(objective, logprob_BT, entropy_BT, batch, config)
    mask_BT = batch.mask_BT
    for gradient_BT in expected[1:3] if config.entropy_weight else expected[1:2]:
        assert not gradient_BT[~mask_BT].any()
        assert gradient_BT[mask_BT].any()
    for logprob, old_logprob in ((0.0, -50.0), (-7.0, math.nan), (30.0, math.inf), (-1e30, 1e30)):
        spoilt_BT = torch.where(mask_BT, logprob_BT, logprob).detach().requires_grad_()
        spoilt_entropy_BT = torch.where(mask_BT, entropy_BT, 9.0).detach().requires_grad_()
        spoilt = Batch(
            torch.where(mask_BT, batch.old_logprob_BT, old_logprob),
            torch.where(mask_BT, batch.advantage_BT, -99.0),
            mask_BT,
            torch.where(mask_BT, batch.reference_BT, old_logprob),
        )
        got = evaluate(objective, spoilt_BT, spoilt_entropy_BT, spoilt, config)
        for got_value, expected_value in zip(got[:3], expected[:3], strict=True):
            torch.testing.assert_close(got_value, expected_value, rtol=1e-13, atol=1e-16)
        assert not got[1][~mask_BT].any()
        assert not got[2][~mask_BT].any()
        assert got[3] == pytest.approx(expected[3], rel=1e-13)


@every_choice
@pytest.mark.parametrize(
    ("aggregation", "dtype", "tolerance"),
    [*((name, torch.float64, 1e-12) for name in AGGREGATIONS), ("token", torch.float32, 5e-6)],
)
def test_micro_batches_add_up_to_the_whole(objective, config, aggregation, dtype, tolerance):
    config = replace(ALL_TERMS, importance=config.importance, aggregation=aggregation)
    logprob_BT, entropy_BT, batch = tensors(dtype=dtype)
    loss, *gradients, result = evaluate(objective, logprob_BT, entropy_BT, batch, config)
    for sizes in ([1] * 8, [3, 5]):
        statistics, total = Statistics(), torch.zeros((), dtype=dtype)
        for rows in torch.arange(8).split(sizes):
            piece = mapped(batch, lambda values, rows=rows: values[rows])
            beside = [length for b, length in enumerate(lengths_of(batch.mask_BT)) if b not in rows.tolist()]
            total = total + loss_of(config, objective, logprob_BT[rows], entropy_BT[rows], piece, statistics, beside)[0]
        assert total.item() == pytest.approx(loss.item(), rel=10 * tolerance)
        for got_BT, gradient_BT in zip(torch.autograd.grad(total, (logprob_BT, entropy_BT)), gradients, strict=True):
            assert (got_BT - gradient_BT).norm() <= tolerance * gradient_BT.norm()
        assert statistics.result() == pytest.approx(result, rel=10 * tolerance)


@every_choice
@every_aggregation
def test_rows_may_be_permuted_and_padded(objective, config, aggregation):
    config = replace(ALL_TERMS, importance=config.importance, aggregation=aggregation)
    logprob_BT, entropy_BT, batch = tensors()
    loss, *gradients, result = evaluate(objective, logprob_BT, entropy_BT, batch, config)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))

    def wide(values):
        return torch.nn.functional.pad(values.detach()[order], (0, 3))

    arguments = wide(logprob_BT).requires_grad_(), wide(entropy_BT).requires_grad_(), mapped(batch, wide)
    wide_loss, *wide_gradients, wide_result = evaluate(objective, *arguments, config)
    assert wide_loss.item() == pytest.approx(loss.item(), rel=1e-13)
    for wide_BT, gradient_BT in zip(wide_gradients, gradients, strict=True):
        torch.testing.assert_close(wide_BT[:, :6], gradient_BT[order], rtol=1e-12, atol=1e-15)
        assert not wide_BT[:, 6:].any()
    assert wide_result == pytest.approx(result, rel=1e-13)


@every
def test_loss_is_the_token_mean_and_not_the_mean_of_completion_means(objective):
    """Each token alone where the objective looks at tokens, each completion alone where at whole completions."""
    logprob_BT, entropy_BT, batch = tensors()
    loss, _, _, result = evaluate(objective, logprob_BT, entropy_BT, batch)
    mask_BT, total = batch.mask_BT, 0.0
    places = range(8) if objective.whole_completions else mask_BT.nonzero().tolist()
    for place in places:
        b, t = (place, slice(None)) if isinstance(place, int) else (place[0], slice(place[1], place[1] + 1))
        piece = mapped(batch, lambda values, b=b, t=t: values[b : b + 1, t])
        alone = logprob_BT[b : b + 1, t].detach().requires_grad_(), entropy_BT[b : b + 1, t]
        total += evaluate(objective, *alone, piece)[0].item() * int(piece.mask_BT.sum())
    assert loss.item() == pytest.approx(total / int(mask_BT.sum()), rel=1e-13)
    assert result["loss/mean"] == pytest.approx(loss.item(), rel=1e-13)


@every_choice
def test_dtype_of_the_loss_is_that_of_the_log_probs(objective, config):
    config = replace(ALL_TERMS, importance=config.importance)
    loss, gradient_BT, *_ = evaluate(objective, *tensors(dtype=torch.float32), config)
    assert loss.dtype == gradient_BT.dtype == torch.float32


@every_choice
def test_the_gradient_that_diagnostics_read_is_the_gradient_that_trains(objective, config):
    """∂(Σ objective)/∂logprob times each completion's factor is the gradient that the log-probs get."""
    logprob_BT, entropy_BT, batch = tensors()
    for aggregation in AGGREGATIONS:
        changed = replace(config, aggregation=aggregation)
        loss, _, read_BT, _ = loss_of(changed, objective, logprob_BT, entropy_BT, batch, Statistics())
        (gradient_BT,) = torch.autograd.grad(loss, logprob_BT)
        factors = coefficients(aggregation, lengths_of(batch.mask_BT), MAX_LENGTH)
        expected_BT = torch.tensor(factors, dtype=torch.float64)[:, None] * read_BT
        torch.testing.assert_close(gradient_BT, expected_BT, rtol=1e-12, atol=1e-16)
        assert not read_BT[~batch.mask_BT].any()


@pytest.mark.parametrize("level", LEVELS)
def test_what_the_objective_saw_is_handed_on(level):
    """The ratio at the level of ``importance``, and the log-probs, advantages and mask that it is of."""
    logprob_BT, entropy_BT, batch = tensors()
    _, x, *_ = loss_of(settings(importance=level), NOCLIP, logprob_BT, entropy_BT, batch, Statistics())
    log_ratio_BT = (logprob_BT - batch.old_logprob_BT).detach()
    if level != "token":
        sums_B1 = torch.where(batch.mask_BT, log_ratio_BT, 0.0).sum(1, keepdim=True)
        length_B1 = 1 if level == "product" else batch.mask_BT.sum(1, keepdim=True)
        log_ratio_BT = (sums_B1 / length_B1).expand_as(log_ratio_BT)
    mask_BT = x.mask_BT
    assert mask_BT.equal(batch.mask_BT)
    torch.testing.assert_close(x.log_ratio_BT[mask_BT].detach(), log_ratio_BT[mask_BT], rtol=1e-12, atol=1e-15)
    for name in ("old_logprob_BT", "advantage_BT"):
        assert getattr(x, name)[mask_BT].equal(getattr(batch, name)[mask_BT])
    assert x.logprob_BT.detach().equal(logprob_BT.detach())


# --- aggregations


@pytest.mark.parametrize(
    ("aggregation", "expected", "factors"),
    [
        # Σ −r A of the two rows: −2 − 0.5 = −2.5 over two tokens, 2 + 3 + 8 = 13 over three.
        ("token", 10.5 / 5, [1 / 5, 1 / 5]),
        ("sequence", (-2.5 / 2 + 13 / 3) / 2, [1 / 4, 1 / 6]),
        ("sequence_sum", 10.5 / 2, [1 / 2, 1 / 2]),
        ("constant", 10.5 / (2 * MAX_LENGTH), [1 / 20, 1 / 20]),
    ],
)
def test_aggregations_by_hand(aggregation, expected, factors):
    loss, gradient_BT, _, result = evaluate(NOCLIP, *by_ratio(*TWO_ROWS), settings(aggregation=aggregation))
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    a, b = factors
    assert gradient_BT.flatten().tolist() == pytest.approx([-2 * a, -0.5 * a, 0, 2 * b, 3 * b, 8 * b], abs=1e-12)
    assert result["loss/mean"] == pytest.approx(2.1)  # a metric over tokens, whatever the aggregation


@pytest.mark.parametrize(
    ("aggregation", "share"),
    [("token", 5 / 50), ("sequence", 2 / 8), ("sequence_sum", 2 / 8), ("constant", 2 / 8)],
)
def test_counts_are_those_of_the_whole_optimizer_batch(aggregation, share):
    """Five of fifty tokens and two of eight rows: the micro-batch's own part of the loss."""
    config, arguments = settings(aggregation=aggregation), by_ratio(*TWO_ROWS)
    whole = evaluate(NOCLIP, *arguments, config)[0].item()
    part = evaluate(NOCLIP, *arguments, config, beside=[10, 9, 8, 7, 6, 5])[0].item()
    assert part == pytest.approx(share * whole, rel=1e-12)


def test_coefficients_by_hand():
    expected = {
        "token": [1 / 10] * 3,
        "sequence": [1 / 6, 1 / 9, 1 / 15],
        "sequence_sum": [1 / 3] * 3,
        "constant": [1 / 60] * 3,
    }
    assert set(expected) == set(AGGREGATIONS)
    for aggregation, factors in expected.items():
        assert coefficients(aggregation, [2, 3, 5], 20) == pytest.approx(factors, rel=1e-15)
    assert coefficients("sequence", [], 20) == []


@every_aggregation
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=12))
def test_coefficients_make_a_mean(aggregation, lengths):
    """A loss of 1 at every token has the mean 1 over tokens, over completion means, and over ``max_length`` each."""
    total = sum(c * n for c, n in zip(coefficients(aggregation, lengths, 50), lengths, strict=True))
    mean_length = sum(lengths) / len(lengths)
    expected = {"token": 1, "sequence": 1, "sequence_sum": mean_length, "constant": mean_length / 50}
    assert total == pytest.approx(expected[aggregation], rel=1e-12)


@every_aggregation
def test_the_terms_beside_the_objective_are_aggregated_like_it(aggregation):
    """With no advantage and entropies, or KL, of 1 at every token, the loss is Σ c_i L_i."""
    logprob_BT, _, batch = by_ratio(TWO_ROWS[0], [0.0, 0.0])
    one_BT = torch.ones_like(logprob_BT).requires_grad_()
    expected = {"token": 1.0, "sequence": 1.0, "sequence_sum": 2.5, "constant": 0.25}[aggregation]
    config = settings(aggregation=aggregation, entropy_weight=0.5)
    assert evaluate(NOCLIP, logprob_BT, one_BT, batch, config)[0].item() == pytest.approx(-0.5 * expected)
    config = settings(aggregation=aggregation, kl="k1", kl_weight=0.5)
    batch = replace(batch, reference_BT=logprob_BT.detach() - 1)
    assert evaluate(NOCLIP, logprob_BT, one_BT, batch, config)[0].item() == pytest.approx(0.5 * expected)


# --- importance levels

# Geometric means: of 4 and 1 it is 2, of 1/8, 1 and 1 it is 1/2.
MEANS = [[4.0, 1.0], [0.125, 1.0, 1.0]]


def test_token_level_by_hand():
    loss, gradient_BT, *_ = evaluate(NOCLIP, *by_ratio(MEANS, [1.0, -2.0]))
    assert loss.item() == pytest.approx((-5 + 4.25) / 5, abs=1e-12)
    assert gradient_BT.flatten().tolist() == pytest.approx([-0.8, -0.2, 0, 0.05, 0.4, 0.4], abs=1e-12)


def test_sequence_level_by_hand():
    """Every token has the value −s A, and ∂(Σ_t −s A_t)/∂logprob_t = −s · mean A."""
    advantages = [[1.0, 3.0], [-2.0, -2.0, 1.0]]
    loss, gradient_BT, *_ = evaluate(NOCLIP, *by_ratio(MEANS, advantages), settings(importance="sequence"))
    assert loss.item() == pytest.approx((-2 * 4 + 0.5 * 3) / 5, abs=1e-12)
    assert gradient_BT.flatten().tolist() == pytest.approx([-0.8, -0.8, 0, 0.1, 0.1, 0.1], abs=1e-12)


def test_sequence_token_level_by_hand():
    """The value of s, and the gradient of the token alone: −s A_t."""
    advantages = [[1.0, 3.0], [-2.0, -2.0, 1.0]]
    loss, gradient_BT, *_ = evaluate(NOCLIP, *by_ratio(MEANS, advantages), settings(importance="sequence_token"))
    assert loss.item() == pytest.approx((-2 * 4 + 0.5 * 3) / 5, abs=1e-12)
    assert gradient_BT.flatten().tolist() == pytest.approx([-0.4, -1.2, 0, 0.2, 0.2, -0.1], abs=1e-12)


def test_at_the_two_sequence_levels_the_whole_completion_is_clipped():
    """s = 2 is over the band for A > 0: neither token trains; s = 1/2 for A > 0 is not, though one ratio is 1/8."""
    for level in ("sequence", "sequence_token"):
        _, gradient_BT, *_ = evaluate(CLIP, *by_ratio(MEANS, [1.0, 1.0]), settings(importance=level))
        assert gradient_BT.flatten().tolist() == pytest.approx([0, 0, 0, -0.1, -0.1, -0.1], abs=1e-12)


@every
def test_sequence_level_is_the_objective_of_the_geometric_mean(objective):
    """At aggregation=sequence: the mean over completions of f(s_i), and the gradient that has by the log-probs."""
    if objective.token_only:
        assert objective.name in REFUSED
        return
    logprob_BT, entropy_BT, batch = tensors()
    config = settings(importance="sequence", aggregation="sequence")
    loss, gradient_BT, *_ = evaluate(objective, logprob_BT, entropy_BT, batch, config)

    def mean_B1(values_BT):
        return torch.stack([row[mask].mean() for row, mask in zip(values_BT, batch.mask_BT, strict=True)])[:, None]

    new_B1, old_B1 = mean_B1(logprob_BT), mean_B1(batch.old_logprob_BT)
    x = ObjectiveInput(
        logprob_BT=new_B1,
        old_logprob_BT=old_B1,
        log_ratio_BT=new_B1 - old_B1,
        advantage_BT=batch.advantage_BT[:, :1],
        mask_BT=torch.ones_like(new_B1, dtype=torch.bool),
    )
    expected = objective(x).mean()
    (expected_BT,) = torch.autograd.grad(expected, logprob_BT)
    torch.testing.assert_close(gradient_BT, expected_BT, rtol=1e-12, atol=1e-15)
    if objective.name not in (
        "cispo",
        "aspo",
    ):  # their values have the token's own log-prob, their gradients the mean's
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_gspo_in_five_lines():
    """GSPO (arXiv 2507.18071, eq. 5): 1/G Σ_i min(s_i A_i, clip(s_i, 1 − ε_l, 1 + ε_h) A_i), at its recipe."""
    run, trains = compose(["experiment=gspo"]), []
    for seed in range(5):
        logprob_BT, entropy_BT, batch = tensors(seed=seed)
        near_BT = logprob_BT.detach() + 5e-3 * (batch.old_logprob_BT - logprob_BT.detach())
        batch = replace(batch, old_logprob_BT=near_BT)
        loss, gradient_BT, *_ = evaluate(run.objective, logprob_BT, entropy_BT, batch, run.loss)
        length_B, advantage_B = batch.mask_BT.sum(1), batch.advantage_BT[:, 0]
        s_B = (((logprob_BT - batch.old_logprob_BT) * batch.mask_BT).sum(1) / length_B).exp()
        surrogate_B = torch.min(s_B * advantage_B, s_B.clamp(1 - 3e-4, 1 + 4e-4) * advantage_B)
        expected = -surrogate_B.mean()
        (expected_BT,) = torch.autograd.grad(expected, logprob_BT)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        torch.testing.assert_close(gradient_BT, expected_BT, rtol=1e-12, atol=1e-15)
        trains += (gradient_BT.abs().sum(1) > 0).tolist()
    assert 0.2 < sum(trains) / len(trains) < 0.8  # the test has seen completions inside and outside of the band


def test_gspo_token_has_the_value_and_for_equal_advantages_the_gradient_of_gspo():
    """(arXiv 2507.18071, section 4.3.)"""
    logprob_BT, entropy_BT, batch = tensors()
    sequence, token = (compose([f"experiment={name}"]).loss for name in ("gspo", "gspo_token"))
    expected, got = (evaluate(CLIP, logprob_BT, entropy_BT, batch, config) for config in (sequence, token))
    assert got[0].item() == pytest.approx(expected[0].item(), rel=1e-13)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-12, atol=1e-15)


def test_luspo_weighs_completions_by_their_length():
    """1/G Σ_i L_i min(s_i A_i, clip(s_i) A_i) (arXiv 2602.05261)."""
    run = compose(["experiment=luspo"])
    loss, gradient_BT, *_ = evaluate(run.objective, *by_ratio(MEANS, [-1.0, 1.0]), run.loss)
    assert loss.item() == pytest.approx((2 * 2 - 3 * 0.5) / 2, abs=1e-12)
    assert gradient_BT.flatten().tolist() == pytest.approx([1, 1, 0, -0.25, -0.25, -0.25], abs=1e-12)


def test_product_level_by_hand():
    """W = 4 and 1/8 at every token; W = 2⁴⁰ is held at e²⁰, and has no gradient."""
    loss, gradient_BT, *_ = evaluate(NOCLIP, *by_ratio(MEANS, [1.0, -2.0]), settings(importance="product"))
    assert loss.item() == pytest.approx((-4 * 2 + 0.25 * 3) / 5, abs=1e-12)
    assert gradient_BT.flatten().tolist() == pytest.approx([-1.6, -1.6, 0, 0.15, 0.15, 0.15], abs=1e-12)
    loss, gradient_BT, *_ = evaluate(NOCLIP, *by_ratio([[2.0] * 40], [1.0]), settings(importance="product"))
    assert loss.item() == pytest.approx(-math.exp(20), rel=1e-12)
    assert not gradient_BT.any()


@pytest.mark.parametrize("band", ["tv", "kl", "chi2", "dcpo"])
def test_a_band_of_the_old_probability_is_of_single_tokens(band):
    told = f"loss.importance=product does not go with objective=clip: objective.band={band} depends on a single token"
    with pytest.raises(ConfigError, match=re.escape(told)):
        configured("objective=clip", f"objective.band={band}", "loss.importance=product")
    with pytest.raises(ConfigError, match=r"objective=cfpo: objective\.mass=true depends on a single token"):
        configured("objective=cfpo", "objective.mass=true", "loss.importance=sequence")


# --- the gate and the drop


def test_delight_by_hand():
    """σ(−A log π) = π^−A / (1 + π^−A), of the policy as it is: at π = 0.1 r, the table of the specification."""
    ratios = torch.tensor([[0.25, 0.5, 0.8, 1.0, 1.25, 2.0, 4.0]], dtype=torch.float64)
    hand = {
        1.0: [0.976, 0.952, 0.926, 0.909, 0.889, 0.833, 0.714],
        -1.0: [0.024, 0.048, 0.074, 0.091, 0.111, 0.167, 0.286],
    }
    for a, gates in hand.items():
        logprob_BT = (0.1 * ratios).log().requires_grad_()
        batch = Batch(torch.full_like(ratios, 0.1).log(), torch.full_like(ratios, a), torch.ones_like(ratios).bool())
        entropy_BT = torch.zeros_like(ratios).requires_grad_()
        plain = evaluate(NOCLIP, logprob_BT, entropy_BT, batch)
        gated = evaluate(NOCLIP, logprob_BT, entropy_BT, batch, settings(gate="delight"))
        assert (gated[1] / plain[1])[0].tolist() == pytest.approx(gates, abs=5e-4)
        assert gated[3]["loss/gate_mean"] == pytest.approx(sum(gates) / 7, abs=5e-4)
        warm = evaluate(NOCLIP, logprob_BT, entropy_BT, batch, settings(gate="delight", gate_eta=1e9))
        torch.testing.assert_close(2 * warm[1], plain[1], rtol=1e-7, atol=0)


def test_opsm_drops_wrong_completions_that_the_policy_has_left():
    """Mean of −log r: log(8)/3 and 0.1 of A < 0, log(8)/3 of A > 0; δ = 0.2 drops the first."""
    ratios = [[0.125, 1.0, 1.0], [math.exp(-0.3), 1.0, 1.0], [0.125, 1.0, 1.0]]
    arguments = by_ratio(ratios, [-1.0, -1.0, 1.0])
    plain = evaluate(NOCLIP, *arguments)
    dropped = evaluate(NOCLIP, *arguments, settings(drop="opsm", drop_limit=0.2))
    assert not dropped[1][0].any()
    torch.testing.assert_close(dropped[1][1:], plain[1][1:], rtol=1e-13, atol=0)  # whose denominators stay
    assert dropped[3]["loss/dropped_rate"] == pytest.approx(1 / 3)
    tight = evaluate(NOCLIP, *arguments, settings(drop="opsm", drop_limit=1e-4))
    assert tight[3]["loss/dropped_rate"] == pytest.approx(2 / 3)


def test_m2_drops_the_farthest_of_the_tokens_that_moved_away():
    """(log r)² of those: .01, .04 and 1; the mean of all is .35, of two .025. Tokens on the corrective side stay."""
    ratios = [[math.exp(0.1), math.exp(0.2), math.exp(-3)], [math.exp(-1), math.exp(2), 1.0]]
    arguments = by_ratio(ratios, [1.0, -1.0])
    plain = evaluate(NOCLIP, *arguments)
    dropped = evaluate(NOCLIP, *arguments, settings(drop="m2", drop_limit=0.04))
    assert (dropped[1] == 0).tolist() == [[False] * 3, [True, False, False]]
    kept_BT = dropped[1] != 0
    torch.testing.assert_close(dropped[1][kept_BT], plain[1][kept_BT], rtol=1e-13, atol=0)
    assert dropped[3]["loss/dropped_rate"] == pytest.approx(1 / 6)
    assert evaluate(NOCLIP, *arguments, settings(drop="m2", drop_limit=0.36))[3]["loss/dropped_rate"] == 0
    assert evaluate(NOCLIP, *arguments, settings(drop="m2", drop_limit=0.009))[3]["loss/dropped_rate"] == 0.5


# --- KL(old‖new), a metric


def test_clamped_log_ratios_are_counted_and_have_no_gradient():
    logprob_BT = torch.tensor([[-1.0, -1.0, -60.0, -1.0]], dtype=torch.float64, requires_grad=True)
    old_logprob_BT = torch.tensor([[-60.0, -1.5, -1.0, 0.0]], dtype=torch.float64)
    one_BT, mask_BT = torch.ones(1, 4, dtype=torch.float64), torch.ones(1, 4, dtype=torch.bool)
    _, gradient_BT, _, result = evaluate(
        NOCLIP, logprob_BT, one_BT.clone().requires_grad_(), Batch(old_logprob_BT, one_BT, mask_BT)
    )
    assert (gradient_BT[0] == 0).tolist() == [True, False, True, False]
    assert result["policy/ratio_clamped_rate"] == 0.5
    assert result["policy/ratio_max"] == pytest.approx(math.exp(LOG_RATIO_CLAMP))


def test_kl_is_zero_at_equal_policies_and_positive_elsewhere():
    logprob_BT, entropy_BT, batch = tensors()
    same = replace(batch, old_logprob_BT=logprob_BT.detach())
    result = evaluate(NOCLIP, logprob_BT, entropy_BT, same)[3]
    assert result["policy/kl_old_new_k3"] == pytest.approx(0, abs=1e-15)
    assert result["policy/ratio_max"] == pytest.approx(1, rel=1e-15)
    assert evaluate(NOCLIP, logprob_BT, entropy_BT, batch)[3]["policy/kl_old_new_k3"] > 0


def test_kl_estimate_is_that_of_old_to_new():
    """Over all actions, weighted by π_old, k3 is exactly KL(π_old‖π_new)."""
    new_V, old_V = torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    one = torch.ones(1, 1, dtype=torch.float64)
    k3 = []
    for v in range(7):
        batch = Batch(old_V[v].view(1, 1), one, one.bool())
        result = evaluate(NOCLIP, new_V[v].view(1, 1).clone().requires_grad_(), one.clone().requires_grad_(), batch)[3]
        k3.append(result["policy/kl_old_new_k3"])
    kl_old_new = (old_V.exp() * (old_V - new_V)).sum().item()
    assert (old_V.exp() * torch.tensor(k3, dtype=torch.float64)).sum().item() == pytest.approx(kl_old_new, rel=1e-12)


# --- KL(policy‖reference), a term of the loss


@pytest.mark.parametrize(
    ("estimator", "values", "gradients"),
    [
        # d = log π − log π_ref = log 2 and −log 4
        ("k1", [math.log(2), -math.log(4)], [1.0, 1.0]),
        ("k2", [math.log(2) ** 2 / 2, math.log(4) ** 2 / 2], [math.log(2), -math.log(4)]),
        ("k3", [0.5 + math.log(2) - 1, 4 - math.log(4) - 1], [1 - 0.5, 1 - 4.0]),
    ],
)
def test_kl_penalties_by_hand(estimator, values, gradients):
    logprob_BT, entropy_BT, batch = by_ratio([[3.0, 3.0]], [0.0])
    shift_BT = torch.tensor([[2.0, 0.25]], dtype=torch.float64).log()
    batch = replace(batch, reference_BT=logprob_BT.detach() - shift_BT)
    config = settings(kl=estimator, kl_weight=0.1)
    loss, gradient_BT, _, result = evaluate(NOCLIP, logprob_BT, entropy_BT, batch, config)
    assert loss.item() == pytest.approx(0.1 * sum(values) / 2, abs=1e-12)
    assert gradient_BT[0].tolist() == pytest.approx([0.1 * g / 2 for g in gradients], abs=1e-12)
    assert result["policy/kl_reference"] == pytest.approx(sum(values) / 2, abs=1e-12)
    free = evaluate(NOCLIP, logprob_BT, entropy_BT, batch, replace(config, kl_weight=0.0))
    assert free[0] == 0
    assert not free[1].any()
    assert free[3]["policy/kl_reference"] == pytest.approx(result["policy/kl_reference"])  # watched, not trained on


@pytest.mark.parametrize(
    ("level", "d"),
    [("token", None), ("sequence", [math.log(2) / 3, -math.log(2)]), ("product", [math.log(2), -math.log(4)])],
)
@pytest.mark.parametrize("reference", ["start", "rollout"])
def test_kl_is_of_the_importance_ratios_level_and_to_either_reference(level, d, reference):
    """Mean over completions of k3 = e^−d + d − 1, as for a published table whose KL is of whole completions."""
    ratios = [[2.0, 2.0, 0.5], [0.5, 0.5]]
    logprob_BT, entropy_BT, batch = by_ratio(ratios, [0.0, 0.0])
    other_BT = torch.full_like(logprob_BT, -7.0)
    batch = replace(batch, reference_BT=batch.old_logprob_BT if reference == "start" else other_BT)
    if reference == "start":
        batch = replace(batch, old_logprob_BT=other_BT)
    config = settings(importance=level, aggregation="sequence", kl="k3", kl_weight=0.04, reference=reference)
    loss, gradient_BT, *_ = evaluate(NOCLIP, logprob_BT, entropy_BT, batch, config)
    ds = (
        [[math.log(r) for r in row] for row in ratios]
        if d is None
        else [[x] * len(r) for x, r in zip(d, ratios, strict=True)]
    )
    means = [sum(math.exp(-x) + x - 1 for x in row) / len(row) for row in ds]
    assert loss.item() == pytest.approx(0.04 * sum(means) / 2, rel=1e-12)
    each = [[0.04 / 2 * (1 - math.exp(-x)) * (1 if level == "product" else 1 / len(row)) for x in row] for row in ds]
    assert gradient_BT[0].tolist() == pytest.approx(each[0], rel=1e-12)
    assert gradient_BT[1, :2].tolist() == pytest.approx(each[1], rel=1e-12)


def test_the_gradient_with_the_kl_is_handed_on():
    logprob_BT, entropy_BT, batch = tensors()
    config = settings(kl="k2", kl_weight=0.3, aggregation="token")
    loss, _, alone_BT, whole_BT = loss_of(config, CLIP, logprob_BT, entropy_BT, batch, Statistics())
    (gradient_BT,) = torch.autograd.grad(loss, logprob_BT)
    torch.testing.assert_close(gradient_BT * batch.mask_BT.sum(), whole_BT, rtol=1e-12, atol=1e-14)
    plain = loss_of(PLAIN, CLIP, logprob_BT, entropy_BT, batch, Statistics())
    assert plain[2].equal(alone_BT)
    assert plain[3] is plain[2]


def divergence(p_V, q_V):
    """KL(p‖q) of two log-distributions."""
    return (p_V.exp() * (p_V - q_V)).sum()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("estimator", "value", "gradient"),
    [
        ("k1", divergence, lambda p_V, q_V: 0 * p_V.sum()),
        ("k2", None, divergence),
        ("k3", divergence, lambda p_V, q_V: divergence(q_V, p_V)),
    ],
)
def test_what_kl_penalties_are_in_expectation(estimator, value, gradient, seed):
    """Over all actions, weighted by the policy's own probabilities as samples are.

    k1 and k3 have the value of KL(policy‖reference); as a loss on samples k1 teaches nothing, k2 has the gradient of
    that KL and k3 that of KL(reference‖policy).
    """
    generator = torch.Generator().manual_seed(seed)
    logits_V = torch.randn(9, dtype=torch.float64, generator=generator).requires_grad_()
    reference_V = torch.randn(9, dtype=torch.float64, generator=generator).log_softmax(-1)
    policy_V = logits_V.log_softmax(-1)
    expectation = (policy_V.detach().exp() * kl(estimator, policy_V - reference_V)).sum()
    if value is not None:
        assert expectation.item() == pytest.approx(value(policy_V, reference_V).item(), rel=1e-12)
    (got_V,) = torch.autograd.grad(expectation, logits_V, retain_graph=True)
    (expected_V,) = torch.autograd.grad(gradient(policy_V, reference_V), logits_V)
    torch.testing.assert_close(got_V, expected_V, rtol=1e-10, atol=1e-14)
    assert estimator == "k1" or got_V.norm() > 0.01


def test_a_reference_far_away_stays_finite():
    logprob_BT, entropy_BT, batch = by_ratio([[1.0, 1.0]], [0.0])
    batch = replace(batch, reference_BT=torch.tensor([[-1e4, 1e4]], dtype=torch.float64))
    for estimator in ("k1", "k2", "k3"):
        config = settings(kl=estimator, kl_weight=1.0)
        loss, gradient_BT, *_ = evaluate(NOCLIP, logprob_BT, entropy_BT, batch, config)
        assert loss.isfinite()
        assert not gradient_BT.any()


# --- entropy


def test_entropy_bonus_by_hand():
    logprob_BT, _, batch = by_ratio(*TWO_ROWS)
    entropy_BT = torch.tensor([[1.0, 2.0, 50.0], [0.5, 0.5, 1.0]], dtype=torch.float64, requires_grad=True)
    plain = evaluate(NOCLIP, logprob_BT, entropy_BT, batch)
    loss, gradient_BT, entropy_gradient_BT, result = evaluate(
        NOCLIP, logprob_BT, entropy_BT, batch, settings(entropy_weight=0.1)
    )
    assert loss.item() == pytest.approx(2.1 - 0.1 * 5 / 5, abs=1e-12)
    torch.testing.assert_close(gradient_BT, plain[1], rtol=1e-13, atol=0)
    assert entropy_gradient_BT.flatten().tolist() == pytest.approx([-0.02, -0.02, 0, -0.02, -0.02, -0.02])
    assert result == pytest.approx(plain[3], rel=1e-13)


# --- configuration


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"kl_weight": 0.1}, "loss.kl_weight=0.1: needs an estimator; set loss.kl to k1, k2 or k3"),
        ({"kl_weight": -0.1}, "loss.kl_weight must be in [0, inf), got -0.1"),
        ({"entropy_weight": -0.1}, "loss.entropy_weight must be in [0, inf), got -0.1"),
        ({"entropy_weight": math.nan}, "loss.entropy_weight must be in [0, inf), got nan"),
        ({"importance": "batch"}, "loss.importance must be one of token, sequence, sequence_token, product, got"),
        ({"kl": "k3", "kl_target": 0.1}, "loss.kl_target=0.1: steers a weight above 0; set loss.kl and loss.kl_weight"),
        ({"drop": "m2"}, "loss.drop='m2': needs loss.drop_limit=0.04 or another limit"),
        ({"drop": "opsm"}, "loss.drop='opsm': needs loss.drop_limit=0.0001 or another limit"),
        ({"drop": "opsm", "drop_limit": 0.0}, "loss.drop_limit must be in (0, inf), got 0.0"),
        ({"gate_eta": 0.0}, "loss.gate_eta must be in (0, inf), got 0.0"),
        ({"reference": "old"}, "loss.reference must be one of start, rollout, got 'old'"),
        (
            {"aggregation": "mean"},
            "loss.aggregation must be one of token, sequence, sequence_sum, constant, got 'mean'",
        ),
        ({"kl": "k4"}, "loss.kl must be one of none, k1, k2, k3, got 'k4'"),
        ({"mask_truncated": 1}, "loss.mask_truncated must be true or false, got 1"),
    ],
)
def test_bad_fields_are_refused(changes, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        settings(**changes)
    with pytest.raises(ConfigError, match=re.escape(told)):
        compose([f"loss.{name}={value}" for name, value in changes.items()])


REFUSED = {
    "gmpo": "it takes the geometric mean over a completion by itself; set loss.importance=token",
    "dppo": "its mask compares the two policies' probabilities of a single token",
    "maspo": "its width depends on the old probability of a single token",
    "topr": "it weighs whole completions by itself; set loss.importance=token",
    "vespo": "it weighs whole completions by itself; set loss.importance=token",
    "tpo": "it weighs whole completions by itself; set loss.importance=token",
}


@pytest.mark.parametrize("level", LEVELS[1:])
@every
def test_an_importance_level_that_makes_no_sense_is_refused_with_the_reason(objective, level):
    overrides = [f"objective={objective.name}", f"loss.importance={level}"]
    if objective.name not in REFUSED:
        assert configured(*overrides).loss.importance == level
        return
    told = f"loss.importance={level} does not go with objective={objective.name}: {REFUSED[objective.name]}"
    with pytest.raises(ConfigError, match=f"^{re.escape(told)}$"):
        configured(*overrides)


ONE_ADVANTAGE = "has one advantage for a completion, which advantage=gae does not give"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_advantages_of_tokens_are_refused_where_there_is_one_for_a_completion(name):
    config, objective = configured("advantage=gae"), default_objective(name)

    def check(importance):
        replace(config.loss, importance=importance).check(objective, config.advantage)

    if name in ("gmpo", "topr", "vespo", "tpo"):
        with pytest.raises(ConfigError, match=re.escape(f"objective={name} {ONE_ADVANTAGE}")):
            check("token")
        return
    check("token")
    if name not in REFUSED:
        check("sequence_token")
        with pytest.raises(ConfigError, match=re.escape(f"loss.importance=sequence {ONE_ADVANTAGE}")):
            check("sequence")
