"""The training loop: collect, update, log, checkpoint, validate. It knows no objective by name."""

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pspo import checkpoint
from pspo.advantage import has_spread
from pspo.budget import Progress
from pspo.config import Config, default_objective
from pspo.console import log, progress_bar, track
from pspo.critic import make_critic
from pspo.dataset import Prompt
from pspo.diagnostics import Record
from pspo.environment import peak_gib
from pspo.evaluation import answer, completion_row, summarize
from pspo.experience import collect, make_rows
from pspo.files import JsonLines, SaveError
from pspo.model import Policy
from pspo.objective import Objective
from pspo.reward import Reward
from pspo.statistics import Statistics
from pspo.stream import Stream, generator
from pspo.tracker import Tracker
from pspo.update import Learner, update

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
    alpha: float | None = None
    notes: list[str] = field(default_factory=list)


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

    def __post_init__(self) -> None:
        config, rollout = self.config, self.config.rollout
        self.critic = make_critic(config.advantage, self.policy)
        self.reference = self.policy.frozen() if config.loss.has_reference else None
        self.learner = Learner(
            self.policy,
            self.critic,
            config.objective,
            config.loss,
            temperature=rollout.temperature,
            max_length=rollout.max_new_tokens,
            max_tokens=config.update.max_tokens,
            max_grad_norm=config.optimizer.max_grad_norm,
        )
        self.optimizer = config.optimizer.make(self._parameter_groups())
        self.state.alpha = getattr(config.objective, "alpha", None)
        self.completions = JsonLines(self.directory / "completions.jsonl")
        self.diagnostics = JsonLines(self.directory / "diagnostics.jsonl")
        self.checkpoints = self.directory / "checkpoints"

    def run(self) -> State:
        """Train to the end of the budget, then leave in the policy the weights that ``selection`` names."""
        config, progress = self.config, self.state.progress
        if progress.steps == 0 and not config.budget.spent(progress):
            self.tracker.log(self._validate(), 0)
        with progress_bar(transient=False) as bar:
            done = getattr(progress, config.budget.unit)
            task = bar.add_task("training", total=config.budget.total, completed=done, info="")
            while not config.budget.spent(progress):
                metrics = self._step()
                if progress.steps % config.evaluation.every == 0 or config.budget.spent(progress):
                    metrics |= self._validate()
                self.tracker.log(metrics, progress.steps)
                if progress.steps % config.checkpoint.every == 0 or config.budget.spent(progress):
                    self._save()
                bar.update(task, completed=getattr(progress, config.budget.unit), info=_summary(metrics))
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
        asked = (self.policy, self.train, self.reward, config.rollout)
        collected = collect(*asked, seed=config.seed, step=number, start=progress.prompts)
        rollout_s = time.perf_counter() - begun
        completions, reward_PG = collected.training()
        rows, critic_metrics = make_rows(
            completions,
            reward_PG,
            config.advantage,
            self.policy,
            reference=self.reference,
            critic=self.critic,
            temperature=config.rollout.temperature,
            max_tokens=config.update.max_tokens,
            mask_truncated=config.loss.mask_truncated,
        )
        num_tokens = sum(len(c.token_ids) for c in collected.completions)
        progress.steps, progress.prompts = number, progress.prompts + len(collected.reward_PG)
        progress.prompts_used += len(reward_PG)
        progress.completion_tokens += num_tokens
        record = self._record(number)
        progress.optimizer_steps += update(
            replace(self.learner, objective=self._objective()),
            self.optimizer,
            rows,
            config=config.update,
            learning_rates=self._learning_rates(fraction, config.budget.fraction(progress)),
            random=generator(config.seed, Stream.MINIBATCH, number),
            statistics=statistics,
            record=record,
            failure=self.directory / f"failed_step_{number:06d}.pt",
        )
        self._warn_without_spread(collected.reward_PG)
        for completion, score in zip(
            collected.completions[: config.rollout.group_size], collected.scores, strict=False
        ):
            self.completions.append({"step": number} | completion_row(completion, score))
        for row in record.rows if record else []:
            self.diagnostics.append({"step": number} | row)
        step_s = time.perf_counter() - begun
        return {
            **collected.metrics(),
            **statistics.result(),
            **critic_metrics,
            **(record.summary() if record else {}),
            **self._next_alpha(record),
            "optimizer/lr": self.optimizer.param_groups[0]["lr"],
            **progress.metrics(),
            "time/step_s": step_s,
            "time/rollout_s": rollout_s,
            "time/update_s": step_s - rollout_s,
            "time/tokens_per_s": num_tokens / step_s,
            "memory/peak_gib": peak_gib(self.policy.device),
        }

    def _objective(self) -> Objective:
        """The objective with this step's alpha."""
        objective = self.config.objective
        return (
            objective
            if self.config.smoothing.constant or self.state.alpha is None
            else objective.with_alpha(self.state.alpha)
        )

    def _next_alpha(self, record: Record | None) -> dict[str, float]:
        """Move alpha on for the next step; the metric is that of the step just made."""
        alpha, config = self.state.alpha, self.config
        if alpha is None:
            return {}
        kl = record.rows[-1]["kl/after_k3"] if record and record.rows else None
        first, fraction = getattr(config.objective, "alpha", alpha), config.budget.fraction(self.state.progress)
        self.state.alpha = config.smoothing.next_alpha(first, alpha, fraction, kl)
        return {"objective/alpha": alpha}

    def _record(self, number: int) -> Record | None:
        """Where the inner steps of this step are to be recorded; None where they are not."""
        config = self.config.diagnostics
        probe = bool(config.counterfactual_every) and number % config.counterfactual_every == 0
        if not probe and not (config.every and number % config.every == 0):
            return None
        return Record([default_objective(name) for name in config.counterfactual] if probe else [])

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """The policy's parameters, then the value model's own, whose learning rate follows the same schedule."""
        groups: list[dict[str, Any]] = [{"params": parameters} for parameters in self.learner.parameters()]
        if self.critic is not None:
            groups[1]["lr_factor"] = self.critic.config.value_lr / self.config.optimizer.lr
        return groups

    def _learning_rates(self, start: float, end: float) -> list[float]:
        """Those of the optimizer steps of one rollout, over which the spent share of the budget goes start -> end."""
        optimizer, first, updates = self.config.optimizer, self.state.progress.optimizer_steps, self.config.update.steps
        if first <= optimizer.warmup_steps:
            self.state.warmup_fraction = start + (end - start) * min(optimizer.warmup_steps - first, updates) / updates
        return [
            optimizer.lr_at(first + i, start + (end - start) * i / updates, self.state.warmup_fraction)
            for i in range(updates)
        ]

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
        state = {
            "weights": checkpoint.weights(self.policy),
            "optimizer": self.optimizer.state_dict(),
            "random": checkpoint.random_state(),
            "state": asdict(self.state),
            "tracker": self.tracker.state(),
            "critic": self.critic.state_dict() if self.critic else {},
            "completions": self.completions.sync(),
            "diagnostics": self.diagnostics.sync(),
        }
        name = f"step_{self.state.progress.steps:06d}"
        checkpoint.save(
            self.checkpoints, name, state, {"time/wall_s": self.earlier_s + time.perf_counter() - self.started}
        )
        self.tracker.commit(self.state.progress.steps)
        checkpoint.prune(self.checkpoints, self.config.checkpoint.keep, best=self.state.best_step)

    def resume(self) -> None:
        """Continue from the newest whole checkpoint, cutting the files back to it, or from the start."""
        found = checkpoint.newest(self.checkpoints)
        if found is None:
            self.tracker.rewind(None)
            self.completions.cut(0)
            self.diagnostics.cut(0)
            return
        path, saved, meta = found
        checkpoint.restore_weights(self.policy, saved["weights"])
        self.optimizer.load_state_dict(saved["optimizer"])
        checkpoint.restore_random_state(saved["random"])
        self.state = State(**saved["state"] | {"progress": Progress(**saved["state"]["progress"])})
        self.tracker.rewind(saved["tracker"])
        if self.critic is not None:
            self.critic.load_state_dict(saved["critic"])
        self.completions.cut(saved["completions"])
        self.diagnostics.cut(saved["diagnostics"])
        self.earlier_s = meta["time/wall_s"]
        log.info("resumed from %s", path)

    def _restore_best(self) -> None:
        path = self.checkpoints / f"best_{self.state.best_step:06d}"
        found = checkpoint.load(path)
        if found is None:
            raise SaveError(f"selection=best, but {path} cannot be read; delete the run directory and start again")
        checkpoint.restore_weights(self.policy, found[0]["weights"])


def _summary(metrics: dict[str, float]) -> str:
    return (
        f"reward {metrics['reward/mean']:.2f}  accuracy {metrics['reward/correct_mean']:.2f}  "
        f"KL(old‖new) {metrics['policy/kl_old_new_k3']:.4f}  {metrics['time/tokens_per_s']:.0f} tokens/s"
    )
