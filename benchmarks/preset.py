"""Runs that benchmarks measure: overrides of the default run and, for some presets, the shape of a random model."""

import copy
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from pspo import dataset, model
from pspo.config import Config, compose
from pspo.dataset import embedded
from pspo.host import environment
from pspo.model import Policy, tiny
from pspo.model.policy import can_share
from pspo.reward import Answered, Score
from pspo.tracker import Tracker
from pspo.trainer import Trainer

NEVER = -1
"""A stop token that is never drawn: every completion is as long as it may be."""


@dataclass(frozen=True)
class Preset:
    """A run to measure.

    Attributes:
        overrides: settings in which the run differs from the default run.
        shape: shape of a Qwen2 model with random weights, which takes the place of the run's own model and whose
            completions all have full length; None for the run's own model.
        trl_rows: completions in one of TRL's micro-batches; None for all of a minibatch.
        step: target for TRL's seconds per optimizer step divided by ours.
        rollout: target for our completion tokens per second divided by TRL's.
        floor: target for our seconds per optimizer step divided by the seconds of our matrix products alone.
    """

    overrides: tuple[str, ...]
    shape: dict[str, int] | None = None
    trl_rows: int | None = None
    step: str = ""
    rollout: str = ""
    floor: str = ""


def _shape(hidden: int, intermediate: int, layers: int, heads: int, keys: int) -> dict[str, int]:
    return {
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
    }


VOCAB = _shape(64, 128, 2, 4, 2)
SMALL = ("rollout.prompts=8", "rollout.group_size=4", "rollout.max_new_tokens=32", "update.num_minibatches=1")
SMOLLM2 = (
    "device=cpu", "model=smollm2", "model.autocast=true", "dataset=embedded", "rollout.prompts=4",
    "rollout.group_size=8", "rollout.max_new_tokens=32", "update.num_epochs=1", "update.num_minibatches=2",
)  # fmt: skip
# Random weights are close to uniform over the vocabulary: a nucleus of 0.9 would be most of it, as it never is else.
GPU = (
    "device=cuda", "dataset=embedded", "rollout.prompts=64", "rollout.group_size=8", "rollout.max_new_tokens=256",
    "rollout.max_rows=256", "rollout.temperature=1.0", "rollout.top_p=1.0",
)  # fmt: skip
PRESETS = {
    "tiny": Preset(("device=cpu",)),
    "vocab": Preset(("device=cpu", *SMALL), VOCAB),
    "smollm2": Preset(SMOLLM2, step="≥ 4", floor="≤ 3.3"),
    "reversal": Preset(("device=cpu", "model=reversal", "dataset=reversal"), floor="≤ 2.5"),
    "qwen0_5b": Preset(("model=qwen0_5b", *GPU), _shape(896, 4864, 24, 14, 2), 64, "≥ 10", "≥ 10"),
    "qwen1_5b": Preset(
        ("model=qwen1_5b", *GPU, "update.max_tokens=8192"), _shape(1536, 8960, 28, 12, 2), 32, "≥ 10", "≥ 10"
    ),
}


def random_policy(config: Config, shape: dict[str, int], device: torch.device) -> Policy:
    """A Qwen2 model with random weights, a tokenizer of its first tokens, and a stop token that is never drawn."""
    texts = [text for problem in embedded.load("train", 512) for text in (problem.question, problem.solution)]
    tokenizer = tiny.train_tokenizer(texts, 256)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    architecture = Qwen2Config(**shape, **special, tie_word_embeddings=True)
    architecture._attn_implementation = config.model.attention
    torch.manual_seed(config.seed)
    with device:
        made = Qwen2ForCausalLM(architecture).eval()
    shares = can_share(made)
    return Policy(made, tokenizer, [NEVER], config.model.autocast, config.model.gradient_checkpointing, shares)


def make_trainer(overrides: Sequence[str], directory: Path, shape: dict[str, int] | None = None) -> Trainer:
    """A trainer of the composed run, at its start; a random model's completions are worth 0 and 1 in turns."""
    config = compose(["tracker=jsonl", *overrides])
    device = environment.choose_device(config.device)
    torch.set_num_threads(environment.choose_threads(config.threads))
    policy = random_policy(config, shape, device) if shape else model.load(config.model, config.seed, device)
    problems = dataset.load(config.dataset, config.seed)
    prompts, held_out = (
        dataset.encode(policy.tokenizer, config.dataset, some)[0] for some in (problems.train, problems.validation)
    )
    tracker = Tracker(config.tracker, directory)
    reward = _in_turns() if shape else config.reward
    return Trainer(config, directory, policy, prompts, held_out, reward, tracker)


def _in_turns() -> Callable[[Sequence[Answered]], list[Score]]:
    worth = itertools.cycle((0.0, 1.0))
    return lambda completions: [Score(next(worth), False, {}, False) for _ in completions]


class Steps:
    """Our training steps, each from the first weights."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.weights = copied(trainer.policy)
        self.optimizer, self.state = copy.deepcopy(trainer.optimizer.state_dict()), copy.deepcopy(trainer.state)

    def step(self, again: bool = False) -> dict[str, float]:
        """One step's metrics, its seconds and tokens among them; ``again``: the next one is the same once more."""
        trainer, rollout = self.trainer, self.trainer.config.rollout
        asked = (len(trainer.train), trainer.config.seed, trainer.state.progress.prompts, rollout.prompts)
        before, worked, begun = trainer.state.progress.completion_tokens, time.process_time(), time.perf_counter()
        made: dict[str, Any] = trainer._step()
        if trainer.policy.device.type == "cuda":
            torch.cuda.synchronize()
        made["seconds"], made["processor_s"] = time.perf_counter() - begun, time.process_time() - worked
        made["completion_tokens"] = trainer.state.progress.completion_tokens - before
        made["prompt_tokens"] = rollout.group_size * sum(len(trainer.train[i].token_ids) for i in dataset.order(*asked))
        restore(trainer.policy.model, self.weights)
        trainer.optimizer.load_state_dict(self.optimizer)
        if again:
            trainer.state = copy.deepcopy(self.state)
        return made


def copied(policy: Policy) -> dict[str, torch.Tensor]:
    """Copies of the trained weights, by name, in the CPU's memory."""
    return {name: p.detach().cpu().clone() for name, p in policy.trainable().items()}


def restore(module: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Put weights back."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
