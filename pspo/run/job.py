"""One run: validate, load, evaluate, train, evaluate, report."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console

from pspo import checkpoint, dataset, lanes, model
from pspo.base.console import log, log_to_console, log_to_file, track
from pspo.base.files import JsonLines, read_lines, write_json, write_text
from pspo.base.schema import as_dict
from pspo.base.stream import Stream
from pspo.config import Config, check, run_directory
from pspo.dataset import Prompt
from pspo.evaluate import answer, summarize
from pspo.host import environment, interrupt
from pspo.run import earlier, lock, outcome
from pspo.run.advice import advice
from pspo.tracker import Tracker
from pspo.trainer import Trainer


def run(config: Config, overrides: Sequence[str] = ()) -> Path:
    """Make, resume or, where it is DONE, only name the run directory of ``config``; ConfigError before any work."""
    log_to_console()
    device = environment.choose_device(config.device)
    directory = run_directory(config, overrides)
    if earlier.is_done(config, directory):
        return directory
    earlier.check(config, directory)
    check(config)
    model.check(config.model)
    config.reward.check()
    problems = dataset.load(config.dataset, config.seed)
    if config.budget.total and len(problems.train) < config.rollout.prompts:
        raise config.rollout.refuse("prompts", f"there are only {len(problems.train)} training problems")
    tests = [problem for test in problems.test.values() for problem in test]
    earlier.set_aside(config, directory)
    with (
        lock.hold(directory) as owner,
        log_to_file(directory / "run.log"),
        outcome.recorded(directory, owner),
        interrupt.caught(),
    ):
        config.reward.check_gold([*problems.train, *problems.validation, *tests])  # a user's code: may raise
        _Run(config, list(overrides), directory, device, problems, owner).execute()
    return directory


@dataclass
class _Run:
    """One process's work in one run directory, its steps in order."""

    config: Config
    overrides: list[str]
    directory: Path
    device: torch.device
    problems: dataset.Splits
    owner: lock.Owner

    def execute(self) -> None:
        started = time.perf_counter()
        earlier.carry_over(self.config, self.directory)
        threads = self._write_identity()
        environment.settle(threads)
        checkpoint.seed_global_generators(self.config.seed)
        log.info("%s on %s with %d CPU threads", self.directory, self.device, threads)
        for sentence in advice(self.config):
            log.warning("%s", sentence)
        policy = model.load(self.config.model, self.config.seed, self.device)
        prompts, notes = self._encode(policy.tokenizer)
        tracker = Tracker(
            self.config.tracker,
            self.directory,
            run_name=self.directory.name,
            group=self.config.group,
            job_type=self.config.objective.name,
            resolved_config=as_dict(self.config),
        )
        try:
            with lanes.beside(policy, threads):
                summary = self._train_and_evaluate(policy, prompts, notes, tracker, started)
        except BaseException as error:
            tracker.close(exit_code=0 if isinstance(error, interrupt.Interrupted) else 1)
            raise
        tracker.summarize(summary)
        tracker.close()
        write_json(self.directory / "summary.json", summary)
        from pspo import report

        report.write_curves(self.directory)
        report.write_report(self.directory)
        lock.check(self.directory, self.owner)
        write_text(self.directory / "DONE", earlier.code(self.config) + "\n")
        console = Console()  # the result is the output; all else goes to standard error
        console.print(report.final_table(summary))
        for label, name in {"run": "", "figure": "curves.png", "report": "report.html"}.items():
            console.print(f"{label:7}{self.directory / name}", soft_wrap=True, highlight=False)

    def _train_and_evaluate(
        self, policy: model.Policy, prompts: dict[str, list[Prompt]], notes: list[str], tracker: Tracker, started: float
    ) -> dict[str, Any]:
        config, tests = self.config, list(self.problems.test)
        trainer = Trainer(
            config, self.directory, policy, prompts["train"], prompts["validation"], config.reward, tracker, started,
            check_owner=lambda: lock.check(self.directory, self.owner),
        )  # fmt: skip
        before = {name: self._evaluate(policy, name, prompts[name], "before") for name in tests}
        trainer.resume()
        if self.owner.restart:
            steps = trainer.state.progress.steps
            log.info("restart %d: %s, resumed from step %d", self.owner.restart, self.owner, steps)
        state = trainer.run()
        after = {name: self._evaluate(policy, name, prompts[name], "after") for name in tests}
        model.save(policy, self.directory / "model")
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
            "notes": advice(config) + notes + state.notes,
            "evaluation": {name: {"before": before[name], "after": after[name]} for name in tests},
            "time/wall_s": trainer.earlier_s + time.perf_counter() - started,
        }

    def _write_identity(self) -> int:
        """Record what is run and where; returns the CPU threads, on resume those of the run's first process.

        Sums are rounded in another order with another number of threads, so a resumed run keeps the first one's.
        """
        path = self.directory / "environment.json"
        earlier = json.loads(path.read_text()) if path.is_file() else {}
        threads = self.config.threads or earlier.get("threads") or environment.choose_threads(None)
        now = environment.describe(threads, self.device)
        for name in ("code", "packages", "threads"):
            if earlier and earlier[name] != now[name]:
                log.warning("%s differ from those that this run began with: %s, now %s", name, earlier[name], now[name])
        write_text(self.directory / "config.yaml", OmegaConf.to_yaml(as_dict(self.config)))
        write_text(self.directory / "overrides.yaml", OmegaConf.to_yaml(self.overrides))
        write_json(path, now)
        return threads

    def _encode(self, tokenizer: Any) -> tuple[dict[str, list[Prompt]], list[str]]:
        """The prompts of every split, and a note on each split that lost problems with too long a prompt."""
        splits = {"train": self.problems.train, "validation": self.problems.validation} | self.problems.test
        prompts, notes = {}, []
        for name, problems in splits.items():
            prompts[name], dropped = dataset.encode(tokenizer, self.config.dataset, problems)
            limit = self.config.dataset.max_prompt_tokens
            if dropped:
                notes.append(f"{dropped} of {len(problems)} {name} problems were dropped: prompts over {limit} tokens")
                log.warning(notes[-1])
            if dropped and not prompts[name]:
                raise self.config.dataset.refuse("max_prompt_tokens", f"all {dropped} {name} prompts are longer")
        if self.config.budget.total and len(prompts["train"]) < self.config.rollout.prompts:
            raise self.config.rollout.refuse("prompts", f"there are only {len(prompts['train'])} training problems")
        return prompts, notes

    def _evaluate(self, policy: model.Policy, name: str, prompts: list[Prompt], when: str) -> dict[str, float]:
        """Greedy accuracy on a test set; every answer is kept in ``evaluation/``, and read again after a resume."""
        path = self.directory / "evaluation" / f"{name}_{when}.jsonl"
        path.parent.mkdir(exist_ok=True)
        if when == "after" or len(read_lines(path)) != len(prompts):
            beside = JsonLines(path.with_name(f".{path.name}"))
            beside.cut(0)
            seed = [self.config.seed, Stream.TEST]
            chunks = answer(policy, prompts, self.config.reward, self.config.rollout, seed=seed, greedy=True)
            with checkpoint.random_state_kept():  # those of a user's reward
                for rows in track(chunks, f"test on {name}, {when}", len(prompts)):
                    for row in rows:
                        beside.append(row)
            beside.sync()
            beside.path.replace(path)
        return summarize(read_lines(path))
