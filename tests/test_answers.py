"""Answers to a test set in a file, which a later process goes on with."""

import random

import numpy as np
import pytest
import torch
from training import composed

from pspo.base.files import read_json, read_lines
from pspo.base.schema import ConfigError
from pspo.dataset import Problem, Prompt
from pspo.evaluate import described
from pspo.rollout import OwnSampler
from pspo.run import evaluation

PROMPTS = [Prompt(Problem(str(i), f"question {i}\u2028", str(i), ""), [i]) for i in range(8)]


class Killed(Exception):
    pass


@pytest.fixture
def answered(monkeypatch):
    """The problems answered so far, batch by batch; a reward that draws from every global generator."""
    batches = []

    def answer(sampler, prompts, reward, *, samples, seed, greedy):
        assert greedy == (samples == 1)
        batches.append([prompt.problem.id for prompt in prompts])
        drawn = random.random() + np.random.rand() + torch.rand(()).item()
        about = {"correct": True, "tokens": 1, "truncated": False, "parsed": True, "reward": drawn}
        return [
            described(p.problem)
            | about
            | {"completion": f"{sampler.config.temperature} {p.problem.id}", "sample": sample}
            for p in prompts
            for sample in range(samples)
        ]

    monkeypatch.setattr(evaluation, "answer", answer)
    return batches


def answers_in(directory, *overrides, check_owner=lambda: None):
    config = composed("rollout.max_rows=3", "seed=5", *overrides)
    return evaluation.Answers(directory, config, OwnSampler("policy", config.rollout), check_owner)


def into(directory, prompts=PROMPTS, *, samples=1, check_owner=lambda: None):
    directory.mkdir(exist_ok=True)
    answers = answers_in(directory, f"evaluate.samples={samples}", check_owner=check_owner)
    return answers.rows("a", prompts, None, float(samples > 1))


def file(directory):
    (path,) = directory.iterdir()
    return path


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
    whole = file(tmp_path / "whole").read_bytes()
    answered.clear()
    random.random(), np.random.rand(), torch.rand(())  # another state of the generators
    before = random.getstate()
    with pytest.raises(Killed):
        into(tmp_path / "broken", check_owner=killed_at(3))
    assert file(tmp_path / "broken").read_bytes() == b"".join(whole.splitlines(keepends=True)[:6])
    assert into(tmp_path / "broken") == rows
    assert file(tmp_path / "broken").read_bytes() == whole
    assert answered == [["0", "1", "2"], ["3", "4", "5"], ["6", "7"], ["6", "7"]]
    assert into(tmp_path / "broken") == rows
    assert len(answered) == 4
    assert random.getstate() == before


def test_a_file_torn_anywhere_becomes_the_unbroken_one(tmp_path, answered):
    into(tmp_path / "whole")
    whole = file(tmp_path / "whole").read_bytes()
    for size in range(0, len(whole), 7):
        file(tmp_path / "whole").write_bytes(whole[:size])
        into(tmp_path / "whole")
        assert file(tmp_path / "whole").read_bytes() == whole


def test_answers_to_other_problems_are_not_kept(tmp_path, answered):
    into(tmp_path / "answers")
    edited = [*PROMPTS[:4], Prompt(Problem("4", "another question", "4", ""), [4]), *PROMPTS[5:]]
    answered.clear()
    rows = into(tmp_path / "answers", edited)
    assert [row["question"] for row in rows] == [prompt.problem.question for prompt in edited]
    assert answered == [["3", "4", "5"], ["6", "7"]]
    assert len(into(tmp_path / "answers", edited[:4])) == 4
    assert len(into(tmp_path / "answers", edited)) == 8
    assert len(answered) == 2


def test_more_answers_are_added_and_no_answer_is_given_twice(tmp_path, answered):
    few = into(tmp_path / "answers", samples=2)
    assert [(row["problem"], row["sample"]) for row in few] == [(str(i), s) for i in range(8) for s in range(2)]
    many = into(tmp_path / "answers", samples=3)
    assert [row for row in many if row["sample"] < 2] == few
    assert len(read_lines(file(tmp_path / "answers"))) == len(many) == 24
    answered.clear()
    assert into(tmp_path / "answers", samples=2) == few
    assert into(tmp_path / "answers", PROMPTS[:3], samples=2) == few[:6]
    assert answered == []


def evaluated(directory, *overrides):
    answers = answers_in(directory, *overrides)
    return answers.numbers({"a": PROMPTS, "b": PROMPTS[:2]}, [])


def test_every_set_is_answered_at_every_temperature(tmp_path, answered):
    rows = evaluated(tmp_path / "new", "evaluate.temperatures=[0,0.5]", "evaluate.samples=2")
    assert [(row["set"], row["temperature"], row["n"], row["samples"]) for row in rows] == [
        ("a", 0, 8, 1), ("a", 0.5, 8, 2), ("b", 0, 2, 1), ("b", 0.5, 2, 2),
    ]  # fmt: skip
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"a_t0.jsonl", "a_t0.5.jsonl", "b_t0.jsonl", "b_t0.5.jsonl", "settings.json"}
    first = read_lines(tmp_path / "new" / "b_t0.5.jsonl")[0]
    assert first["completion"] == "0.5 0"  # the sampler's temperature
    settings = read_json(tmp_path / "new" / "settings.json")
    assert settings.items() >= {"top_p": 1.0, "max_new_tokens": 40, "prompt": None, "samples": 2, "data": {}}.items()
    assert [row["ungradable"] for row in rows] == [0, 0, 0, 0]


def test_answers_with_other_settings_are_not_mixed(tmp_path, answered):
    evaluated(tmp_path)
    evaluated(tmp_path, "evaluate.samples=7", "evaluate.temperatures=[0,1]")
    with pytest.raises(ConfigError, match=r"evaluate.name='greedy': .* holds answers with another top_p, prompt; give"):
        evaluated(tmp_path, "evaluate.top_p=0.9", "dataset.prompt={question}")


def test_whoever_was_taken_over_from_writes_no_answer(tmp_path, answered):
    with pytest.raises(Killed):
        into(tmp_path / "answers", check_owner=killed_at(1))
    assert file(tmp_path / "answers").read_bytes() == b""
