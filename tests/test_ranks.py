"""Ranks: the same run for any number of them, an error of one is everyone's. Forked here, gloo on loopback."""

import itertools
import math
import os
import pickle
import signal
import socket
import subprocess
import time
import traceback

import numpy as np
import pytest
import torch
from training import by_length, learner_of, make_trainer

from pspo.base.schema import ConfigError
from pspo.base.statistics import Statistics
from pspo.host import interrupt, ranks
from pspo.model.source import save_parts
from pspo.objective import default_objective
from pspo.update.rows import Row
from pspo.update.step import accumulate


@pytest.fixture
def on_ranks(tmp_path):
    """``on_ranks(n, work)``: what ``work()`` returns in each of n ranks, or the text of what it raises."""

    def start(number, work, wait=True):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        about = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        pids = []
        for rank in range(number):
            if (pid := os.fork()) == 0:
                try:
                    os.environ |= {
                        name: str(value) for name, value in (about | {"RANK": rank, "LOCAL_RANK": rank}).items()
                    }
                    with ranks.joined():
                        result = work()
                except BaseException:  # noqa: BLE001  its text is the test's
                    result = traceback.format_exc()
                (tmp_path / f"{rank}.pickle").write_bytes(pickle.dumps(result))
                os._exit(0)
            pids.append(pid)
        for pid in pids:
            os.waitpid(pid, 0)
        paths = [tmp_path / f"{rank}.pickle" for rank in range(number)]
        return [pickle.loads(path.read_bytes()) if path.exists() else None for path in paths]

    return start


def rank():
    return torch.distributed.get_rank()


def test_one_process_is_the_first_of_one():
    assert ranks.count() == 1
    assert ranks.is_first()
    assert ranks.gather(lambda: 3) == [3]
    assert ranks.first(lambda: 4) == 4
    assert ranks.spread([1, 2], lambda own: [-x for x in own]) == [-1, -2]
    ranks.total([tensor := torch.ones(2)])
    assert tensor.tolist() == [1, 1]


@pytest.mark.parametrize("items", [0, 1, 2, 3, 7])
def test_every_item_is_one_ranks_and_results_keep_their_order(on_ranks, items):
    def work():
        own = ranks.share(range(items))
        return list(own), ranks.spread(range(items), lambda own: [(x, -x) for x in own]), ranks.first(rank)

    found = on_ranks(3, work)
    assert list(itertools.chain(*(own for own, _, _ in found))) == list(range(items))
    assert all(results == [(x, -x) for x in range(items)] for _, results, _ in found)
    assert max(len(own) for own, _, _ in found) - min(len(own) for own, _, _ in found) <= 1
    assert [first for _, _, first in found] == [0, 0, 0]


def test_tensors_of_any_size_and_dtype_are_summed(on_ranks, monkeypatch):
    monkeypatch.setattr(ranks, "BUCKET_BYTES", 64)

    def work():
        tensors = [
            torch.full((n,), float(rank() + 1), dtype=d) for n in (1, 3, 40, 2) for d in (torch.float32, torch.float64)
        ]
        ranks.total(tensors)
        return [(tensor.dtype, tensor.tolist()) for tensor in tensors]

    for found in on_ranks(3, work):
        assert found == [(d, [6.0] * n) for n in (1, 3, 40, 2) for d in (torch.float32, torch.float64)]


class Stubborn(Exception):
    """One that cannot be made again from its arguments."""

    def __init__(self, first, second):
        super().__init__(first)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConfigError("mend the key"), "ConfigError: mend the key"),
        (torch.OutOfMemoryError("too large"), "OutOfMemoryError: too large"),
        (interrupt.Interrupted(signal.SIGTERM), "Interrupted: 15"),
        (Stubborn("why", 2), "why"),
    ],
)
def test_what_one_rank_raises_all_raise(on_ranks, error, expected):
    def work():
        def fail():
            if rank() == 1:
                raise error

        ranks.gather(fail)

    found = on_ranks(3, work)
    assert all(expected in text for text in found)
    assert "raised in rank 1" in found[0]


def test_a_rank_that_has_ended_ends_the_others(on_ranks):
    def work():
        if rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.gather(lambda: None)

    first, gone, last = on_ranks(3, work)
    assert gone is None
    assert all("RankError: another rank has ended" in text for text in (first, last))


def test_the_reason_of_a_rank_that_leaves_is_known_to_the_others(on_ranks):
    def work():
        if rank() == 1:
            raise ValueError("its own mistake")
        ranks.gather(lambda: None)

    first, _, last = on_ranks(3, work)
    assert all("RankError: rank 1: ValueError: its own mistake" in text for text in (first, last))


def test_a_rank_that_has_left_is_not_missed(on_ranks, monkeypatch):
    monkeypatch.setattr(ranks, "BEAT_S", 0.1)
    monkeypatch.setattr(ranks, "SILENT_S", 1.0)

    def work():
        ranks.gather(lambda: None)
        if rank() == 0:  # as it saves the model
            time.sleep(3)
        return "done"

    assert on_ranks(2, work) == ["done", "done"]


def test_a_rank_that_is_silent_ends_the_others(on_ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "BEAT_S", 0.1)
    monkeypatch.setattr(ranks, "SILENT_S", 2.0)

    def work():
        if rank() == 1:
            subprocess.Popen(["sh", "-c", f"sleep 20; kill -9 {os.getpid()}"])
            ranks.gather(lambda: None)
            os.kill(os.getpid(), signal.SIGSTOP)
        ranks.gather(lambda: None)
        with ranks.watched((tmp_path / f"reason_{rank()}").write_text):
            ranks.gather(lambda: None)

    assert on_ranks(3, work) == [None] * 3
    for other in (0, 2):
        assert (tmp_path / f"reason_{other}").read_text() == "rank 1 gave no sign of life for 2 s"


def test_any_rank_can_make_a_policy(on_ranks, tiny_policy, tmp_path):
    policy = tiny_policy()

    def work():
        save_parts(tmp_path / str(rank()), policy.model, policy.tokenizer)
        return sorted(path.name for path in (tmp_path / str(rank())).iterdir())

    first, second = on_ranks(2, work)
    assert first == second
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(second)


def rows(number):
    """Rows of several lengths, two of each prompt."""
    draw = np.random.default_rng(7)
    made = []
    for n in range(number):
        length = 1 + n % 4
        ids, advantage = draw.integers(5, 100, length).tolist(), (-1.0) ** n * (1 + n / 8)
        made.append(Row([5, 6 + n // 2], ids, [-4.5 - 0.1 * n] * length, [advantage] * length, group=n // 2))
    return made


LOSSES = [
    {"importance": importance, "aggregation": aggregation}
    for importance in ("token", "sequence", "sequence_token", "product")
    for aggregation in ("token", "sequence", "sequence_sum", "constant")
]
CASES = [("pspo_geometric", loss) for loss in LOSSES] + [
    ("clip", {"drop": "m2", "drop_limit": 0.01}), ("clip", {"gate": "delight"}), ("tpo", {}),
    ("noclip", {"entropy_weight": 0.1}),
    ("sapo", {"kl": "k3", "kl_weight": 0.1, "reference": "rollout"}),
]  # fmt: skip


@pytest.mark.parametrize("number", [8, 3])
def test_loss_gradient_and_statistics_are_those_of_one_process(on_ranks, tiny_policy, number):
    policy = tiny_policy(torch.float64, exact=True)

    def work():
        found = []
        for objective, loss in CASES:
            statistics = Statistics()
            learner = learner_of(policy, default_objective(objective), loss=loss)
            total = accumulate(learner, rows(number), statistics)
            gradient = torch.cat([p.grad.flatten() for p in policy.trainable().values()])
            found.append((total.numpy(), gradient.numpy(), statistics.result()))
        return found

    ((expected,), *others) = (on_ranks(ranks, work) for ranks in (1, 2, 4))
    for found in itertools.chain(*others):
        for (objective, loss), one, other in zip(CASES, expected, found, strict=True):
            np.testing.assert_allclose(other[0], one[0], rtol=1e-12, atol=1e-12, err_msg=f"{objective} {loss}")
            scale = np.abs(one[1]).max()
            np.testing.assert_allclose(other[1] / scale, one[1] / scale, atol=1e-12, err_msg=f"{objective} {loss}")
            assert comparable(other[2]) == pytest.approx(comparable(one[2]), rel=1e-12, abs=1e-12)


RUNS = [
    [],
    ["advantage=mean", "loss.aggregation=sequence", "update.num_minibatches=2"],
    ["advantage=leave_one_out", "loss.importance=sequence", "loss.mask_truncated=true"],
    ["advantage=gae", "advantage.critic=separate"],
    ["objective=pspo_geometric", "smoothing=adaptive", "rollout.max_redraws=2"],
    ["loss.kl=k3", "loss.kl_weight=0.1", "loss.kl_target=0.01", "update.old_logprobs=recompute"],
    ["objective=tpo", "diagnostics.counterfactual_every=1"],
    ["optimizer=sgd", "rollout.prompts=5", "update.num_epochs=3"],
    ["optimizer.sharded=true", "update.num_minibatches=2"],
]


@pytest.mark.parametrize(
    "overrides", [RUNS[0], *(pytest.param(run, marks=pytest.mark.process) for run in RUNS[1:])], ids=" ".join
)
def test_a_run_is_the_same_for_any_number_of_ranks(on_ranks, tiny_policy, tmp_path, overrides):
    policy = tiny_policy(torch.float64, exact=True)

    def work():
        directory = tmp_path / f"{ranks.count()}_{rank() if ranks.count() > 1 else 0}"
        trainer = make_trainer(policy, directory, "rollout.prompts=4", "budget.steps=10", *overrides)
        trainer.run()
        weights = torch.cat([p.detach().flatten() for p in policy.trainable().values()])
        metrics = trainer.tracker._lines.rows()
        return weights.numpy(), metrics, trainer.files["completions"].rows(), trainer.files["diagnostics"].rows()

    (expected,), *others = (on_ranks(number, work) for number in (1, 2, 4))
    assert not isinstance(expected, str), expected
    for weights, *files in itertools.chain(*others):
        np.testing.assert_allclose(weights, expected[0], atol=1e-10)
        for rows_of, expected_rows in zip(files, expected[1:], strict=True):
            assert len(rows_of) == len(expected_rows) > 0
            for row, one in zip(rows_of, expected_rows, strict=True):
                assert comparable(row) == pytest.approx(comparable(one), rel=1e-9, abs=1e-9, nan_ok=True)


def comparable(row):
    """The numbers of a row that do not depend on the clock or on how rows are packed."""
    elsewhere = ("time/", "memory/", "update/padding_rate")
    return {
        name: math.nan if value is None else value
        for name, value in row.items()
        if isinstance(value, int | float | None) and not name.startswith(elsewhere)
    }


@pytest.mark.parametrize("sharded", ["true", "false"])
def test_a_run_goes_on_with_another_number_of_ranks(on_ranks, tiny_policy, tmp_path, sharded):
    """2 ranks, then 1, then 4, to what one process comes to without a break."""

    def train(steps, name):
        def work():
            directory = tmp_path / name
            if not ranks.is_first():
                directory = tmp_path / f"{name}_{ranks.count()}_{rank()}"
                directory.mkdir()
                (directory / "checkpoints").symlink_to(tmp_path / name / "checkpoints")
            keys = (f"optimizer.sharded={sharded}", "checkpoint.every=3", f"budget.steps={steps}")
            policy = tiny_policy(torch.float64, exact=True)
            make_trainer(policy, directory, *keys).run()
            return torch.cat([p.detach().flatten() for p in policy.trainable().values()]).numpy()

        return work

    (expected,) = on_ranks(1, train(9, "unbroken"))
    for number, steps in ((2, 3), (1, 6), (4, 9)):
        found = on_ranks(number, train(steps, "broken"))
    for weights in found:
        np.testing.assert_allclose(weights, expected, atol=1e-10)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(on_ranks, tiny_policy, tmp_path):
    policy = tiny_policy(torch.float64, exact=True)

    def work():
        def reward(completion, problem):
            calls.append(problem.id)
            if rank() == 1 and len(calls) == 9:
                os.kill(os.getpid(), signal.SIGTERM)
            return by_length(completion, problem)

        calls = []
        trainer = make_trainer(policy, tmp_path / str(rank()), "budget.steps=10", reward=reward)
        try:
            with interrupt.caught():
                trainer.run()
        except SystemExit as left:
            return (
                left.code,
                trainer.state.progress.steps,
                sorted(path.name for path in (tmp_path / str(rank())).glob("checkpoints/step*")),
            )

    first, second = on_ranks(2, work)
    assert not isinstance(second, str), second
    assert first[:2] == second[:2] == (143, 3)
    assert "step_000003" in first[2]
    assert second[2] == []  # rank 0 alone writes
