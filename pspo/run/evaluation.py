"""One evaluation: the answers of a run's weights, or of a model that no run has trained, to held-out problems."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from pspo import checkpoint, dataset, model
from pspo.base.console import Phase, log, log_to_console, log_to_file
from pspo.base.files import read_json, write_json, write_text
from pspo.base.schema import ConfigError, as_dict
from pspo.config import Config, check, compose, for_answers, identity, read
from pspo.dataset import Problem, Prompt, Splits
from pspo.host import environment, interrupt
from pspo.run import earlier, held_out, lock, outcome

GROUP = "evaluate"  # directory under output_dir that holds the answers of models that no run has trained
SUMMARY = "summary.json"


@dataclass(frozen=True)
class Evaluation:
    """Which weights answer, and where their answers lie: ``run/evaluation/<when>/<evaluate.name>``."""

    config: Config  # whose ``model`` is what is loaded, before the checkpoint if there is one
    run: Path
    when: str
    checkpoint: Path | None = None

    @property
    def directory(self) -> Path:
        return self.run / "evaluation" / self.when / self.config.evaluate.name

    @property
    def is_done(self) -> bool:
        """Whether the directory holds the answers to every set at every temperature, as many as the settings have."""
        known = read_json(self.directory / SUMMARY).get("answers", [])
        have = {(row["set"], row["temperature"]): row["samples"] for row in known}
        sets, config = self.config.evaluate.sets, self.config.evaluate
        names = {name for name, _ in have} if sets is None else {Path(name).stem for name in sets}
        wanted = {(name, t): config.num_samples(t) for name in names for t in config.temperatures}
        return bool(wanted) and all(have.get(cell, 0) >= samples for cell, samples in wanted.items())


def split(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The values of ``run`` and ``checkpoint`` among the words of a command line, and the other words."""
    own = {name: value for name, _, value in (word.partition("=") for word in words) if name in ("run", "checkpoint")}
    return own, [word for word in words if word.partition("=")[0] not in own]


def of_words(words: Sequence[str]) -> Evaluation:
    """The one evaluation that a job's words ask for. Raises ConfigError."""
    own, overrides = split(words)
    return of_run(Path(own["run"]), own.get("checkpoint"), overrides) if "run" in own else of_model(overrides)


def of_run(run: Path, checkpoint_name: str | None, overrides: Sequence[str]) -> Evaluation:
    """The evaluation of a run's last weights, or of one of its checkpoints. Raises ConfigError."""
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"run={run} is no run directory: it has no config.yaml; give outputs/<group>/<run>")
    config = for_answers(run, overrides)
    if read(run / "config.yaml").budget.total == 0:  # a model that no run has trained: its weights are the model's own
        return Evaluation(config, run, "after")
    if checkpoint_name is not None:
        known = sorted(path.parent.name for path in run.glob("checkpoints/[!.]*/meta.json"))
        if checkpoint_name not in known:
            raise ConfigError(f"checkpoint={checkpoint_name}: {run} has {', '.join(known) or 'no checkpoint'}")
        return Evaluation(config, run, checkpoint_name, run / "checkpoints" / checkpoint_name)
    if not (run / "DONE").is_file():
        raise ConfigError(f"run={run} is not done; wait for its end, or give checkpoint=<one of its checkpoints>")
    lora = replace(config.model.lora, rank=0)  # the adapters are merged
    path = str(run / "model")
    trained = replace(config.model, path=path, hub_id=None, architecture=None, warm_start=None, lora=lora)
    return Evaluation(replace(config, model=trained), run, "after")


def of_model(overrides: Sequence[str]) -> Evaluation:
    """The evaluation of the model that the overrides choose; its answers go to ``outputs/evaluate/<its name>``."""
    config = compose(
        [f"group={GROUP}", *overrides, "budget.steps=0", "budget.prompts=null", "budget.completion_tokens=null"]
    )
    own = Path(config.evaluate.path or "", config.dataset.name)
    if config.evaluate.path is not None and config.dataset.path is None and own.exists():
        config = replace(config, dataset=replace(config.dataset, path=str(own)))  # which examples are taken from
    source = config.model.path or config.model.hub_id
    words = [config.model.name if source is None else Path(source).name]
    words += [f"{config.dataset.shots}shot"] if config.dataset.shots else []
    run = Path(config.output_dir) / config.group / "_".join([*words, identity(config)])
    return Evaluation(config, run, "after")


def prompts(evaluation: Evaluation) -> tuple[dict[str, list[Prompt]], list[Problem]]:
    """The prompts of every test set, and the problems shown in them. Raises ConfigError."""
    config = evaluation.config
    check(config)
    model.check(config.model)
    names = {config.dataset.name, "validation"}
    needs_dataset = config.evaluate.sets is None or config.dataset.shots or names & set(config.evaluate.sets)
    splits = dataset.load(config.dataset, config.seed) if needs_dataset else Splits([], [], {})
    problems = held_out.problems(config, splits)
    if not problems:
        raise config.evaluate.refuse("sets", f"dataset={config.dataset.name} has no test problems; name test sets")
    encoded, _ = held_out.encoded(config, problems, splits.shots, evaluation.run.parent)
    return encoded, splits.shots


def answer(evaluation: Evaluation) -> Path:
    """Give the answers that are missing, print the table; returns the directory of the answers. Raises ConfigError."""
    log_to_console()
    config, directory = evaluation.config, evaluation.directory
    device = environment.choose_device(config.device)
    if evaluation.is_done:
        log.info("already answered: %s", directory)
    else:
        encoded, shots = prompts(evaluation)
        if not (evaluation.run / "config.yaml").is_file():
            _begin(evaluation)
        with (
            lock.hold(directory) as owner,
            log_to_file(directory / "run.log"),
            outcome.recorded(directory, owner),
            interrupt.caught(),
        ):
            threads = environment.choose_threads(config.threads)
            environment.settle(threads)
            checkpoint.seed_global_generators(config.seed)
            log.info("%s on %s with %d CPU threads", directory, device, threads)
            Phase("loading the model")
            policy = model.load(config.model, config.seed, device)
            if evaluation.checkpoint is not None:
                if (saved := checkpoint.load(evaluation.checkpoint)) is None:
                    raise ConfigError(f"checkpoint={evaluation.checkpoint} cannot be read; choose another")
                checkpoint.restore_weights(policy, saved[0]["weights"])
            numbers = held_out.answered(
                evaluation.run, held_out.sets(config, encoded), policy, config, shots, when=evaluation.when,
                temperatures=config.evaluate.temperatures, check_owner=partial(lock.check, directory, owner),
            )  # fmt: skip
            merged = {
                (row["set"], row["temperature"]): row for row in read_json(directory / SUMMARY).get("answers", [])
            }
            merged |= {(row["set"], row["temperature"]): row for row in numbers}
            write_json(directory / SUMMARY, {"run": str(evaluation.run), "answers": list(merged.values())})
            write_text(directory / "DONE", environment.code_digest() + "\n")
    console = Console()
    console.print(table(read_json(directory / SUMMARY)["answers"]))
    console.print(f"answers {directory}", soft_wrap=True, highlight=False)
    return directory


def _begin(evaluation: Evaluation) -> None:
    """Make the run directory of a model that no run has trained, whose training, of no step, is done."""
    run, config = evaluation.run, evaluation.config
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / earlier.INPUTS, {"code": environment.code_digest()} | model.digests(config.model))
    write_text(run / "config.yaml", OmegaConf.to_yaml(as_dict(config)))
    write_text(run / "DONE", environment.code_digest() + "\n")


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The numbers of every set and temperature for a person, in 80 columns."""
    made = Table(box=None, padding=(0, 2, 0, 0))
    sampled = any(row["samples"] > 1 for row in rows)
    for column in ("test set", "T", "n", "accuracy [95 %]", "strict", *(("pass@k", "maj@k") if sampled else ()), "cut"):
        made.add_column(column, justify="left" if column == "test set" else "right", no_wrap=True)
    for row in rows:
        low, high, k = 100 * row["ci95_low"], 100 * row["ci95_high"], row["samples"]
        last = next((name for name in reversed(list(row)) if name.startswith("pass@")), "")
        votes = (f"{100 * row[last]:.1f} @{last[5:]}", f"{100 * row[f'maj@{k}']:.1f}") if last else ("", "")
        strict = f"{100 * row['strict_accuracy']:.1f}" if "strict_accuracy" in row else ""
        accuracy = f"{100 * row['accuracy']:.1f} % [{low:.1f}, {high:.1f}]"
        cut, n = f"{100 * row['truncated_rate']:.1f} %", f"{row['n']:,}" + (f"x{k}" if k > 1 else "")
        made.add_row(row["set"], f"{row['temperature']:g}", n, accuracy, strict, *(votes if sampled else ()), cut)
    return made
