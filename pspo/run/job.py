"""One run: validate, load, evaluate, train, evaluate, report."""

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
from pspo.evaluate import answer_into, summarize
from pspo.host import environment, interrupt
from pspo.run import earlier, lock, outcome
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


def prepare(config: Config, directory: Path) -> Prepared:
    """Every check of a run that is to be made or resumed, before anything is written. Raises ConfigError."""
    check(config)
    model.check(config.model)  # downloads it where need be, after which its commit can be compared
    history = earlier.look(config, directory)
    splits = dataset.load(config.dataset, config.seed)
    _check_enough(config, len(splits.train))
    one = next(split for split in (splits.train, *splits.test.values()) if split)[:1]
    dataset.encode(model.tokenizer(config.model), config.dataset, one)  # refuses a chat template that fails
    problems = {"train": splits.train, "validation": splits.validation} | splits.test
    return Prepared(config, directory, history, problems, list(splits.test))


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
    config = run.config
    tests: dict[str, dict[str, Any]] = {name: {} for name in run.tests}
    for name, results in tests.items() if config.budget.total else ():  # initial weights: nothing is resumed yet
        results["before"] = _test(trainer, name, prompts[name], "before")
    trainer.resume()
    if owner.restart:
        log.info("restart %d: %s, resumed from step %d", owner.restart, owner, trainer.state.progress.steps)
    if not config.budget.spent(trainer.state.progress):  # a lost checkpoint's answers are of other weights
        for answers in run.directory.glob("evaluation/*_after.jsonl"):
            answers.unlink()
    state = trainer.run()
    for name, results in tests.items():
        results["after"] = _test(trainer, name, prompts[name], "after")
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
    prompts, config, tokenizer = {}, run.config.dataset, model.tokenizer(run.config.model)
    date = dataset.prompt_date(tokenizer, Path(run.config.continue_from or run.directory).parent)
    if date is not None:
        notes.append(f"the model's chat template prints a date, {date} in all runs of this group")
        log.info(notes[-1])
    for name, problems in run.problems.items():
        prompts[name], dropped = dataset.encode(tokenizer, config, problems, date)
        if dropped:
            limit = f"prompts over {config.max_prompt_tokens} tokens"
            notes.append(f"{dropped} of {len(problems)} {name} problems were dropped: {limit}")
            log.warning(notes[-1])
        if dropped and not prompts[name]:
            raise config.refuse("max_prompt_tokens", f"all {dropped} {name} prompts are longer")
    _check_enough(run.config, len(prompts["train"]))
    return prompts


def _test(trainer: Trainer, name: str, prompts: list[Prompt], when: str) -> dict[str, float]:
    """Greedy accuracy on a test set, whose answers are kept in ``evaluation/`` and read again after a resume."""
    path = trainer.directory / "evaluation" / f"{name}_{when}.jsonl"
    path.parent.mkdir(exist_ok=True)
    title, config = f"test on {name}, {when}", trainer.config
    rows = answer_into(
        path, trainer.sampler, prompts, config.reward, config.rollout,
        seed=config.seed, title=title, check_owner=trainer.check_owner,
    )  # fmt: skip
    return summarize(rows)


def _check_enough(config: Config, num_problems: int) -> None:
    """Refuse a training set that does not fill one step."""
    if config.budget.total and num_problems < config.rollout.prompts:
        raise config.rollout.refuse("prompts", f"there are only {num_problems} training problems")
