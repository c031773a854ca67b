"""Corrections of the loss for a sampler that is not quite the trainer's policy, and how the gap between them counts."""

import dataclasses
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_loss import PLAIN, settings, tensors
from training import composed, learner_of, problems, rollout_config

from pspo.advantage import Group
from pspo.base.schema import ConfigError
from pspo.base.statistics import Statistics
from pspo.loss import at_level, batch_loss
from pspo.objective import OBJECTIVES, ObjectiveInput, default_objective, log_ratio
from pspo.rollout import OwnSampler
from pspo.update import make_rows, update
from pspo.update.correction import corrections
from pspo.update.rows import gap_metrics, score

KINDS = ("truncate", "band", "sequence_band")
EVERY = [default_objective(name) for name in OBJECTIVES]


def of(kind, k, low=0.5, high=2.0):
    """The factors, and the share out of bounds, of completions with these π_trainer / π_sampler."""
    config = rollout_config(correction=kind, correction_low=low, correction_high=high)
    sampled = [[-1.0 - 0.1 * t for t in range(len(row))] for row in k]
    trained = [np.add(row, np.log(values)).tolist() for row, values in zip(sampled, k, strict=True)]
    return corrections(config, trained, sampled)


K = [[0.25, 0.5001, 1.0, 4.0], [1.9999, 2.5], [0.1]]
BY_HAND = {
    "truncate": ([[0.25, 0.5001, 1.0, 2.0], [1.9999, 2.0], [0.1]], 2 / 7),
    "band": ([[0.0, 0.5001, 1.0, 0.0], [1.9999, 0.0], [0.0]], 4 / 7),
    # Geometric means: (0.25 · 0.5001 · 1 · 4)^(1/4) = 0.841, (1.9999 · 2.5)^(1/2) = 2.236, 0.1.
    "sequence_band": ([[1.0] * 4, [0.0, 0.0], [0.0]], 3 / 7),
}


@pytest.mark.parametrize("kind", KINDS)
def test_factors_by_hand(kind):
    factors, rate = of(kind, K)
    expected, share = BY_HAND[kind]
    assert [len(row) for row in factors] == [4, 2, 1]
    for row, values in zip(factors, expected, strict=True):
        assert row == pytest.approx(values, rel=1e-12)
    assert rate == pytest.approx(share)


def test_bounds_belong_to_the_band_and_the_lower_one_is_not_of_truncation():
    assert of("band", [[1.0]], low=1.0, high=1.0) == ([[1.0]], 0.0)
    assert of("truncate", [[1e-30]], low=0.9)[1] == 0.0


def test_a_ratio_beyond_all_numbers_is_out_of_bounds():
    config = rollout_config(correction="truncate")
    assert corrections(config, [[0.0]], [[-1e4]]) == ([[2.0]], 1.0)


def pieces(objective, config, correction_BT):
    logprob_BT, entropy_BT, batch = tensors()
    tokens = ObjectiveInput.at_tokens(logprob_BT, batch.old_logprob_BT, batch.advantage_BT, batch.mask_BT)
    tokens = dataclasses.replace(tokens, target_BT=tokens.advantage_BT)  # for objectives of a whole batch
    coefficient_B1 = torch.linspace(0.1, 0.8, len(logprob_BT), dtype=torch.float64)[:, None]
    loss, _, weight_BT, _ = batch_loss(
        config, objective, tokens, entropy_BT, None, coefficient_B1, Statistics(), correction_BT
    )
    (gradient_BT,) = torch.autograd.grad(loss, logprob_BT)
    return loss.detach(), gradient_BT, weight_BT


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("name", ["noclip", "clip", "gmpo", "pspo_geometric"])
def test_the_factor_multiplies_the_tokens_loss_and_has_no_gradient(name, importance):
    """Beside autograd through Σ c_i · factor · objective, also where one token's loss is moved by other tokens."""
    objective, config = default_objective(name), settings(importance=importance)
    if importance == "sequence" and objective.token_only:
        pytest.skip(objective.token_only)
    logprob_BT, _, batch = tensors()
    factor_BT = torch.rand(logprob_BT.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2
    loss, gradient_BT, weight_BT = pieces(objective, config, factor_BT)
    tokens = ObjectiveInput.at_tokens(logprob_BT, batch.old_logprob_BT, batch.advantage_BT, batch.mask_BT)
    leaves = replace(tokens, log_ratio_BT=log_ratio(logprob_BT, tokens.old_logprob_BT))
    objective_BT = objective(at_level(importance, leaves))
    coefficient_B1 = torch.linspace(0.1, 0.8, len(logprob_BT), dtype=torch.float64)[:, None]
    assert loss == pytest.approx(
        (torch.where(batch.mask_BT, coefficient_B1 * factor_BT * objective_BT, 0.0)).sum().item(), rel=1e-12
    )
    by_row_BT = torch.where(batch.mask_BT, factor_BT * objective_BT, 0.0)
    (own_BT,) = torch.autograd.grad(by_row_BT.sum(), logprob_BT)
    torch.testing.assert_close(gradient_BT, own_BT * coefficient_B1 * batch.mask_BT, rtol=1e-12, atol=1e-15)
    assert torch.equal(weight_BT, pieces(objective, config, None)[2])  # the diagnostics see the objective alone


@pytest.mark.parametrize("objective", EVERY, ids=lambda o: o.name)
def test_a_factor_of_one_changes_no_bit(objective):
    one, none = (pieces(objective, PLAIN, c) for c in (torch.ones(8, 6, dtype=torch.float64), None))
    assert all(map(torch.equal, one, none))


GROUP = Group(name="group", ddof=1, eps=1e-4)


def learned(policy, completions, **changes):
    """The policy's weights after a step of two updates, and what was logged of the sampler."""
    settings = {"num_epochs": 2, "max_tokens": 60, "temperature": 0.8, "old_logprobs": "recompute", "max_new_tokens": 6}
    learner = learner_of(policy, default_objective("clip"), **settings | changes)
    optimizer, statistics = torch.optim.SGD(policy.trainable().values(), lr=0.1), Statistics()
    reward_PG = torch.arange(12.0, dtype=torch.float64).view(3, 4) ** 2
    rows, metrics = make_rows(completions, reward_PG, GROUP, learner)
    random = np.random.default_rng(0)
    update(learner, optimizer, rows, learning_rates=[0.1] * 2, random=random, statistics=statistics, failure=None)
    return torch.cat([p.detach().flatten() for p in policy.trainable().values()]), metrics


def exact(policy):
    """Completions with the trainer's own log-probabilities: a gap of 0."""
    sampled = OwnSampler(policy, rollout_config(max_new_tokens=6, temperature=0.8)).sample(problems(3), 4, [0])
    rows, _ = make_rows(
        sampled, torch.zeros(3, 4), GROUP, learner_of(policy, default_objective("noclip"), temperature=0.8)
    )
    logprobs, _ = score(policy, rows, 0.8, 60, None)
    return [replace(c, logprobs=new) for c, new in zip(sampled, logprobs, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_at_a_gap_of_0_a_correction_changes_no_bit_of_what_is_learned(tiny_policy, kind):
    completions = exact(tiny_policy())
    plain, metrics = learned(tiny_policy(), completions)
    corrected, told = learned(tiny_policy(), completions, correction=kind)
    assert torch.equal(plain, corrected)
    assert metrics["policy/sampler_gap_max"] == 0
    assert told == metrics | {"policy/corrected_rate": 0.0}


def test_a_masked_token_teaches_nothing_and_a_truncated_one_at_its_bound(tiny_policy):
    """Log-probs that are off by log 3 at one completion: IcePop leaves it out; truncation doubles its loss."""
    completions = exact(tiny_policy())
    moved = [
        replace(c, logprobs=[x - math.log(3) for x in c.logprobs]) if n == 5 else c for n, c in enumerate(completions)
    ]
    tokens = [len(c.token_ids) for c in completions]
    plain, _ = learned(tiny_policy(), completions)
    changed = {kind: learned(tiny_policy(), moved, correction=kind) for kind in ("none", *KINDS)}
    assert torch.equal(changed["none"][0], plain)  # whose ratios are the trainer's own
    for kind in KINDS:
        assert not torch.equal(changed[kind][0], plain)
        assert changed[kind][1]["policy/corrected_rate"] == pytest.approx(tokens[5] / sum(tokens))
    assert torch.equal(changed["band"][0], changed["sequence_band"][0])
    assert changed["band"][1]["policy/sampler_gap_max"] == pytest.approx(math.log(3), abs=1e-5)


def test_what_top_p_leaves_out_is_no_gap_of_vllm():
    """Its log-probabilities of a nucleus that holds 0.9 of the policy are higher by −log 0.9 at the most."""
    gap_N = np.array([math.log(0.9), math.log(0.95), 0.0, math.log(0.9) - 0.02, 0.01])
    vllm, own = (gap_metrics(gap_N, rollout_config(sampler=name, top_p=0.9)) for name in ("vllm", "own"))
    assert vllm["policy/sampler_gap_mean"] == pytest.approx(0.03 / 5)
    assert vllm["policy/sampler_gap_max"] == pytest.approx(0.02)
    assert own["policy/sampler_gap_mean"] == pytest.approx(np.abs(gap_N).mean())


REFUSED = {
    "rollout.correction=band": "rollout.correction='band': compares the sampler's log-probabilities with the "
    "trainer's; set update.old_logprobs=recompute",
    "rollout.correction=ice": "rollout.correction must be one of none, truncate, band, sequence_band, got 'ice'",
    "rollout.correction_high=0.9": "rollout.correction_high must be in [1, inf), got 0.9",
    "rollout.correction_low=1.1": "rollout.correction_low must be in [0, 1], got 1.1",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_settings_that_make_no_sense_are_refused(overrides):
    with pytest.raises(ConfigError, match=re.escape(REFUSED[overrides])):
        composed(*overrides.split())
