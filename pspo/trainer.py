"""The training loop: collect, update, log, checkpoint, validate. It knows no objective by name."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pspo import checkpoint
from pspo.advantage import make_critic
from pspo.base.console import Phase, log
from pspo.base.files import JsonLines
from pspo.base.statistics import Statistics
from pspo.base.stream import Stream, generator
from pspo.budget import Progress
from pspo.config import Config, identity
from pspo.dataset import Prompt, Splits
from pspo.diagnostics import Record
from pspo.evaluate import completion_row, validate
from pspo.host import interrupt, ranks
from pspo.host.memory import peak_gib
from pspo.model import Policy
from pspo.objective import default_objective
from pspo.optimizer import whole_state
from pspo.reward import Reward
from pspo.rollout import Completion, collect, rewards, rollout_metrics, training
from pspo.rollout.samplers import make_sampler
from pspo.smoothing import Controller
from pspo.tracker import Tracker
from pspo.update import Learner, check_gap, make_rows, update

ALPHA = "objective/alpha"
SHOWN = {"reward": "reward/mean", "KL(old‖new)": "policy/kl_old_new_k3", "loss": "supervise/train_loss"}
"""Word in the line of the phase "training" -> the metric of the last step that the line shows."""


@dataclass
class State:
    """The counters that influence later steps; a checkpoint holds them with the weights and the optimizer."""

    progress: Progress = field(default_factory=Progress)
    warmup_fraction: float = 0.0
    best_score: float | None = None
    best_step: int = 0
    steered: dict[str, float] = field(default_factory=dict)  # alpha, and the weights that a controller moves, by metric
    row: dict[str, float] | None = field(default_factory=dict)  # the last step's metrics, until it is validated


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
    check_owner: Callable[[], None] = lambda: None  # leaves the process if another one has taken the directory over
    state: State = field(default_factory=State)

    @classmethod
    def check(cls, config: Config, splits: Splits) -> None:
        """Refuse problems that cannot be learned from. Raises ConfigError."""

    def __post_init__(self) -> None:
        config, rollout = self.config, self.config.rollout
        self.sampler = make_sampler(self.policy, rollout)
        self.critic = make_critic(config.advantage, self.policy)
        fixed = config.loss.kl != "none" and config.loss.reference == "start"
        max_norm, reference = config.optimizer.max_grad_norm, self.policy.frozen() if fixed else None
        self.learner = Learner(
            self.policy, self.critic, config.objective, config.loss, rollout, config.update, max_norm, reference
        )
        groups: list[dict[str, Any]] = [{"params": list(self.policy.trainable().items())}]
        if self.critic is not None:  # its own weights, whose learning rate follows the policy's schedule
            factor = self.critic.config.value_lr / config.optimizer.lr
            groups.append({"params": list(self.critic.named_parameters()), "lr_factor": factor})
        self.optimizer = config.optimizer.make(groups)
        self.controllers, alpha = dict[str, tuple[Controller, str]](), getattr(config.objective, "alpha", None)
        self.state.steered = {} if alpha is None else {ALPHA: alpha}
        targets = [(config.objective, name, *of) for name, of in config.objective.steered.items()]
        for block, name, key, metric in [*targets, (config.loss, "kl_weight", "kl_target", "policy/kl_reference")]:
            first, target = getattr(block, name), getattr(block, key)
            if target is not None:
                self.state.steered[f"{block.block}/{name}"] = first
                self.controllers[f"{block.block}/{name}"] = Controller.of_weight(first, target), metric
        self.files = {name: JsonLines(self.directory / f"{name}.jsonl") for name in ("completions", "diagnostics")}
        self.checkpoints = self.directory / "checkpoints"
        self.unsaved = False

    def run(self) -> State:
        """Train to the end of the budget, then leave in the policy the weights that ``selection`` names."""
        config, state, progress, unit = self.config, self.state, self.state.progress, self.config.budget.unit
        self.limit, self.random = interrupt.TimeLimit(), checkpoint.random_state()
        try:
            begun = getattr(progress, unit)
            with Phase("training", config.budget.total, done=begun, unit=unit.replace("_", " ")) as advance:
                while state.row or not config.budget.spent(progress):
                    if state.row is None:
                        state.row, self.unsaved = self._step(), True
                        self.random = checkpoint.random_state()  # a user's reward may draw from it
                    last = config.budget.spent(progress)
                    if progress.steps % config.evaluate.every == 0 or last:
                        state.row |= self._validate()
                    self.check_owner()
                    self.tracker.log(state.row, progress.steps)
                    metrics, state.row, self.unsaved = state.row, None, True
                    is_near = any(ranks.gather(self.limit.near))
                    if is_near or last or (progress.steps and progress.steps % config.checkpoint.every == 0):
                        self._save()
                    if progress.steps:
                        described = (f"{word} {metrics[name]:.3f}" for word, name in SHOWN.items() if name in metrics)
                        advance(getattr(progress, unit), "  ".join(described))
                    ranks.gather(interrupt.check)
        except interrupt.Interrupted:  # between steps, in a rollout, when nothing has changed yet, or in a validation
            if self.unsaved:
                self._save()
            ranks.gather(lambda: None)  # none leaves before the first has saved
            raise
        if state.best_score is not None:
            checkpoint.load_weights(self.policy, self.checkpoints / f"best_{state.best_step:06d}")
            self.sampler.refresh(self.policy)
        return state

    def _step(self) -> dict[str, float]:
        """One rollout with all its updates. A signal stops it before anything has changed, or after all has."""
        config, progress, begun = self.config, self.state.progress, time.perf_counter()
        if self.policy.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step, start = progress.steps + 1, progress.prompts
        asked = (self.train, self.reward, config.rollout, config.seed, step, start, config.dataset.replacement)
        completions = collect(self.sampler, *asked)
        rollout_s = time.perf_counter() - begun
        with interrupt.deferred():
            self.sampler.sleep()
            metrics = self._learn(completions)
            learned_s = time.perf_counter() - begun
            self.sampler.refresh(self.policy)
        step_s, num_tokens = time.perf_counter() - begun, sum(len(c.token_ids) for c in completions)
        return metrics | {
            "time/step_s": step_s,
            "time/rollout_s": rollout_s,
            "time/update_s": learned_s - rollout_s,
            "time/refresh_s": step_s - learned_s,
            "time/tokens_per_s": num_tokens / step_s,
            "memory/peak_gib": peak_gib(self.policy.device),
        }

    def _learn(self, completions: list[Completion]) -> dict[str, float]:
        """The updates of a step from its completions; returns the step's metrics."""
        config, state, progress, statistics = self.config, self.state, self.state.progress, Statistics()
        used, metrics = training(config.rollout, completions), rollout_metrics(config.rollout, completions)
        learner, steered = self._steered_learner(), dict(state.steered)
        rows, row_metrics = make_rows(used, rewards(config.rollout, used), config.advantage, learner)
        check_gap(row_metrics.get("policy/sampler_gap_mean", 0.0), self.policy.autocast)
        spent_before, number = config.budget.fraction(progress), progress.steps + 1
        progress.steps, progress.prompts = number, progress.prompts + len(completions) // config.rollout.group_size
        progress.prompts_used += len(used) // config.rollout.group_size
        progress.completion_tokens += sum(len(c.token_ids) for c in completions)
        record, spent = self._record(number), config.budget.fraction(progress)
        learning_rates, state.warmup_fraction = config.optimizer.rates(
            progress.optimizer_steps, config.update.steps, spent_before, spent, state.warmup_fraction
        )
        random, failure = generator(config.seed, Stream.MINIBATCH, number), f"failed_step_{number:06d}.pt"
        progress.optimizer_steps += update(
            learner, self.optimizer, rows, learning_rates, random, statistics, self.directory / failure, record
        )
        self.check_owner()
        for completion in completions[: config.rollout.group_size]:
            self.files["completions"].append({"step": number} | completion_row(completion))
        for row in record.rows if record else []:
            self.files["diagnostics"].append({"step": number} | row)
        measured = statistics.result()
        self._steer(record, measured)
        return {
            **metrics,
            **measured,
            **row_metrics,
            **(record.summary() if record else {}),
            **steered,
            "optimizer/lr": self.optimizer.param_groups[0]["lr"],
            **progress.metrics(),
        }

    def _steered_learner(self) -> Learner:
        """The learner with this step's alpha and steered weights."""
        blocks: dict[str, Any] = {"objective": self.config.objective, "loss": self.config.loss}
        for name, value in self.state.steered.items():
            if name in self.controllers or not self.config.smoothing.constant:
                block, _, key = name.partition("/")
                blocks[block] = replace(blocks[block], **{key: value})
        return replace(self.learner, **blocks)

    def _steer(self, record: Record | None, measured: dict[str, float]) -> None:
        """Move alpha and the steered weights on for the next step."""
        steered, config = self.state.steered, self.config
        for name, (controller, metric) in self.controllers.items():
            steered[name] = controller.next(steered[name], measured.get(metric))
        if ALPHA in steered:
            kl = record.rows[-1]["kl/after_k3"] if record and record.rows else None
            first = getattr(config.objective, "alpha", steered[ALPHA])
            fraction = config.budget.fraction(self.state.progress)
            steered[ALPHA] = config.smoothing.next_alpha(first, steered[ALPHA], fraction, kl)

    def _record(self, number: int) -> Record | None:
        """An empty record for the inner steps of step ``number``, where diagnostics are due at this step."""
        config = self.config.diagnostics
        probe = config.counterfactual_every > 0 and number % config.counterfactual_every == 0
        due = probe or (config.every > 0 and number % config.every == 0)
        return Record([default_objective(name) for name in config.counterfactual] if probe else []) if due else None

    def _validation(self) -> tuple[dict[str, float], float]:
        """Metrics of held-out training problems, and the number that ``selection=best`` maximises."""
        seed = [self.config.seed, Stream.VALIDATION, self.state.progress.steps]
        metrics = validate(self.sampler, self.validation, self.reward, seed, self.config.rollout.max_rows)
        return metrics, metrics["validation/sampled_reward_mean"]

    def _validate(self) -> dict[str, float]:
        """The metrics of a validation; saves the weights if ``selection=best`` and none were better."""
        if not self.validation:
            return {}
        (metrics, score), state = self._validation(), self.state
        if self.config.selection == "best" and (state.best_score is None or score > state.best_score):
            state.best_score, state.best_step = score, state.progress.steps
            if ranks.is_first():
                content = {"weights": checkpoint.weights(self.policy)}
                checkpoint.save(self.checkpoints, f"best_{state.best_step:06d}", content, {})
        return metrics

    def _save(self) -> None:
        self.unsaved, optimizer = False, whole_state(self.optimizer)
        random, *others = ranks.gather(lambda: self.random)
        if not ranks.is_first():
            return
        self.check_owner()
        state = {
            "weights": checkpoint.weights(self.policy),
            "optimizer": optimizer,
            "random": random,
            "random_of_others": others,
            "state": asdict(self.state),
            "tracker": self.tracker.state(),
            "critic": self.critic.state_dict() if self.critic else {},
            "rows": {name: file.sync() for name, file in self.files.items()},
        }
        steps = self.state.progress.steps
        name = f"step_{steps:06d}" if self.state.row is None else f"step_{steps - 1:06d}_updated"
        with self.limit.saving():
            checkpoint.save(self.checkpoints, name, state, {"identity": identity(self.config)})
        self.tracker.commit(steps)
        checkpoint.prune(self.checkpoints, self.config.checkpoint.keep, best=self.state.best_step)

    def resume(self) -> None:
        """Continue from the newest whole checkpoint, cutting the files back to it, or from the start."""
        newest = checkpoint.newest(self.checkpoints) if ranks.is_first() else None
        saved: dict[str, Any] = newest[1] if newest else {"tracker": None, "rows": dict.fromkeys(self.files, 0)}
        if ranks.is_first():
            self.tracker.rewind(saved["tracker"])
            for name, file in self.files.items():
                file.cut(saved["rows"][name])
        path = ranks.first(lambda: newest and newest[0])
        if path is None:
            return
        if not ranks.is_first():
            saved = checkpoint.load_whole(path)
        checkpoint.restore_weights(self.policy, saved["weights"])
        self.sampler.refresh(self.policy)
        self.optimizer.load_state_dict(saved["optimizer"])
        random = [saved["random"], *saved.get("random_of_others", [])]
        checkpoint.restore_random_state(random[ranks.index() % len(random)])
        self.state = State(**saved["state"] | {"progress": Progress(**saved["state"]["progress"])})
        if self.critic is not None:
            self.critic.load_state_dict(saved["critic"])
        log.info("resumed from %s", path)
