"""What an update learns from: rows, and their log-probabilities and values without gradient."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from training import learner_of, problems, rollout_config

from pspo.advantage import GAE, Group, LeaveOneOut, Mean, make_critic
from pspo.objective import default_objective
from pspo.rollout import OwnSampler
from pspo.update.rows import Row, make_rows, score

GROUP = Group(name="group", ddof=1, eps=1e-4)


def completions_of(policy, number=3):
    sampler = OwnSampler(policy, rollout_config(max_new_tokens=6, temperature=0.8))
    return sampler.sample(problems(number), 4, [0])


def rows_of(policy, completions, reward_PG, advantage=GROUP, **changes):
    loss = {"mask_truncated": changes.pop("mask_truncated", False)}
    settings = {"temperature": 0.8, "max_tokens": 40} | changes
    learner = learner_of(policy, default_objective("noclip"), loss=loss, **settings)
    return make_rows(completions, reward_PG, advantage, learner)


def rewards(number=3):
    return torch.arange(4.0 * number, dtype=torch.float64).view(number, 4) ** 2


@pytest.mark.parametrize(
    "advantage", [GROUP, Mean(name="mean"), LeaveOneOut(name="leave_one_out")], ids=lambda a: a.name
)
def test_make_rows(tiny_policy, advantage):
    policy = tiny_policy()
    completions = completions_of(policy)
    rows, metrics = rows_of(policy, completions, rewards(), advantage)
    assert metrics == {}
    expected = advantage(rewards()).flatten().tolist()
    for i, (row, c, a) in enumerate(zip(rows, completions, expected, strict=True)):
        assert replace(row, advantages=[]) == Row(c.prompt.token_ids, c.token_ids, c.logprobs, [], group=i // 4)
        assert row.advantages == pytest.approx([a] * len(c.token_ids), rel=1e-12)
    with pytest.raises(ValueError, match="zip"):
        rows_of(policy, completions[:-1], rewards(), advantage)


def test_truncated_completions_count_in_their_group_and_do_not_train(tiny_policy):
    policy = replace(tiny_policy(), stop_ids=list(range(2, 128, 8)))
    completions = completions_of(policy)
    finished = [c.finished for c in completions]
    assert 2 < sum(finished) < 10
    everyone, _ = rows_of(policy, completions, rewards())
    rows, _ = rows_of(policy, completions, rewards(), mask_truncated=True)
    expected = [row for row, kept in zip(everyone, finished, strict=True) if kept]
    assert [row.token_ids for row in rows] == [row.token_ids for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row.advantages == pytest.approx(other.advantages, rel=1e-12)
    none, _ = rows_of(policy, [replace(c, finished=False) for c in completions], rewards(), mask_truncated=True)
    assert none == []


@pytest.mark.parametrize("shares_prompts", [False, True])
def test_score_is_what_the_library_computes_whatever_the_micro_batches(tiny_policy, shares_prompts):
    policy = replace(tiny_policy(torch.float64, exact=True), shares_prompts=shares_prompts)
    rows, _ = rows_of(policy, completions_of(policy), rewards())
    for max_tokens in (1, 20, 10_000):
        logprobs, values = score(policy, rows, 0.8, max_tokens, None)
        assert values == [[]] * len(rows)
        for row, found in zip(rows, logprobs, strict=True):
            logits_SV = policy.model(torch.tensor([row.prompt_ids + row.token_ids])).logits[0] / 0.8
            logprob_TV = logits_SV.log_softmax(-1)[len(row.prompt_ids) - 1 : -1]
            assert found == pytest.approx(logprob_TV[range(len(row.token_ids)), row.token_ids].tolist(), abs=1e-12)
    assert score(policy, [], 0.8, 20, None) == ([], [])


@pytest.mark.parametrize("with_critic", [False, True])
def test_old_logprobs_are_the_samplers_or_the_trainers(tiny_policy, with_critic):
    policy = tiny_policy(torch.float64, exact=True)
    moved = [replace(c, logprobs=[x - 0.25 for x in c.logprobs]) for c in completions_of(policy)]
    settings = {"advantage": gae(), "critic": make_critic(gae(), policy)} if with_critic else {}
    kept, _ = rows_of(policy, moved, rewards(), **settings)
    assert [row.old_logprobs for row in kept] == [c.logprobs for c in moved]
    made, metrics = rows_of(policy, moved, rewards(), old_logprobs="recompute", **settings)
    assert metrics["policy/sampler_gap_mean"] == pytest.approx(0.25, abs=1e-9)
    for row, before, completion in zip(made, kept, completions_of(policy), strict=True):
        assert row.old_logprobs == pytest.approx(completion.logprobs, abs=1e-9)
        assert row.advantages == pytest.approx(before.advantages, abs=1e-12)


def test_reference_logprobs_are_those_of_the_frozen_policy(tiny_policy):
    policy = tiny_policy(torch.float64, exact=True)
    reference = policy.frozen()
    completions = completions_of(policy)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.mul_(1.5)
    rows, _ = rows_of(policy, completions, rewards(), reference=reference)
    assert not any(p.requires_grad for p in reference.model.parameters())
    for row in rows:  # the sampler's own, from before the weights moved
        assert row.reference_logprobs == pytest.approx(row.old_logprobs, abs=1e-10)
    moved, _ = score(policy, rows, 0.8, 40, None)
    assert max(abs(row.old_logprobs[0] - new[0]) for row, new in zip(rows, moved, strict=True)) > 0.1
    assert all(row.reference_logprobs is None for row in rows_of(policy, completions, rewards())[0])


def gae(**changes):
    values = {"gamma": 1.0, "lam": 0.9, "normalize": False, "critic": "trunk", "value_lr": 1e-3, "value_weight": 0.1}
    return GAE(name="gae", **values | {"value_clip": None} | changes)


def test_rows_of_a_value_model_have_values_returns_and_advantages_of_tokens(tiny_policy):
    policy, advantage = tiny_policy(torch.float64, exact=True), gae()
    critic = make_critic(advantage, policy)
    torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(0))
    completions = completions_of(policy)
    rows, metrics = rows_of(policy, completions, rewards(), advantage, critic=critic)
    _, values = score(policy, rows, 0.8, 40, critic)
    advantages, returns = advantage.estimate(rewards(), [len(row.token_ids) for row in rows], values)
    for row, *expected in zip(rows, values, advantages, returns, strict=True):
        for found, numbers in zip((row.values, row.advantages, row.returns), expected, strict=True):
            assert found == pytest.approx(numbers, abs=1e-12)
    value, target = (torch.from_numpy(np.concatenate(lists)) for lists in (values, returns))
    expected = 1 - (target - value).var(correction=0) / target.var(correction=0)
    assert metrics == {"critic/explained_variance": pytest.approx(expected.item(), rel=1e-9)}
