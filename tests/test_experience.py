import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training import make_trainer, problems

from pspo.advantage import GAE, Group, LeaveOneOut, Mean
from pspo.advantage.critic import make_critic
from pspo.base.stream import Stream
from pspo.dataset import order
from pspo.model.batch import make_batch
from pspo.model.logprob import token_logprobs
from pspo.reward import Score
from pspo.rollout import Completion, Rollout, sample
from pspo.rollout.experience import Collected, Row, collect, make_rows, score

ROLLOUT = Rollout(
    prompts=3,
    group_size=4,
    max_new_tokens=4,
    overlong_share=0.0,
    max_redraws=0,
    temperature=1.0,
    top_p=1.0,
    max_rows=64,
)
GROUP = Group(name="group", ddof=1, eps=1e-4)


def scripted(spread):
    """A reward that differs inside the groups of the problems named in ``spread``, and is 1/2 in all others."""
    calls = []

    def reward(text, problem):
        calls.append(problem.id)
        value = float(calls.count(problem.id) % 2) if int(problem.id) in spread else 0.5
        return Score(value, value == 1, {"script": value}, True)

    return reward


def batched(reward):
    return lambda completions: [reward(completion.text, completion.problem) for completion in completions]


def asked(number, start=0, *, total=20, seed=7):
    return order(total, seed, start, number)


def collected(policy, rollout, spread, *, start=0, total=20, step=1):
    return collect(policy, problems(total), batched(scripted(spread)), rollout, seed=7, step=step, start=start)


def drawn(found):
    return [int(c.prompt.problem.id) for c in found.completions[:: ROLLOUT.group_size]]


# --- collect


def test_without_redraws_every_group_trains_whatever_its_rewards(tiny_policy):
    found = collected(tiny_policy(), ROLLOUT, spread={asked(3)[1]}, start=0)
    assert drawn(found) == asked(3)
    assert found.used_P.tolist() == [True] * 3
    completions, reward_PG = found.training()
    assert completions == found.completions
    assert torch.equal(reward_PG, found.reward_PG)
    assert reward_PG.dtype == torch.float64
    assert reward_PG.tolist() == [[0.5] * 4, [1, 0, 1, 0], [0.5] * 4]


def test_groups_without_spread_are_drawn_again_and_do_not_train(tiny_policy):
    """Of the prompts 0, 1, 2 in the data order 1 has no spread, nor has 3 that comes for it; 4 has one."""
    places = asked(9)
    found = collected(tiny_policy(), replace(ROLLOUT, max_redraws=5), spread={places[i] for i in (0, 2, 4, 5, 6)})
    assert drawn(found) == places[:5]
    assert found.used_P.tolist() == [True, False, True, False, True]
    completions, reward_PG = found.training()
    assert [int(c.prompt.problem.id) for c in completions[::4]] == [places[i] for i in (0, 2, 4)]
    assert [c.sample for c in completions] == [0, 1, 2, 3] * 3
    assert reward_PG.tolist() == [[1, 0, 1, 0]] * 3
    assert len(found.scores) == len(found.completions) == 20
    metrics = found.metrics()
    assert metrics["reward/zero_spread_rate"] == pytest.approx(2 / 5)  # of all that were drawn
    assert metrics["reward/mean"] == pytest.approx(0.5)


def test_as_many_prompts_are_drawn_again_as_are_missing(tiny_policy):
    places = asked(9)
    found = collected(tiny_policy(), replace(ROLLOUT, max_redraws=1), spread={places[4]})
    assert drawn(found) == places[:6]  # three, then three more; the cap of one redraw stops it with one group
    assert found.used_P.tolist() == [False] * 4 + [True, False]
    found = collected(tiny_policy(), replace(ROLLOUT, max_redraws=2), spread={places[4]})
    assert drawn(found) == places[:8]


@pytest.mark.parametrize("max_redraws", [1, 3])
def test_where_no_group_ever_has_a_spread_nothing_trains(tiny_policy, max_redraws):
    found = collected(tiny_policy(), replace(ROLLOUT, max_redraws=max_redraws), spread=set())
    assert len(drawn(found)) == 3 * (1 + max_redraws)
    assert not found.used_P.any()
    assert found.training()[0] == []
    assert found.training()[1].shape == (0, 4)
    assert found.metrics()["reward/zero_spread_rate"] == 1


@given(
    spread=st.sets(st.integers(0, 39)),
    prompts=st.integers(1, 6),
    max_redraws=st.integers(0, 6),
    start=st.integers(0, 50),
)
def test_a_step_draws_the_data_order_on_from_its_start_and_keeps_to_its_cap(spread, prompts, max_redraws, start):
    """Against the rule itself, with a sampler that samples nothing."""
    rollout = replace(ROLLOUT, prompts=prompts, max_redraws=max_redraws)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pspo.rollout.experience.sample", nothing)
        found = collected(None, rollout, spread, start=start, total=40)
    ids = drawn(found)
    assert ids == asked(len(ids), start, total=40)
    assert prompts <= len(ids) <= prompts * (1 + max_redraws)
    used = found.used_P.tolist()
    assert sum(used) <= prompts
    if max_redraws:
        assert used == [i in spread for i in ids]
        if sum(used) < prompts:  # it gave up only at the cap
            assert len(ids) - sum(used) >= max_redraws + 1
    if start % 40 + len(ids) <= 40:
        assert len(set(ids)) == len(ids)  # no prompt twice within a step, while it stays inside an epoch


def nothing(policy, prompts, **settings):
    return [Completion(p, g, [1], [0.0], True, "") for p in prompts for g in range(settings["group_size"])]


def test_what_is_sampled_depends_on_seed_step_and_problem_alone(tiny_policy):
    policy, places = tiny_policy(), asked(9)
    rollout = replace(ROLLOUT, max_redraws=5)
    found = collected(policy, rollout, spread={places[i] for i in (0, 2, 4)}, step=3)
    settings = {name: getattr(rollout, name) for name in ("group_size", "max_new_tokens", "temperature", "top_p")}
    expected = sample(policy, [problems(20)[i] for i in places[:5]], seed=[7, Stream.TRAIN, 3], max_rows=64, **settings)
    assert [c.token_ids for c in found.completions] == [c.token_ids for c in expected]


def test_metrics():
    def one(prompt, length, finished):
        return Completion(prompt, 0, [1] * length, [0.0] * length, finished, "")

    a, b = problems(2)
    completions = [one(a, 1, True), one(a, 3, False), one(b, 4, False), one(b, 4, True)]
    scores = [
        Score(1.0, True, {"answer": 1.0}, True),
        Score(0.0, False, {"answer": 0.0, "format": 0.4}, True),
        Score(0.0, False, {}, False),
        Score(0.0, False, {}, True),
    ]
    reward_PG = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    metrics = Collected(completions, scores, reward_PG, torch.tensor([True, True])).metrics()
    assert metrics == pytest.approx(
        {
            "reward/mean": 0.25,
            "reward/std": 0.5,
            "reward/answer_mean": 0.25,
            "reward/format_mean": 0.1,
            "reward/correct_mean": 0.25,
            "reward/unparsed_rate": 0.25,
            "reward/zero_spread_rate": 0.5,
            "completion/length_mean": 3.0,
            "completion/truncated_rate": 0.5,
        }
    )


# --- the penalty on completions near their end

OVERLONG = replace(ROLLOUT, max_new_tokens=20, overlong_share=0.25)


@pytest.mark.parametrize(
    ("length", "penalty"), [(1, 0.0), (15, 0.0), (16, -0.2), (17, -0.4), (18, -0.6), (19, -0.8), (20, -1.0)]
)
def test_overlong_penalty_by_hand(length, penalty):
    """DAPO (arXiv 2503.14476, eq. 13) with L_max = 20 and L_cache = 5: ((20 − 5) − length) / 5 from 15 tokens on."""
    assert OVERLONG.overlong_penalty(length) == pytest.approx(penalty, abs=1e-12)
    assert replace(OVERLONG, overlong_share=0.0).overlong_penalty(length) == 0


@given(share=st.floats(0.001, 0.999), max_new_tokens=st.integers(1, 4000))
def test_overlong_penalty_falls_steadily_from_0_to_minus_1(share, max_new_tokens):
    rollout = replace(OVERLONG, max_new_tokens=max_new_tokens, overlong_share=share)
    buffer = share * max_new_tokens
    assert rollout.overlong_penalty(max_new_tokens) == pytest.approx(-1)
    values = [rollout.overlong_penalty(length) for length in range(max(0, max_new_tokens - 50), max_new_tokens + 1)]
    for before, after in itertools.pairwise(values):
        assert before - 1 / buffer - 1e-9 <= after <= before  # monotone, and no step is larger than its slope
        assert before <= 0
    assert rollout.overlong_penalty(math.floor(max_new_tokens - buffer)) == 0


def test_the_penalty_is_added_to_the_reward_and_logged_as_a_component(tiny_policy):
    rollout = replace(ROLLOUT, overlong_share=0.5)
    found = collected(tiny_policy(), rollout, spread=set())
    plain = collected(tiny_policy(), ROLLOUT, spread=set())
    lengths = [len(c.token_ids) for c in found.completions]
    assert 4 in lengths  # max_new_tokens: a penalty of 1
    expected = [-max(0.0, (length - 2) / 2) for length in lengths]
    assert [s.components["overlong"] for s in found.scores] == expected
    assert (found.reward_PG - plain.reward_PG).flatten().tolist() == pytest.approx(expected)
    assert all(s.components["script"] == 0.5 for s in found.scores)
    assert found.metrics()["reward/overlong_mean"] == pytest.approx(sum(expected) / len(expected))
    assert "overlong" not in plain.scores[0].components


def test_the_penalty_can_make_the_spread_that_dynamic_sampling_asks_for(tiny_policy):
    """The advantage sees the penalty, so has_spread does."""
    found = collected(tiny_policy(), replace(ROLLOUT, overlong_share=0.9, max_redraws=1), spread=set())
    lengths = [[len(c.token_ids) for c in group] for group in zip(*[iter(found.completions)] * 4, strict=True)]
    assert found.used_P.tolist() == [len(set(group)) > 1 for group in lengths]


# --- rows


def completions_of(policy, number=3, max_new_tokens=6):
    settings = {"group_size": 4, "max_new_tokens": max_new_tokens, "temperature": 0.8, "top_p": 1.0, "max_rows": 64}
    return sample(policy, problems(number), seed=[0], **settings)


def rows_of(policy, completions, reward_PG, advantage=GROUP, **changes):
    settings = {"reference": None, "critic": None, "temperature": 0.8, "max_tokens": 40, "mask_truncated": False}
    return make_rows(completions, reward_PG, advantage, policy, **settings | changes)


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
    for row, c, a in zip(rows, completions, expected, strict=True):
        assert row == Row(c.prompt.token_ids, c.token_ids, c.logprobs, [a] * len(c.token_ids))
    with pytest.raises(ValueError, match="zip"):
        rows_of(policy, completions[:-1], rewards(), advantage)


def test_truncated_completions_count_in_their_group_and_do_not_train(tiny_policy):
    policy = replace(tiny_policy(), stop_ids=list(range(2, 128, 8)))
    completions = completions_of(policy)
    finished = [c.finished for c in completions]
    assert 2 < sum(finished) < 10
    everyone, _ = rows_of(policy, completions, rewards())
    rows, _ = rows_of(policy, completions, rewards(), mask_truncated=True)
    assert rows == [row for row, kept in zip(everyone, finished, strict=True) if kept]
    none, _ = rows_of(policy, [replace(c, finished=False) for c in completions], rewards(), mask_truncated=True)
    assert none == []


def test_score_is_what_the_trainer_computes_whatever_the_micro_batches(tiny_policy):
    policy = tiny_policy(torch.float64, exact=True)
    rows, _ = rows_of(policy, completions_of(policy), rewards())
    batch = make_batch([r.prompt_ids for r in rows], [r.token_ids for r in rows], policy.pad_id, policy.device)
    expected_BT = token_logprobs(policy.model, batch, 0.8).logprob_BT.detach()
    for max_tokens in (1, 20, 10_000):
        logprobs, values = score(policy, rows, 0.8, max_tokens, None)
        assert values == [[]] * len(rows)
        for row, found, expected_T in zip(rows, logprobs, expected_BT, strict=True):
            assert found == pytest.approx(expected_T[: len(row.token_ids)].tolist(), abs=1e-12)
    assert score(policy, [], 0.8, 20, None) == ([], [])


@pytest.mark.parametrize("with_critic", [False, True])
def test_old_logprobs_are_the_samplers_or_the_trainers(tiny_policy, with_critic):
    policy = tiny_policy(torch.float64, exact=True)
    moved = [replace(c, logprobs=[x - 0.25 for x in c.logprobs]) for c in completions_of(policy)]
    settings = {"advantage": gae(), "critic": make_critic(gae(), policy)} if with_critic else {}
    kept, _ = rows_of(policy, moved, rewards(), **settings)
    assert [row.old_logprobs for row in kept] == [c.logprobs for c in moved]
    made, metrics = rows_of(policy, moved, rewards(), recompute=True, **settings)
    assert metrics["policy/sampler_gap_mean"] == pytest.approx(0.25, abs=1e-9)
    for row, before, completion in zip(made, kept, completions_of(policy), strict=True):
        assert row.old_logprobs == pytest.approx(completion.logprobs, abs=1e-9)
        assert row.advantages == before.advantages


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
    advantages, returns = advantage.estimate(rewards().flatten().tolist(), values)
    assert [row.values for row in rows] == values
    assert [row.advantages for row in rows] == advantages
    assert [row.returns for row in rows] == returns
    value, target = (torch.from_numpy(np.concatenate(lists)) for lists in (values, returns))
    expected = 1 - (target - value).var(correction=0) / target.var(correction=0)
    assert metrics == {"critic/explained_variance": pytest.approx(expected.item(), rel=1e-9)}


# --- a step of a run


def trainer_of(policy, directory, reward, *overrides):
    overrides = ("budget.steps=2", "rollout.max_redraws=2", *overrides)
    return make_trainer(policy, directory, *overrides, reward=reward, num_problems=20)


def weights(policy):
    return torch.cat([p.detach().flatten().clone() for p in policy.trainable().values()])


def test_generated_and_used_prompts_are_both_counted(tiny_policy, tmp_path):
    places = order(20, 0, 0, 20)
    trainer = trainer_of(tiny_policy(), tmp_path, scripted({places[i] for i in (0, 2, 3, 5)}))
    first, second = trainer._step(), trainer._step()
    assert (first["budget/prompts"], first["budget/prompts_used"]) == (3, 2)  # 0, 1 and 2
    assert (second["budget/prompts"], second["budget/prompts_used"]) == (6, 4)  # 3, 4 and 5
    assert second["budget/optimizer_steps"] == 8
    assert first["budget/completion_tokens"] > 0


@pytest.mark.parametrize(
    ("overrides", "spread"),
    [
        pytest.param([], set(), id="no spread"),
        pytest.param(["advantage=gae"], set(), id="no spread, value model"),
        pytest.param(["loss.kl=k3", "loss.kl_weight=0.1"], set(), id="no spread, reference"),
        pytest.param(["rollout.max_redraws=0", "loss.mask_truncated=true"], set(range(20)), id="all truncated"),
    ],
)
def test_a_run_goes_on_where_a_step_has_nothing_to_learn_from(tiny_policy, tmp_path, overrides, spread):
    """No optimizer step, the weights are as before, and the run comes to its end."""
    policy = replace(tiny_policy(), stop_ids=[-1])  # no token ends a completion
    before = weights(policy)
    trainer = trainer_of(policy, tmp_path, scripted(spread), *overrides)
    state = trainer.run()
    assert state.progress.steps == 2
    assert state.progress.optimizer_steps == 0
    assert torch.equal(weights(policy), before)
    assert state.progress.prompts == (12 if not spread else 4)
