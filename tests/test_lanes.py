import contextlib
import copy
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training import make_trainer

from pspo import lanes
from pspo.base.statistics import Statistics
from pspo.config import default_objective
from pspo.diagnostics import InnerStep
from pspo.host import interrupt
from pspo.loss import Loss
from pspo.model import Policy, stop_ids
from pspo.rollout import in_lanes, in_step, uniforms
from pspo.rollout.experience import Row
from pspo.update import Learner, accumulate, deal

PLAIN = {"importance": "token", "aggregation": "token", "kl": "none", "kl_weight": 0.0, "entropy_weight": 0.1}
LOSS = Loss(**PLAIN, mask_truncated=False)


@pytest.fixture(scope="module")
def policy(tiny_tokenizer, tiny_models):
    """A policy with three lanes, which have imported all they need."""
    model = copy.deepcopy(tiny_models(0, "grouped")).eval()
    made = Policy(model, tiny_tokenizer, stop_ids(model, tiny_tokenizer), False, False, shares_prompts=True)
    with lanes.beside(made, 3):
        made.lanes.wait()
        yield made
    assert made.lanes is None


@pytest.fixture
def none_ready(monkeypatch):
    """From when it is called on, all other lanes are still at their imports."""
    return lambda: monkeypatch.setattr(lanes._Lane, "is_ready", lambda self: False)


def rows_of(count, seed=0):
    random = torch.Generator().manual_seed(seed)
    rows = []
    for n in range(count):
        length = int(torch.randint(1, 9, (), generator=random))
        token_ids = torch.randint(7, 128, (length,), generator=random).tolist()
        old = (torch.randn(length, generator=random) * 0.3 - math.log(128)).tolist()
        rows.append(Row([5 + n % 5] * (1 + n % 3), token_ids, old, [float(n % 4) - 1.5] * length))
    return rows


def accumulated(policy, rows):
    learner = Learner(policy, None, default_objective("clip"), LOSS, 0.8, 10, 100, 1.0)
    statistics, inner = Statistics(), InnerStep()
    policy.model.zero_grad(set_to_none=True)
    loss = accumulate(learner, rows, statistics, inner, first=True)
    told = statistics.result()
    told.pop("update/padding_rate")  # which is about the cut
    gradient = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    policy.model.zero_grad(set_to_none=True)
    return loss.item(), gradient, told, inner.result()


# --- what lanes come to


def test_a_gradient_and_its_numbers_are_those_of_one_process(policy):
    rows = rows_of(32)
    loss, gradient, told, inner = accumulated(policy, rows)
    alone = accumulated(replace(policy, lanes=None), rows)
    assert loss == pytest.approx(alone[0], abs=1e-6)
    assert torch.allclose(gradient, alone[1], atol=2e-6 * float(alone[1].abs().max()), rtol=0)
    assert told == pytest.approx(alone[2], rel=1e-5, abs=1e-6)
    assert inner == pytest.approx(alone[3], rel=1e-5, abs=1e-6)


def test_a_gradient_that_is_there_already_is_added_to(policy):
    rows = rows_of(12)
    learner = Learner(policy, None, default_objective("noclip"), LOSS, 0.8, 10, 100, 1.0)
    for _ in range(2):
        accumulate(learner, rows, Statistics())
    twice = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    policy.model.zero_grad(set_to_none=True)
    accumulate(learner, rows, Statistics())
    once = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    policy.model.zero_grad(set_to_none=True)
    assert torch.allclose(twice, 2 * once, atol=1e-6)


@pytest.mark.parametrize("groups", [[4, 4, 4, 4, 4], [3, 1], [2]])
def test_rows_come_back_in_their_places(policy, groups):
    prompts = [prompt for n, size in enumerate(groups) for prompt in [[9 + n] * (1 + n)] * size]
    uniform_RT = torch.from_numpy(uniforms([1, 2], len(prompts), 12))
    tokens, logprobs = in_lanes(policy, prompts, uniform_RT, 1.0, 0.9, 6)
    alone_tokens, alone_logprobs = in_step(policy, prompts, uniform_RT, 1.0, 0.9, 99)
    assert torch.equal(tokens, alone_tokens)
    assert torch.allclose(logprobs, alone_logprobs, atol=1e-5)


def test_who_works_it_out_does_not_change_a_bit(policy, none_ready):
    rows, uniform_RT = rows_of(32), torch.from_numpy(uniforms([3], 15, 12))
    prompts = [[9 + n // 3] * (1 + n // 3) for n in range(15)]
    sampled, gradient = in_lanes(policy, prompts, uniform_RT, 1.0, 1.0, 99), accumulated(policy, rows)
    none_ready()
    again = in_lanes(policy, prompts, uniform_RT, 1.0, 1.0, 99)
    assert all(map(torch.equal, sampled, again))
    here = accumulated(policy, rows)
    assert torch.equal(gradient[1], here[1])
    assert (gradient[0], *gradient[2:]) == (here[0], *here[2:])


def test_a_training_is_the_same_to_the_last_bit_with_lanes_and_without_them_ready(policy, tmp_path, none_ready):
    first, ends = {name: p.detach().clone() for name, p in policy.model.named_parameters()}, []
    for name in ("ready", "not"):
        if name == "not":
            none_ready()
        policy.model.load_state_dict(first, strict=False)
        make_trainer(policy, tmp_path / name, "checkpoint.every=100").run()
        ends.append({name: p.detach().clone() for name, p in policy.model.named_parameters()})
    policy.model.load_state_dict(first, strict=False)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in first)
    assert not all(torch.equal(ends[0][name], first[name]) for name in first)


def test_other_lanes_have_the_weights_of_now(policy):
    prompts, uniform_RT = [[9], [10], [11]], torch.from_numpy(uniforms([4], 3, 8))
    before = in_lanes(policy, prompts, uniform_RT, 0.0, 1.0, 9)[1]
    weight = policy.model.get_output_embeddings().weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(3)
    after = in_lanes(policy, prompts, uniform_RT, 0.0, 1.0, 9)
    alone = in_step(policy, prompts, uniform_RT, 0.0, 1.0, 9)
    with torch.no_grad():
        weight.copy_(kept)
    assert torch.equal(after[0], alone[0])
    assert not (after[1] == before).all(-1).any()


def test_a_value_model_is_learned_in_one_process(policy):
    class Critic(torch.nn.Module):
        config = None

        def forward(self, tokens, hidden_NH, autocast):
            raise LookupError  # which the message to another process could not even hold

    alone = replace(policy, lanes=object())
    learner = Learner(alone, Critic(), default_objective("noclip"), LOSS, 0.8, 10, 100, 1.0)
    with pytest.raises(LookupError):
        accumulate(learner, rows_of(4), Statistics())


@given(
    lengths=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 30)), min_size=1, max_size=40),
    count=st.integers(1, 6),
)
def test_rows_are_dealt_evenly_and_by_prompt(lengths, count):
    rows = [Row([7] * (1 + p), [n] * c, [], []) for n, (p, c) in enumerate(lengths)]
    parts = deal(rows, count)
    assert len(parts) <= count
    assert sorted(row.token_ids for part in parts for row in part) == sorted(row.token_ids for row in rows)
    prompts = [{len(row.prompt_ids) for row in part} for part in parts]
    assert sum(map(len, prompts)) <= len({len(row.prompt_ids) for row in rows}) + len(parts) - 1
    largest = max(len(row.prompt_ids) + len(row.token_ids) for row in rows)
    total = sum(len(row.token_ids) for row in rows) + sum({len(row.prompt_ids) for row in rows})
    assert max(sum(len(row.token_ids) for row in part) for part in parts) <= total / count + largest


# --- what can go wrong


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_what_a_lane_raises_is_raised_here_and_all_work_on(policy, broken):
    parts = [("x",) if n == broken else ("7",) for n in range(3)]
    with pytest.raises(ValueError, match="invalid literal"):
        policy.lanes.each(int, parts)
    assert policy.lanes.each(int, [("1",), ("2",), ("3",)]) == [1, 2, 3]


def test_a_lane_that_lacks_memory_is_no_end_but_this_process_may_lack_it_too(policy):
    with pytest.raises(MemoryError):
        policy.lanes.each(bytearray, [(1,), (2**62,)])
    assert not any(lane.lost for lane in policy.lanes._others)


def test_signals_are_for_the_first_lane_alone(policy):
    for lane in policy.lanes._others:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
            os.kill(lane.process.pid, signum)
    assert policy.lanes.each(int, [("1",), ("2",), ("3",)]) == [1, 2, 3]
    assert not any(lane.lost for lane in policy.lanes._others)


def test_the_number_of_threads_is_left_as_it_was(policy):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert policy.lanes.each(torch.get_num_threads, [(), (), ()]) == [1, 1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_the_share_of_a_lane_that_dies_is_worked_out_here(policy, caplog):
    rows, expected = rows_of(16), None
    alone = replace(policy, lanes=None)
    with lanes.beside(alone, 2):
        alone.lanes.wait()
        expected = accumulated(alone, rows)
        (other,) = alone.lanes._others
        killer = threading.Timer(0.3, os.kill, (other.process.pid, signal.SIGKILL))
        killer.start()
        with caplog.at_level(logging.WARNING, "pspo"):
            assert alone.lanes.each(time.sleep, [(0,), (1,)]) == [None, None]  # it dies in the middle of its work
        assert other.lost
        assert caplog.text.count("worked out here") == 1
        found = accumulated(alone, rows)
    assert torch.equal(found[1], expected[1])
    assert caplog.text.count("worked out here") == 1


def test_a_process_that_is_asked_to_stop_waits_for_no_lane(policy, monkeypatch):
    alone = replace(policy, lanes=None)
    with lanes.beside(alone, 2):
        alone.lanes.wait()
        monkeypatch.setattr(interrupt, "_received", None)
        asked = threading.Timer(0.3, setattr, (interrupt, "_received", signal.SIGTERM))
        asked.start()
        begun = time.monotonic()
        with pytest.raises(interrupt.Interrupted):
            alone.lanes.each(time.sleep, [(0,), (60,)])
        assert time.monotonic() - begun < 20
        monkeypatch.setattr(interrupt, "_received", None)


def test_what_no_message_can_hold_is_done_here(policy):
    alone = replace(policy, lanes=None)
    with lanes.beside(alone, 2):
        alone.lanes.wait()
        assert alone.lanes.each(lambda x: x + 1, [(1,), (2,)]) == [2, 3]


def test_no_lane_outlives_a_process_that_is_killed(tmp_path, policy):
    policy.model.save_pretrained(tmp_path)
    code = f"""
import os, signal, torch
from types import SimpleNamespace
from transformers import AutoModelForCausalLM
from pspo import interrupt, lanes
from pspo.model import Policy, attention
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, attn_implementation="grouped")
several = lanes.Lanes(Policy(model, None, [2], False, False), 2)
print(several._others[0].process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert made.returncode == -signal.SIGKILL, made.stderr
    stat = Path(f"/proc/{int(made.stdout)}/stat")
    ended = time.monotonic() + 60
    while time.monotonic() < ended:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if stat.read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.1)
                continue
        return
    pytest.fail("the lane is still there")


# --- who has them


def test_one_thread_a_large_policy_or_the_librarys_layers_have_none(policy, tiny_policy, monkeypatch):
    monkeypatch.setattr(lanes, "Lanes", lambda policy, count: count)
    assert lanes.start(policy, 2) == 2
    assert lanes.start(policy, 64) == lanes.MOST
    assert lanes.start(policy, 1) is None
    assert lanes.start(tiny_policy(attention="sdpa"), 2) is None
    assert lanes.start(replace(policy, autocast=True), 2) is None
    monkeypatch.setattr(lanes, "SMALL", 10)
    assert lanes.start(policy, 2) is None


def test_a_frozen_copy_has_none(policy):
    assert policy.frozen().lanes is None
