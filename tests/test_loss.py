import math

import pytest
import torch

from pspo.logprob import LOG_RATIO_CLAMP
from pspo.loss import batch_loss
from pspo.objective import PSPO, Clip, NoClip
from pspo.statistics import Statistics

OBJECTIVES = [
    NoClip(name="noclip"),
    Clip(name="clip", eps_low=0.2, eps_high=0.28),
    PSPO(name="pspo", alpha=0.1),
]
every = pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
NOCLIP = OBJECTIVES[0]


def batch(rows=8, tokens=6, dtype=torch.float64, seed=0):
    """Log-probs (a leaf), old log-probs, advantages and a mask of ragged rows."""
    generator = torch.Generator().manual_seed(seed)
    logprob_BT = -torch.rand(rows, tokens, dtype=torch.float64, generator=generator) * 3
    old_logprob_BT = logprob_BT + torch.randn(rows, tokens, dtype=torch.float64, generator=generator) * 0.4
    advantage_B = torch.randn(rows, dtype=torch.float64, generator=generator)
    length_B = torch.randint(1, tokens + 1, (rows,), generator=generator)
    length_B[0] = tokens
    mask_BT = torch.arange(tokens) < length_B[:, None]
    return logprob_BT.to(dtype).requires_grad_(), old_logprob_BT.to(dtype), advantage_B, mask_BT


def loss_and_gradient(objective, logprob_BT, old_logprob_BT, advantage_B, mask_BT, num_tokens=None):
    statistics = Statistics()
    num_tokens = int(mask_BT.sum()) if num_tokens is None else num_tokens
    loss = batch_loss(objective, logprob_BT, old_logprob_BT, advantage_B, mask_BT, num_tokens, statistics)
    (gradient_BT,) = torch.autograd.grad(loss, logprob_BT)
    return loss.detach(), gradient_BT, statistics.result()


def test_by_hand():
    ratio_BT = torch.tensor([[2.0, 0.5, 99.0], [1.0, 1.5, 4.0]], dtype=torch.float64)
    mask_BT = torch.tensor([[True, True, False], [True, True, True]])
    logprob_BT = torch.full((2, 3), -1.0, dtype=torch.float64, requires_grad=True)
    advantage_B = torch.tensor([1.0, -2.0], dtype=torch.float64)
    loss, gradient_BT, result = loss_and_gradient(
        NOCLIP, logprob_BT, logprob_BT.detach() - ratio_BT.log(), advantage_B, mask_BT, num_tokens=10
    )
    # Σ −r A = −2 − 0.5 + 2 + 3 + 8 = 10.5; ten tokens in the whole optimizer batch, five of them here.
    assert loss.item() == pytest.approx(1.05, abs=1e-12)
    assert gradient_BT.flatten().tolist() == pytest.approx([-0.2, -0.05, 0, 0.2, 0.3, 0.8], abs=1e-12)
    # Σ r − 1 − log r = (9 − 5) − log(2 · 0.5 · 1 · 1.5 · 4) = 4 − log 6
    assert result == pytest.approx(
        {
            "loss/mean": 2.1,
            "policy/kl_old_new_k3": (4 - math.log(6)) / 5,
            "policy/ratio_max": 4.0,
            "policy/ratio_clamped_rate": 0.0,
        },
        abs=1e-12,
    )


@every
def test_masked_tokens_count_for_nothing_and_get_no_gradient(objective):
    logprob_BT, old_logprob_BT, advantage_B, mask_BT = batch()
    expected = loss_and_gradient(objective, logprob_BT, old_logprob_BT, advantage_B, mask_BT)
    assert not expected[1][~mask_BT].any()
    assert expected[1][mask_BT].any()
    for logprob, old_logprob in ((0.0, -50.0), (-7.0, math.nan), (30.0, math.inf), (-1e30, 1e30)):
        spoilt_BT = torch.where(mask_BT, logprob_BT, logprob).detach().requires_grad_()
        old_BT = torch.where(mask_BT, old_logprob_BT, old_logprob)
        loss, gradient_BT, result = loss_and_gradient(objective, spoilt_BT, old_BT, advantage_B, mask_BT)
        assert torch.equal(loss, expected[0])
        assert torch.equal(gradient_BT, expected[1])
        assert result == expected[2]


@every
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("sizes", [[1] * 8, [3, 5], [2, 2, 4]])
def test_micro_batches_add_up_to_the_whole(objective, dtype, tolerance, sizes):
    logprob_BT, old_logprob_BT, advantage_B, mask_BT = batch(dtype=dtype)
    loss, gradient_BT, result = loss_and_gradient(objective, logprob_BT, old_logprob_BT, advantage_B, mask_BT)
    statistics, total = Statistics(), torch.zeros((), dtype=dtype)
    pieces = zip(*(t.split(sizes) for t in (logprob_BT, old_logprob_BT, advantage_B, mask_BT)), strict=True)
    for piece in pieces:
        total = total + batch_loss(objective, *piece, int(mask_BT.sum()), statistics)
    (total_gradient_BT,) = torch.autograd.grad(total, logprob_BT)
    assert total.item() == pytest.approx(loss.item(), rel=10 * tolerance)
    assert (total_gradient_BT - gradient_BT).norm() <= tolerance * gradient_BT.norm()
    assert statistics.result() == pytest.approx(result, rel=10 * tolerance)


@every
def test_rows_may_be_permuted_and_padded(objective):
    tensors, order = batch(), torch.randperm(8, generator=torch.Generator().manual_seed(1))
    loss, gradient_BT, result = loss_and_gradient(objective, *tensors)
    logprob_BT, old_logprob_BT, advantage_B, mask_BT = (t.detach()[order] for t in tensors)
    pad = torch.nn.functional.pad
    wide_BT = pad(logprob_BT, (0, 3)).requires_grad_()
    wide_loss, wide_gradient_BT, wide_result = loss_and_gradient(
        objective, wide_BT, pad(old_logprob_BT, (0, 3)), advantage_B, pad(mask_BT, (0, 3))
    )
    assert wide_loss.item() == pytest.approx(loss.item(), rel=1e-13)
    assert torch.equal(wide_gradient_BT[:, :6], gradient_BT[order])
    assert not wide_gradient_BT[:, 6:].any()
    assert wide_result == pytest.approx(result, rel=1e-13)


@every
def test_loss_is_the_token_mean_and_not_the_mean_of_completion_means(objective):
    logprob_BT, old_logprob_BT, advantage_B, mask_BT = batch()
    loss, _, result = loss_and_gradient(objective, logprob_BT, old_logprob_BT, advantage_B, mask_BT)
    tokens = [
        loss_and_gradient(
            objective,
            logprob_BT[b : b + 1, t : t + 1].detach().requires_grad_(),
            old_logprob_BT[b : b + 1, t : t + 1],
            advantage_B[b : b + 1],
            mask_BT[b : b + 1, t : t + 1],
        )[0].item()
        for b, t in mask_BT.nonzero().tolist()
    ]
    assert loss.item() == pytest.approx(sum(tokens) / len(tokens), rel=1e-13)
    assert result["loss/mean"] == pytest.approx(loss.item(), rel=1e-13)


def test_clamped_log_ratios_are_counted_and_have_no_gradient():
    logprob_BT = torch.tensor([[-1.0, -1.0, -60.0, -1.0]], dtype=torch.float64, requires_grad=True)
    old_logprob_BT = torch.tensor([[-60.0, -1.5, -1.0, 0.0]], dtype=torch.float64)
    mask_BT = torch.ones(1, 4, dtype=torch.bool)
    _, gradient_BT, result = loss_and_gradient(NOCLIP, logprob_BT, old_logprob_BT, torch.ones(1).double(), mask_BT)
    assert (gradient_BT[0] == 0).tolist() == [True, False, True, False]
    assert result["policy/ratio_clamped_rate"] == 0.5
    assert result["policy/ratio_max"] == pytest.approx(math.exp(LOG_RATIO_CLAMP))


def test_kl_is_zero_at_equal_policies_and_positive_elsewhere():
    logprob_BT, old_logprob_BT, advantage_B, mask_BT = batch()
    same = loss_and_gradient(NOCLIP, logprob_BT, logprob_BT.detach(), advantage_B, mask_BT)[2]
    assert same["policy/kl_old_new_k3"] == 0
    assert same["policy/ratio_max"] == 1
    assert loss_and_gradient(NOCLIP, logprob_BT, old_logprob_BT, advantage_B, mask_BT)[2]["policy/kl_old_new_k3"] > 0


def test_kl_estimate_is_that_of_old_to_new():
    """Over all actions, weighted by π_old, k3 is exactly KL(π_old‖π_new)."""
    new_V, old_V = torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    statistics = [Statistics() for _ in new_V]
    for v, each in enumerate(statistics):
        one = torch.ones(1, 1, dtype=torch.bool)
        batch_loss(NOCLIP, new_V[v].view(1, 1), old_V[v].view(1, 1), torch.ones(1).double(), one, 1, each)
    k3_V = torch.tensor([each.result()["policy/kl_old_new_k3"] for each in statistics], dtype=torch.float64)
    kl = (old_V.exp() * (old_V - new_V)).sum().item()
    assert (old_V.exp() * k3_V).sum().item() == pytest.approx(kl, rel=1e-12)


@every
def test_dtype_of_the_loss_is_that_of_the_log_probs(objective):
    logprob_BT, old_logprob_BT, advantage_B, mask_BT = batch(dtype=torch.float32)
    loss, gradient_BT, _ = loss_and_gradient(objective, logprob_BT, old_logprob_BT, advantage_B, mask_BT)
    assert loss.dtype == gradient_BT.dtype == torch.float32
