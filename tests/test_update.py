import itertools
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pspo import update as module
from pspo.advantage import Advantage
from pspo.dataset import Problem, Prompt
from pspo.logprob import Batch, make_batch
from pspo.objective import OBJECTIVES, PSPO, Clip, NoClip
from pspo.rollout import sample
from pspo.schema import ConfigError
from pspo.statistics import Statistics
from pspo.update import NonFiniteError, Row, Update, accumulate, make_rows, pack, update

ALL = [NoClip(name="noclip"), Clip(name="clip", eps_low=0.2, eps_high=0.2), PSPO(name="pspo", alpha=0.1)]
every = pytest.mark.parametrize("objective", ALL, ids=lambda o: o.name)
cuts = pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        pytest.param({"attention": "eager"}, 1e-6, id="float32-eager"),
        pytest.param({"attention": "sdpa"}, 1e-6, id="float32-sdpa"),
        pytest.param({"dtype": torch.float64, "exact": True}, 1e-12, id="float64"),
    ],
)
ONE_STEP = Update(num_epochs=1, num_minibatches=1, max_tokens=10_000)


def make(num_rows=8, seed=0):
    """Rows of many lengths whose old log-probs are near those of a random policy of 128 tokens."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(num_rows):
        prompt, completion = (random.integers(7, 128, size=random.integers(1, 9)).tolist() for _ in range(2))
        old_logprobs = (-math.log(128) + 0.3 * random.standard_normal(len(completion))).tolist()
        rows.append(Row(prompt, completion, old_logprobs, float(random.standard_normal())))
    return rows


def gradient(policy):
    found = torch.cat([p.grad.flatten() for p in policy.trainable().values()])
    policy.model.zero_grad(set_to_none=True)
    return found


def weights(policy):
    return torch.cat([p.detach().flatten().clone() for p in policy.trainable().values()])


def accumulated(policy, objective, rows, max_tokens):
    statistics = Statistics()
    loss = accumulate(policy, objective, rows, max_tokens, 0.8, statistics, first=True)
    return loss.item(), gradient(policy), statistics.result()


def run(policy, objective, rows, *, config=ONE_STEP, lr=0.1, optimizer=None, failure=None, **changes):
    """``update`` under SGD unless told otherwise; its statistics."""
    optimizer = optimizer or torch.optim.SGD(policy.trainable().values(), lr=lr)
    statistics = Statistics()
    settings = {
        "temperature": 1.0,
        "max_grad_norm": math.inf,
        "learning_rates": [lr] * config.steps,
        "random": np.random.default_rng(0),
    }
    update(
        policy, objective, optimizer, rows, config=config, statistics=statistics, failure=failure, **settings | changes
    )
    return statistics.result()


# --- micro-batches


@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=40),
    max_tokens=st.integers(1, 400),
)
def test_pack_takes_every_row_once_and_keeps_to_its_budget(lengths, max_tokens):
    rows = [Row([0] * p, [i] * c, [0.0] * c, 0.0) for i, (p, c) in enumerate(lengths)]
    packed = pack(rows, max_tokens)
    assert sorted(row.token_ids[0] for micro in packed for row in micro) == list(range(len(rows)))
    for micro in packed:
        assert micro
        longest = max(len(row.prompt_ids) + len(row.token_ids) for row in micro)
        assert len(micro) == 1 or len(micro) * longest <= max_tokens
    padded = [make_batch([r.prompt_ids for r in m], [r.token_ids for r in m], 0, torch.device("cpu")) for m in packed]
    for micro, batch in zip(packed, padded, strict=True):
        assert len(micro) == 1 or batch.input_ids_BS.numel() <= max_tokens


def test_pack_uses_its_budget():
    rows = [Row([0] * 5, [0] * 5, [0.0] * 5, 0.0)] * 8
    assert [len(micro) for micro in pack(rows, 40)] == [4, 4]
    assert [len(micro) for micro in pack(rows, 39)] == [3, 3, 2]
    assert [len(micro) for micro in pack(rows, 1)] == [1] * 8


@pytest.mark.parametrize("max_tokens", [10_000, 40])
def test_loss_gradient_and_statistics_from_the_librarys_logits(tiny_policy, max_tokens):
    """The noclip loss Σ −r A over the tokens of the whole batch, row by row without padding."""
    policy, rows, temperature = tiny_policy(torch.float64, exact=True), make(), 0.8
    logprobs, entropies = [], []
    for row in rows:
        logits_SV = policy.model(input_ids=torch.tensor([row.prompt_ids + row.token_ids])).logits[0] / temperature
        predicting = torch.distributions.Categorical(logits=logits_SV[len(row.prompt_ids) - 1 : -1])
        logprobs.append(predicting.log_prob(torch.tensor(row.token_ids)))
        entropies.append(predicting.entropy())
    logprob_N, entropy_N = torch.cat(logprobs), torch.cat(entropies).detach()
    old_logprob_N = torch.tensor([x for row in rows for x in row.old_logprobs], dtype=torch.float64)
    advantage_N = torch.tensor([row.advantage for row in rows for _ in row.token_ids], dtype=torch.float64)
    log_ratio_N = logprob_N - old_logprob_N
    expected = -(log_ratio_N.exp() * advantage_N).sum() / len(advantage_N)
    expected.backward()
    expected_gradient, log_ratio_N = gradient(policy), log_ratio_N.detach()
    assert (log_ratio_N < 0).any()
    assert (log_ratio_N > 0).any()

    loss, got, result = accumulated(policy, ALL[0], rows, max_tokens)
    assert loss == pytest.approx(expected.item(), rel=1e-10)
    assert (got - expected_gradient).norm() / expected_gradient.norm() <= 1e-10
    told = {
        "loss/mean": expected.item(),
        "policy/kl_old_new_k3": (log_ratio_N.exp() - 1 - log_ratio_N).mean().item(),
        "policy/ratio_max": log_ratio_N.exp().max().item(),
        "policy/ratio_clamped_rate": 0.0,
        "policy/entropy_mean": entropy_N.mean().item(),
        "policy/sampler_gap_mean": log_ratio_N.abs().mean().item(),
    }
    assert {name: result[name] for name in told} == pytest.approx(told, rel=1e-10)


@every
@cuts
def test_loss_and_gradient_do_not_depend_on_micro_batches(tiny_policy, objective, options, tolerance):
    policy, rows = tiny_policy(**options), make()
    assert [len(pack(rows, n)) for n in (10_000, 40, 1)] == [1, 3, 8]
    loss, whole, result = accumulated(policy, objective, rows, 10_000)
    assert whole.norm() > 0.01
    for max_tokens in (40, 1):
        cut_loss, cut, cut_result = accumulated(policy, objective, rows, max_tokens)
        assert cut_loss == pytest.approx(loss, rel=tolerance, abs=tolerance)
        assert (cut - whole).norm() / whole.norm() <= tolerance
        assert cut_result == pytest.approx(result, rel=10 * tolerance, abs=tolerance)


@every
@cuts
def test_loss_and_gradient_do_not_depend_on_padding(tiny_policy, monkeypatch, objective, options, tolerance):
    policy, rows = tiny_policy(**options), make()
    loss, plain, result = accumulated(policy, objective, rows, 10_000)

    def wider(prompts, completions, pad_id, device):
        batch = make_batch(prompts, completions, pad_id, device)
        pad = torch.nn.functional.pad
        return Batch(
            pad(batch.input_ids_BS, (0, 7), value=pad_id),
            pad(batch.attention_BS, (0, 7)),
            pad(batch.position_BT, (0, 4), value=batch.input_ids_BS.shape[1] + 6),
            pad(batch.token_ids_BT, (0, 4), value=pad_id),
            pad(batch.mask_BT, (0, 4)),
        )

    monkeypatch.setattr(module, "make_batch", wider)
    padded_loss, padded, padded_result = accumulated(policy, objective, rows, 10_000)
    assert padded_loss == pytest.approx(loss, rel=tolerance, abs=tolerance)
    assert (padded - plain).norm() / plain.norm() <= tolerance
    assert padded_result == pytest.approx(result, rel=10 * tolerance, abs=tolerance)


@every
def test_order_of_rows_is_of_no_account(tiny_policy, objective):
    policy, rows = tiny_policy(torch.float64, exact=True), make()
    loss, expected, result = accumulated(policy, objective, rows, 40)
    other_loss, other, other_result = accumulated(policy, objective, rows[::-1], 40)
    assert other_loss == pytest.approx(loss, rel=1e-12, abs=1e-12)
    assert (other - expected).norm() / expected.norm() <= 1e-12
    assert other_result == pytest.approx(result, rel=1e-12, abs=1e-12)


def test_recomputed_activations_change_nothing(tiny_policy):
    rows = make()
    expected = accumulated(tiny_policy(torch.float64, exact=True), ALL[0], rows, 40)
    policy = tiny_policy(torch.float64, exact=True, gradient_checkpointing=True)
    got = accumulated(policy, ALL[0], rows, 40)
    assert got[0] == pytest.approx(expected[0], rel=1e-12, abs=1e-12)
    assert (got[1] - expected[1]).norm() / expected[1].norm() <= 1e-12
    assert not policy.model.training


def test_gradient_of_pspo_is_that_of_noclip_times_one_minus_alpha(tiny_policy):
    policy, rows = tiny_policy(torch.float64, exact=True), make()
    expected = 0.7 * accumulated(policy, NoClip(name="noclip"), rows, 40)[1]
    got = accumulated(policy, PSPO(name="pspo", alpha=0.3), rows, 40)[1]
    assert (got - expected).norm() / expected.norm() <= 1e-12


# --- epochs, minibatches, optimizer steps


@given(num_rows=st.integers(1, 20), num_epochs=st.integers(1, 3), share=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
def test_minibatches_take_every_row_once_in_each_epoch(num_rows, num_epochs, share, seed):
    num_minibatches = 1 + int(share * (num_rows - 1))
    weight = torch.nn.Parameter(torch.zeros(()))

    class Fake:
        @staticmethod
        def trainable():
            return {"weight": weight}

    seen, first = [], []

    def record(policy, objective, rows, *args, **options):
        seen.append([row.advantage for row in rows])
        first.append(options["first"])
        weight.grad = torch.ones(())
        return torch.zeros(())

    config = Update(num_epochs=num_epochs, num_minibatches=num_minibatches, max_tokens=1)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "accumulate", record)
        rows = [Row([1], [1], [0.0], float(i)) for i in range(num_rows)]
        run(Fake, ALL[0], rows, config=config, optimizer=optimizer, lr=1.0, random=np.random.default_rng(seed))
    assert len(seen) == num_epochs * num_minibatches == -weight.item()
    assert first == [True] + [False] * (len(seen) - 1)
    for start in range(0, len(seen), num_minibatches):
        epoch = seen[start : start + num_minibatches]
        assert sorted(itertools.chain(*epoch)) == list(range(num_rows))
        assert max(map(len, epoch)) - min(map(len, epoch)) <= 1


def test_one_step_by_hand(tiny_policy):
    """SGD moves the weights by −lr · gradient, scaled down to ``max_grad_norm``; the norm told is that before."""
    policy, rows = tiny_policy(torch.float64, exact=True), make()
    before = weights(policy)
    accumulate(policy, ALL[0], rows, 10_000, 1.0, Statistics())
    expected = gradient(policy)
    norm = expected.norm().item()
    result = run(policy, ALL[0], rows, lr=0.5)
    torch.testing.assert_close(weights(policy), before - 0.5 * expected, atol=1e-12, rtol=0)
    assert result["optimizer/grad_norm_mean"] == pytest.approx(norm, rel=1e-9)
    assert all(p.grad is None for p in policy.trainable().values())
    assert not policy.model.training

    policy = tiny_policy(torch.float64, exact=True)
    result = run(policy, ALL[0], rows, lr=0.5, max_grad_norm=norm / 4)
    torch.testing.assert_close(weights(policy), before - 0.125 * expected, atol=1e-6, rtol=0)
    assert result["optimizer/grad_norm_mean"] == pytest.approx(norm, rel=1e-9)


def test_every_optimizer_step_has_its_learning_rate(tiny_policy):
    policy, taken = tiny_policy(), []
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.0)
    optimizer.register_step_pre_hook(lambda made, *_: taken.append(made.param_groups[0]["lr"]))
    config = Update(num_epochs=2, num_minibatches=3, max_tokens=100)
    rows = [replace(row, advantage=0.0) for row in make()]
    run(policy, ALL[0], rows, config=config, optimizer=optimizer, learning_rates=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert taken == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


@pytest.mark.parametrize("max_tokens", [10_000, 1])
@pytest.mark.parametrize(("num_epochs", "num_minibatches"), [(1, 1), (1, 3), (2, 5)])
def test_statistics_are_over_all_tokens_of_the_step(tiny_policy, max_tokens, num_epochs, num_minibatches):
    """With a learning rate of 0 every cut of a step into pieces must tell the same."""
    policy, rows = tiny_policy(torch.float64, exact=True), make()
    expected = accumulated(policy, ALL[0], rows, 10_000)[2]
    config = Update(num_epochs=num_epochs, num_minibatches=num_minibatches, max_tokens=max_tokens)
    got = run(policy, ALL[0], rows, config=config, lr=0.0, temperature=0.8)
    assert got.pop("optimizer/grad_norm_mean") > 0
    gap = got.pop("policy/sampler_gap_mean"), expected.pop("policy/sampler_gap_mean")
    assert num_minibatches > 1 or gap[0] == pytest.approx(gap[1], rel=1e-12)
    assert got == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_under_sgd_pspo_at_a_larger_rate_is_noclip_step_by_step(tiny_policy):
    config, alpha = Update(num_epochs=2, num_minibatches=2, max_tokens=100), 0.3
    noclip, pspo = tiny_policy(torch.float64, exact=True), tiny_policy(torch.float64, exact=True)
    for step in range(3):
        before = weights(noclip)
        run(noclip, NoClip(name="noclip"), make(seed=step), config=config, lr=0.1)
        run(pspo, PSPO(name="pspo", alpha=alpha), make(seed=step), config=config, lr=0.1 / (1 - alpha))
        assert (weights(noclip) - before).norm() > 1e-3
        torch.testing.assert_close(weights(pspo), weights(noclip), atol=1e-11, rtol=0)


# --- what cannot be trusted stops the run

NAN, INF = math.nan, math.inf
BROKEN = {
    "nan old log-prob": {"old_logprobs": [-4.0, NAN, -4.0]},
    "-inf old log-prob": {"old_logprobs": [-4.0, -INF, -4.0]},
    "inf old log-prob": {"old_logprobs": [INF, -4.0, -4.0]},
    "nan advantage": {"advantage": NAN},
    "inf advantage": {"advantage": INF},
    "-inf advantage": {"advantage": -INF},
    "overflow of the gradient": {"advantage": 1e38},
    "overflow of the loss": {"advantage": 1e39},
}


@every
@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_row_stops_the_run_before_the_step(tiny_policy, tmp_path, objective, broken):
    policy, failure = tiny_policy(torch.float32), tmp_path / "failed_step_000001.pt"
    bad = replace(Row([9, 8], [30, 31, 2], [-4.0] * 3, 1.0), **BROKEN[broken])
    rows = [*make(5), bad, *make(2, seed=1)]
    before = weights(policy)
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=0.1)
    config = replace(ONE_STEP, max_tokens=40)
    with pytest.raises(NonFiniteError, match=re.escape(str(failure))):
        run(policy, objective, rows, config=config, optimizer=optimizer, failure=failure)
    assert torch.equal(weights(policy), before)
    assert not optimizer.state_dict()["state"]
    saved = [Row(**row) for row in torch.load(failure, weights_only=True)]
    assert sorted(map(repr, saved)) == sorted(map(repr, rows))
    assert repr(bad) in map(repr, saved)


def test_a_broken_weight_stops_the_run_before_the_step(tiny_policy, tmp_path):
    policy, failure = tiny_policy(), tmp_path / "failed.pt"
    with torch.no_grad():
        policy.model.model.layers[0].mlp.up_proj.weight[0, 0] = NAN
    before = weights(policy)
    with pytest.raises(NonFiniteError, match=re.escape(str(failure))):
        run(policy, ALL[0], make(), failure=failure)
    torch.testing.assert_close(weights(policy), before, atol=0, rtol=0, equal_nan=True)
    assert len(torch.load(failure, weights_only=True)) == 8


def test_only_the_offending_minibatch_is_saved_and_steps_before_it_stand(tiny_policy, tmp_path):
    rows, config = make(8), replace(ONE_STEP, num_minibatches=4)
    order = np.array_split(np.random.default_rng(0).permutation(8), 4)
    rows[order[2][1]] = replace(rows[order[2][1]], advantage=NAN)
    whole = tiny_policy(torch.float64, exact=True)
    with pytest.raises(NonFiniteError):
        run(whole, ALL[0], rows, config=config, failure=tmp_path / "failed.pt")
    saved = torch.load(tmp_path / "failed.pt", weights_only=True)
    assert repr([Row(**row) for row in saved]) == repr([rows[i] for i in order[2]])
    by_hand = tiny_policy(torch.float64, exact=True)
    for chosen in order[:2]:
        run(by_hand, ALL[0], [rows[i] for i in chosen])
    torch.testing.assert_close(weights(whole), weights(by_hand), atol=1e-12, rtol=0)


# --- from the sampler to the step


def ask(policy, seed, num_prompts=4, group_size=16, max_new_tokens=2):
    prompts = [Prompt(Problem(str(i), "", "", ""), [10 + i, 20 + i]) for i in range(num_prompts)]
    return sample(
        policy,
        prompts,
        seed=[seed],
        group_size=group_size,
        max_new_tokens=max_new_tokens,
        temperature=1.0,
        top_p=1.0,
        max_rows=1024,
    )


@every
def test_on_fresh_samples_the_ratio_is_one(tiny_policy, objective):
    policy = tiny_policy(torch.float64, exact=True)
    completions = ask(policy, 0, max_new_tokens=6)
    advantage_N = torch.randn(len(completions), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = run(policy, objective, make_rows(completions, advantage_N))
    lengths = torch.tensor([len(c.token_ids) for c in completions])
    assert result["loss/mean"] == pytest.approx(-(advantage_N * lengths).sum().item() / lengths.sum().item(), abs=1e-9)
    assert result["policy/ratio_max"] == pytest.approx(1, abs=1e-9)
    assert result["policy/kl_old_new_k3"] == pytest.approx(0, abs=1e-12)
    assert result["policy/sampler_gap_mean"] < 1e-9
    assert result["policy/ratio_clamped_rate"] == 0


def test_make_rows(tiny_policy):
    completions = ask(tiny_policy(), 0)
    rows = make_rows(completions, torch.arange(64.0))
    assert [r.advantage for r in rows] == list(range(64))
    assert all(
        (r.prompt_ids, r.token_ids, r.old_logprobs) == (c.prompt.token_ids, c.token_ids, c.logprobs)
        for r, c in zip(rows, completions, strict=True)
    )
    with pytest.raises(ValueError, match="zip"):
        make_rows(completions, torch.arange(63.0))


def test_the_probe_is_for_every_objective():
    assert {o.name for o in ALL} == set(OBJECTIVES)


@every
def test_learns_a_first_token(tiny_policy, objective):
    """Must-learn probe: one token of 128 is rewarded in the first place; 100 rollouts of two updates at the most."""
    policy, wanted = tiny_policy(), 77

    def reward(completions):
        return torch.tensor([float(c.token_ids[0] == wanted) for c in completions], dtype=torch.float64)

    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=5e-3, weight_decay=0.0)
    advantage, config = Advantage(ddof=1, eps=1e-4), Update(num_epochs=2, num_minibatches=1, max_tokens=4096)
    assert reward(ask(policy, 0)).mean() < 0.1
    for step in range(100):
        completions = ask(policy, step)
        reward_N = reward(completions)
        if reward_N.mean() > 0.95:
            break
        rows = make_rows(completions, advantage(reward_N.view(4, 16)).flatten())
        run(policy, objective, rows, config=config, lr=5e-3, optimizer=optimizer, max_grad_norm=1.0)
    assert reward(ask(policy, 1000, group_size=64)).mean() > 0.9


# --- configuration


@pytest.mark.parametrize("field", ["num_epochs", "num_minibatches", "max_tokens"])
@pytest.mark.parametrize(("value", "told"), [(0, "in [1, inf)"), (-1, "in [1, inf)"), (1.5, "a whole number")])
def test_bad_fields_are_refused(field, value, told):
    with pytest.raises(ConfigError, match=re.escape(f"update.{field} must be {told}, got {value!r}")):
        replace(ONE_STEP, **{field: value})
