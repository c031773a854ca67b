"""One step of ours beside one of TRL's: ``python -m benchmarks.step [preset] [rounds] [key=value ...]``.

The same weights, prompts, lengths, group size and updates per rollout, in one process, in turns: TRL's own training
loop runs, and whenever it has learned from a rollout, its weights are put back and our step is made. The first round is
a warm-up. TRL runs in float32 and in bfloat16; the faster one counts. Presets: ``tiny``, the embedded default on the
CPU; ``smollm2``, SmolLM2-135M-Instruct on the CPU in bfloat16 (``model.autocast=false`` for float32), one rollout of 4
prompts x 8 completions x 32 tokens and two optimizer steps; ``reversal``, an episode of token reversal, beside its
matrix products alone (``--trl=none``), as TRL has no such policy; ``vocab``, a small model of 152k tokens; ``qwen0_5b``
and ``qwen1_5b``, those shapes on a GPU. The last three have random weights and completions of full length.

The tokens of an update are those of prompts and completions, once for each epoch. Our rollout's time includes the
rewards, TRL's does not. Peak memory is that of one step in a process of its own. The floor is the time of the matrix
products of our own step, each measured alone at its shape on this machine.
"""

import argparse
import copy
import gc
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.measure import row
from benchmarks.preset import PRESETS, Steps, make_trainer
from pspo.base.schema import ConfigError
from pspo.doctor.limits import limits
from pspo.host import speed
from pspo.host.memory import call_peak_gib
from pspo.trainer import Trainer

DTYPES = ("float32", "bfloat16")


def in_turns(ours: Steps, directory: Path, rounds: int, dtype: str, rows: int | None) -> dict[str, Any]:
    """Numbers of all rounds but the first, of both sides, in lists."""
    from benchmarks.theirs import Turns, make_theirs

    trainer, model, made = ours.trainer, copy.deepcopy(ours.trainer.policy.model), []
    trainer.state = copy.deepcopy(ours.state)
    theirs = make_theirs(trainer, model, directory, rollouts=rounds + 1, bf16=dtype == "bfloat16", rows=rows)
    turns = Turns(model, ours.weights, trainer.config.update.steps, lambda: made.append(ours.step()))
    theirs.add_callback(turns)
    theirs.train()
    sides = {
        "ours": [(m["seconds"], m["time/rollout_s"], m["prompt_tokens"], m["completion_tokens"]) for m in made],
        "trl": list(zip(turns.step_s, theirs.rollout_s, theirs.prompt_tokens, theirs.completion_tokens, strict=True)),
    }
    return {side: rates(values[1:], trainer) for side, values in sides.items()}


def alone(ours: Steps, rounds: int) -> dict[str, Any]:
    """Numbers of all rounds of ours but the first, in lists."""
    made = [ours.step() for _ in range(rounds + 1)][1:]
    values = [(m["seconds"], m["time/rollout_s"], m["prompt_tokens"], m["completion_tokens"]) for m in made]
    return {"ours": rates(values, ours.trainer)}


def rates(values: Sequence[tuple[float, float, float, float]], trainer: Trainer) -> dict[str, Any]:
    """Of rounds, each seconds, the rollout's seconds, prompt tokens and completion tokens."""
    updates, epochs = trainer.config.update.steps, trainer.config.update.num_epochs
    return {
        "s_per_optimizer_step": [step / updates for step, *_ in values],
        "rollout_tokens_per_s": [completion / rollout for _, rollout, _, completion in values],
        "update_tokens_per_s": [
            epochs * (prompt + completion) / (step - rollout) for step, rollout, prompt, completion in values
        ],
        "prompt_tokens": statistics.mean(prompt for *_, prompt, _ in values),
        "completion_tokens": statistics.mean(completion for *_, completion in values),
    }


def peak_gib(trainer: Trainer, directory: Path, side: str, rows: int | None) -> float:
    """Peak memory of the first step of one side, alone."""
    if side == "ours":
        work: Any = trainer._step
    else:
        from benchmarks.theirs import make_theirs

        work = make_theirs(
            trainer, trainer.policy.model, directory, rollouts=1, bf16=side == "bfloat16", rows=rows
        ).train
    return call_peak_gib(work, trainer.policy.device)


def bounds(trainer: Trainer, context: float) -> dict[str, float]:
    """What the GPU's bandwidth allows a rollout, and its matrix products an update: see ``limits``."""
    policy, rollout, device = trainer.policy, trainer.config.rollout, trainer.policy.device
    rows = min(rollout.max_rows, rollout.prompts * rollout.group_size)
    dtype = torch.bfloat16 if policy.autocast else policy.model.dtype
    copied, multiplied = speed.copy_rate(device), speed.matmul_rate(dtype, device)
    rollout_rate, update_rate = limits(policy, rows, context, copied, multiplied)
    return {
        "bytes_per_s": copied,
        "operations_per_s": multiplied,
        "rollout_tokens_per_s": rollout_rate,
        "update_tokens_per_s": update_rate,
    }


def beside_trl(name: str, dtype: str, found: dict[str, Any], peaks: dict[str, float]) -> list[dict[str, Any]]:
    """Our side beside TRL's."""
    ours, trl, preset = found["ours"], found["trl"], PRESETS[name]
    rows, beside = [], f"TRL, {dtype}"
    for what, key, target in (
        ("s per optimizer step", "s_per_optimizer_step", preset.step),
        ("rollout, completion tokens/s", "rollout_tokens_per_s", preset.rollout),
        ("update, tokens/s", "update_tokens_per_s", ""),
    ):
        over = measure.ratio(*((trl[key], ours[key]) if key.startswith("s_") else (ours[key], trl[key])))
        rows.append(row(f"{name}: {what}", measure.summary(ours[key]), beside, measure.summary(trl[key]), over, target))
    ours_gib, trl_gib = [peaks["ours"]], [peaks[dtype]]
    values = measure.summary(ours_gib), beside, measure.summary(trl_gib), measure.ratio(trl_gib, ours_gib)
    return [*rows, row(f"{name}: peak memory of a step, GiB", *values)]


def beside_limits(name: str, ours: dict[str, Any], floor: float, bound: dict[str, float]) -> list[dict[str, Any]]:
    """Our side beside what the machine allows."""
    compared = [("s per optimizer step", "s_per_optimizer_step", "its matrix products", floor, PRESETS[name].floor)]
    if bound:
        compared += [
            (
                "rollout, completion tokens/s",
                "rollout_tokens_per_s",
                "the bandwidth",
                bound["rollout_tokens_per_s"],
                "≥ 0.5",
            ),
            ("update, tokens/s", "update_tokens_per_s", "the matmul rate", bound["update_tokens_per_s"], "≥ 0.4"),
        ]
    return [
        row(
            f"{name}: {what}",
            measure.summary(ours[key]),
            beside,
            measure.summary([limit]),
            measure.ratio(ours[key], [limit] * len(ours[key])),
            target,
        )
        for what, key, beside, limit, target in compared
    ]


def main() -> None:
    """Measure memory in children, then time here."""
    parser = argparse.ArgumentParser(prog="benchmarks.step", epilog="key=value sets the run's own configuration")
    parser.add_argument("preset", nargs="?", choices=PRESETS, default="tiny")
    parser.add_argument("rounds", nargs="?", type=int, default=5)
    parser.add_argument("--rows", type=int, help="completions in one of TRL's micro-batches")
    parser.add_argument("--trl", choices=[*DTYPES, "none"], help="TRL in one dtype only, or ours alone")
    parser.add_argument("--alone", choices=["ours", *DTYPES], help="print the peak memory of one side and leave")
    asked = measure.arguments(parser)
    preset, trl = PRESETS[asked.preset], asked.trl or ("none" if asked.preset == "reversal" else None)
    dtypes: Sequence[str] = () if trl == "none" else [trl] if trl else DTYPES
    rows = asked.rows or preset.trl_rows
    with tempfile.TemporaryDirectory() as directory:
        where = Path(directory)
        try:
            peaks = {}
            if not asked.alone:
                words = [asked.preset, *([f"--rows={rows}"] if rows else []), *asked.overrides]
                peaks = {
                    side: measure.alone("benchmarks.step", f"--alone={side}", *words) for side in ("ours", *dtypes)
                }
            trainer = make_trainer([*preset.overrides, *asked.overrides], where, preset.shape)
        except ConfigError as error:
            sys.exit(f"benchmarks.step: {error}")
        if asked.alone:
            print(json.dumps(peak_gib(trainer, where, asked.alone, rows)))
            return
        ours, found, table = Steps(trainer), dict[str, Any](), list[dict[str, Any]]()
        for dtype in dtypes:
            found[dtype] = in_turns(ours, where, asked.rounds, dtype, rows)
            gc.collect()
        if dtypes:
            faster = min(dtypes, key=lambda dtype: statistics.median(found[dtype]["trl"]["s_per_optimizer_step"]))
            table = beside_trl(asked.preset, faster, found[faster], peaks)
        else:
            found[faster := "alone"] = alone(ours, asked.rounds)
        device, one = trainer.policy.device, found[faster]["ours"]
        floor = measure.floor_s(measure.products(ours.step), device) / trainer.config.update.steps
        count = trainer.config.rollout.prompts * trainer.config.rollout.group_size
        context = (one["prompt_tokens"] + one["completion_tokens"] / 2) / count
        bound = bounds(trainer, context) if device.type == "cuda" else {}
    measure.write(
        f"step_{asked.preset}",
        [*table, *beside_limits(asked.preset, one, floor, bound)],
        rounds=found,
        peak_gib=peaks,
        limits=bound,
        floor_s=floor,
        overrides=asked.overrides,
        trl_rows=rows,
    )


if __name__ == "__main__":
    main()
