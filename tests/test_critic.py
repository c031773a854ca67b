from dataclasses import replace

import numpy as np
import pytest
import torch
from training import Killed, make_trainer
from training import learner_of as plain_learner

from pspo.advantage import GAE, Group, make_critic
from pspo.base.statistics import Statistics
from pspo.model.logprob import predicting_states
from pspo.objective import default_objective
from pspo.update import update
from pspo.update.rows import Row, batch_of, score
from pspo.update.step import accumulate

both = pytest.mark.parametrize("kind", ["trunk", "separate"])


def gae(**changes):
    values = {"gamma": 1.0, "lam": 0.95, "normalize": False, "critic": "trunk", "value_lr": 1e-2, "value_weight": 0.5}
    return GAE(name="gae", **values | {"value_clip": None} | changes)


def make(num_rows=6, seed=0):
    """Rows of many lengths with values, returns and advantages of their tokens."""
    random, rows = np.random.default_rng(seed), []
    for _ in range(num_rows):
        prompt, completion = (random.integers(7, 128, size=random.integers(1, 9)).tolist() for _ in range(2))
        old, advantages, values, returns = random.standard_normal((4, len(completion))).tolist()
        old = [0.3 * x - 4.85 for x in old]
        rows.append(Row(prompt, completion, old, advantages, None, values, returns))
    return rows


def fresh(policy, rows):
    """The same rows as the policy itself would have sampled them."""
    logprobs, _ = score(policy, rows, 1.0, 10_000, None)
    return [replace(row, old_logprobs=old) for row, old in zip(rows, logprobs, strict=True)]


def learner_of(policy, critic, objective="noclip", **changes):
    return plain_learner(policy, default_objective(objective), critic=critic, **changes)


def gradients(learner, rows):
    """The policy's gradient, the critic's own, the loss and the statistics."""
    statistics = Statistics()
    loss = accumulate(learner, rows, statistics).item()
    found = []
    for parameters in learner.parameters():
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        found.append(torch.cat([g.flatten() for g in grads]))
        for p in parameters:
            p.grad = None
    told = statistics.result()
    told.pop("update/padding_rate")  # which is about the cut
    return [*found, torch.zeros(0)][:2], loss, told


def weights(module):
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def trained(critic, seed=0):
    """The same critic with a head that says something."""
    torch.nn.init.normal_(critic.head.weight, std=0.3, generator=torch.Generator().manual_seed(seed))
    return critic


# --- values


def test_only_gae_has_a_value_model(tiny_policy):
    assert make_critic(Group(name="group", ddof=1, eps=1e-4), tiny_policy()) is None
    assert make_critic(gae(), tiny_policy()) is not None


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_are_zero_at_the_start(tiny_policy, kind, dtype):
    policy = tiny_policy(dtype, attention="sdpa")
    critic, rows = make_critic(gae(critic=kind), policy), make()
    _, values = score(policy, rows, 1.0, 40, critic)
    assert values == [[0.0] * len(row.token_ids) for row in rows]
    assert {p.dtype for p in critic.parameters()} == {dtype}


@both
def test_a_value_is_a_linear_function_of_the_state_that_predicts_the_token(tiny_policy, kind):
    policy = tiny_policy(torch.float64, exact=True)
    critic, rows = trained(make_critic(gae(critic=kind), policy)), make()
    for max_tokens in (10_000, 20):
        _, values = score(policy, rows, 1.0, max_tokens, critic)
        for row, value in zip(rows, values, strict=True):
            hidden_SH = policy.model.model(torch.tensor([row.prompt_ids + row.token_ids])).last_hidden_state[0]
            expected_T = critic.head(hidden_SH[len(row.prompt_ids) - 1 : -1]).squeeze(-1)
            assert value == pytest.approx(expected_T.tolist(), abs=1e-10)
    batch = batch_of(rows, policy, [[i] for i in range(len(rows))])
    value_BT = critic(batch, predicting_states(policy.model.get_decoder(), batch), False)
    assert not value_BT[~batch.mask_BT].any()


def test_a_separate_critic_begins_as_a_copy_of_the_trunk_and_goes_its_own_way(tiny_policy):
    policy = tiny_policy(torch.float64, exact=True)
    critic = make_critic(gae(critic="separate"), policy)
    decoder = policy.model.get_decoder()
    assert all(torch.equal(a, b) for a, b in zip(critic.decoder.parameters(), decoder.parameters(), strict=True))
    assert not {id(p) for p in critic.parameters()} & {id(p) for p in policy.model.parameters()}
    assert {name for name, _ in make_critic(gae(), policy).named_parameters()} == {"head.weight", "head.bias"}
    trained(critic)
    _, before = score(policy, make(), 1.0, 40, critic)
    with torch.no_grad():
        for p in policy.model.parameters():
            p.mul_(1.1)
    for value, expected in zip(score(policy, make(), 1.0, 40, critic)[1], before, strict=True):
        assert value == pytest.approx(expected, abs=1e-12)


# --- the loss


@pytest.mark.parametrize(
    ("value_clip", "expected"),
    [
        # V = 1, old 0, R = 2: (1 − 2)²; with a bound of 0.5, V' = 0.5: max(1, 2.25).
        # V = −1, old 0.5, R = 0: 1, and with V' = 0 max(1, 0). V = 0.2, old 0, R = 1: inside the bound, the same.
        (None, [1.0, 1.0, 0.64]),
        (0.5, [2.25, 1.0, 0.64]),
    ],
)
def test_value_loss_by_hand(tiny_policy, value_clip, expected):
    critic = make_critic(gae(value_clip=value_clip, value_weight=0.4), tiny_policy())
    value_BT = torch.tensor([[1.0, -1.0, 0.2]], requires_grad=True)
    old_value_BT, return_BT = torch.tensor([[0.0, 0.5, 0.0]]), torch.tensor([[2.0, 0.0, 1.0]])
    loss_BT = critic.loss(value_BT, old_value_BT, return_BT)
    assert loss_BT[0].tolist() == pytest.approx([0.2 * x for x in expected], rel=1e-6)
    (gradient_BT,) = torch.autograd.grad(loss_BT.sum(), value_BT)
    # w (V − R), but nothing where the clipped value is the worse one: it does not move with V.
    first = 0.4 * (1 - 2) if value_clip is None else 0.0
    assert gradient_BT[0].tolist() == pytest.approx([first, 0.4 * (-1 - 0), 0.4 * (0.2 - 1)], rel=1e-6)


@both
@pytest.mark.parametrize("value_clip", [None, 0.2])
def test_the_value_loss_is_the_mean_over_the_tokens_of_the_optimizer_batch(tiny_policy, kind, value_clip):
    policy, rows = tiny_policy(torch.float64, exact=True), make()
    critic = trained(make_critic(gae(critic=kind, value_clip=value_clip), policy))
    _, values = score(policy, rows, 1.0, 10_000, critic)
    errors = []
    for row, value in zip(rows, values, strict=True):
        for v, old, target in zip(value, row.values, row.returns, strict=True):
            near = old + min(max(v - old, -0.2), 0.2)
            errors.append(0.25 * max((v - target) ** 2, (near - target) ** 2 if value_clip else 0.0))
    expected = sum(errors) / len(errors)
    _, with_values, result = gradients(learner_of(policy, critic), rows)
    _, without, _ = gradients(learner_of(policy, None), rows)
    assert result["critic/loss_mean"] == pytest.approx(expected, rel=1e-10)
    assert with_values - without == pytest.approx(expected, rel=1e-9)


@both
def test_value_loss_and_gradients_do_not_depend_on_micro_batches(tiny_policy, kind):
    policy, rows = tiny_policy(torch.float64, exact=True), make()
    critic = trained(make_critic(gae(critic=kind, value_clip=0.2), policy))
    whole, loss, result = gradients(learner_of(policy, critic), rows)
    for max_tokens in (30, 1):
        cut, cut_loss, cut_result = gradients(learner_of(policy, critic, max_tokens=max_tokens), rows)
        assert cut_loss == pytest.approx(loss, rel=1e-12)
        assert cut_result == pytest.approx(result, rel=1e-11, abs=1e-12)
        for a, b in zip(cut, whole, strict=True):
            assert (a - b).norm() <= 1e-12 * b.norm()


def test_a_separate_critic_leaves_the_gradient_of_the_policy_alone_and_the_trunk_does_not(tiny_policy):
    policy, rows = tiny_policy(torch.float64, exact=True), make()
    (plain, _), *_ = gradients(learner_of(policy, None), rows)
    separate, trunk = (trained(make_critic(gae(critic=kind), policy)) for kind in ("separate", "trunk"))
    (got, own), *_ = gradients(learner_of(policy, separate), rows)
    assert (got - plain).norm() <= 1e-12 * plain.norm()
    assert own.norm() > 0.01
    (got, own), *_ = gradients(learner_of(policy, trunk), rows)
    assert (got - plain).norm() > 0.01 * plain.norm()
    assert own.norm() > 0.01


def test_through_the_trunk_the_value_loss_has_its_own_gradient(tiny_policy):
    """Without advantages what reaches the policy is the gradient of the value loss, from the library's own states."""
    policy = tiny_policy(torch.float64, exact=True)
    rows = [replace(row, advantages=[0.0] * len(row.token_ids)) for row in make()]
    critic = trained(make_critic(gae(), policy))
    num_tokens, expected = sum(len(row.token_ids) for row in rows), 0.0
    for row in rows:
        hidden_SH = policy.model.model(torch.tensor([row.prompt_ids + row.token_ids])).last_hidden_state[0]
        value_T = critic.head(hidden_SH[len(row.prompt_ids) - 1 : -1]).squeeze(-1)
        expected = expected + 0.25 * (value_T - torch.tensor(row.returns, dtype=torch.float64)).square().sum()
    (expected / num_tokens).backward()
    groups = learner_of(policy, critic).parameters()
    expected = [
        torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in group])
        for group in groups
    ]
    for group in groups:
        for p in group:
            p.grad = None
    got, *_ = gradients(learner_of(policy, critic), rows)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm()


# --- its training


@both
def test_gradients_of_policy_and_critic_are_clipped_each_by_themselves(tiny_policy, tmp_path, kind):
    policy = tiny_policy(torch.float64, exact=True)
    critic, rows = trained(make_critic(gae(critic=kind, value_weight=50.0), policy)), fresh(policy, make())
    learner = replace(learner_of(policy, critic), max_grad_norm=0.01)
    (of_policy, own), *_ = gradients(learner, rows)
    before = [torch.cat([p.detach().flatten().clone() for p in group]) for group in learner.parameters()]
    groups = [{"params": group} for group in learner.parameters()]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    update(
        learner, optimizer, rows,
        learning_rates=[1.0], random=np.random.default_rng(0), statistics=Statistics(), failure=tmp_path,
    )  # fmt: skip
    for group, old, gradient in zip(learner.parameters(), before, (of_policy, own), strict=True):
        moved = torch.cat([p.detach().flatten() for p in group]) - old
        torch.testing.assert_close(moved, -0.01 * gradient / gradient.norm(), rtol=1e-4, atol=1e-12)


@both
def test_its_learning_rate_follows_that_of_the_policy(tiny_policy, tmp_path, kind):
    schedule = ["optimizer.warmup_steps=3", "optimizer.decay=linear"]
    overrides = ["advantage=gae", f"advantage.critic={kind}", "advantage.value_lr=4e-3", *schedule]
    trainer, rates = make_trainer(tiny_policy(), tmp_path, *overrides), []
    trainer.optimizer.register_step_pre_hook(lambda made, *_: rates.append([g["lr"] for g in made.param_groups]))
    trainer.run()
    assert len(rates) == 16
    assert [own for _, own in rates] == pytest.approx([4 * of_policy for of_policy, _ in rates], rel=1e-12)
    assert rates[0] == pytest.approx([1e-3 / 3, 4e-3 / 3])
    assert max(own for _, own in rates) == pytest.approx(4e-3)
    assert rates[-1][0] < 0.1e-3


@both
def test_a_resumed_run_ends_with_the_bits_of_the_unbroken_one(tiny_policy, tmp_path, kind):
    overrides = ["advantage=gae", f"advantage.critic={kind}", "objective=clip"]
    whole = make_trainer(tiny_policy(), tmp_path / "whole", *overrides)
    whole.run()
    with pytest.raises(Killed):  # in the fourth step: the third is lost, for no checkpoint has it
        make_trainer(tiny_policy(), tmp_path / "broken", *overrides, calls=24).run()
    resumed = make_trainer(tiny_policy(), tmp_path / "broken", *overrides)
    assert resumed.state.progress.steps == 2
    assert torch.count_nonzero(resumed.critic.head.weight) > 0
    resumed.run()
    assert torch.equal(weights(resumed.critic), weights(whole.critic))
    assert torch.equal(weights(resumed.policy.model), weights(whole.policy.model))
    (first, second) = (t.optimizer.state_dict()["state"] for t in (whole, resumed))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[i][name], second[i][name]) for i in first for name in first[i])


@both
def test_values_learn_what_a_completion_is_worth(tiny_policy, tmp_path, kind):
    """Fixed rows whose return is 1 for one prompt and −1 for another: explained by the value model after some steps."""
    policy = tiny_policy()
    critic = make_critic(gae(critic=kind, value_weight=1.0), policy)
    rows = [
        Row([10 + sign], [30, 31, 2], [], [0.0] * 3, None, [0.0] * 3, [float(2 * sign - 1)] * 3)
        for sign in (0, 1)
        for _ in range(4)
    ]
    learner = learner_of(policy, critic, num_epochs=40)
    groups = [{"params": group} for group in learner.parameters()]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0)
    update(
        learner, optimizer, fresh(policy, rows),
        learning_rates=[1e-2] * 40, random=np.random.default_rng(0), statistics=Statistics(),
        failure=tmp_path,
    )  # fmt: skip
    _, values = score(policy, rows, 1.0, 100, critic)
    assert np.abs(np.array(values) - np.array([row.returns for row in rows])).max() < 0.2
