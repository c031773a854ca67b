"""Prompts from chat templates or plain text: worked examples, one date for all runs of a group, refusals."""

import contextlib
import string
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import filelock
from jinja2 import TemplateError

from pspo.base.files import write_text
from pspo.base.schema import ConfigError
from pspo.dataset.problem import Problem, Problems

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from pspo.dataset import DatasetConfig

PLAIN = "Question: {question}\nAnswer:"  # the prompt of a model without a chat template, such as many a base model
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, ArithmeticError, RecursionError)  # of a chat template
CLOCK = "strftime_now"  # the one function by which transformers lets a chat template see the clock


@dataclass(frozen=True)
class Prompt:
    """A problem, its rendered question, and in training its place in the data order."""

    problem: Problem
    token_ids: list[int]
    place: int = 0


def render(
    tokenizer: "Tokenizer",
    system_prompt: str,
    questions: Sequence[str],
    today: date | None = None,
    *,
    prompt: str | None = None,
    shots: Problems = (),
) -> list[list[int]]:
    """The token ids of each question's prompt, up to where the model begins to write.

    By the tokenizer's chat template, in which each of ``shots`` is a turn of the user and one of the assistant. With
    ``prompt``, and where the tokenizer has no chat template, as plain text: ``prompt`` or else ``PLAIN`` with the
    question in the place of {question}, behind the system prompt and the examples. A template that prints the date
    prints ``today``, by default the day of the call. Raises ConfigError where the template refuses.
    """
    if prompt is not None or not tokenizer.chat_template:
        form = prompt or PLAIN
        examples = [f"{form.replace('{question}', shot.question)} {shot.solution}" for shot in shots]
        before = [part for part in (system_prompt, *examples) if part]
        texts = ["\n\n".join([*before, form.replace("{question}", question)]) for question in questions]
        return [tokenizer.encode(text) for text in texts]
    template = (_clock(today) if today else "") + _template(tokenizer)
    if not questions:
        return []
    turns = [("system", system_prompt)] if system_prompt else []
    turns += [turn for shot in shots for turn in (("user", shot.question), ("assistant", shot.solution))]
    talk = [{"role": role, "content": text} for role, text in turns]
    messages = [[*talk, {"role": "user", "content": question}] for question in questions]
    try:
        ids = tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except TEMPLATE_ERRORS as error:
        remedy = "mend chat_template.jinja in the model's folder, or choose another model"
        if system_prompt:
            with contextlib.suppress(ConfigError):
                render(tokenizer, "", questions[:1], today, shots=shots)
                remedy = 'it writes prompts without a system message alone; set dataset.system_prompt=""'
        name = tokenizer.name_or_path or "this model"
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(f"the chat template of {name} refuses: {reason}; {remedy}") from error
    return cast(list[list[int]], ids)


def encode(
    tokenizer: "Tokenizer", config: "DatasetConfig", problems: Problems, today: date | None = None, shots: Problems = ()
) -> tuple[list[Prompt], int]:
    """The prompts of at most ``max_prompt_tokens``, in order, and the number of longer ones, which are dropped.

    Raises ConfigError where the chat template refuses a prompt, or leaves the system prompt out.
    """
    questions = [problem.question for problem in problems]
    form = partial(render, tokenizer, today=today, prompt=config.prompt, shots=shots)
    rendered = form(config.system_prompt, questions)
    if config.system_prompt and rendered[:1] == form("", questions[:1]) != []:
        raise config.refuse("system_prompt", 'the model\'s chat template leaves it out; set dataset.system_prompt=""')
    prompts = [Prompt(problem, token_ids) for problem, token_ids in zip(problems, rendered, strict=True)]
    short = [prompt for prompt in prompts if len(prompt.token_ids) <= config.max_prompt_tokens]
    return short, len(prompts) - len(short)


def prompt_date(tokenizer: "Tokenizer", group_directory: Path) -> date | None:
    """The day that all prompts of a group print, or None where the chat template does not print the date.

    The group's first run writes it into the file ``prompt_date`` of the group's directory. Raises ConfigError.
    """
    if not tokenizer.chat_template or CLOCK not in _template(tokenizer):
        return None
    path = group_directory / "prompt_date"
    try:
        with filelock.FileLock(path.with_name(".prompt_date.lock")):
            if not path.is_file():
                write_text(path, f"{date.today()}\n")
            return date.fromisoformat(path.read_text().strip())
    except (OSError, ValueError) as error:
        reason = f"which holds a day such as 2026-01-31, cannot be read or written: {error}"
        raise ConfigError(f"{path}, {reason}") from error


def _template(tokenizer: "Tokenizer") -> str:
    try:
        return tokenizer.get_chat_template()
    except ValueError:  # several with names
        several = f"the chat templates {', '.join(sorted(tokenizer.chat_template))} and none named default"
        remedy = "put a chat_template.jinja into the model's folder, or set dataset.prompt"
        raise ConfigError(
            f"the tokenizer of {tokenizer.name_or_path or 'this model'} has {several}; {remedy}"
        ) from None


def _clock(today: date) -> str:
    """A macro that replaces ``CLOCK`` in the template behind it: each directive of ``strftime`` by the day's text."""
    directives = [f"%{flag}{letter}" for flag in ("", "-") for letter in string.ascii_letters]
    replaced = "".join(f"|replace({directive!r}, {today.strftime(directive)!r})" for directive in directives)
    return f"{{% macro {CLOCK}(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n"
