"""The training loop: collect, update, log, checkpoint, validate. It knows no objective by name."""

import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pspo import checkpoint, interrupt
from pspo.advantage import has_spread
from pspo.budget import Progress
from pspo.config import Config, identity
from pspo.console import log, progress_bar, track
from pspo.dataset import Prompt, order
from pspo.evaluation import answer, completion_row, summarize
from pspo.files import JsonLines, SaveError
from pspo.model import Policy
from pspo.reward import Reward, Score
from pspo.rollout import Completion, sample
from pspo.statistics import Statistics
from pspo.stream import Stream, generator
from pspo.tracker import Tracker
from pspo.update import make_rows, update

NO_SPREAD_STEPS = 5
"""After so many steps in a row in which every group has equal rewards, the run says that it learns nothing."""


@dataclass
class State:
    """Everything beside weights and optimizer that influences what comes next."""

    progress: Progress = field(default_factory=Progress)
    warmup_fraction: float = 0.0
    best_reward: float | None = None
    best_step: int = 0
    no_spread_steps: int = 0
    notes: list[str] = field(default_factory=list)
    row: dict[str, float] | None = field(default_factory=dict)  # of the last step, while it has yet to be validated


@dataclass
class Trainer:
    """One run's training, from its newest checkpoint to the end of its budget."""

    config: Config
    directory: Path
    policy: Policy
    train: list[Prompt]
    validation: list[Prompt]
    reward: Reward
    tracker: Tracker
    started: float = field(default_factory=time.perf_counter)
    earlier_s: float = 0.0
    state: State = field(default_factory=State)
    check_owner: Callable[[], None] = lambda: None  # leaves the process if another one has taken the directory over

    def __post_init__(self) -> None:
        self.optimizer = self.config.optimizer.make(self.policy.trainable().values())
        self.completions = JsonLines(self.directory / "completions.jsonl")
        self.checkpoints = self.directory / "checkpoints"
        self.unsaved = False

    def run(self) -> State:
        """Train to the end of the budget, then leave in the policy the weights that ``selection`` names."""
        config, state, progress = self.config, self.state, self.state.progress
        self.limit = interrupt.TimeLimit()
        try:
            with progress_bar(transient=False) as bar:
                done = getattr(progress, config.budget.unit)
                task = bar.add_task("training", total=config.budget.total, completed=done, info="")
                while state.row or not config.budget.spent(progress):
                    if state.row is None:
                        state.row, self.unsaved = self._step(), True
                    last = config.budget.spent(progress)
                    if progress.steps % config.evaluation.every == 0 or last:
                        with checkpoint.random_state_kept():  # those of a user's reward
                            state.row |= self._validate()
                    self.check_owner()
                    self.tracker.log(state.row, progress.steps)
                    metrics, state.row, self.unsaved = state.row, None, True
                    if self.limit.near() or last or (progress.steps and progress.steps % config.checkpoint.every == 0):
                        self._save()
                    if progress.steps:
                        bar.update(task, completed=getattr(progress, config.budget.unit), info=_summary(metrics))
                    interrupt.check()
        except interrupt.Interrupted:  # between steps, in a rollout, when nothing has changed yet, or in a validation
            if self.unsaved:
                self._save()
            raise
        if self.state.best_reward is not None:
            self._restore_best()
        return self.state

    def _step(self) -> dict[str, float]:
        """One rollout with all its updates."""
        config, progress, statistics = self.config, self.state.progress, Statistics()
        begun = time.perf_counter()
        if self.policy.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        number, fraction = progress.steps + 1, config.budget.fraction(progress)
        chosen = order(len(self.train), config.seed, progress.prompts, config.rollout.prompts)
        completions = self._collect([self.train[i] for i in chosen], number)
        rollout_s = time.perf_counter() - begun
        scores = [self.reward(c.text, c.prompt.problem) for c in completions]
        reward_PG = torch.tensor([s.reward for s in scores], dtype=torch.float64).view(-1, config.rollout.group_size)
        advantage_PG = config.advantage(reward_PG)
        progress.steps, progress.prompts = number, progress.prompts + len(chosen)
        progress.completion_tokens += sum(len(c.token_ids) for c in completions)
        update(
            self.policy,
            config.objective,
            self.optimizer,
            make_rows(completions, advantage_PG.flatten()),
            config=config.update,
            temperature=config.rollout.temperature,
            max_grad_norm=config.optimizer.max_grad_norm,
            learning_rates=self._learning_rates(fraction, config.budget.fraction(progress)),
            random=generator(config.seed, Stream.MINIBATCH, number),
            statistics=statistics,
            failure=self.directory / f"failed_step_{number:06d}.pt",
        )
        progress.optimizer_steps += config.update.steps
        self._warn_without_spread(reward_PG)
        self.check_owner()
        for completion, score in zip(completions[: config.rollout.group_size], scores, strict=False):
            self.completions.append({"step": number} | completion_row(completion, score))
        step_s = time.perf_counter() - begun
        return {
            **_rollout_metrics(completions, scores, reward_PG),
            **statistics.result(),
            "optimizer/lr": self.optimizer.param_groups[0]["lr"],
            **progress.metrics(),
            "time/step_s": step_s,
            "time/rollout_s": rollout_s,
            "time/update_s": step_s - rollout_s,
            "time/tokens_per_s": sum(len(c.token_ids) for c in completions) / step_s,
            "memory/peak_gib": _peak_gib(self.policy.device),
        }

    def _learning_rates(self, start: float, end: float) -> list[float]:
        """Those of the optimizer steps of one rollout, over which the spent share of the budget goes start -> end."""
        optimizer, first, updates = self.config.optimizer, self.state.progress.optimizer_steps, self.config.update.steps
        if first <= optimizer.warmup_steps and optimizer.decay != "constant":  # which needs no share of the budget
            self.state.warmup_fraction = start + (end - start) * min(optimizer.warmup_steps - first, updates) / updates
        return [
            optimizer.lr_at(first + i, start + (end - start) * i / updates, self.state.warmup_fraction)
            for i in range(updates)
        ]

    def _collect(self, prompts: list[Prompt], number: int) -> list[Completion]:
        rollout = self.config.rollout
        return sample(
            self.policy,
            prompts,
            seed=[self.config.seed, Stream.TRAIN, number],
            group_size=rollout.group_size,
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            max_rows=rollout.max_rows,
        )

    def _validate(self) -> dict[str, float]:
        """Greedy and sampled answers to held-out training problems; keeps the best weights where they are asked for."""
        if not self.validation:
            return {}
        begun = time.perf_counter()
        seed = [self.config.seed, Stream.VALIDATION, self.state.progress.steps]
        asked = (self.policy, self.validation, self.reward, self.config.rollout)
        greedy, sampled = (
            summarize([row for chunk in track(chunks, "validation", len(self.validation)) for row in chunk])
            for chunks in (answer(*asked, seed=seed, greedy=greedy) for greedy in (True, False))
        )
        best = self.state.best_reward
        if self.config.selection == "best" and (best is None or sampled["reward_mean"] > best):
            self.state.best_reward, self.state.best_step = sampled["reward_mean"], self.state.progress.steps
            name = f"best_{self.state.best_step:06d}"
            checkpoint.save(self.checkpoints, name, {"weights": checkpoint.weights(self.policy)}, {})
        log.info(
            "step %d: validation accuracy %.1f %% greedy, %.1f %% sampled, %.1f tokens",
            self.state.progress.steps,
            100 * greedy["accuracy"],
            100 * sampled["accuracy"],
            sampled["length_mean"],
        )
        return {
            "validation/greedy_accuracy": greedy["accuracy"],
            "validation/greedy_length_mean": greedy["length_mean"],
            "validation/sampled_accuracy": sampled["accuracy"],
            "validation/sampled_reward_mean": sampled["reward_mean"],
            "validation/sampled_length_mean": sampled["length_mean"],
            "time/validation_s": time.perf_counter() - begun,
        }

    def _warn_without_spread(self, reward_PG: Tensor) -> None:
        self.state.no_spread_steps = 0 if has_spread(reward_PG).any() else self.state.no_spread_steps + 1
        if self.state.no_spread_steps == NO_SPREAD_STEPS:
            self.state.notes.append(
                f"up to step {self.state.progress.steps}, {NO_SPREAD_STEPS} steps in a row had no group with a spread "
                f"of rewards (mean {reward_PG.mean():.2f}): there was nothing to learn from; try more completions, a "
                "higher temperature, or other problems"
            )
            log.warning(self.state.notes[-1])

    def _save(self) -> None:
        self.check_owner()
        state = {
            "weights": checkpoint.weights(self.policy),
            "optimizer": self.optimizer.state_dict(),
            "random": checkpoint.random_state(),
            "state": asdict(self.state),
            "tracker": self.tracker.state(),
            "completions": self.completions.sync(),
        }
        steps = self.state.progress.steps
        name = f"step_{steps:06d}" if self.state.row is None else f"step_{steps - 1:06d}_updated"
        wall_s = self.earlier_s + time.perf_counter() - self.started
        about = {"identity": identity(self.config), "time/wall_s": wall_s}
        with self.limit.saving():
            checkpoint.save(self.checkpoints, name, state, about)
        self.unsaved = False
        self.tracker.commit(steps)
        checkpoint.prune(self.checkpoints, self.config.checkpoint.keep, best=self.state.best_step)

    def resume(self) -> None:
        """Continue from the newest whole checkpoint, cutting the files back to it, or from the start."""
        found = checkpoint.newest(self.checkpoints)
        if found is None:
            self.tracker.rewind(None)
            self.completions.cut(0)
            return
        path, saved, meta = found
        checkpoint.restore_weights(self.policy, saved["weights"])
        self.optimizer.load_state_dict(saved["optimizer"])
        checkpoint.restore_random_state(saved["random"])
        self.state = State(**saved["state"] | {"progress": Progress(**saved["state"]["progress"])})
        self.tracker.rewind(saved["tracker"])
        self.completions.cut(saved["completions"])
        self.earlier_s = meta["time/wall_s"]
        log.info("resumed from %s", path)

    def _restore_best(self) -> None:
        path = self.checkpoints / f"best_{self.state.best_step:06d}"
        found = checkpoint.load(path)
        if found is None:
            raise SaveError(f"selection=best, but {path} cannot be read; delete the run directory and start again")
        checkpoint.restore_weights(self.policy, found[0]["weights"])


def _rollout_metrics(completions: list[Completion], scores: list[Score], reward_PG: Tensor) -> dict[str, float]:
    """What was sampled and what it was worth; a component that a score lacks counts as 0."""
    names = sorted({name for score in scores for name in score.components})
    return {
        "reward/mean": reward_PG.mean().item(),
        "reward/std": reward_PG.std().item(),
        **{f"reward/{name}_mean": _mean(s.components.get(name, 0.0) for s in scores) for name in names},
        "reward/correct_mean": _mean(s.correct for s in scores),
        "reward/unparsed_rate": _mean(not s.parsed for s in scores),
        "reward/zero_spread_rate": 1 - has_spread(reward_PG).double().mean().item(),
        "completion/length_mean": _mean(len(c.token_ids) for c in completions),
        "completion/truncated_rate": _mean(not c.finished for c in completions),
    }


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _summary(metrics: dict[str, float]) -> str:
    return (
        f"reward {metrics['reward/mean']:.2f}  accuracy {metrics['reward/correct_mean']:.2f}  "
        f"KL(old‖new) {metrics['policy/kl_old_new_k3']:.4f}  {metrics['time/tokens_per_s']:.0f} tokens/s"
    )


def _peak_gib(device: torch.device) -> float:
    """Peak memory: of the GPU in this step where there is one, else of the process so far (Linux counts in KiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
