"""The main job: compose, validate, load, evaluate, train, evaluate, report.

python -m pspo.run objective=pspo model=qwen1_5b
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from pspo import checkpoint, dataset, earlier, environment, failure, interrupt, lanes, lock, model
from pspo.advice import advice
from pspo.config import CONF, Config, check, open_keys, resolve, run_directory
from pspo.console import log, log_to_console, log_to_file, track
from pspo.dataset import Prompt
from pspo.evaluation import answer, summarize
from pspo.files import JsonLines, SaveError, read_lines, write_json, write_text
from pspo.help import help_text
from pspo.launcher import RunsFailed, result
from pspo.memory import NoRoomError
from pspo.reward import Reward, check_gold, make_reward
from pspo.schema import ConfigError, as_dict, unknown
from pspo.stream import Stream
from pspo.tracker import Tracker
from pspo.trainer import Trainer
from pspo.update import NonFiniteError

EXPECTED = (ConfigError, HydraException, OmegaConfBaseException, NonFiniteError, NoRoomError, SaveError, RunsFailed)
"""Errors that are told in one sentence; any other is a bug and shows its traceback."""


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def main(composed: DictConfig) -> float | None:
    """One run, or one job of a multirun; returns what a sweeper may maximise."""
    values = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(values, dict)
    overrides = [override.lstrip("+") for override in HydraConfig.get().overrides.task]
    try:
        return result(run(resolve({str(name): value for name, value in values.items()}), overrides))
    except EXPECTED as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            log.error("pspo: %s", error)  # Hydra tells of the first failed job alone, and at the end
            raise error.with_traceback(None) from None  # whose frames would keep this job's weights until then
        _leave(error)


def cli() -> None:
    """``python -m pspo.run``: a user's mistake is one sentence and exit status 2, a failed run is status 1."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        sys.stdout.write(help_text())
        return
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come to us, and we say them in one sentence
    sys.argv[1:] = open_keys(sys.argv[1:])
    try:
        main()
    except EXPECTED as error:
        _leave(error)
    except KeyboardInterrupt:
        sys.exit("\npspo: stopped; the same command resumes from the last checkpoint")


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
    reward = make_reward(config.reward)
    problems = dataset.load(config.dataset, config.seed)
    if config.budget.total and len(problems.train) < config.rollout.prompts:
        raise config.rollout.refuse("prompts", f"there are only {len(problems.train)} training problems")
    tests = [problem for test in problems.test.values() for problem in test]
    earlier.set_aside(config, directory)
    with (
        lock.hold(directory) as owner,
        log_to_file(directory / "run.log"),
        failure.recorded(directory, owner),
        interrupt.caught(),
    ):
        check_gold(reward, config.reward, [*problems.train, *problems.validation, *tests])  # a user's code: may raise
        _Run(config, list(overrides), directory, device, problems, reward, owner).execute()
    return directory


@dataclass
class _Run:
    """One process's work in one run directory, its steps in order."""

    config: Config
    overrides: list[str]
    directory: Path
    device: torch.device
    problems: dataset.Splits
    reward: Reward
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
        from pspo import report  # matplotlib, which the first step need not wait for

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
            config, self.directory, policy, prompts["train"], prompts["validation"], self.reward, tracker, started,
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
            chunks = answer(policy, prompts, self.reward, self.config.rollout, seed=seed, greedy=True)
            with checkpoint.random_state_kept():  # those of a user's reward
                for rows in track(chunks, f"test on {name}, {when}", len(prompts)):
                    for row in rows:
                        beside.append(row)
            beside.sync()
            beside.path.replace(path)
        return summarize(read_lines(path))


def _leave(error: Exception) -> NoReturn:
    """Say one sentence; exit with 2 for a configuration to mend and 1 for a run that failed."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        error = unknown(option, error.options, group)
    sys.stderr.write(f"pspo: {' '.join(str(error).split())}\n")
    sys.exit(1 if isinstance(error, SaveError | NonFiniteError | NoRoomError | RunsFailed) else 2)


if __name__ == "__main__":
    cli()
