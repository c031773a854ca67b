import math
import time

import pytest
import torch

from benchmarks import measure, neighbour, table
from pspo.host import environment

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


def test_a_product_takes_about_as_long_as_the_same_by_hand():
    a, b = torch.randn(256, 256), torch.randn(256, 256)
    by_hand = min(measure.seconds(lambda: [a @ b for _ in range(20)], CPU) for _ in range(5)) / 20
    assert by_hand / 20 < measure.product_s(1, 256, 256, 256, torch.float32, CPU) < 20 * by_hand


def test_peak_memory_is_what_a_call_adds():
    kept = torch.ones(2**22)  # 16 MiB before
    peak = measure.peak_gib(lambda: (torch.ones(2**24), time.sleep(0)), CPU)  # 64 MiB
    assert peak == pytest.approx(64 / 1024, rel=0.2)
    del kept


def test_memory_that_is_freed_but_kept_counts_as_free():
    environment.settle(1)
    work = lambda: [torch.ones(2**20) for _ in range(16)]  # noqa: E731 - 64 MiB
    work()
    assert measure.peak_gib(work, CPU) == pytest.approx(64 / 1024, rel=0.2)


def test_a_fair_share():
    assert neighbour.fair(2, 1, 2) == pytest.approx(4 / 3)
    assert neighbour.fair(2, 2, 2) == 2
    assert neighbour.fair(2, 1, 1) == 1
    assert neighbour.fair(2, 2, 1) == 2
