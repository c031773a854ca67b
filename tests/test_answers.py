"""Answers to a test set in a file, which a later process goes on with."""

import random

import numpy as np
import pytest
import torch
from training import composed

from pspo import evaluate
from pspo.dataset import Problem, Prompt

ROLLOUT = composed("rollout.max_rows=3").rollout
PROMPTS = [Prompt(Problem(str(i), f"question {i}\u2028", str(i), ""), [i]) for i in range(8)]


class Killed(Exception):
    pass


@pytest.fixture
def answered(monkeypatch):
    """The problems answered so far, batch by batch; a reward that draws from every global generator."""
    batches = []

    def answer(policy, prompts, reward, rollout, *, seed, greedy):
        assert greedy
        batches.append([prompt.problem.id for prompt in prompts])
        drawn = random.random() + np.random.rand() + torch.rand(()).item()
        yield [
            evaluate.asked_of(p.problem) | {"completion": f"{policy} {p.problem.id}", "reward": drawn} for p in prompts
        ]

    monkeypatch.setattr(evaluate, "answer", answer)
    return batches


def into(path, prompts=PROMPTS, *, policy="policy", check_owner=lambda: None):
    return evaluate.answer_into(path, policy, prompts, None, ROLLOUT, seed=5, title="test", check_owner=check_owner)


def killed_at(call):
    calls = []

    def check_owner():
        calls.append(1)
        if len(calls) == call:
            raise Killed

    return check_owner


def test_answers_are_kept_and_the_file_is_that_of_an_unbroken_process(tmp_path, answered):
    rows = into(tmp_path / "whole")
    assert [row["problem"] for row in rows] == list("01234567")
    assert answered == [["0", "1", "2"], ["3", "4", "5"], ["6", "7"]]
    assert len({row["reward"] for row in rows}) == 3
    whole = (tmp_path / "whole").read_bytes()
    answered.clear()
    random.random(), np.random.rand(), torch.rand(())  # another state of the generators
    before = random.getstate()
    with pytest.raises(Killed):
        into(tmp_path / "broken", check_owner=killed_at(3))
    assert (tmp_path / "broken").read_bytes() == b"".join(whole.splitlines(keepends=True)[:6])
    assert into(tmp_path / "broken") == rows
    assert (tmp_path / "broken").read_bytes() == whole
    assert answered == [["0", "1", "2"], ["3", "4", "5"], ["6", "7"], ["6", "7"]]
    assert into(tmp_path / "broken") == rows
    assert len(answered) == 4
    assert random.getstate() == before


def test_a_file_torn_anywhere_becomes_the_unbroken_one(tmp_path, answered):
    into(tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for size in range(0, len(whole), 7):
        (tmp_path / "torn").write_bytes(whole[:size])
        into(tmp_path / "torn")
        assert (tmp_path / "torn").read_bytes() == whole


def test_answers_to_other_problems_are_not_kept(tmp_path, answered):
    into(tmp_path / "answers")
    edited = [*PROMPTS[:4], Prompt(Problem("4", "another question", "4", ""), [4]), *PROMPTS[5:]]
    answered.clear()
    rows = into(tmp_path / "answers", edited)
    assert [row["question"] for row in rows] == [prompt.problem.question for prompt in edited]
    assert answered == [["3", "4", "5"], ["6", "7"]]
    assert len(into(tmp_path / "answers", edited[:4])) == 4
    assert len(into(tmp_path / "answers", edited)) == 8


def test_whoever_was_taken_over_from_writes_no_answer(tmp_path, answered):
    with pytest.raises(Killed):
        into(tmp_path / "answers", check_owner=killed_at(1))
    assert (tmp_path / "answers").read_bytes() == b""
