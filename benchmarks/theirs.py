"""TRL's ``GRPOTrainer`` on our model, prompts, rewards, lengths and updates per rollout. Needs the extra ``bench``."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("WANDB_MODE", "disabled")

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, set_seed

try:
    from trl import GRPOConfig, GRPOTrainer
except ImportError:
    sys.exit("this benchmark needs TRL 1.16; run pip install -e '.[bench]'")

from benchmarks.preset import NEVER, restore
from pspo.dataset import order
from pspo.host import speed
from pspo.rollout import Completion
from pspo.trainer import Trainer


class Theirs(GRPOTrainer):
    """TRL's trainer, with its rollouts timed and their tokens counted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rollout_s: list[float] = []
        self.prompt_tokens: list[int] = []
        self.completion_tokens: list[int] = []

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        found = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        speed.synchronize(self.model.device)
        self.rollout_s.append(time.perf_counter() - begun)
        self.prompt_tokens.append(sum(map(len, prompt_ids)))
        self.completion_tokens.append(sum(map(len, found[0])))
        return found


class Turns(TrainerCallback):
    """Whenever TRL has learned from a rollout: note its time, put its weights back, and let ours have its turn."""

    def __init__(self, model: torch.nn.Module, weights: dict[str, Any], updates: int, turn: Callable[[], Any]) -> None:
        self.model, self.weights, self.updates, self.turn = model, weights, updates, turn
        self.step_s: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **__: Any) -> None:
        """The end of one of TRL's optimizer steps."""
        if state.global_step % self.updates:
            return
        speed.synchronize(self.model.device)
        self.step_s.append(time.perf_counter() - self.begun)
        restore(self.model, self.weights)
        optimizer.state.clear()
        self.turn()
        self.begun = time.perf_counter()


def make_theirs(ours: Trainer, model: Any, directory: Path, *, rollouts: int, bf16: bool, rows: int | None) -> Theirs:
    """TRL's trainer of ``model`` for so many of the run's rollouts, ``rows`` completions in a micro-batch.

    It learns in float32 or, with ``bf16``, in bfloat16 autocast on float32 masters.
    """
    config, policy = ours.config, ours.policy
    chosen = [ours.train[i] for i in order(len(ours.train), config.seed, 0, rollouts * config.rollout.prompts)]
    texts = [policy.tokenizer.decode(prompt.token_ids) for prompt in chosen]
    prompt_of = dict(zip(texts, chosen, strict=True))
    minibatch = config.rollout.prompts * config.rollout.group_size // config.update.num_minibatches
    rows = rows or minibatch
    if minibatch % rows:
        sys.exit(f"--rows={rows} must divide the {minibatch} completions of a minibatch")
    length = config.rollout.max_new_tokens

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        written = zip(prompts, completions, strict=True)
        scores = ours.reward([Completion(prompt_of[prompt], 0, [], [], True, text) for prompt, text in written])
        return [score.reward for score in scores]

    set_seed(config.seed)
    theirs = Theirs(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=str(directory),
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=minibatch // rows,
            steps_per_generation=minibatch // rows * config.update.num_minibatches,
            num_iterations=config.update.num_epochs,
            num_generations=config.rollout.group_size,
            max_completion_length=length,
            generation_kwargs={"min_new_tokens": length} if policy.stop_ids == [NEVER] else None,
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            learning_rate=config.optimizer.lr,
            max_grad_norm=config.optimizer.max_grad_norm,
            max_steps=config.update.steps * rollouts,
            gradient_checkpointing=policy.gradient_checkpointing,
            activation_checkpointing=False,
            shuffle_dataset=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=policy.device.type == "cpu",
            bf16=bf16,
        ),
        train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
        processing_class=policy.tokenizer,
    )
    theirs.remove_callback(PrinterCallback)
    return theirs
