"""What the inner-step diagnostics cost: ``python -m benchmarks.diagnostics [pairs] [key=value ...]``.

The same training step, from the same weights, with and without them, in alternating order; the share of time that
they add, with the 95 % interval of its mean over the pairs (t).
"""

import copy
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from scipy import stats

from pspo import dataset, environment, model
from pspo.config import compose
from pspo.reward import make_reward
from pspo.tracker import Tracker
from pspo.trainer import Trainer


def make_trainer(overrides: list[str], directory: Path) -> Trainer:
    """A trainer of the composed run, at its start."""
    config = compose(["tracker=jsonl", *overrides])
    device = environment.choose_device(config.device)
    torch.set_num_threads(environment.choose_threads(config.threads))
    policy = model.load(config.model, config.seed, device)
    problems = dataset.load(config.dataset, config.seed)
    prompts, _ = dataset.encode(policy.tokenizer, config.dataset, problems.train)
    tracker = Tracker(config.tracker, directory, run_name="", group="", job_type="", resolved_config={})
    return Trainer(config, directory, policy, prompts, [], make_reward(config.reward), tracker)


def step_s(trainer: Trainer, every: int) -> tuple[float, float]:
    """Wall and processor seconds of the first step with diagnostics every so many steps; all is put back after it."""
    weights = {name: p.detach().clone() for name, p in trainer.policy.trainable().items()}
    optimizer, state = copy.deepcopy(trainer.optimizer.state_dict()), copy.deepcopy(trainer.state)
    diagnostics = dataclasses.replace(trainer.config.diagnostics, every=every)
    trainer.config = dataclasses.replace(trainer.config, diagnostics=diagnostics)
    begun, worked = time.perf_counter(), time.process_time()
    trainer._step()
    if trainer.policy.device.type == "cuda":
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - begun, time.process_time() - worked
    with torch.no_grad():
        for name, parameter in trainer.policy.trainable().items():
            parameter.copy_(weights[name])
    trainer.optimizer.load_state_dict(optimizer)
    trainer.state = state
    return elapsed


def interval(added: list[float]) -> dict[str, float]:
    """Mean of the shares added, with its 95 % interval."""
    mean, error = statistics.mean(added), statistics.stdev(added) / len(added) ** 0.5
    half = error * stats.t.ppf(0.975, len(added) - 1)
    return {"added_share_mean": mean, "ci95_low": mean - half, "ci95_high": mean + half}


def main() -> None:
    """Print the pairs' result as JSON."""
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(sys.argv[2:], Path(directory))
        for every in (0, 1):
            step_s(trainer, every)
        seconds = [
            {every: step_s(trainer, every) for every in ((0, 1) if pair % 2 else (1, 0))} for pair in range(pairs)
        ]
    result = {
        "pairs": pairs,
        "step_s_median": statistics.median(pair[0][0] for pair in seconds),
        "wall": interval([pair[1][0] / pair[0][0] - 1 for pair in seconds]),
        "processor": interval([pair[1][1] / pair[0][1] - 1 for pair in seconds]),
        "threads": torch.get_num_threads(),
        "device": str(trainer.policy.device),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
