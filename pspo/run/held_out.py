"""Held-out problems of a run: the test sets, their prompts, their graders, and the answers of its weights."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pspo import dataset, model
from pspo.base.console import log
from pspo.base.schema import as_dict
from pspo.config import Config
from pspo.dataset import Problem, Prompt, Splits
from pspo.evaluate import HeldOut, answer_sets
from pspo.model import Policy
from pspo.reward import Paper, Plain, default_reward
from pspo.rollout import OwnSampler

LATEX_SETS = ("math", "math500")  # whose gold answers are LaTeX


def problems(config: Config, splits: Splits) -> dict[str, list[Problem]]:
    """The problems of each test set of ``evaluate.sets``, by the set's name. Raises ConfigError."""
    if config.evaluate.sets is None:
        return splits.test
    tests = {}
    for name in config.evaluate.sets:
        if name == "validation":
            if not splits.validation:
                raise config.evaluate.refuse("sets", "there are no validation problems; set dataset.num_validation")
            tests[name] = splits.validation
        elif name in splits.test and name not in _others(config):
            tests[name] = splits.test[name]
        else:
            tests[Path(name).stem] = dataset.load_set(config.dataset, name, config.evaluate.path)
    return tests


def encoded(
    config: Config, problems: Mapping[str, list[Problem]], shots: Sequence[Problem], group: Path
) -> tuple[dict[str, list[Prompt]], list[str]]:
    """The prompts of every split, and sentences on the date that prompts have and on splits that lost long prompts.

    ``group`` is the directory whose runs print one date. Raises ConfigError where a split has no prompt left.
    """
    prompts, notes, tokenizer = dict[str, list[Prompt]](), list[str](), model.tokenizer(config.model)
    if not tokenizer.chat_template and config.dataset.prompt is None:
        notes.append("the tokenizer has no chat template, so prompts are plain text, 'Question: ...' and 'Answer:'")
    date = None if config.dataset.prompt else dataset.prompt_date(tokenizer, group)
    if date is not None:
        notes.append(f"the model's chat template prints a date, {date} in all runs of this group")
    for sentence in notes:
        log.info(sentence)
    for name, split in problems.items():
        prompts[name], dropped = dataset.encode(tokenizer, config.dataset, split, date, shots)
        if dropped:
            limit = f"prompts over {config.dataset.max_prompt_tokens} tokens"
            notes.append(f"{dropped} of {len(split)} {name} problems were dropped: {limit}")
            log.warning(notes[-1])
        if dropped and not prompts[name]:
            raise config.dataset.refuse("max_prompt_tokens", f"all {dropped} {name} prompts are longer")
    return prompts, notes


def sets(config: Config, prompts: Mapping[str, Sequence[Prompt]]) -> list[HeldOut]:
    """The test sets, each with the reward that grades it: the run's own, and reward=math in place of a numeric rule."""
    numeric = isinstance(config.reward, Plain | Paper)
    return [
        HeldOut(name, some, default_reward("math") if numeric and name in LATEX_SETS else config.reward)
        for name, some in prompts.items()
    ]


def answered(
    directory: Path, sets: Sequence[HeldOut], policy: Policy, config: Config, shots: Sequence[Problem], *, when: str,
    temperatures: Sequence[float], check_owner: Callable[[], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """The numbers of every set and temperature; the answers are in ``evaluation/<when>/<name>`` of the run."""
    settings = {
        "system_prompt": config.dataset.system_prompt,
        "prompt": config.dataset.prompt,
        "shots": [shot.id for shot in shots],
        "reward": as_dict(config.reward),
        "data": {name: dataset.set_digests(name, config.evaluate.path) for name in _others(config)},
    }
    numbers = answer_sets(
        directory / "evaluation" / when / config.evaluate.name, sets, partial(OwnSampler, policy), config.evaluate,
        config.rollout, temperatures=temperatures, settings=settings, seed=config.seed,
        title="test" if when == "after" else f"test, {when}", check_owner=check_owner,
    )  # fmt: skip
    return [{"when": when} | row for row in numbers]


def _others(config: Config) -> list[str]:
    """The test sets that are read for the evaluation alone, not with ``dataset``."""
    own = {config.dataset.name} if config.evaluate.path is None or config.dataset.name == "embedded" else set()
    return [name for name in config.evaluate.sets or [] if name not in {"validation", *own}]
