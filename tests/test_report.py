import io
import itertools
import json
import math
import random
import re
from pathlib import Path

import pytest
from rich.console import Console

from pspo.base.figure import spread
from pspo.base.files import read_lines
from pspo.base.statistics import wilson_interval
from pspo.report import METRICS, difference, final_table, meaning, write_curves, write_report
from pspo.report.curves import LABEL_SPACING, panels_of
from pspo.report.panels import FIGURE, SECTIONS

README = Path(__file__).parents[1] / "README.md"
ATTACK = "18 * 5 = <script>alert(1)</script>&lt;\u2028\x1b[31m \u202e\n#### 90"


def result(num_correct, n=512):
    low, high = wilson_interval(num_correct, n)
    rates = {"reward_mean": 0.5, "length_mean": 21.5, "truncated_rate": 0.025, "unparsed_rate": 0.0}
    return {"accuracy": num_correct / n, "ci95_low": low, "ci95_high": high, "n": n} | rates


def summary_of(steps):
    return {
        "status": "done",
        "run": "pspo_alpha0.1_seed0_1a2b3c4d",
        "objective": {"name": "pspo", "alpha": 0.1},
        "seed": 0,
        "steps": steps,
        "optimizer_steps": 4 * steps,
        "prompts": 32 * steps,
        "completion_tokens": 12345,
        "selection": "last",
        "selected_step": steps,
        "notes": ["3 train problems were dropped <b>"],
        "evaluation": {"embedded": {"before": result(103), "after": result(318)}},
        "time/wall_s": 92.13,
    }


def row_of(step, clock):
    p = 0.15 + 0.5 * (1 - math.exp(-step / 12))
    row = {
        "step": step,
        "reward/mean": p,
        "reward/correct_mean": p,
        "reward/format_mean": 0.9,
        "completion/length_mean": 25 - 5 * p,
        "completion/truncated_rate": 0.1,
        "policy/kl_old_new_k3": None if step == 2 else 0.001 * step,
        "policy/entropy_mean": 1.2,
        "policy/ratio_max": 1.5,
        "optimizer/grad_norm_mean": 0.5,
        "objective/alpha": 0.1,
        "ratio/ess": 0.99,
        "weight/zero_rate": 0.0,
        "weight/damped_rate": 1.0,
        "weight/amplified_rate": 0.0,
        "weight/reversed_rate": 0.0,
        "weight/mass_kept": 0.9,
        "time/step_s": clock.random(),
        "time/tokens_per_s": 1000 * clock.random(),
        "memory/peak_gib": clock.random(),
    }
    return row | ({"validation/greedy_accuracy": p} if step % 2 == 0 else {})


def completion_of(step, sample):
    facts = {"problem": "embedded/train/17", "question": "How <many>?", "answer": "90", "completion": ATTACK}
    score = {"reward": 1.05, "correct": sample == 0, "parsed": True, "components": {}, "tokens": 20, "truncated": False}
    return {"step": step, "sample": sample} | facts | score


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def make_run(directory, steps=6, clock_seed=0):
    """A run directory as a run leaves it; only ``clock_seed`` changes what depends on time and memory."""
    clock = random.Random(clock_seed)
    directory.mkdir()
    write_lines(directory / "metrics.jsonl", [row_of(step, clock) for step in range(1, steps + 1)])
    write_lines(directory / "completions.jsonl", [completion_of(s, k) for s in range(1, steps + 1) for k in range(6)])
    summary = summary_of(steps) | {"time/wall_s": 100 * clock.random()}
    (directory / "summary.json").write_text(json.dumps(summary))
    (directory / "config.yaml").write_text("output_dir: outputs\nobjective:\n  name: pspo\n  alpha: 0.1\nseed: 0\n")
    (directory / "environment.json").write_text('{"packages": {"torch": "2.13.0"}, "code": {"commit": null}}')
    return directory


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A run with its figure and its page."""
    run = make_run(tmp_path_factory.mktemp("drawn") / "run")
    before = {path.name for path in run.iterdir()}
    write_curves(run)
    write_report(run)
    assert {path.name for path in run.iterdir()} - before == {"curves.png", "report.html"}
    return run


@pytest.fixture(scope="module")
def page(drawn):
    return (drawn / "report.html").read_text(encoding="utf-8")


@pytest.mark.process
def test_figure_and_page_are_the_same_bytes_for_the_same_run(drawn, page, tmp_path):
    again = make_run(tmp_path / "again", clock_seed=1)
    assert write_curves(again).read_bytes() == (drawn / "curves.png").read_bytes()
    lines = [text.splitlines() for text in (page, write_report(again).read_text())]
    differ = [a for a, b in zip(*lines, strict=True) if a != b]
    assert len(differ) >= 4
    assert all("time/" in line or "memory/" in line for line in differ)


def test_the_figure_carries_no_version(drawn):
    png = (drawn / "curves.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert b"matplotlib" not in png


def test_page_escapes_what_others_wrote(page):
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;lt;" in page
    assert "\x1b" not in page
    assert "How &lt;many&gt;?" in page
    assert "3 train problems were dropped &lt;b&gt;" in page


def test_page_needs_no_network(page):
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert "default-src 'none'" in page
    assert page.count("data:image/png;base64,") == len(FIGURE)


def test_page_tells_the_result_and_what_it_cost(page):
    assert (
        "pspo (alpha 0.1), seed 0, 6 steps: greedy accuracy on embedded 20.1 % [16.9, 23.8] → 62.1 % [57.8, 66.2], "
        "n = 512." in page
    )
    for text in ("12,345", "last, step 6", "Step 1<", "Step 6<", "objective.alpha", "packages.torch", "2.13.0"):
        assert text in page
    assert page.count("<article>") == 8  # four of the first step and four of the last
    assert "outputs" not in page


def test_unfinished_and_empty_runs_have_a_page_and_a_figure(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "not done yet" in write_report(empty).read_text()
    write_curves(empty)
    write_lines(empty / "metrics.jsonl", [{"step": 0, "validation/greedy_accuracy": 0.25}])
    with (empty / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "rewa')
    assert read_lines(empty / "metrics.jsonl") == [{"step": 0, "validation/greedy_accuracy": 0.25}]
    assert [panel.title for panel in panels_of(read_lines(empty / "metrics.jsonl"))] == ["Accuracy"]
    write_curves(empty)
    write_report(empty)


def test_an_evaluation_without_training_is_reported(tmp_path):
    run = make_run(tmp_path / "run", steps=0)
    page = write_report(run).read_text()
    assert "0 steps" in page
    assert "Completions" not in page
    write_curves(run)


def test_panels_without_their_metrics_are_left_out():
    rows = [{"step": 1, "reward/mean": 0.5, "policy/entropy_mean": None}]
    assert [panel.title for panel in panels_of(rows)] == ["Reward"]


def test_every_metric_of_a_panel_has_a_meaning():
    curves = {curve for section in SECTIONS.values() for panel in section for curve in panel.curves}
    assert curves <= METRICS.keys()
    assert meaning("reward/brevity_mean") == METRICS["reward/<component>_mean"]
    assert meaning("reward/format_mean") == METRICS["reward/format_mean"]
    assert meaning("reward/nonsense") is None


def test_difference_is_newcombes_interval():
    # Newcombe (1998), Stat. Med. 17:873, table II, contrast (a): 56/70 - 48/80, method 10.
    after, before = result(56, 70), result(48, 80)
    assert difference(before, after) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    assert difference(before, before)[1] < 0 < difference(before, before)[2]


def test_final_table_shows_accuracies_and_difference_on_80_columns():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(final_table(summary_of(6)))
    text = console.export_text()
    for part in ("embedded", "512", "20.1 % [16.9, 23.8]", "62.1 % [57.8, 66.2]", "+42.0 [+36.3, +47.2]"):
        assert part in text


def test_the_title_of_the_final_table_may_be_wider_than_the_table():
    console = Console(width=80, record=True, file=io.StringIO())
    summary = summary_of(6) | {"evaluation": {"s": {"after": result(1)}}, "objective": {"name": "clip", "x": "y" * 40}}
    console.print(final_table(summary))
    assert console.export_text().splitlines()[0].endswith("seed 0, 6 steps")


def test_labels_keep_their_order_and_distance():
    heights = spread([0.1, 0.6, 0.61, 0.62], LABEL_SPACING)
    assert heights[0] == pytest.approx(0.1)
    assert all(b - a >= LABEL_SPACING - 1e-9 for a, b in itertools.pairwise(heights))
    assert heights[2] == pytest.approx(0.61)


def table():
    """``METRICS`` as the Markdown table of the README."""
    rows = ["| `{}` | {} |".format(name, meaning.replace("|", "\\|")) for name, meaning in METRICS.items()]
    return "\n".join(["| key | meaning |", "|---|---|", *rows])


def test_the_readme_has_the_table_of_metrics():
    """Run `python -m tests.test_report` after a change of METRICS."""
    assert f"<!-- metrics -->\n{table()}\n<!-- /metrics -->" in README.read_text()


if __name__ == "__main__":
    before, _, rest = README.read_text().partition("<!-- metrics -->")
    after = rest.partition("<!-- /metrics -->")[2]
    README.write_text(f"{before}<!-- metrics -->\n{table()}\n<!-- /metrics -->{after}")
