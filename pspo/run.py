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
from typing import Any

import filelock
import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pspo import dataset, environment, model, report
from pspo.checkpoint import SaveError
from pspo.config import CONF, Config, open_keys, resolve, run_directory
from pspo.console import console, log, log_to_console, log_to_file, track
from pspo.dataset import Prompt
from pspo.evaluation import TEST, answer, summarize
from pspo.files import write_json, write_text
from pspo.help import help_text
from pspo.reward import Reward, check_gold, make_reward
from pspo.schema import ConfigError, as_dict
from pspo.tracker import Tracker
from pspo.trainer import Trainer
from pspo.update import NonFiniteError


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def main(composed: DictConfig) -> None:
    """One run, or one job of a multirun."""
    values = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(values, dict)
    overrides = [o.lstrip("+") for o in HydraConfig.get().overrides.task]
    run(resolve({str(name): value for name, value in values.items()}), overrides)


def cli() -> None:
    """``python -m pspo.run``: a user's mistake is one sentence and exit status 2, a failed run is status 1."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        console_out = sys.stdout
        console_out.write(help_text())
        return
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come to us, and we say them in one sentence
    sys.argv[1:] = open_keys(sys.argv[1:])
    try:
        main()
    except (ConfigError, hydra.errors.HydraException, OmegaConfBaseException) as error:
        _leave(2, " ".join(str(error).split()))
    except (NonFiniteError, SaveError) as error:
        _leave(1, str(error))
    except KeyboardInterrupt:
        _leave(130, "stopped; the same command resumes from the last checkpoint")


def run(config: Config, overrides: Sequence[str] = ()) -> Path:
    """Make, resume or, where it is DONE, only name the run directory of ``config``. Raises ConfigError before any work."""
    device = environment.choose_device(config.device)
    dataset.check(config.dataset)
    if config.budget.total and dataset.is_test_set(config.dataset):
        raise dataset.refuse_training(config.dataset)
    reward = make_reward(config.reward)
    model.check(config.model)
    problems = dataset.load(config.dataset, config.seed)
    check_gold(reward, [p for split in (problems.train, problems.validation, *problems.test.values()) for p in split])

    directory = run_directory(config, overrides)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(directory / ".lock", timeout=0)
        lock.acquire()
    except filelock.Timeout:
        owner = (directory / ".owner").read_text() if (directory / ".owner").is_file() else "unknown"
        raise ConfigError(
            f"another process ({owner}) is at work in {directory}; wait for it, or change seed or group"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"output_dir={config.output_dir}: cannot write {directory} ({error.strerror}); set output_dir=<directory>"
        ) from error
    with lock:
        write_text(directory / ".owner", f"{os.uname().nodename}, process {os.getpid()}")
        log_to_console()
        if (directory / "DONE").is_file():
            _say_done(directory)
            return directory
        handler = log_to_file(directory / "run.log")
        try:
            _Run(config, list(overrides), directory, device, problems, reward).execute()
        except Exception:
            log.exception("the run failed; the same command resumes from its last checkpoint")
            raise
        finally:
            log.removeHandler(handler)
            handler.close()
    return directory


@dataclass
class _Run:
    config: Config
    overrides: list[str]
    directory: Path
    device: torch.device
    problems: dataset.Splits
    reward: Reward

    def execute(self) -> None:
        config, directory, started = self.config, self.directory, time.perf_counter()
        threads = self._threads()
        torch.set_num_threads(threads)
        self._write_identity(threads)
        log.info("%s in %s", "resuming" if (directory / "checkpoints").is_dir() else "starting", directory)
        policy = model.load(config.model, config.seed, self.device)
        prompts, dropped = self._encode(policy.tokenizer)
        notes = [
            f"{n} {split} problems with prompts over {config.dataset.max_prompt_tokens} tokens were dropped"
            for split, n in dropped.items()
            if n
        ]
        for note in notes:
            log.warning(note)
        tracker = Tracker(
            config.tracker,
            directory,
            run_name=directory.name,
            group=config.group,
            job_type=config.objective.name,
            resolved_config=as_dict(config),
        )
        trainer = Trainer(config, directory, policy, prompts["train"], prompts["validation"], self.reward, tracker)
        tests = {name: prompts[name] for name in self.problems.test}
        before = {name: self._evaluate(policy, name, tests[name], "before") for name in tests}
        trainer.resume()
        state = trainer.run()
        after = {name: self._evaluate(policy, name, tests[name], "after") for name in tests}
        model.save(policy, directory / "model")
        summary: dict[str, Any] = {
            "status": "done",
            "run": directory.name,
            "objective": as_dict(config.objective),
            "seed": config.seed,
            "steps": state.progress.steps,
            "optimizer_steps": state.progress.optimizer_steps,
            "prompts": state.progress.prompts,
            "completion_tokens": state.progress.completion_tokens,
            "selection": config.selection,
            "selected_step": state.best_step if config.selection == "best" else state.progress.steps,
            "notes": notes,
            "evaluation": {name: {"before": before[name], "after": after[name]} for name in tests},
            "time/wall_s": trainer.wall_s + time.perf_counter() - started,
        }
        write_json(directory / "summary.json", summary)
        tracker.summarize(summary)
        tracker.close()
        report.write_curves(directory)
        report.write_report(directory)
        write_text(directory / "DONE", environment.code_digest() + "\n")
        console.print(report.final_table(summary, directory))

    def _threads(self) -> int:
        """The thread count of the directory's first process, so that a resumed run repeats its arithmetic."""
        recorded = self.directory / "environment.json"
        if self.config.threads is None and recorded.is_file():
            return int(json.loads(recorded.read_text())["threads"])
        return environment.choose_threads(self.config.threads)

    def _write_identity(self, threads: int) -> None:
        write_text(self.directory / "config.yaml", OmegaConf.to_yaml(as_dict(self.config)))
        write_text(self.directory / "overrides.yaml", OmegaConf.to_yaml(self.overrides))
        write_json(self.directory / "environment.json", environment.describe(threads, self.device))

    def _encode(self, tokenizer: Any) -> tuple[dict[str, list[Prompt]], dict[str, int]]:
        splits = {"train": self.problems.train, "validation": self.problems.validation} | self.problems.test
        encoded = {name: dataset.encode(tokenizer, self.config.dataset, split) for name, split in splits.items()}
        for name, (kept, dropped) in encoded.items():
            if dropped and not kept:
                raise self.config.dataset.refuse(
                    "max_prompt_tokens", f"all {dropped} {name} problems have longer prompts"
                )
        return {name: kept for name, (kept, _) in encoded.items()}, {name: n for name, (_, n) in encoded.items()}

    def _evaluate(self, policy: model.Policy, name: str, prompts: list[Prompt], when: str) -> dict[str, float]:
        """Greedy accuracy on a test set; every answer is kept in ``evaluation/``, and read again after a resume."""
        path = self.directory / "evaluation" / f"{name}_{when}.jsonl"
        path.parent.mkdir(exist_ok=True)
        if path.is_file() and when == "before":
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        else:
            rows = answer(
                policy,
                prompts,
                self.reward,
                self.config.rollout,
                seed=[self.config.seed, TEST, 0],
                greedy=True,
                track=lambda chunks: track(chunks, f"test on {name}, {when}", len(chunks)),
            )
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return summarize(rows)


def _say_done(directory: Path) -> None:
    log.info(
        "already done: %s (another seed or group makes a new run; delete the directory to run it again)", directory
    )
    if (directory / "DONE").read_text().strip() != environment.code_digest():
        log.warning("the code has changed since that run was made")


def _leave(status: int, sentence: str) -> None:
    console.print(f"pspo: {sentence}", markup=False, highlight=False, soft_wrap=True)
    sys.exit(status)


if __name__ == "__main__":
    cli()
