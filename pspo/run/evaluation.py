"""Answers to held-out problems in files, by the weights of a run or of a model that no run has trained."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from pspo import checkpoint, dataset, model
from pspo.base.console import Phase, log, log_to_console, track
from pspo.base.files import JsonLines, digest, read_json, write_json, write_text
from pspo.base.schema import ConfigError, as_dict
from pspo.base.stream import Stream, generator
from pspo.config import Config, check, compose, for_answers, identity, read
from pspo.dataset import Problem, Prompt, Splits
from pspo.evaluate import answer, described, summarize
from pspo.evaluate.answers import SETTINGS
from pspo.host import environment, interrupt, ranks
from pspo.reward import Paper, Plain, Reward, default_reward
from pspo.rollout import RolloutConfig, Sampler
from pspo.rollout.samplers import make_sampler
from pspo.run import earlier, lock
from pspo.run.outcome import at_work

LATEX_SETS = ("math", "math500")  # whose gold answers are LaTeX


def problems(config: Config, splits: Splits) -> dict[str, list[Problem]]:
    """The problems of each test set of ``evaluate.sets``, by the set's name. Raises ConfigError."""
    evaluate, tests = config.evaluate, dict[str, list[Problem]]()
    known = splits.test | {"validation": splits.validation}
    for name in splits.test if evaluate.sets is None else evaluate.sets:
        is_loaded = name in known and name not in _sets_of_their_own(config)
        tests[Path(name).stem] = known[name] if is_loaded else dataset.load_set(config.dataset, name, evaluate.path)
    if not tests.get("validation", True):
        raise evaluate.refuse("sets", "there are no validation problems; set dataset.num_validation")
    return tests


def _sets_of_their_own(config: Config) -> list[str]:
    """The test sets that are read for the evaluation alone, not with ``dataset``."""
    own = {config.dataset.name} if config.evaluate.path is None or config.dataset.name == "embedded" else set()
    return [name for name in config.evaluate.sets or [] if name not in {"validation", *own}]


def _sources(config: Config) -> dict[str, Any]:
    """The reward, and the digests of its own files and of the test sets that are read for the evaluation alone."""
    files = {str(path): digest(path) for path in config.reward.source_files()}
    data = {name: dataset.set_digests(name, config.evaluate.path) for name in _sets_of_their_own(config)}
    return {"reward": as_dict(config.reward) | files, "data": data}


def encoded(
    config: Config, problems: Mapping[str, list[Problem]], shots: Sequence[Problem], group: Path
) -> tuple[dict[str, list[Prompt]], list[str]]:
    """The prompts of every split, with one date for all runs of ``group``, and what a reader must know of them."""
    prompts, notes, tokenizer = dict[str, list[Prompt]](), list[str](), model.tokenizer(config.model)
    if not tokenizer.chat_template and config.dataset.prompt is None:
        notes.append("the tokenizer has no chat template, so prompts are plain text, 'Question: ...' and 'Answer:'")
    date = None if config.dataset.prompt else dataset.prompt_date(tokenizer, group)
    if date is not None:
        notes.append(f"the model's chat template prints a date, {date} in all runs of this group")
    for name, split in problems.items():
        prompts[name], dropped = dataset.encode(tokenizer, config.dataset, split, date, shots)
        if dropped and not prompts[name]:
            raise config.dataset.refuse("max_prompt_tokens", f"all {dropped} {name} prompts are longer")
        if dropped:
            rule = f"were dropped: prompts over {config.dataset.max_prompt_tokens} tokens"
            notes.append(f"{dropped} of {len(split)} {name} problems {rule}")
    for sentence in notes:
        log.warning(sentence)
    return prompts, notes


@dataclass(frozen=True)
class Answers:
    """The answers of a sampler's policy in the folder ``evaluation/<when>/<evaluate.name>`` of a run."""

    directory: Path
    config: Config
    sampler: Sampler
    check_owner: Callable[[], None]  # leaves the process if another one has taken the directory over

    @property
    def rollout(self) -> RolloutConfig:
        """How the answers are sampled, but for the temperature."""
        evaluate, rollout = self.config.evaluate, self.config.rollout
        return replace(rollout, top_p=evaluate.top_p, max_new_tokens=evaluate.max_new_tokens or rollout.max_new_tokens)

    def numbers(self, prompts: Mapping[str, Sequence[Prompt]], shots: Sequence[Problem]) -> list[dict[str, Any]]:
        """The numbers of every test set and temperature. Raises ConfigError for a folder with other settings."""
        config, evaluate = self.config, self.config.evaluate
        settings = {
            "sampler": self.rollout.sampler,
            "top_p": self.rollout.top_p,
            "max_new_tokens": self.rollout.max_new_tokens,
            "system_prompt": config.dataset.system_prompt,
            "prompt": config.dataset.prompt,
            "shots": [shot.id for shot in shots],
            **_sources(config),
        }
        record = read_json(self.directory / SETTINGS)
        changed = [name for name in settings if record and ({"sampler": "own"} | record).get(name) != settings[name]]
        if changed and config.rerun != "resume":
            reason = f"{self.directory} holds answers with another {', '.join(changed)}"
            raise evaluate.refuse("name", f"{reason}; give evaluate.name=<another name>")
        self.directory.mkdir(parents=True, exist_ok=True)
        write_json(self.directory / SETTINGS, settings | {"samples": evaluate.samples})
        about, numbers = {"when": self.directory.parent.name, "evaluation": evaluate.name}, []
        for name, split in prompts.items():
            numeric = isinstance(config.reward, Plain | Paper)
            reward = default_reward("math") if numeric and name in LATEX_SETS else config.reward
            ungradable = {"ungradable": len(reward.ungradable([prompt.problem for prompt in split]))}
            for temperature in evaluate.temperatures:
                summary = summarize(self.rows(name, split, reward, temperature))
                numbers.append({"set": name, "temperature": temperature} | about | summary | ungradable)
        return numbers

    def rows(self, name: str, prompts: Sequence[Prompt], reward: Reward, temperature: float) -> list[dict[str, Any]]:
        """The answers to one test set at one temperature; answers that the set's file lacks are sampled and appended.

        A later process's batches and its states of the global generators, from which a user's reward may draw, are
        those of an unbroken process, and so are the file's bytes.
        """
        seed, samples = self.config.seed, self.config.evaluate.samples if temperature else 1
        sampler = self.sampler.under(replace(self.rollout, temperature=temperature or 1.0))
        lines = JsonLines(self.directory / f"{name}_t{temperature:g}.jsonl")
        questions = {prompt.problem.id: described(prompt.problem) for prompt in prompts}
        # Lines from the first on that answers another question under a known name are of other data, and so go.
        valid = takewhile(lambda row: questions.get(row["problem"], row).items() <= row.items(), lines.rows())
        rows = {(row["problem"], row["sample"]): row for row in valid}
        rows = ranks.first(lambda: rows)
        if ranks.is_first():
            lines.cut(len(rows))
        size = max(1, self.rollout.max_rows // samples)
        batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        title = f"test {self.directory.parent.name} on {name} at T={temperature:g}"
        with checkpoint.random_state_kept():
            for number, batch in enumerate(track(batches, title, len(prompts), "problems")):
                if all((prompt.problem.id, sample) in rows for prompt in batch for sample in range(samples)):
                    continue
                checkpoint.seed_global_generators(int(generator(seed, Stream.TEST, number * size).integers(2**32)))
                key, greedy = [seed, Stream.TEST], temperature == 0
                answers = answer(sampler, batch, reward, samples=samples, seed=key, greedy=greedy)
                self.check_owner()
                for row in answers:
                    if (place := (row["problem"], row["sample"])) not in rows:
                        rows[place] = row
                        lines.append(row)
                lines.sync()
                ranks.gather(interrupt.check)
        return [rows[prompt.problem.id, sample] for prompt in prompts for sample in range(samples)]


@dataclass(frozen=True)
class Evaluation:
    """Which weights ``python -m pspo.evaluate`` takes, and in which folder of which run their answers lie."""

    words: list[str]  # of the command line, from which another process makes the same evaluation
    config: Config  # whose ``model`` is what is loaded, before the checkpoint if there is one
    run: Path
    when: str = "after"
    checkpoint: Path | None = None

    @property
    def directory(self) -> Path:
        return self.run / "evaluation" / self.when / self.config.evaluate.name

    @property
    def settings(self) -> dict[str, Any]:
        blocks = {block: as_dict(getattr(self.config, block)) for block in ("evaluate", "dataset", "reward")}
        return blocks | {"sampler": self.config.rollout.sampler}

    @property
    def changed(self) -> list[str]:
        """Files of the model, or its hub repository, that changed since ``run`` began. Raises ConfigError."""
        if self.config.model.path == str(self.run / "model"):  # the run's own
            return []
        before = read_json(self.run / earlier.INPUTS)
        return [name for name, now in model.digests(self.config.model).items() if before.get(name, now) != now]

    @property
    def state(self) -> str:
        """Whether the folder is done, with the same settings from the same files, or new."""
        if not (self.directory / "DONE").is_file():
            return "new"
        record, sources = (read_json(self.directory / name) for name in ("summary.json", SETTINGS))
        same = self.settings.items() <= ({"sampler": "own"} | record).items()  # before vLLM there was no other
        with contextlib.suppress(ConfigError):  # a node that does not see the files
            same &= not self.changed and _sources(self.config).items() <= sources.items()
            same &= dataset.digests(self.config.dataset) == record.get("data")
        return "done" if same else "new"

    def prompts(self) -> tuple[dict[str, list[Prompt]], list[Problem]]:
        """The prompts of every test set, and the problems shown in them. Raises ConfigError."""
        config = self.config
        check(config)
        model.check(config.model)
        if self.changed:
            reason = f"{', '.join(self.changed)} changed since {self.run} began, whose answers are the earlier model's"
            raise ConfigError(f"{reason}; restore what changed, or give group=<another group>")
        names = {config.dataset.name, "validation"}
        needs_dataset = config.evaluate.sets is None or config.dataset.shots or names & set(config.evaluate.sets)
        splits = dataset.load(config.dataset, config.seed) if needs_dataset else Splits([], [], {})
        tests = problems(config, splits)
        if not tests:
            raise config.evaluate.refuse("sets", f"dataset={config.dataset.name} has no test problems; name test sets")
        return encoded(config, tests, splits.shots, self.run.parent)[0], splits.shots

    def answer(self) -> list[dict[str, Any]]:
        """Give the answers that are missing; returns a row of numbers for every set and temperature."""
        config, directory = self.config, self.directory
        log_to_console()
        if self.state == "done":
            log.info("already answered: %s", directory)
            return list(read_json(directory / "summary.json")["answers"])
        device = environment.choose_device(config.device)
        prompts, shots = self.prompts()
        data = None
        with contextlib.suppress(ConfigError):  # test sets of their own do not need the data set
            data = dataset.digests(config.dataset)
        if not (self.run / "config.yaml").is_file():  # of a model that no run has trained: a run of no step, done
            self.run.mkdir(parents=True, exist_ok=True)
            write_json(self.run / earlier.INPUTS, {"code": environment.code_digest()} | model.digests(config.model))
            write_text(self.run / "config.yaml", OmegaConf.to_yaml(as_dict(config)))
            write_text(self.run / "DONE", environment.code_digest() + "\n")
        with at_work(directory) as owner:
            (directory / "DONE").unlink(missing_ok=True)
            torch.set_num_threads(environment.choose_threads(config.threads))
            checkpoint.seed_global_generators(config.seed)
            with Phase("loading the model"):
                policy = model.load(config.model, config.seed, device)
                if self.checkpoint is not None:
                    checkpoint.load_weights(policy, self.checkpoint)
                sampler = make_sampler(policy, config.rollout)
            guard = partial(lock.check_owner, directory, owner)
            numbers = Answers(directory, config, sampler, guard).numbers(prompts, shots)
            about = {"run": str(self.run), **self.settings, "data": data}
            write_json(directory / "summary.json", about | {"answers": numbers})
            write_text(directory / "DONE", environment.code_digest() + "\n")
        return numbers


def of_words(words: Sequence[str]) -> Evaluation:
    """The evaluation of ``run=<directory>``, perhaps at ``checkpoint=``, else of a bare model. Raises ConfigError."""
    own = {name: value for name, _, value in (word.partition("=") for word in words) if name in ("run", "checkpoint")}
    overrides, name = [word for word in words if word.partition("=")[0] not in own], own.get("checkpoint")
    if "run" not in own:
        if name is not None:
            raise ConfigError(f"checkpoint={name} needs run=<run directory>")
        return _of_model(overrides)
    run = Path(own["run"])
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"run={run} is no run directory: it has no config.yaml; give outputs/<group>/<run>")
    config = for_answers(run, overrides)
    if read(run / "config.yaml").budget.total == 0:  # a model that no run has trained: its weights are the model's own
        return Evaluation(list(words), config, run)
    if name is not None:
        known = sorted(path.parent.name for path in run.glob("checkpoints/[!.]*/meta.json"))
        if name not in known:
            raise ConfigError(f"checkpoint={name}: {run} has {', '.join(known) or 'no checkpoint'}")
        return Evaluation(list(words), config, run, name, run / "checkpoints" / name)
    if not (run / "DONE").is_file():
        raise ConfigError(f"run={run} is not done; wait for its end, or give checkpoint=<one of its checkpoints>")
    path, lora = str(run / "model"), replace(config.model.lora, rank=0)  # the adapters are merged
    trained = replace(config.model, path=path, lora=lora, hub_id=None, architecture=None, warm_start=None)
    return Evaluation(list(words), replace(config, model=trained), run)


def _of_model(overrides: list[str]) -> Evaluation:
    """The evaluation of the model that the overrides choose; its answers go to ``outputs/evaluate/<its name>``."""
    untrained = ["budget.steps=0", "budget.prompts=null", "budget.completion_tokens=null"]
    config = compose(["group=evaluate", *overrides, *untrained])
    own = Path(config.evaluate.path or "", config.dataset.name)
    if config.evaluate.path is not None and config.dataset.path is None and own.exists():
        config = replace(config, dataset=replace(config.dataset, path=str(own)))  # which examples are taken from
    words = [Path(config.model.path or config.model.hub_id or config.model.name).name]
    words += [f"{config.dataset.shots}shot"] if config.dataset.shots else []
    return Evaluation(overrides, config, Path(config.output_dir, config.group, "_".join([*words, identity(config)])))
