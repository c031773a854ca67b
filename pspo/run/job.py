"""One run: validate, load, evaluate, train, evaluate, report."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
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
from pspo.config import Config, check
from pspo.dataset import Problem, Prompt
from pspo.host import environment, interrupt
from pspo.run import earlier, held_out, lock, outcome
from pspo.run.advice import advice
from pspo.run.name import run_directory
from pspo.tracker import Tracker
from pspo.trainer import Trainer


@dataclass(frozen=True)
class Prepared:
    """One run whose settings have passed every check."""

    config: Config
    directory: Path  # need not exist
    history: earlier.History
    problems: dict[str, list[Problem]]  # by split: train, validation, and the test sets by name
    tests: list[str]  # names of the test sets
    shots: list[Problem]  # shown with their solutions in every prompt


def prepare(config: Config, directory: Path) -> Prepared:
    """Every check of a run that is to be made or resumed, before anything is written. Raises ConfigError."""
    check(config)
    model.check(config.model)  # downloads it where need be, after which its commit can be compared
    history = earlier.look(config, directory)
    splits = dataset.load(config.dataset, config.seed)
    _check_enough(config, len(splits.train))
    tests = held_out.problems(config, splits)
    one = next(split for split in (splits.train, *tests.values()) if split)[:1]
    dataset.encode(model.tokenizer(config.model), config.dataset, one)  # refuses a chat template that fails
    problems = {"train": splits.train, "validation": splits.validation} | tests
    return Prepared(config, directory, history, problems, list(tests), splits.shots)


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
        _execute(prepared, list(overrides), device, owner)
    return directory


def _execute(run: Prepared, overrides: list[str], device: torch.device, owner: lock.Owner) -> None:
    """One process's work in one run directory, in order."""
    config, directory, started = run.config, run.directory, time.perf_counter()
    config.reward.check_gold(list(chain(*run.problems.values())))  # a user's code: may raise
    earlier.carry_over(config, directory)
    earlier.record_inputs(config, directory)
    threads = _record_settings(run, overrides, device, owner)
    environment.settle(threads)
    checkpoint.seed_global_generators(config.seed)
    log.info("%s on %s with %d CPU threads", directory, device, threads)
    notes = advice(config)
    if run.history.changed and checkpoint.names(directory / "checkpoints"):
        notes.append(f"resumed although {', '.join(run.history.changed)} changed since this run began")
    for sentence in notes:
        log.warning("%s", sentence)
    prompts = _encode(run, notes)
    Phase("loading the model")
    policy = model.load(config.model, config.seed, device)
    tracker = Tracker(config.tracker, directory)
    try:
        trainer = Trainer(
            config, directory, policy, prompts["train"], prompts["validation"], config.reward, tracker, started,
            check_owner=partial(lock.check, directory, owner),
        )  # fmt: skip
        summary = _train_and_evaluate(run, trainer, prompts, notes, owner)
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
    trainer.check_owner()
    write_text(directory / "DONE", environment.code_digest() + "\n")
    console = Console()  # the result is the output; all else goes to standard error
    console.print(report.final_table(summary))
    for label, name in {"run": "", "figure": "curves.png", "report": "report.html"}.items():
        console.print(f"{label:7}{directory / name}", soft_wrap=True, highlight=False)


def _train_and_evaluate(
    run: Prepared, trainer: Trainer, prompts: dict[str, list[Prompt]], notes: list[str], owner: lock.Owner
) -> dict[str, Any]:
    """Test, train from the newest checkpoint, test again; returns the content of ``summary.json``."""
    config, first = run.config, run.config.evaluate.temperatures[:1]
    sets = held_out.sets(config, {name: prompts[name] for name in run.tests})
    test = partial(
        held_out.answered, run.directory, sets, trainer.policy, config, run.shots, check_owner=trainer.check_owner
    )
    # Before training nothing is resumed yet, so that the weights are the initial ones.
    numbers = test(when="before", temperatures=first) if config.budget.total else []
    trainer.resume()
    if owner.restart:
        log.info("restart %d: %s, resumed from step %d", owner.restart, owner, trainer.state.progress.steps)
    if not config.budget.spent(trainer.state.progress):  # a lost checkpoint's answers are of other weights
        shutil.rmtree(run.directory / "evaluation" / "after", ignore_errors=True)
    state = trainer.run()
    numbers += test(when="after", temperatures=config.evaluate.temperatures)
    tests: dict[str, dict[str, Any]] = {name: {} for name in run.tests}
    for row in numbers:
        if [row["temperature"]] == first:
            tests[row["set"]][row["when"]] = row
    return {
        "status": "done",
        "run": run.directory.name,
        "objective": as_dict(config.objective),
        "seed": config.seed,
        **vars(state.progress),
        "selection": config.selection,
        "selected_step": state.best_step if config.selection == "best" else state.progress.steps,
        "notes": notes + state.notes,
        "evaluation": tests,
        "answers": numbers,
        "time/wall_s": trainer.earlier_s + time.perf_counter() - trainer.started,
    }


def _record_settings(run: Prepared, overrides: list[str], device: torch.device, owner: lock.Owner) -> int:
    """Record settings and machine; returns the CPU threads, on resume the first process's number: sums round alike."""
    entries = environment.history(run.directory)
    threads = environment.choose_threads(run.config.threads or (entries[0]["threads"] if entries else None))
    about = {"host": owner.host, "job_id": owner.job_id, "time/started": owner.started}
    for difference in environment.record(run.directory, environment.describe(threads, device) | about):
        log.warning("since the run's last process, %s", difference)
    write_text(run.directory / "config.yaml", OmegaConf.to_yaml(as_dict(run.config)))
    write_text(run.directory / "overrides.yaml", OmegaConf.to_yaml(overrides))
    return threads


def _encode(run: Prepared, notes: list[str]) -> dict[str, list[Prompt]]:
    """The prompts of every split; adds to ``notes`` which date they have, and which splits lost too long prompts."""
    group = Path(run.config.continue_from or run.directory).parent
    prompts, about = held_out.encoded(run.config, run.problems, run.shots, group)
    notes += about
    _check_enough(run.config, len(prompts["train"]))
    return prompts


def _check_enough(config: Config, num_problems: int) -> None:
    """Refuse a training set that does not fill one step."""
    if config.budget.total and num_problems < config.rollout.prompts:
        raise config.rollout.refuse("prompts", f"there are only {num_problems} training problems")
