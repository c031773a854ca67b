"""Fine-tune a model on a data set's solutions: the supervised baseline, whose folder is then a ``model.path``.

python -m pspo.supervise model=qwen0_5b dataset=gsm8k

Its keys are supervise.epochs, supervise.batch_size and those of python -m pspo.run that are not about rollouts and
objectives; the defaults stand in conf/supervise.yaml. A step is an epoch. The same command resumes from the last
finished epoch.
"""

import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pspo import config, dataset, model
from pspo.base.console import Phase, log
from pspo.base.schema import ConfigError, Schema, key
from pspo.config import Config
from pspo.dataset import Prompt
from pspo.model.batch import Batch
from pspo.model.warm_start import mean_loss, train
from pspo.run.__main__ import reporting
from pspo.run.job import run
from pspo.trainer import Trainer
from pspo.update.rows import Row, micro_batches


@dataclass(frozen=True, kw_only=True)
class Supervise(Schema, block="supervise"):
    """How long a model learns from solutions."""

    epochs: int = key("passes over the training problems", within="[1, inf)")
    batch_size: int = key("problems of one optimizer step", within="[1, inf)")


@dataclass(frozen=True, kw_only=True)
class SuperviseConfig(Config):
    """The settings of a run whose steps are epochs; ``selection=best`` is by the validation loss."""

    supervise: Supervise


def supervise(settings: SuperviseConfig, overrides: Sequence[str] = ()) -> Path:
    """Make, resume or, where it is DONE, only name the run directory; ConfigError before any work."""
    name = f"supervised_{settings.model.name}_{settings.dataset.name}_seed{settings.seed}_{config.identity(settings)}"
    return run(settings, overrides, Path(settings.output_dir, settings.group, name), SupervisedTrainer)


class SupervisedTrainer(Trainer):
    """A trainer whose step is one epoch of supervised learning."""

    config: SuperviseConfig

    @classmethod
    def check(cls, config: Config, splits: dataset.Splits) -> None:
        needed = [splits.train, *([splits.validation] if config.selection == "best" else [])]
        if not all(any(problem.solution for problem in split) for split in needed):
            raise ConfigError(
                f"dataset={config.dataset.name} has no solutions to learn from; choose gsm8k, math or embedded, or "
                "dataset=jsonl with a solution in each line"
            )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.train = [prompt for prompt in self.train if prompt.problem.solution]
        self.validation = [prompt for prompt in self.validation if prompt.problem.solution]
        log.info("learning from the solutions of %d problems", len(self.train))
        self.rows = solution_rows(self.policy.tokenizer, self.train, self.config.dataset)

    def _step(self) -> dict[str, float]:
        """One pass over the training problems. A signal cuts it short; nothing is saved then."""
        settings, policy, progress, begun = self.config, self.policy, self.state.progress, time.perf_counter()
        rows, size, epoch = self.rows, settings.supervise.batch_size, progress.steps
        num_steps, losses = math.ceil(len(rows) / size), list[float]()
        spent = epoch / settings.supervise.epochs, (epoch + 1) / settings.supervise.epochs
        learning_rates, self.state.warmup_fraction = settings.optimizer.rates(
            progress.optimizer_steps, num_steps, *spent, self.state.warmup_fraction
        )

        def steps() -> Iterator[tuple[list[Batch], float]]:
            order = dataset.order(len(rows), settings.seed, epoch * len(rows), len(rows))
            for step, lr in enumerate(learning_rates):
                yield self._batches([rows[i] for i in order[step * size : (step + 1) * size]]), lr

        self.unsaved, max_norm = False, settings.optimizer.max_grad_norm
        with policy.recomputing(), Phase(f"epoch {epoch + 1}", num_steps, unit="optimizer steps") as advance:
            for loss in train(policy.model, self.optimizer, steps(), policy.autocast, max_norm):
                losses.append(loss)
                advance(len(losses), f"loss {loss:.3f} nats per token")
        self.sampler.refresh(policy)
        progress.steps, progress.optimizer_steps = epoch + 1, progress.optimizer_steps + num_steps
        progress.prompts = progress.prompts_used = progress.prompts + len(rows)
        metrics = {"supervise/train_loss": sum(losses) / num_steps, "optimizer/lr": learning_rates[-1]}
        return metrics | progress.metrics() | {"time/step_s": time.perf_counter() - begun}

    def _validation(self) -> tuple[dict[str, float], float]:
        rows = solution_rows(self.policy.tokenizer, self.validation, self.config.dataset)
        with Phase("validation"):
            loss = mean_loss(self.policy.model, self._batches(rows), self.policy.autocast)
        return {"supervise/validation_loss": loss}, -loss

    def _batches(self, rows: list[Row]) -> list[Batch]:
        return [batch for _, batch in micro_batches(rows, self.policy, self.config.update.max_tokens)]


def solution_rows(encoder: Any, prompts: Sequence[Prompt], config: dataset.DatasetConfig) -> list[Row]:
    """Prompts with the tokens of their solutions, to the chat template's end of a turn or the end of the text."""
    end = model.end_of_turn(encoder) if config.prompt is None else None
    space = " " if config.prompt or not encoder.chat_template else ""  # behind 'Answer:'
    solutions = [encoder.encode(space + prompt.problem.solution, add_special_tokens=False) for prompt in prompts]
    last = encoder.eos_token_id if end is None else end
    ending = [] if last is None else [last]
    return [Row(prompt.token_ids, ids + ending, [], []) for prompt, ids in zip(prompts, solutions, strict=True)]


def cli() -> None:
    """``python -m pspo.supervise``."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(__doc__ or "")
        return
    with reporting("resumes from the last finished epoch"):
        directory = supervise(config.compose_tree("supervise", SuperviseConfig, arguments), arguments)
        sys.stdout.write(f"model.path={directory / 'model'}\n")


if __name__ == "__main__":
    cli()
