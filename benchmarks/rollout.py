"""Our sampler beside another: ``python -m benchmarks.rollout [rounds] [--beside generate|vllm] [key=value ...]``.

Completion tokens per second of 32 prompts x 8 completions of at most 34 tokens, in turns, the first round a warm-up:
the same weights, prompts, temperature and stop tokens, and beside the library's ``generate`` once more without stop
tokens, all of full length. The library gets the prompts left-padded and keeps its default, growing cache. Our time
includes the log-probabilities and the texts, as vLLM's does.
"""

import argparse
import copy
import dataclasses
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from benchmarks import measure
from benchmarks.preset import NEVER, make_trainer
from pspo.base.schema import ConfigError
from pspo.dataset import order
from pspo.host import speed
from pspo.rollout import OwnSampler
from pspo.rollout.samplers import make_sampler
from pspo.trainer import Trainer

SIZES = ("rollout.prompts=32", "rollout.group_size=8", "rollout.max_new_tokens=34")


def make_ours(trainer: Trainer, stop_ids: list[int]) -> Callable[[int], int]:
    """A rollout by its number, which returns how many tokens were sampled."""
    config = trainer.config.rollout
    sampler = OwnSampler(trainer.policy, dataclasses.replace(config, max_rows=config.prompts * config.group_size))

    def rollout(number: int) -> int:
        trainer.policy.stop_ids = stop_ids
        completions = sampler.sample(chosen(trainer, number), config.group_size, [trainer.config.seed, number])
        return sum(len(completion.token_ids) for completion in completions)

    return rollout


def make_theirs(trainer: Trainer, stop_ids: list[int]) -> Callable[[int], int]:
    """The same by the library."""
    config, policy = trainer.config.rollout, trainer.policy
    model: Any = copy.deepcopy(policy.model)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=0,
        max_new_tokens=config.max_new_tokens,
        pad_token_id=policy.pad_id,
        eos_token_id=stop_ids if stop_ids != [NEVER] else None,
    )

    def rollout(number: int) -> int:
        torch.manual_seed(number)
        rows = [prompt.token_ids for prompt in chosen(trainer, number) for _ in range(config.group_size)]
        width = max(map(len, rows))
        ids = torch.tensor([[policy.pad_id] * (width - len(row)) + row for row in rows], device=policy.device)
        there = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=policy.device)
        with torch.no_grad():
            found = model.generate(input_ids=ids, attention_mask=there)[:, width:]
        stopped = torch.isin(found, torch.tensor(stop_ids, device=policy.device))
        return int((stopped.cumsum(-1) - stopped.long() == 0).sum())

    return rollout


def make_vllm(trainer: Trainer) -> Callable[[int], int]:
    """The same by vLLM's engine."""
    config = trainer.config.rollout
    sampler = make_sampler(trainer.policy, dataclasses.replace(config, sampler="vllm"))

    def rollout(number: int) -> int:
        completions = sampler.sample(chosen(trainer, number), config.group_size, [trainer.config.seed, number])
        return sum(len(completion.token_ids) for completion in completions)

    return rollout


def chosen(trainer: Trainer, number: int) -> list[Any]:
    """The prompts of a rollout."""
    count = trainer.config.rollout.prompts
    return [
        trainer.train[i]
        for i in order(
            len(trainer.train), trainer.config.seed, number * count, count, trainer.config.dataset.replacement
        )
    ]


def main() -> None:
    """Both lengths (vLLM: stopping alone), both sides in turns."""
    parser = argparse.ArgumentParser(prog="benchmarks.rollout", epilog="key=value sets the run's own configuration")
    parser.add_argument("rounds", nargs="?", type=int, default=7)
    parser.add_argument("--beside", choices=["generate", "vllm"], default="generate")
    asked = measure.arguments(parser)
    rows, rounds, beside = [], {}, asked.beside
    with tempfile.TemporaryDirectory() as directory:
        try:
            trainer = make_trainer([*SIZES, *asked.overrides], Path(directory))
        except ConfigError as error:
            sys.exit(f"benchmarks.rollout: {error}")
        device, usual = trainer.policy.device, trainer.policy.stop_ids
        lengths = [("stopping", usual), *([("of full length", [NEVER])] if beside == "generate" else [])]
        for length, stop_ids in lengths:
            rate: dict[str, list[float]] = {"ours": [], beside: []}
            theirs_of = make_vllm(trainer) if beside == "vllm" else make_theirs(trainer, stop_ids)
            sides = {"ours": make_ours(trainer, stop_ids), beside: theirs_of}
            for number in range(asked.rounds + 1):
                for side, rollout in sides.items():
                    tokens: list[int] = []
                    seconds = speed.seconds(lambda: tokens.append(rollout(number)), device)  # noqa: B023
                    rate[side].append(tokens[0] / seconds)
            ours, theirs = rate["ours"][1:], rate[beside][1:]
            values = measure.summary(ours), beside, measure.summary(theirs), measure.ratio(ours, theirs)
            rows.append(measure.row(f"rollout, completions {length}: tokens/s", *values))
            rounds[length] = rate
    measure.write("rollout" if beside == "generate" else "rollout_vllm", rows, rounds=rounds, overrides=asked.overrides)


if __name__ == "__main__":
    main()
