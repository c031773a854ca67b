"""One run: validate, load, evaluate, train, evaluate, report."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pspo import checkpoint, dataset, model
from pspo.base.console import Phase, log, log_to_console
from pspo.base.files import write_json, write_text
from pspo.base.schema import ConfigError, as_dict
from pspo.config import Config, check, identity
from pspo.dataset import Problem, Prompt, Splits
from pspo.host import environment, interrupt, ranks
from pspo.run import earlier, evaluation, lock
from pspo.run.advice import advice
from pspo.run.outcome import at_work
from pspo.tracker import Tracker, TrackerConfig
from pspo.trainer import Trainer


def prepare(config: Config, directory: Path, kind: type[Trainer]) -> tuple[earlier.History, Splits]:
    """Every check of a run that is to be made or resumed, before anything is written. Raises ConfigError."""
    check(config)
    splits = dataset.load(config.dataset, config.seed)
    splits = replace(splits, test=evaluation.problems(config, splits))
    kind.check(config, splits)
    model.check(config.model)  # downloads it where need be, after which its commit can be compared
    history = earlier.look(config, directory)
    one = next(split for split in (splits.train, *splits.test.values()) if split)[:1]
    dataset.encode(model.tokenizer(config.model), config.dataset, one)  # refuses a chat template that fails
    return history, splits


def run(
    config: Config, overrides: Sequence[str] = (), directory: Path | None = None, kind: type[Trainer] = Trainer
) -> Path:
    """Make, resume or, where it is DONE, only name the run directory of ``config``; ConfigError before any work."""
    log_to_console()
    device = environment.choose_device(config.device)
    directory = directory or earlier.run_directory(config, overrides)
    if ranks.first(lambda: earlier.is_finished(config, directory)):
        return directory
    history, splits = ranks.gather(lambda: prepare(config, directory, kind))[0]
    agree(config)
    if not ranks.is_first():
        follow(config, directory, kind, splits, device)
        return directory
    if history.state == "again":
        earlier.set_aside(directory)
    with at_work(directory) as owner:
        is_new = history.state == "new" and config.continue_from is None
        if is_new and (source := earlier.shorter(config, directory)):
            log.info("%s is the same but for its budget: continue_from=%s goes on from there", source, source)
        Phase("preparing the problems")
        problems = {"train": splits.train, "validation": splits.validation} | splits.test
        config.reward.check_gold(list(chain(*problems.values())))  # a user's code: may raise
        earlier.carry_over(config, directory)
        earlier.begin(config, directory, overrides, device, owner)
        notes = advice(config) if kind is Trainer else []
        if history.changed and checkpoint.names(directory / "checkpoints"):
            notes.append(f"resumed although {', '.join(history.changed)} changed since this run began")
        for sentence in notes:
            log.warning("%s", sentence)
        group = Path(config.continue_from or directory).parent
        prompts, about = evaluation.encoded(config, problems, splits.shots, group)
        Phase("loading the model")
        policy = model.load(config.model, config.seed, device)
        tracker, check_owner = Tracker(config.tracker, directory), partial(lock.check_owner, directory, owner)
        try:
            train, validation = prompts["train"], prompts["validation"]
            trainer = kind(config, directory, policy, train, validation, config.reward, tracker, check_owner)
            tests = {name: prompts[name] for name in splits.test}
            summary = _train_and_evaluate(trainer, tests, splits.shots, owner) | {"notes": notes + about}
            probe = next(prompt for split in prompts.values() for prompt in split)
            _save_and_report(trainer, probe, summary)
        except BaseException as error:
            tracker.close(exit_code=0 if isinstance(error, interrupt.Interrupted) else 1)
            raise
        tracker.summarize(summary)
        tracker.close()
        check_owner()
        write_text(directory / "DONE", environment.code_digest() + "\n")
    from pspo import report

    console = Console()  # the result is the output; all else goes to standard error
    console.print(report.final_table(summary))
    for label, name in {"run": "", "figure": "curves.png", "report": "report.html"}.items():
        console.print(f"{label:7}{directory / name}", soft_wrap=True, highlight=False)
    return directory


def agree(config: Config) -> None:
    """Refuse ranks of another configuration, code or data than rank 0's. Raises ConfigError."""
    if ranks.count() == 1:
        return
    first, *others = ranks.gather(lambda: earlier.inputs(config) | {"configuration": identity(config)})
    for rank, other in enumerate(others, start=1):
        if changed := [name for name in first if other.get(name) != first[name]]:
            raise ConfigError(f"rank {rank} has another {', '.join(changed)} than rank 0; give all ranks the same")
    if config.rollout.sampler == "vllm":
        raise config.rollout.refuse("sampler", "serves one process; set rollout.sampler=own, or start one rank")
    if ranks.count() > config.rollout.prompts:
        why = f"are fewer than the {ranks.count()} ranks that share them; start fewer, or raise rollout.prompts"
        raise config.rollout.refuse("prompts", why)


def follow(config: Config, directory: Path, kind: type[Trainer], splits: Splits, device: torch.device) -> None:
    """Take part in the run of ``directory`` as another rank than the first: reads it, and writes nothing there."""
    config = replace(config, tracker=TrackerConfig(name="jsonl"))
    with tempfile.TemporaryDirectory() as name, interrupt.caught():
        own = Path(name)
        (own / "checkpoints").symlink_to(directory.absolute() / "checkpoints")
        torch.set_num_threads(environment.choose_threads(config.threads))
        checkpoint.seed_global_generators(config.seed)
        problems = {"train": splits.train, "validation": splits.validation} | splits.test
        prompts, _ = evaluation.encoded(config, problems, splits.shots, directory.parent)
        policy = model.load(config.model, config.seed, device)
        train, validation = prompts["train"], prompts["validation"]
        trainer = kind(config, own, policy, train, validation, config.reward, Tracker(config.tracker, own))
        _train_and_evaluate(trainer, {name: prompts[name] for name in splits.test}, splits.shots, None)


def _save_and_report(trainer: Trainer, probe: Prompt, summary: dict[str, Any]) -> None:
    """The model, with LoRA its adapters as well, ``summary.json``, the figure and the report; spends the policy."""
    directory = trainer.directory
    Phase("saving the model")
    if trainer.config.model.lora.rank:
        model.save_adapters(trainer.policy, directory / "adapter")
    model.save(trainer.policy, directory / "model", probe=probe.token_ids)
    write_json(directory / "summary.json", summary)
    Phase("writing the report")
    from pspo import report  # matplotlib, which the first step need not wait for

    report.write_curves(directory)
    report.write_report(directory)


def _train_and_evaluate(
    trainer: Trainer, prompts: dict[str, list[Prompt]], shots: list[Problem], owner: lock.Owner | None
) -> dict[str, Any]:
    """Test, train from the newest checkpoint, test again; returns the content of ``summary.json``."""
    config, first = trainer.config, trainer.config.evaluate.temperatures[:1]

    def test(when: str, config: Config) -> list[dict[str, Any]]:
        directory = trainer.directory / "evaluation" / when / config.evaluate.name
        return evaluation.Answers(directory, config, trainer.sampler, trainer.check_owner).numbers(prompts, shots)

    # Before training nothing is resumed yet, so that the weights are the initial ones.
    short = replace(config, evaluate=replace(config.evaluate, temperatures=first))
    numbers = test("before", short) if config.budget.total else []
    trainer.resume()
    if owner is not None and owner.restart:
        log.info("restart %d: %s, resumed from step %d", owner.restart, owner, trainer.state.progress.steps)
    if not config.budget.spent(trainer.state.progress):  # a lost checkpoint's answers are of other weights
        shutil.rmtree(trainer.directory / "evaluation" / "after", ignore_errors=True)
    state = trainer.run()
    numbers += test("after", config)
    tests: dict[str, dict[str, Any]] = {name: {} for name in prompts}
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
    }
