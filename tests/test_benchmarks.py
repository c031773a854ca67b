import math
import time

import pytest
import torch

from benchmarks import measure, preset, rollout, table
from pspo.config import compose
from pspo.host import speed
from pspo.host.memory import call_peak_gib

CPU = torch.device("cpu")


def test_the_readme_has_the_table_of_the_results():
    readme = table.README.read_text(encoding="utf-8")
    assert readme.count(table.BEGIN) == readme.count(table.END) == 1
    assert readme == table.put(readme, table.text())


def test_without_results_the_table_is_empty(tmp_path):
    assert table.text(tmp_path) == ""
    assert table.put(f"a\n{table.BEGIN}\nold\n{table.END}\nb", "") == f"a\n{table.BEGIN}\n{table.END}\nb"


def test_a_row_has_medians_and_the_spread_of_the_ratio():
    theirs, ours = [10.0, 20.0, 90.0], [2.0, 5.0, 9.0]
    assert measure.summary(ours) == {"median": 5.0, "min": 2.0, "max": 9.0, "n": 3}
    ratio = measure.ratio(theirs, ours)
    assert ratio == {"median": 5.0, "min": 4.0, "max": 10.0, "n": 3}
    row = measure.row("s", measure.summary(ours), "TRL", measure.summary(theirs), ratio, "≥ 5")
    assert measure.markdown([row]).splitlines()[-1] == "| s | 5 | 20 (TRL) | 5 [4, 10], 3 | ≥ 5 |"


def test_arguments_take_overrides_anywhere(monkeypatch):
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("rounds", nargs="?", type=int, default=5)
    parser.add_argument("--rows", type=int)
    monkeypatch.setattr("sys.argv", ["x", "seed=1", "3", "--rows=4", "rollout.prompts=2"])
    asked = measure.arguments(parser)
    assert (asked.rounds, asked.rows, asked.overrides) == (3, 4, ["seed=1", "rollout.prompts=2"])


def operations(count):
    return sum(times * math.prod(shape) for (*shape, _), times in count.items())


@pytest.mark.parametrize("inference", [False, True])
def test_products_of_a_linear_layer_forward_and_backward(inference):
    layer, x = torch.nn.Linear(3, 5), torch.randn(2, 7, 3, requires_grad=True)
    with torch.inference_mode(inference):
        count = measure.products(lambda: layer(x))
    assert count == {(1, 14, 3, 5, torch.float32): 1}
    if not inference:
        assert operations(measure.products(lambda: layer(x).sum().backward())) == 3 * 14 * 3 * 5


def test_products_of_fused_attention_are_those_of_plain_attention():
    q, k, v = (torch.randn(2, 4, 6, 8, requires_grad=True) for _ in range(3))

    def fused():
        torch.nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()

    def plain():
        ((q @ k.transpose(-1, -2)).softmax(-1) @ v).sum().backward()

    made = measure.products(fused)
    assert operations(made) == operations(measure.products(plain)) == 6 * 8 * 6 * 6 * 8
    assert sum(made.values()) == 6


def test_the_floor_adds_up_its_products(monkeypatch):
    monkeypatch.setattr(measure, "product_s", lambda batch, rows, *_: rows)
    assert measure.floor_s({(1, 2, 3, 4, torch.float32): 5, (2, 7, 3, 4, torch.float32): 1}, CPU) == 17


@pytest.mark.parametrize("batch", [1, 3])
def test_a_product_is_measured_at_its_shape(batch, monkeypatch):
    made = []

    def rate_s(work, device):
        made.append(measure.products(work))
        return float(len(made))

    monkeypatch.setattr(speed, "rate_s", rate_s)
    assert speed.product_s(batch, 4, 5, 6, torch.float32, CPU) == 1.0  # of two layouts the faster one
    assert made == [{(batch, 4, 5, 6, torch.float32): 1}] * 2


@pytest.mark.parametrize("call_s", [1e-6, 3e-4, 0.2])
def test_the_rate_of_a_call_is_that_of_its_quickest_repeats(call_s, monkeypatch):
    """By a clock that a call moves on, and that something else moves on as well at first."""
    clock = {"s": 0.0, "calls": 0}

    def work():
        clock["calls"] += 1
        clock["s"] += call_s * (3 if clock["calls"] == 1 else 1)

    monkeypatch.setattr(time, "perf_counter", lambda: clock["s"])
    assert speed.rate_s(work, CPU) == pytest.approx(call_s, rel=1e-6)


def test_peak_memory_is_what_a_call_adds():
    kept = torch.ones(2**22)  # 16 MiB before
    peak = call_peak_gib(lambda: (torch.ones(2**24), time.sleep(0)), CPU)  # 64 MiB
    assert peak == pytest.approx(64 / 1024, rel=0.2)
    del kept


def test_memory_that_is_freed_but_kept_counts_as_free():
    torch.set_num_threads(1)
    work = lambda: [torch.ones(2**20) for _ in range(16)]  # noqa: E731 - 64 MiB
    work()
    assert call_peak_gib(work, CPU) == pytest.approx(64 / 1024, rel=0.2)


# --- what is measured


@pytest.mark.parametrize("name", preset.PRESETS)
def test_a_preset_is_a_run(name):
    config = compose(word for word in preset.PRESETS[name].overrides if not word.startswith("device="))
    assert config.rollout.prompts * config.rollout.group_size % config.update.num_minibatches == 0


SHAPE = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
LITTLE = ["device=cpu", "threads=1", "rollout.prompts=3", "rollout.group_size=2", "rollout.max_new_tokens=5"]


def test_every_measured_step_begins_with_the_first_weights(tmp_path):
    steps = preset.Steps(preset.make_trainer([*LITTLE, "update.num_minibatches=1"], tmp_path, SHAPE))
    policy, before = steps.trainer.policy, preset.copied(steps.trainer.policy)
    for number in (1, 2):
        made = steps.step()
        assert made["completion_tokens"] == 3 * 2 * 5  # of full length
        assert made["prompt_tokens"] > 0 < made["seconds"]
        assert steps.trainer.state.progress.steps == number
        assert made["optimizer/update_norm_estimate"] > 0
        assert all(map(torch.equal, preset.copied(policy).values(), before.values()))
    steps.step(again=True)
    assert steps.trainer.state.progress.steps == 0


def test_both_sides_write_as_many_tokens(tmp_path):
    trainer = preset.make_trainer(LITTLE, tmp_path, SHAPE)
    for make in (rollout.make_ours, rollout.make_theirs):
        assert make(trainer, [preset.NEVER])(0) == 3 * 2 * 5
