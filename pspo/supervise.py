"""Fine-tune a model on a data set's solutions: the supervised baseline, whose folder is then a ``model.path``.

python -m pspo.supervise model=qwen0_5b dataset=gsm8k
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from pspo import checkpoint, config, dataset, model
from pspo.base.command import answering, leave
from pspo.base.console import Phase, log, log_to_console, log_to_file
from pspo.base.files import JsonLines, SaveError, write_json, write_text
from pspo.base.schema import ConfigError, Schema, as_dict, key
from pspo.dataset import Problem, Prompt
from pspo.host import environment, interrupt
from pspo.host.memory import NoRoomError
from pspo.model import Policy
from pspo.model.batch import Batch
from pspo.model.supervised import mean_loss, train
from pspo.run import earlier, held_out, lock, outcome
from pspo.update import NonFiniteError, UpdateError
from pspo.update.rows import Row, micro_batches

HELP = f"""{__doc__}
Its keys are model, dataset, optimizer, update.max_tokens, selection, checkpoint.keep, seed, group, output_dir, device,
threads and rerun, as of python -m pspo.run, and supervise.epochs and supervise.batch_size; the defaults stand in
conf/supervise.yaml. The same command, given again, resumes from the last finished epoch.
"""


@dataclass(frozen=True, kw_only=True)
class Supervise(Schema, block="supervise"):
    """How long a model learns from solutions."""

    epochs: int = key("passes over the training problems", within="[1, inf)")
    batch_size: int = key("problems of one optimizer step", within="[1, inf)")


@dataclass(frozen=True, kw_only=True)
class SuperviseConfig(config.Config):
    """The settings of a run, and those of its supervised learning; ``selection=best`` is by the validation loss."""

    supervise: Supervise


def supervise(settings: SuperviseConfig) -> Path:
    """Make, resume or, where it is DONE, only name the run directory; ConfigError before any work."""
    log_to_console()
    device, name = environment.choose_device(settings.device), f"{settings.model.name}_{settings.dataset.name}"
    name = f"supervised_{name}_seed{settings.seed}_{config.identity(settings)}"
    directory = Path(settings.output_dir, settings.group, name)
    if earlier.is_finished(settings, directory):
        return directory
    config.check(settings)
    dataset.check(settings.dataset, training=True)
    model.check(settings.model)
    splits = dataset.load(settings.dataset, settings.seed)
    problems = {"train": _solved(splits.train), "validation": _solved(splits.validation)}
    if not problems["train"] or (settings.selection == "best" and not problems["validation"]):
        raise ConfigError(
            f"dataset={settings.dataset.name} has no solutions to learn from; choose gsm8k, math or embedded, or "
            "dataset=jsonl with a solution in each line"
        )
    if earlier.look(settings, directory).state == "again":
        earlier.set_aside(directory)
    with (
        lock.hold(directory) as owner,
        log_to_file(directory / "run.log"),
        outcome.recorded(directory, owner),
        interrupt.caught(),
    ):
        earlier.record_inputs(settings, directory)
        threads = environment.choose_threads(settings.threads)
        environment.record(directory, environment.describe(threads, device))
        environment.settle(threads)
        checkpoint.seed_global_generators(settings.seed)
        Phase("loading the model")
        policy = model.load(settings.model, settings.seed, device)
        prompts, _ = held_out.encoded(settings, problems, splits.shots, directory.parent)
        rows = {split: _rows(policy.tokenizer, some, settings.dataset) for split, some in prompts.items()}
        learning = Learning(settings, directory, policy, rows, partial(lock.check, directory, owner))
        budget = {"steps": learning.steps * settings.supervise.epochs, "prompts": None, "completion_tokens": None}
        values = as_dict(settings) | {"budget": budget}  # which pspo.status compares with the metrics
        write_text(directory / "config.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
        learning.resume()
        summary = learning.run()
        Phase("saving the model")
        model.save(policy, directory / "model", probe=rows["train"][0].prompt_ids)
        write_json(directory / "summary.json", summary)
        learning.check_owner()
        write_text(directory / "DONE", environment.code_digest() + "\n")
    return directory


@dataclass
class Learning:
    """The epochs of one run; a line of metrics and a checkpoint end each of them."""

    settings: SuperviseConfig
    directory: Path
    policy: Policy
    rows: dict[str, list[Row]]  # by split
    check_owner: Callable[[], None]  # leaves the process if another one has taken the directory over
    epoch: int = 0
    best_loss: float = math.inf  # of the validation problems, nats per token
    best_epoch: int = 0

    def __post_init__(self) -> None:
        self.lines, self.checkpoints = JsonLines(self.directory / "metrics.jsonl"), self.directory / "checkpoints"
        self.optimizer = self.settings.optimizer.make(self.policy.trainable().values())
        self.steps = math.ceil(len(self.rows["train"]) / self.settings.supervise.batch_size)  # of one epoch

    def run(self) -> dict[str, Any]:
        """Learn to the last epoch, then leave in the policy the weights that ``selection`` names."""
        settings, epochs = self.settings, self.settings.supervise.epochs
        with Phase("training", epochs * self.steps, done=self.epoch * self.steps, unit="optimizer steps") as advance:
            if not self.epoch:
                self.lines.append({"step": 0} | self._validate())
            while self.epoch < epochs:
                begun, loss = time.perf_counter(), self._learn(advance)
                with interrupt.deferred():
                    self._end_epoch(loss, begun)
        if settings.selection == "best":
            best = checkpoint.load(self.checkpoints / f"best_{self.best_epoch:06d}")
            if best is None:
                raise SaveError(f"the weights of epoch {self.best_epoch} cannot be read; delete {self.directory}")
            checkpoint.restore_weights(self.policy, best[0]["weights"])
        selected = self.best_epoch if settings.selection == "best" else epochs
        return {"status": "done", "seed": settings.seed, "selection": settings.selection, "selected_epoch": selected}

    def resume(self) -> None:
        """Go on behind the last epoch that has a whole checkpoint, or begin."""
        newest = checkpoint.newest(self.checkpoints)
        if newest is None:
            self.lines.cut(0)
            return
        path, saved, _ = newest
        checkpoint.restore_weights(self.policy, saved["weights"])
        self.optimizer.load_state_dict(saved["optimizer"])
        checkpoint.restore_random_state(saved["random"])
        self.epoch, self.best_loss, self.best_epoch = saved["epochs"]
        self.lines.cut(saved["lines"])
        log.info("resumed from %s", path)

    def _learn(self, advance: Phase) -> float:
        """One pass over the training problems; returns its mean loss, in nats per token."""
        losses = list[float]()
        try:
            with self.policy.recomputing():
                for loss in train(
                    self.policy.model, self.optimizer, self._batches(), autocast=self.policy.autocast,
                    max_grad_norm=self.settings.optimizer.max_grad_norm,
                ):  # fmt: skip
                    losses.append(loss)
                    advance(self.epoch * self.steps + len(losses), f"loss {loss:.3f} nats per token")
        except FloatingPointError as error:
            raise NonFiniteError(f"{error}; lower optimizer.lr or optimizer.max_grad_norm") from error
        return sum(losses) / len(losses)

    def _batches(self) -> Iterator[tuple[list[Batch], float]]:
        """The micro-batches and the learning rate of each optimizer step of the next epoch."""
        rows, optimizer, size = self.rows["train"], self.settings.optimizer, self.settings.supervise.batch_size
        first, total = self.epoch * self.steps, self.steps * self.settings.supervise.epochs
        order = dataset.order(len(rows), self.settings.seed, self.epoch * len(rows), len(rows))
        for step in range(self.steps):
            chosen = [rows[i] for i in order[step * size : (step + 1) * size]]
            spent, warm = (first + step) / total, optimizer.warmup_steps / total
            yield self._cut(chosen), optimizer.lr_at(first + step, spent, warm)

    def _cut(self, rows: list[Row]) -> list[Batch]:
        return [batch for _, batch in micro_batches(rows, self.policy, self.settings.update.max_tokens)]

    def _validate(self) -> dict[str, float]:
        if not self.rows["validation"]:
            return {}
        loss = mean_loss(self.policy.model, self._cut(self.rows["validation"]), self.policy.autocast)
        return {"supervise/validation_loss": loss}

    def _end_epoch(self, train_loss: float, begun: float) -> None:
        """Validate, and save: the weights where none were better, the metrics, and what ``resume`` needs."""
        self.epoch += 1
        step = self.epoch * self.steps
        row = {"step": step, "budget/steps": step, "supervise/train_loss": train_loss} | self._validate()
        row |= {"optimizer/lr": self.optimizer.param_groups[0]["lr"], "time/epoch_s": time.perf_counter() - begun}
        self.check_owner()
        if row.get("supervise/validation_loss", math.inf) < self.best_loss:
            self.best_loss, self.best_epoch = row["supervise/validation_loss"], self.epoch
            checkpoint.save(
                self.checkpoints, f"best_{self.epoch:06d}", {"weights": checkpoint.weights(self.policy)}, {}
            )
        self.lines.append(row)
        state: dict[str, Any] = {"weights": checkpoint.weights(self.policy), "optimizer": self.optimizer.state_dict()}
        state |= {"random": checkpoint.random_state(), "lines": self.lines.sync()}
        state |= {"epochs": [self.epoch, self.best_loss, self.best_epoch]}
        about = {"identity": config.identity(self.settings)}
        checkpoint.save(self.checkpoints, f"step_{self.epoch:06d}", state, about)
        checkpoint.prune(self.checkpoints, self.settings.checkpoint.keep, best=self.best_epoch)


def _solved(problems: list[Problem]) -> list[Problem]:
    solved = [problem for problem in problems if problem.solution]
    if 0 < len(solved) < len(problems):
        log.warning("%d of %d problems have no solution and are left out", len(problems) - len(solved), len(problems))
    return solved


def _rows(encoder: Any, prompts: Sequence[Prompt], config: dataset.DatasetConfig) -> list[Row]:
    """Prompts with the tokens of their solutions, to the chat template's end of a turn or the end of the text."""
    end = model.end_of_turn(encoder) if config.prompt is None else None
    space = " " if config.prompt or not encoder.chat_template else ""  # behind 'Answer:'
    solutions = [encoder.encode(space + prompt.problem.solution, add_special_tokens=False) for prompt in prompts]
    last = encoder.eos_token_id if end is None else end
    return [Row(prompt.token_ids, [*ids, last], [], []) for prompt, ids in zip(prompts, solutions, strict=True)]


def cli() -> None:
    """``python -m pspo.supervise``: a user's mistake is one sentence and exit status 2, a failed run is status 1."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(HELP)
        return
    with answering(ConfigError, stopped="stopped; the same command resumes from the last finished epoch"):
        settings = config.compose_tree("supervise", SuperviseConfig, arguments)
        try:
            directory = supervise(settings)
        except (UpdateError, NoRoomError, SaveError) as error:
            leave(error, 1)
        sys.stdout.write(f"model.path={directory / 'model'}\n")


if __name__ == "__main__":
    cli()
