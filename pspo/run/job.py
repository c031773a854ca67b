"""One run: validate, load, evaluate, train, evaluate, report."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from pspo import checkpoint, dataset, model
from pspo.base.console import Phase, log, log_to_console
from pspo.base.files import write_json, write_text
from pspo.base.schema import as_dict
from pspo.config import Config, check
from pspo.dataset import Problem, Prompt, Splits
from pspo.host import environment, interrupt
from pspo.run import earlier, evaluation, lock
from pspo.run.advice import advice
from pspo.run.outcome import at_work
from pspo.tracker import Tracker
from pspo.trainer import Trainer


@dataclass(frozen=True)
class Prepared:
    """One run whose settings have passed every check."""

    history: earlier.History
    splits: Splits
    tests: dict[str, list[Problem]]  # by the test set's name


def prepare(config: Config, directory: Path) -> Prepared:
    """Every check of a run that is to be made or resumed, before anything is written. Raises ConfigError."""
    check(config)
    model.check(config.model)  # downloads it where need be, after which its commit can be compared
    history = earlier.look(config, directory)
    splits = dataset.load(config.dataset, config.seed)
    tests = evaluation.problems(config, splits)
    one = next(split for split in (splits.train, *tests.values()) if split)[:1]
    dataset.encode(model.tokenizer(config.model), config.dataset, one)  # refuses a chat template that fails
    return Prepared(history, splits, tests)


def run(
    config: Config, overrides: Sequence[str] = (), directory: Path | None = None, kind: type[Trainer] = Trainer
) -> Path:
    """Make, resume or, where it is DONE, only name the run directory of ``config``; ConfigError before any work."""
    log_to_console()
    device, started = environment.choose_device(config.device), time.perf_counter()
    directory = directory or earlier.run_directory(config, overrides)
    if earlier.is_finished(config, directory):
        return directory
    run = prepare(config, directory)
    if run.history.state == "again":
        earlier.set_aside(directory)
    with at_work(directory) as owner:
        is_new = run.history.state == "new" and config.continue_from is None
        if is_new and (source := earlier.shorter(config, directory)):
            log.info("%s is the same but for its budget: continue_from=%s goes on from there", source, source)
        problems = {"train": run.splits.train, "validation": run.splits.validation} | run.tests
        config.reward.check_gold(list(chain(*problems.values())))  # a user's code: may raise
        earlier.carry_over(config, directory)
        earlier.begin(config, directory, overrides, device, owner)
        notes = advice(config) if kind is Trainer else []
        if run.history.changed and checkpoint.names(directory / "checkpoints"):
            notes.append(f"resumed although {', '.join(run.history.changed)} changed since this run began")
        for sentence in notes:
            log.warning("%s", sentence)
        prompts, about = evaluation.encoded(
            config, problems, run.splits.shots, Path(config.continue_from or directory).parent
        )
        Phase("loading the model")
        policy = model.load(config.model, config.seed, device)
        tracker, check_owner = Tracker(config.tracker, directory), partial(lock.check, directory, owner)
        try:
            splits = prompts["train"], prompts["validation"]
            trainer = kind(config, directory, policy, *splits, config.reward, tracker, check_owner, started)
            summary = _train_and_evaluate(run, trainer, prompts, owner) | {"notes": notes + about}
            Phase("saving the model")
            probe = next(prompt for split in prompts.values() for prompt in split)
            model.save(policy, directory / "model", probe=probe.token_ids)
            write_json(directory / "summary.json", summary)
            Phase("writing the report")
            from pspo import report  # matplotlib, which the first step need not wait for

            report.write_curves(directory)
            report.write_report(directory)
        except BaseException as error:
            tracker.close(exit_code=0 if isinstance(error, interrupt.Interrupted) else 1)
            raise
        tracker.summarize(summary)
        tracker.close()
        check_owner()
        write_text(directory / "DONE", environment.code_digest() + "\n")
    console = Console()  # the result is the output; all else goes to standard error
    console.print(report.final_table(summary))
    for label, name in {"run": "", "figure": "curves.png", "report": "report.html"}.items():
        console.print(f"{label:7}{directory / name}", soft_wrap=True, highlight=False)
    return directory


def _train_and_evaluate(
    run: Prepared, trainer: Trainer, prompts: dict[str, list[Prompt]], owner: lock.Owner
) -> dict[str, Any]:
    """Test, train from the newest checkpoint, test again; returns the content of ``summary.json``."""
    config, first = trainer.config, trainer.config.evaluate.temperatures[:1]

    def test(when: str, config: Config) -> list[dict[str, Any]]:
        directory = trainer.directory / "evaluation" / when / config.evaluate.name
        answers = evaluation.Answers(directory, config, trainer.policy, trainer.check_owner)
        return answers.numbers({name: prompts[name] for name in run.tests}, run.splits.shots)

    # Before training nothing is resumed yet, so that the weights are the initial ones.
    short = replace(config, evaluate=replace(config.evaluate, temperatures=first))
    numbers = test("before", short) if config.budget.total else []
    trainer.resume()
    if owner.restart:
        log.info("restart %d: %s, resumed from step %d", owner.restart, owner, trainer.state.progress.steps)
    if not config.budget.spent(trainer.state.progress):  # a lost checkpoint's answers are of other weights
        shutil.rmtree(trainer.directory / "evaluation" / "after", ignore_errors=True)
    state = trainer.run()
    numbers += test("after", config)
    tests: dict[str, dict[str, Any]] = {name: {} for name in run.tests}
    for row in numbers:
        if [row["temperature"]] == first:
            tests[row["set"]][row["when"]] = row
    return {
        "status": "done",
        "run": trainer.directory.name,
        "objective": as_dict(config.objective) if type(trainer) is Trainer else {"name": "supervised"},
        "seed": config.seed,
        **vars(state.progress),
        "selection": config.selection,
        "selected_step": state.best_step if config.selection == "best" else state.progress.steps,
        "evaluation": tests,
        "answers": numbers,
        "time/wall_s": trainer.earlier_s + time.perf_counter() - trainer.started,
    }
