"""One step of ours beside one of TRL's ``GRPOTrainer``: ``python -m benchmarks.step [preset] [rounds] [key=value ...]``.

The same weights, prompts, lengths, group size and updates per rollout, in one process, in turns: TRL's own training loop
runs, and whenever it has learned from a rollout, its weights are put back and our step is made. Needs the extra
``bench``. Presets: ``tiny``, the embedded default on the CPU; ``vocab``, the same with 152k tokens; ``qwen0_5b`` and
``qwen1_5b``, those shapes with random weights on a GPU, every completion as long as is allowed.

The floor is the time of the matrix products of our own step, each measured alone at its shape on this machine.
"""

import copy
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("WANDB_MODE", "disabled")

import torch
from datasets import Dataset
from transformers import TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer

from benchmarks import measure
from benchmarks.diagnostics import make_trainer
from pspo.model import Policy
from pspo.trainer import Trainer

PRESETS: dict[str, list[str]] = {
    "tiny": [],
    "vocab": ["model.architecture.vocab_size=151936"],
    "qwen0_5b": ["model=qwen0_5b", "rollout.prompts=64", "rollout.group_size=8", "rollout.max_new_tokens=256"],
    "qwen1_5b": ["model=qwen1_5b", "rollout.prompts=64", "rollout.group_size=8", "rollout.max_new_tokens=256"],
}


class Ours:
    """Our trainer, put back to its first weights after every step."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.weights = {name: p.detach().clone() for name, p in trainer.policy.trainable().items()}
        self.optimizer = copy.deepcopy(trainer.optimizer.state_dict())
        self.rows: list[dict[str, float]] = []
        self.step_s: list[float] = []

    def step(self) -> None:
        """One step, timed; the data order and the random numbers go on, the weights do not."""
        self.step_s.append(measure.seconds(lambda: self.rows.append(self.trainer._step()), self.trainer.policy.device))
        restore(self.trainer.policy, self.weights)
        self.trainer.optimizer.load_state_dict(self.optimizer)


class Turns(TrainerCallback):
    """Whenever TRL has made the updates of one rollout: note its time, put its weights back, make a step of ours."""

    def __init__(self, ours: Ours, model: torch.nn.Module, updates: int) -> None:
        self.ours, self.model, self.updates = ours, model, updates
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.step_s: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **__: Any) -> None:
        """The end of one of TRL's optimizer steps."""
        if state.global_step % self.updates:
            return
        measure.synchronize(self.model.device)
        self.step_s.append(time.perf_counter() - self.begun)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self.weights[name])
        optimizer.state.clear()
        self.ours.step()
        measure.synchronize(self.model.device)
        self.begun = time.perf_counter()


class Timed(GRPOTrainer):
    """TRL's trainer, with its rollouts timed and their tokens counted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rollout_s: list[float] = []
        self.rollout_tokens: list[int] = []

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        found = super()._generate_single_turn(*args, **kwargs)
        measure.synchronize(self.model.device)
        self.rollout_s.append(time.perf_counter() - begun)
        self.rollout_tokens.append(sum(len(ids) for ids in found[0]))
        return found


def restore(policy: Policy, weights: dict[str, torch.Tensor]) -> None:
    """Put weights back."""
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            parameter.copy_(weights[name])


def run(preset: str, rounds: int, overrides: list[str], bf16: bool) -> dict[str, Any]:
    """Both in turns, the first round as a warm-up; TRL in float32 or in bfloat16 autocast."""
    with tempfile.TemporaryDirectory() as directory:
        ours = Ours(make_trainer([*PRESETS[preset], *overrides], Path(directory)))
        trainer = ours.trainer
        config, policy = trainer.config, trainer.policy
        model = copy.deepcopy(policy.model)
        if model.config._attn_implementation == "grouped":
            model.set_attn_implementation("sdpa")  # TRL's users do not have ours
        problems = {policy.tokenizer.decode(prompt.token_ids): prompt.problem for prompt in trainer.train}
        rows = config.rollout.prompts * config.rollout.group_size

        def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
            return [trainer.reward(c, problems[p]).reward for p, c in zip(prompts, completions, strict=True)]

        set_seed(config.seed)
        theirs = Timed(
            model=model,
            reward_funcs=reward,
            args=GRPOConfig(
                output_dir=directory,
                per_device_train_batch_size=rows // config.update.num_minibatches,
                gradient_accumulation_steps=1,
                steps_per_generation=config.update.num_minibatches,
                num_iterations=config.update.num_epochs,
                num_generations=config.rollout.group_size,
                max_completion_length=config.rollout.max_new_tokens,
                temperature=config.rollout.temperature,
                top_p=config.rollout.top_p,
                learning_rate=config.optimizer.lr,
                max_grad_norm=config.optimizer.max_grad_norm,
                max_steps=config.update.steps * (rounds + 1),
                gradient_checkpointing=policy.gradient_checkpointing,
                activation_checkpointing=False,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=policy.device.type == "cpu",
                bf16=bf16,
            ),
            train_dataset=Dataset.from_list(
                [{"prompt": policy.tokenizer.decode(prompt.token_ids)} for prompt in trainer.train]
            ),
            processing_class=policy.tokenizer,
            callbacks=[],
        )
        turns = Turns(ours, model, config.update.steps)
        theirs.add_callback(turns)
        theirs.train()
        return told(ours, turns, theirs)


def told(ours: Ours, turns: Turns, theirs: Timed) -> dict[str, Any]:
    """The numbers of all rounds but the first."""
    updates, rows = ours.trainer.config.update.steps, ours.rows[1:]
    tokens = [row["completion/length_mean"] * ours.trainer.config.rollout.group_size for row in rows]
    prompts = ours.trainer.config.rollout.prompts
    our_tokens = [t * prompts for t in tokens]
    return {
        "ours": {
            "s_per_optimizer_step": measure.summary([s / updates for s in ours.step_s[1:]]),
            "rollout_tokens_per_s": measure.summary(
                [n / row["time/rollout_s"] for n, row in zip(our_tokens, rows, strict=True)]
            ),
            "update_tokens_per_s": measure.summary(
                [
                    ours.trainer.config.update.num_epochs * n / row["time/update_s"]
                    for n, row in zip(our_tokens, rows, strict=True)
                ]
            ),
            "completion_length": statistics.mean(row["completion/length_mean"] for row in rows),
        },
        "trl": {
            "s_per_optimizer_step": measure.summary([s / updates for s in turns.step_s[1:]]),
            "rollout_tokens_per_s": measure.summary(
                [n / s for n, s in zip(theirs.rollout_tokens[1:], theirs.rollout_s[1:], strict=True)]
            ),
            "rollout_share": measure.summary(
                [r / s for r, s in zip(theirs.rollout_s[1:], turns.step_s[1:], strict=True)]
            ),
            "completion_length": statistics.mean(theirs.rollout_tokens[1:])
            / (prompts * ours.trainer.config.rollout.group_size),
        },
        "trl_over_ours": {
            "s_per_optimizer_step": measure.ratio(turns.step_s[1:], ours.step_s[1:]),
        },
    }


def main() -> None:
    """Both dtypes of TRL; the faster one counts."""
    preset, rounds = (sys.argv[1] if len(sys.argv) > 1 else "tiny"), int(sys.argv[2]) if len(sys.argv) > 2 else 5
    found = {name: run(preset, rounds, sys.argv[3:], bf16) for name, bf16 in (("float32", False), ("bfloat16", True))}
    measure.write(f"step_{preset}", {"preset": preset, "trl_in": found})


if __name__ == "__main__":
    main()
