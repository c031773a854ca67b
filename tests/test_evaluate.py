"""Held-out problems: who answers, how the answers are drawn, what the metrics say."""

import random

import numpy as np
import pytest
import torch
from training import batched, problems, rollout_config

from pspo.base.console import Phase
from pspo.base.stream import Stream
from pspo.evaluate import answer, summarize, validate
from pspo.evaluate.answers import majority
from pspo.reward import Score
from pspo.rollout import Completion, OwnSampler


class Recording:
    """A sampler that says which prompts, seed and greediness it was asked for; problem i has i + 1 tokens."""

    def __init__(self):
        self.calls, self.phases = [], []

    def sample(self, prompts, group_size, seed, *, greedy=False):
        assert group_size == 1
        self.calls.append(([p.problem.id for p in prompts], list(seed), greedy))
        self.phases.append(str(Phase.current))
        return [Completion(p, 0, [1] * (int(p.problem.id) + 1), [], greedy, f"{greedy}") for p in prompts]


def graded(text, problem):
    """Greedy answers to even problems are right, sampled ones to the first; only those were parsed."""
    correct = int(problem.id) % 2 == 0 if text == "True" else problem.id == "0"
    return Score(1.5 * correct, correct, {"answer": float(correct)}, correct)


def test_validation_by_hand():
    """Five problems: greedy 0, 2 and 4 are right, sampled 0 alone; mean length of 1 to 5 tokens is 3."""
    sampler = Recording()
    metrics = validate(sampler, problems(5), batched(graded), [7, Stream.VALIDATION, 3], max_rows=2)
    assert metrics.pop("time/validation_s") >= 0
    assert metrics == {
        "validation/greedy_accuracy": 0.6,
        "validation/greedy_length_mean": 3.0,
        "validation/sampled_accuracy": 0.2,
        "validation/sampled_reward_mean": pytest.approx(0.3),
        "validation/sampled_length_mean": 3.0,
    }
    key = [7, Stream.VALIDATION, 3]
    assert sampler.calls == [(list(part), key, greedy) for greedy in (True, False) for part in ("01", "23", "4")]
    assert sampler.phases[0] == "validation, greedy: 0 of 5 problems, 0 %"
    assert sampler.phases[4].startswith("validation, sampled: 2 of 5 problems, 40 %, 0:00:0")  # and how long is left


def test_rows_and_their_summary():
    rows = answer(Recording(), problems(4), batched(graded), samples=1, seed=[1], greedy=True)
    assert [row["problem"] for row in rows] == ["0", "1", "2", "3"]
    assert (rows[0]["reward"], rows[0]["correct"], rows[0]["components"]) == (1.5, True, {"answer": 1.0})
    assert rows[1] == {
        "problem": "1", "question": "", "answer": "", "completion": "True", "sample": 0, "reward": 0.0,
        "correct": False, "parsed": False, "components": {"answer": 0.0}, "tokens": 2, "truncated": False,
        "strict": None, "timed_out": False,
    }  # fmt: skip
    summary = summarize([*rows, rows[0] | {"truncated": True}])
    assert 0 <= summary.pop("ci95_low") < 0.6 < summary.pop("ci95_high") <= 1
    expected = {"accuracy": 0.6, "n": 4, "reward_mean": 0.9, "length_mean": 2.2, "truncated_rate": 0.2, "samples": 1}
    assert summary == pytest.approx(expected | {"unparsed_rate": 0.4, "timed_out": 0})


def sampled(problem, *answers):
    """Rows of the answers to a problem whose gold answer is 1."""
    return [
        {
            "problem": problem, "completion": text, "sample": i, "correct": text.endswith("#### 1"), "reward": 0.0,
            "parsed": True, "tokens": 1, "truncated": False, "strict": text == "#### 1",
        }
        for i, text in enumerate(answers)
    ]  # fmt: skip


def test_several_answers_to_each_problem_by_hand():
    """Two of four and none of four are correct: pass@2 = (1 − C(2,2)/C(4,2) + 0) / 2 = 5/12, pass@4 = 1/2."""
    summary = summarize([*sampled("a", "#### 1", "so #### 1", "#### 1.0", "#### 2"), *sampled("b", *["#### 7"] * 4)])
    assert summary["n"] == 2
    assert summary["samples"] == 4
    assert summary["accuracy"] == summary["pass@1"] == 0.25
    assert summary["strict_accuracy"] == 0.125
    assert summary["pass@2"] == pytest.approx(5 / 12)
    assert summary["pass@4"] == 0.5
    assert summary["maj@4"] == 0.5


def test_a_majority_shares_its_vote_where_answers_tie():
    assert majority(sampled("a", "#### 1", "#### 2", "#### 1.0", "#### 2")) == 0.5
    assert majority(sampled("a", "#### 1", "#### 2", "#### 3", "#### 2")) == 0.0
    assert majority(sampled("a", "no idea", "no idea", "no idea", "#### 1")) == 1.0
    assert majority(sampled("a", "no idea")) == 0.0


def test_the_interval_is_over_problems_not_answers():
    """Eight equal answers to a problem are no more than one."""
    rows = {k: [row for i in range(50) for row in sampled(str(i), *[f"#### {1 + i % 2}"] * k)] for k in (1, 8)}
    one, many = map(summarize, rows.values())
    assert (one["ci95_low"], one["ci95_high"]) == (many["ci95_low"], many["ci95_high"])


def test_an_answer_does_not_depend_on_what_else_is_asked(tiny_policy):
    """Nor on ``max_rows``; each step samples other answers, and greedy ones stay."""
    policy, prompts = tiny_policy(torch.float64, exact=True), problems(6)

    def answers(asked, step, *, greedy=False, **changes):
        config = rollout_config(max_new_tokens=8, **changes)
        seed = [7, Stream.VALIDATION, step]
        rows = answer(OwnSampler(policy, config), asked, batched(graded), samples=2, seed=seed, greedy=greedy)
        return {(row["problem"], row["sample"]): row["completion"] for row in rows}

    reference = answers(prompts, 1)
    assert answers(prompts[4:1:-1], 1, max_rows=2).items() <= reference.items()
    assert answers(prompts, 2) != reference
    assert answers(prompts, 1, greedy=True) == answers(prompts, 2, greedy=True)


def test_validation_leaves_the_global_generators_as_they_were(tiny_policy):
    """Whatever a user's reward draws from them; else a run would depend on how often it validates."""

    def drawing(text, problem):
        torch.rand(3), np.random.rand(3), random.random()
        return Score(0.0, False, {}, True)

    def state():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    config = rollout_config()
    before = state()
    validate(OwnSampler(tiny_policy(), config), problems(3), batched(drawing), [7, Stream.VALIDATION, 1], 2)
    assert state() == before
