"""One run: validate, load, evaluate, train, evaluate, report."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console

from pspo import checkpoint, dataset, model
from pspo.base.console import Phase, log, log_to_console, log_to_file
from pspo.base.files import write_json, write_text
from pspo.base.schema import as_dict
from pspo.config import Config, check, run_directory
from pspo.dataset import Problem, Prompt
from pspo.evaluate import answer_into, summarize
from pspo.host import environment, interrupt
from pspo.reward import Reward
from pspo.rollout import Sampler
from pspo.run import earlier, lock, outcome
from pspo.run.advice import advice
from pspo.tracker import Tracker
from pspo.trainer import Trainer


@dataclass(frozen=True)
class Prepared:
    """One run whose settings have passed every check.

    Attributes:
        directory: the run directory, which need not exist.
        history: what earlier processes left there.
        problems: all problems, by split.
        reward: the reward, its code imported.
    """

    directory: Path
    history: earlier.History
    problems: dataset.Splits
    reward: Reward


def prepare(config: Config, directory: Path) -> Prepared:
    """Every check of a run that is to be made or resumed, before anything is written. Raises ConfigError."""
    check(config)
    model.check(config.model)  # downloads it where need be, after which its commit can be compared
    history = earlier.look(config, directory)
    problems = dataset.load(config.dataset, config.seed)
    _check_enough(config, len(problems.train))
    one = next(split for split in (problems.train, *problems.test.values()) if split)[:1]
    dataset.encode(model.tokenizer(config.model), config.dataset, one)  # refuses a chat template that fails
    return Prepared(directory, history, problems, config.reward)


def run(config: Config, overrides: Sequence[str] = ()) -> Path:
    """Make, resume or, where it is DONE, only name the run directory of ``config``; ConfigError before any work."""
    log_to_console()
    device = environment.choose_device(config.device)
    directory = run_directory(config, overrides)
    if earlier.is_finished(config, directory):
        return directory
    prepared = prepare(config, directory)
    if prepared.history.state == "again":
        earlier.set_aside(directory)
    last = lock.owner(directory)
    with (
        lock.hold(directory) as owner,
        log_to_file(directory / "run.log"),
        outcome.recorded(directory, owner),
        interrupt.caught(),
    ):
        if last is not None and not last.ended:
            log.warning("%s, the last at work here, was killed: kill -9, out of memory, or a lost node", last)
        is_new = prepared.history.state == "new" and config.continue_from is None
        if is_new and (source := earlier.shorter(config, directory)):
            log.info("%s is the same but for its budget: continue_from=%s goes on from there", source, source)
        _Run(config, list(overrides), prepared, device, owner).execute()
    return directory


@dataclass
class _Run:
    """One process's work in one run directory, its steps in order."""

    config: Config
    overrides: list[str]
    prepared: Prepared
    device: torch.device
    owner: lock.Owner

    def __post_init__(self) -> None:
        self.directory, self.problems = self.prepared.directory, self.prepared.problems
        self.reward, self.changed = self.prepared.reward, self.prepared.history.changed

    def execute(self) -> None:
        config, directory, started = self.config, self.directory, time.perf_counter()
        self.reward.check_gold(list(chain(*self._splits().values())))  # a user's code: may raise
        earlier.carry_over(config, directory)
        earlier.record_inputs(config, directory)
        threads = self._record_settings()
        environment.settle(threads)
        checkpoint.seed_global_generators(config.seed)
        log.info("%s on %s with %d CPU threads", directory, self.device, threads)
        notes = advice(config)
        if self.changed and checkpoint.names(directory / "checkpoints"):
            notes.append(f"resumed although {', '.join(self.changed)} changed since this run began")
        for sentence in notes:
            log.warning("%s", sentence)
        prompts, dropped = self._encode(model.tokenizer(config.model))
        Phase("loading the model")
        policy = model.load(config.model, config.seed, self.device)
        tracker = Tracker(config.tracker, directory)
        try:
            summary = self._train_and_evaluate(policy, prompts, notes + dropped, tracker, started)
            Phase("saving the model")
            model.save(
                policy, directory / "model", probe=next(p for split in prompts.values() for p in split).token_ids
            )
        except BaseException as error:
            tracker.close(exit_code=0 if isinstance(error, interrupt.Interrupted) else 1)
            raise
        tracker.summarize(summary)
        tracker.close()
        write_json(directory / "summary.json", summary)
        Phase("writing the report")
        from pspo import report  # matplotlib, which the first step need not wait for

        report.write_curves(directory)
        report.write_report(directory)
        self._check_owner()
        write_text(directory / "DONE", environment.code_digest() + "\n")
        console = Console()  # the result is the output; all else goes to standard error
        console.print(report.final_table(summary))
        for label, name in {"run": "", "figure": "curves.png", "report": "report.html"}.items():
            console.print(f"{label:7}{directory / name}", soft_wrap=True, highlight=False)

    def _train_and_evaluate(
        self, policy: model.Policy, prompts: dict[str, list[Prompt]], notes: list[str], tracker: Tracker, started: float
    ) -> dict[str, Any]:
        config = self.config
        trainer = Trainer(
            config, self.directory, policy, prompts["train"], prompts["validation"], self.reward, tracker, started,
            check_owner=self._check_owner,
        )  # fmt: skip
        tests: dict[str, dict[str, Any]] = {name: {} for name in self.problems.test}
        for name, results in tests.items() if config.budget.total else ():  # initial weights: nothing is resumed yet
            results["before"] = self._test(trainer.sampler, name, prompts[name], "before")
        trainer.resume()
        if self.owner.restart:
            steps = trainer.state.progress.steps
            log.info("restart %d: %s, resumed from step %d", self.owner.restart, self.owner, steps)
        if not config.budget.spent(trainer.state.progress):  # a lost checkpoint's answers are of other weights
            for answers in self.directory.glob("evaluation/*_after.jsonl"):
                answers.unlink()
        state = trainer.run()
        for name, results in tests.items():
            results["after"] = self._test(trainer.sampler, name, prompts[name], "after")
        return {
            "status": "done",
            "run": self.directory.name,
            "objective": as_dict(config.objective),
            "seed": config.seed,
            "steps": state.progress.steps,
            "optimizer_steps": state.progress.optimizer_steps,
            "prompts": state.progress.prompts,
            "completion_tokens": state.progress.completion_tokens,
            "selection": config.selection,
            "selected_step": state.best_step if config.selection == "best" else state.progress.steps,
            "notes": notes + state.notes,
            "evaluation": tests,
            "time/wall_s": trainer.earlier_s + time.perf_counter() - started,
        }

    def _record_settings(self) -> int:
        """Record what is run and where; returns the CPU threads, on resume those of the run's first process.

        Sums are rounded in another order with another number of threads, so a resumed run keeps the first one's.
        """
        known = [entry["threads"] for entry in environment.history(self.directory)[:1]]
        threads = self.config.threads or next(iter(known), None) or environment.choose_threads(None)
        about = {"host": self.owner.host, "job_id": self.owner.job_id, "time/started": self.owner.started}
        for difference in environment.record(self.directory, environment.describe(threads, self.device) | about):
            log.warning("since the run's last process, %s", difference)
        write_text(self.directory / "config.yaml", OmegaConf.to_yaml(as_dict(self.config)))
        write_text(self.directory / "overrides.yaml", OmegaConf.to_yaml(self.overrides))
        return threads

    def _splits(self) -> dict[str, list[Problem]]:
        return {"train": self.problems.train, "validation": self.problems.validation} | self.problems.test

    def _encode(self, tokenizer: Any) -> tuple[dict[str, list[Prompt]], list[str]]:
        """The prompts of every split, and a note on each split that lost problems with too long a prompt."""
        prompts, notes, limit = {}, [], self.config.dataset.max_prompt_tokens
        today = dataset.prompt_date(tokenizer, Path(self.config.continue_from or self.directory).parent)
        if today is not None:
            notes.append(f"the model's chat template prints a date, {today} in all runs of this group")
            log.info(notes[-1])
        for name, problems in self._splits().items():
            prompts[name], dropped = dataset.encode(tokenizer, self.config.dataset, problems, today)
            if dropped:
                notes.append(f"{dropped} of {len(problems)} {name} problems were dropped: prompts over {limit} tokens")
                log.warning(notes[-1])
            if dropped and not prompts[name]:
                raise self.config.dataset.refuse("max_prompt_tokens", f"all {dropped} {name} prompts are longer")
        _check_enough(self.config, len(prompts["train"]))
        return prompts, notes

    def _test(self, sampler: Sampler, name: str, prompts: list[Prompt], when: str) -> dict[str, float]:
        """Greedy accuracy on a test set, whose answers are kept in ``evaluation/`` and read again after a resume."""
        path = self.directory / "evaluation" / f"{name}_{when}.jsonl"
        path.parent.mkdir(exist_ok=True)
        asked = (path, sampler, prompts, self.reward, self.config.rollout)
        title = f"test on {name}, {when}"
        return summarize(answer_into(*asked, seed=self.config.seed, title=title, check_owner=self._check_owner))

    def _check_owner(self) -> None:
        lock.check(self.directory, self.owner)


def _check_enough(config: Config, num_problems: int) -> None:
    """Refuse a training set that does not fill one step."""
    if config.budget.total and num_problems < config.rollout.prompts:
        raise config.rollout.refuse("prompts", f"there are only {num_problems} training problems")
