"""Seconds and memory of ``python -m pspo.compare`` on a made group: ``python -m benchmarks.comparison [runs]``.

Files as runs leave them, of 10 seeds an arm: 100 steps with 16 optimizer steps each, 512 greedy answers before and
after training, and 4 sampled answers to 128 problems. Numbers are drawn, not trained; texts are of their usual length.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks import measure
from pspo.base.schema import as_dict
from pspo.config import compose
from pspo.diagnostics import QUANTILES

SEEDS = 10
STEPS = 100
ATTACK = "<script>alert(1)</script>\u2028\x1b[31m"


def make_group(
    directory: Path, arms: Sequence[Sequence[str]], seeds: int, steps: int, problems: int, samples: int = 4
) -> Path:
    """A group of finished runs: for each arm, a list of overrides, one run a seed, with all files that are compared."""
    for number, overrides in enumerate(arms):
        config = as_dict(compose([*overrides, f"group={directory.name}", f"output_dir={directory.parent}"]))
        for seed in range(seeds):
            make_run(
                directory / f"arm{number:02}_seed{seed}", config | {"seed": seed}, number, steps, problems, samples
            )
    return directory


def make_run(run: Path, config: dict[str, Any], arm: int, steps: int, problems: int, samples: int) -> None:
    """One finished run whose accuracy grows with ``arm``."""
    run.mkdir(parents=True)
    rng = np.random.default_rng([arm, config["seed"]])
    last = 0.55 + 0.3 * arm / (arm + 4) + 0.03 * rng.standard_normal()
    accuracy = 0.2 + (last - 0.2) * (1 - np.exp(-np.arange(steps + 1) / max(1, steps / 4)))
    inner = config["update"]["num_epochs"] * config["update"]["num_minibatches"]
    write_lines(run / "metrics.jsonl", (metrics(step, accuracy[step], rng) for step in range(steps + 1)))
    write_lines(
        run / "diagnostics.jsonl",
        (
            {"step": step} | inner_metrics(place, inner, arm, rng)
            for step in range(1, steps + 1)
            for place in range(inner)
        ),
    )
    write_lines(run / "completions.jsonl", [{"step": 1} | answer(0, 0, 0.5, rng)])
    for when, share in (("before", 0.2), ("after", float(accuracy[-1]))):
        folder = run / "evaluation" / when
        rows = (answer(problem, 0, share, rng) for problem in range(problems))
        write_lines(folder / "greedy" / "embedded_t0.jsonl", rows)
        if when == "after" and samples:
            for temperature in (0.4, 0.8):
                rows = (
                    answer(p, k, share - 0.1 * temperature, rng) for p in range(problems // 4) for k in range(samples)
                )
                write_lines(folder / "paper" / f"embedded_t{temperature:g}.jsonl", rows)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "inputs.json").write_text(json.dumps({"code": "0123456789abcdef"}))
    (run / "summary.json").write_text(json.dumps({"status": "done", "run": run.name, "seed": config["seed"]}))
    (run / "DONE").write_text("0123456789abcdef\n")


def write_lines(path: Path, rows: Any) -> None:
    """A file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def metrics(step: int, accuracy: float, rng: np.random.Generator) -> dict[str, Any]:
    """A row of ``metrics.jsonl``; row 0 is the validation before training."""
    noisy = accuracy + 0.02 * rng.standard_normal()
    row = {"step": step}
    if step % 10 == 0:
        row |= {
            "validation/greedy_accuracy": noisy,
            "validation/sampled_accuracy": noisy - 0.05,
            "time/validation_s": 2.0,
        }
        row |= {"validation/greedy_length_mean": 24 - 5 * noisy, "validation/sampled_length_mean": 25 - 5 * noisy}
    if step == 0:
        return row
    shares = dict(zip(("damped", "zero", "amplified", "reversed"), rng.dirichlet([4, 2, 1, 1]), strict=True))
    return row | {
        "reward/mean": noisy, "reward/correct_mean": noisy, "completion/length_mean": 30 - 9 * noisy,
        "completion/truncated_rate": 0.05 * rng.random(), "policy/kl_old_new_k3": 0.001 + 0.001 * rng.random(),
        "policy/entropy_mean": 1.5 - noisy, "policy/ratio_max": 1 + 8 * rng.random(),
        "ratio/ess": 1 - 0.1 * rng.random(), "optimizer/grad_norm_mean": rng.gamma(2),
        "weight/mass_kept": 1 - 0.2 * rng.random(), **{f"weight/{name}_rate": share for name, share in shares.items()},
        "time/step_s": 3.5, "time/rollout_s": 2 + 0.1 * rng.random(), "time/update_s": 1 + 0.1 * rng.random(),
        "time/tokens_per_s": 900 + 50 * rng.random(), "memory/peak_gib": 1.2,
        "budget/steps": step, "budget/prompts": 32 * step, "budget/completion_tokens": 3000 * step,
        "budget/optimizer_steps": 16 * step,
    }  # fmt: skip


def inner_metrics(place: int, inner: int, arm: int, rng: np.random.Generator) -> dict[str, Any]:
    """A row of ``diagnostics.jsonl``, all its columns."""
    distance = place / inner * (1 + 0.2 * arm) * (1 + 0.2 * rng.random())
    quantiles = {
        f"ratio/{sign}_{q}": 1 + distance * rng.random()
        for sign in ("positive", "negative")
        for q in [*QUANTILES, "max"]
    }
    return quantiles | {
        "epoch": 4 * place // inner, "minibatch": place % 4, "ratio/ess": 1 - 0.2 * distance,
        "ratio/tv": 0.1 * distance, "kl/before_k1": 0.01 * distance, "kl/before_k3": 0.01 * distance,
        "kl/after_k1": 0.01 * distance, "kl/after_k3": 0.01 * distance, "policy/entropy": 1.0,
        "weight/zero_rate": 0.3 * distance / (1 + distance),
        "weight/damped_rate": 0.3, "weight/amplified_rate": 0.1, "weight/reversed_rate": 0.0,
        "weight/mass_kept": 1 - 0.3 * distance, "optimizer/grad_norm": 1.0, "optimizer/grad_norm_clipped": 1.0,
        "optimizer/update_norm_estimate": 0.1 / (1 + place),
    }  # fmt: skip


def answer(problem: int, sample: int, share: float, rng: np.random.Generator) -> dict[str, Any]:
    """An answer, right with a probability near ``share`` that depends on the problem; problem 0 has a hostile text."""
    easiness = np.random.default_rng([7, problem]).normal(0, 0.25)
    correct = bool(rng.random() < share + easiness)
    tokens = int(rng.integers(12, 28 if correct else 40))
    sentence = f"{3 + problem} apples and {tokens} more make {problem + tokens}. #### {problem}"
    text = (ATTACK if problem == 0 else "") + sentence
    return {
        "problem": f"embedded/test/{problem}", "question": "How many <apples> are there?", "answer": f"{problem}",
        "completion": text, "sample": sample, "reward": float(correct), "correct": correct,
        "components": {"correct": float(correct)}, "parsed": True, "strict": correct, "timed_out": False,
        "tokens": tokens, "truncated": tokens > 38,
    }  # fmt: skip


def arms(count: int) -> Iterator[list[str]]:
    """Overrides of ``count`` arms: noclip, and the others' knobs at as many settings as it takes."""
    shared = ["update.num_epochs=4", "update.num_minibatches=4"]
    yield [*shared, "objective=noclip"]
    knobs = {"pspo_geometric": "alpha", "clip": "eps_low", "sapo": "tau_positive"}
    for number in range(count - 1):
        name = list(knobs)[number % len(knobs)]
        yield [*shared, f"objective={name}", f"objective.{knobs[name]}={0.05 * (1 + number // len(knobs)):g}"]


def main() -> None:
    """Make the group, compare it in a process of its own, and keep seconds and peak memory."""
    parser = argparse.ArgumentParser(prog="benchmarks.comparison")
    parser.add_argument("runs", nargs="?", type=int, default=300)
    count = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        group = make_group(Path(folder) / "made", list(arms(count // SEEDS)), SEEDS, STEPS, 512)
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-m", "pspo.compare", str(group)], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - begun
        gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        megabytes = (group / "comparison.html").stat().st_size / 1e6
    limits = {"seconds": (seconds, 30.0), "peak memory, GiB": (gib, 1.0), "the page, MB": (megabytes, 10.0)}
    rows = [
        measure.row(
            f"comparison of {count} runs: {unit}", measure.summary([value]), "limit", measure.summary([limit]),
            measure.ratio([limit], [value]), "≥ 1",
        )
        for unit, (value, limit) in limits.items()
    ]  # fmt: skip
    measure.write("comparison", rows, runs=count)


if __name__ == "__main__":
    main()
