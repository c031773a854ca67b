"""What one step collects: prompts drawn, rewards, redraws, the metrics of a rollout."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training import batched, problems, rollout_config, scripted

from pspo.base.stream import Stream
from pspo.dataset import order
from pspo.reward import Score
from pspo.rollout import Completion, OwnSampler, collect, rewards, rollout_metrics, training

ROLLOUT = rollout_config()


def asked(number, start=0, *, total=20, seed=7):
    return order(total, seed, start, number)


def collected(sampler, spread, *, config=ROLLOUT, start=0, total=20, step=1):
    return collect(sampler, problems(total), batched(scripted(spread)), config, seed=7, step=step, start=start)


def drawn(completions):
    return [int(c.problem.id) for c in completions[:: ROLLOUT.group_size]]


def trains(config, completions):
    """Whether each group trains, by the places of the groups that do."""
    places = {c.prompt.place for c in training(config, completions)}
    return [c.prompt.place in places for c in completions[:: config.group_size]]


@pytest.fixture
def sampler(tiny_policy):
    return OwnSampler(tiny_policy(torch.float64, exact=True), ROLLOUT)


class Silent:
    """A sampler whose completions are all one token long."""

    def sample(self, prompts, group_size, seed, *, greedy=False):
        return [Completion(p, g, [1], [0.0], True, "") for p in prompts for g in range(group_size)]


def test_without_redraws_every_group_trains_whatever_its_rewards():
    found = collected(Silent(), {asked(3)[1]})
    assert drawn(found) == asked(3)
    assert trains(ROLLOUT, found) == [True] * 3
    assert training(ROLLOUT, found) == found
    reward_PG = rewards(ROLLOUT, found)
    assert reward_PG.dtype == torch.float64
    assert reward_PG.tolist() == [[0.5] * 4, [1, 0, 1, 0], [0.5] * 4]


def test_groups_without_spread_are_drawn_again_and_do_not_train():
    """Of the prompts 0, 1, 2 in the data order 1 has no spread, nor has 3 that comes for it; 4 has one."""
    places, config = asked(9), replace(ROLLOUT, max_redraws=5)
    found = collected(Silent(), {places[i] for i in (0, 2, 4, 5, 6)}, config=config)
    assert drawn(found) == places[:5]
    assert trains(config, found) == [True, False, True, False, True]
    used = training(config, found)
    assert drawn(used) == [places[i] for i in (0, 2, 4)]
    assert [c.sample for c in used] == [0, 1, 2, 3] * 3
    assert rewards(config, used).tolist() == [[1, 0, 1, 0]] * 3
    assert len(found) == 20
    metrics = rollout_metrics(config, found)
    assert metrics["reward/zero_spread_rate"] == pytest.approx(2 / 5)  # of all that were drawn
    assert metrics["reward/mean"] == pytest.approx(0.5)


def test_as_many_prompts_are_drawn_again_as_are_missing():
    places, once = asked(9), replace(ROLLOUT, max_redraws=1)
    found = collected(Silent(), {places[4]}, config=once)
    assert drawn(found) == places[:6]  # three, then three more; the cap of one redraw stops it with one group
    assert trains(once, found) == [False] * 4 + [True, False]
    found = collected(Silent(), {places[4]}, config=replace(ROLLOUT, max_redraws=2))
    assert drawn(found) == places[:8]


@pytest.mark.parametrize("max_redraws", [1, 3])
def test_where_no_group_ever_has_a_spread_nothing_trains(max_redraws):
    config = replace(ROLLOUT, max_redraws=max_redraws)
    found = collected(Silent(), set(), config=config)
    assert len(drawn(found)) == 3 * (1 + max_redraws)
    assert not any(trains(config, found))
    assert training(config, found) == []
    assert rewards(config, []).shape == (0, 4)
    assert rollout_metrics(config, found)["reward/zero_spread_rate"] == 1


def test_the_reward_is_asked_once_for_all_completions_of_a_draw():
    places, config, calls = asked(9), replace(ROLLOUT, max_redraws=5), []
    reward = batched(scripted({places[i] for i in (0, 2, 4)}))

    def watched(completions):
        calls.append([c.prompt.place for c in completions[::4]])
        return reward(completions)

    collect(Silent(), problems(20), watched, config, seed=7, step=1, start=0)
    assert calls == [[0, 1, 2], [3], [4]]


def test_a_reward_that_leaves_completions_out_is_refused():
    with pytest.raises(ValueError, match="zip"):
        collect(Silent(), problems(20), lambda completions: [], ROLLOUT, seed=7, step=1, start=0)


@given(
    spread=st.sets(st.integers(0, 39)),
    prompts=st.integers(1, 6),
    max_redraws=st.integers(0, 6),
    start=st.integers(0, 50),
)
def test_a_step_draws_the_data_order_on_from_its_start_and_keeps_to_its_cap(spread, prompts, max_redraws, start):
    """Against the rule itself, with a sampler that samples nothing."""
    config = replace(ROLLOUT, prompts=prompts, max_redraws=max_redraws)
    found = collected(Silent(), spread, config=config, start=start, total=40)
    ids = drawn(found)
    assert ids == asked(len(ids), start, total=40)
    assert [c.prompt.place for c in found[::4]] == list(range(start, start + len(ids)))
    assert prompts <= len(ids) <= prompts * (1 + max_redraws)
    used = trains(config, found)
    assert sum(used) <= prompts
    if max_redraws:
        assert used == [i in spread for i in ids]
        if sum(used) < prompts:  # it gave up only at the cap
            assert len(ids) - sum(used) >= max_redraws + 1
    if start % 40 + len(ids) <= 40:
        assert len(set(ids)) == len(ids)  # no prompt twice within a step, while it stays inside an epoch


# --- the random numbers of a step


def written(completions):
    return {(c.prompt.place, c.sample): c.token_ids for c in completions}


@pytest.mark.parametrize(
    ("total", "prompts", "max_redraws", "start"),
    [
        pytest.param(4, 4, 0, 2, id="an epoch ends inside the step"),
        pytest.param(2, 2, 2, 0, id="prompts drawn again on a small set"),
        pytest.param(1, 3, 0, 5, id="one problem"),
    ],
)
def test_a_problem_drawn_twice_in_a_step_has_completions_of_its_own_each_time(
    tiny_policy, total, prompts, max_redraws, start
):
    config = rollout_config(prompts=prompts, max_redraws=max_redraws, max_new_tokens=8)
    sampler = OwnSampler(tiny_policy(torch.float64, exact=True), config)
    found = collected(sampler, set(), config=config, total=total, start=start)
    ids = drawn(found)
    assert len(set(ids)) < len(ids) == prompts * (1 + max_redraws)
    for one, other in itertools.combinations(range(len(ids)), 2):
        if ids[one] == ids[other]:
            pairs = zip(found[4 * one : 4 * one + 4], found[4 * other : 4 * other + 4], strict=True)
            assert all(a.token_ids != b.token_ids for a, b in pairs)
    alone = rollout_config(prompts=1, max_new_tokens=8)
    for place in range(start, start + len(ids)):  # and each place has the same ones, whatever else is drawn beside it
        again = collected(OwnSampler(sampler.policy, alone), set(), config=alone, total=total, start=place)
        assert written(again).items() <= written(found).items()


def test_what_is_sampled_depends_on_seed_step_problem_and_place_alone(sampler):
    places, config = asked(9), replace(ROLLOUT, max_redraws=5)
    found = collected(sampler, {places[i] for i in (0, 2, 4)}, config=config, step=3)
    prompts = [replace(problems(20)[i], place=place) for place, i in enumerate(places[:5])]
    expected = sampler.sample(prompts, 4, [7, Stream.TRAIN, 3])
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    assert written(found) != written(collected(sampler, {places[i] for i in (0, 2, 4)}, config=config, step=4))


# --- metrics


def test_metrics():
    def one(prompt, length, finished, score):
        return Completion(prompt, 0, [1] * length, [0.0] * length, finished, "", score)

    a, b = problems(2)
    completions = [
        one(a, 1, True, Score(1.0, True, {"answer": 1.0}, True)),
        one(a, 3, False, Score(0.0, False, {"answer": 0.0, "format": 0.4}, True)),
        one(b, 4, False, Score(0.0, False, {}, False, timed_out=True)),
        one(b, 4, True, Score(0.0, False, {}, True, timed_out=True)),
    ]
    metrics = rollout_metrics(replace(ROLLOUT, group_size=2), completions)
    assert metrics == pytest.approx(
        {
            "reward/mean": 0.25,
            "reward/std": 0.5,
            "reward/answer_mean": 0.25,
            "reward/format_mean": 0.1,
            "reward/correct_mean": 0.25,
            "reward/unparsed_rate": 0.25,
            "reward/timed_out_rate": 0.5,
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
    config = replace(OVERLONG, max_new_tokens=max_new_tokens, overlong_share=share)
    buffer = share * max_new_tokens
    assert config.overlong_penalty(max_new_tokens) == pytest.approx(-1)
    values = [config.overlong_penalty(length) for length in range(max(0, max_new_tokens - 50), max_new_tokens + 1)]
    for before, after in itertools.pairwise(values):
        assert before - 1 / buffer - 1e-9 <= after <= before  # monotone, and no step is larger than its slope
        assert before <= 0
    assert config.overlong_penalty(math.floor(max_new_tokens - buffer)) == 0


def test_the_penalty_is_added_to_the_reward_and_logged_as_a_component(sampler):
    config = replace(ROLLOUT, overlong_share=0.5)
    found, plain = collected(sampler, set(), config=config), collected(sampler, set())
    lengths = [len(c.token_ids) for c in found]
    assert 4 in lengths  # max_new_tokens: a penalty of 1
    expected = [-max(0.0, (length - 2) / 2) for length in lengths]
    assert [c.score.components["overlong"] for c in found] == expected
    assert (rewards(config, found) - rewards(ROLLOUT, plain)).flatten().tolist() == pytest.approx(expected)
    assert all(c.score.components["script"] == 0.5 for c in found)
    assert rollout_metrics(config, found)["reward/overlong_mean"] == pytest.approx(sum(expected) / len(expected))
    assert all("overlong" not in c.score.components for c in plain)


def test_the_penalty_can_make_the_spread_that_dynamic_sampling_asks_for(tiny_policy):
    """The advantage sees the penalty, so has_spread does."""
    config = replace(ROLLOUT, overlong_share=0.9, max_redraws=1)
    policy = replace(tiny_policy(torch.float64, exact=True), stop_ids=list(range(2, 128, 16)))
    found = collected(OwnSampler(policy, config), set(), config=config)
    lengths = [{len(c.token_ids) for c in group} for group in zip(*[iter(found)] * 4, strict=True)]
    assert trains(config, found) == [len(group) > 1 for group in lengths]
    assert any(len(group) > 1 for group in lengths)
