"""Answers to held-out problems: validation in training, and test answers in files that a later process goes on with."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

from pspo.base.console import log, track
from pspo.base.files import JsonLines, read_json, read_lines, write_json
from pspo.base.stream import Stream, generator
from pspo.checkpoint import random_state_kept, seed_global_generators
from pspo.dataset import Problem, Prompt
from pspo.evaluate.config import EvaluateConfig
from pspo.evaluate.summary import summarize
from pspo.host import interrupt
from pspo.reward import Reward
from pspo.rollout import Completion, RolloutConfig, Sampler

SETTINGS = "settings.json"  # in a folder of answers: how the answers were sampled and graded


@dataclass(frozen=True)
class HeldOut:
    """The problems of one test set as prompts, and the reward that grades their answers."""

    name: str
    prompts: Sequence[Prompt]
    reward: Reward


def answer_sets(
    directory: Path, sets: Sequence[HeldOut], make_sampler: Callable[[RolloutConfig], Sampler], config: EvaluateConfig,
    rollout: RolloutConfig, *, temperatures: Sequence[float], settings: Mapping[str, Any], seed: int, title: str,
    check_owner: Callable[[], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """Answer every set at every temperature in ``directory``; returns one row of numbers for each.

    ``directory`` is ``evaluation/<when>/<config.name>``; what it holds already is not answered again. ``settings`` say
    how prompts and grades are made. Raises ConfigError where ``directory`` holds answers with other settings.
    """
    length = config.max_new_tokens or rollout.max_new_tokens
    rollout = replace(rollout, top_p=config.top_p, max_new_tokens=length)
    record, about = read_json(directory / SETTINGS), {"top_p": config.top_p, "max_new_tokens": length, **settings}
    if changed := [name for name in about if record and record.get(name) != about[name]]:
        reason = f"{directory} holds answers with another {', '.join(changed)}; give evaluate.name=<another name>"
        raise config.refuse("name", reason)
    directory.mkdir(parents=True, exist_ok=True)
    ungradable = {each.name: len(each.reward.ungradable([p.problem for p in each.prompts])) for each in sets}
    ungradable = record.get("ungradable", {}) | ungradable
    write_json(directory / SETTINGS, about | {"samples": config.samples, "ungradable": ungradable})
    numbers = []
    for each in sets:
        for temperature in temperatures:
            sampler = make_sampler(replace(rollout, temperature=temperature or 1.0))
            rows = answer_into(
                directory / f"{each.name}_t{temperature:g}.jsonl", sampler, each.prompts, each.reward,
                samples=config.num_samples(temperature), greedy=temperature == 0, max_rows=rollout.max_rows, seed=seed,
                title=f"{title} on {each.name}" + (f" at T={temperature:g}" if temperature else ""),
                check_owner=check_owner,
            )  # fmt: skip
            about = {"set": each.name, "temperature": temperature, "evaluation": config.name}
            numbers.append(about | summarize(rows) | {"ungradable": ungradable[each.name]})
    return numbers


def answer_into(
    path: Path, sampler: Sampler, prompts: Sequence[Prompt], reward: Reward, *,
    samples: int, greedy: bool, max_rows: int, seed: int, title: str, check_owner: Callable[[], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """``samples`` answers to each problem of a test set in a file, a line for each; returns the lines.

    After every ``max_rows`` answers the file is flushed; a later process gives the answers that the file lacks. Its
    batches and the state of the global generators, from which a user's reward may draw, are those of an unbroken
    process, and so are the file's bytes.
    """
    lines, batch_size = JsonLines(path), max(1, max_rows // samples)
    asked = {prompt.problem.id: asked_of(prompt.problem) for prompt in prompts}
    # Lines from the first on that answers another question under a known name are of other data, and so go.
    valid = takewhile(lambda row: asked.get(row["problem"], row).items() <= row.items(), read_lines(path))
    rows = {(row["problem"], row["sample"]): row for row in valid}
    lines.cut(len(rows))
    parts = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    wanted = [(prompt.problem.id, sample) for prompt in prompts for sample in range(samples)]
    missing = sum(place not in rows for place in wanted)
    with random_state_kept():
        for number, part in enumerate(track(parts, title, len(prompts), "problems") if missing else ()):
            if all((prompt.problem.id, sample) in rows for prompt in part for sample in range(samples)):
                continue
            seed_global_generators(int(generator(seed, Stream.TEST, number * batch_size).integers(2**32)))
            answers = answer(sampler, part, reward, samples=samples, seed=[seed, Stream.TEST], greedy=greedy)
            check_owner()
            for row in answers:
                if (place := (row["problem"], row["sample"])) not in rows:
                    rows[place] = row
                    lines.append(row)
            lines.sync()
            interrupt.check()
    return [rows[place] for place in wanted]


def validate(
    sampler: Sampler, prompts: Sequence[Prompt], reward: Reward, rollout: RolloutConfig, *, seed: int, step: int
) -> dict[str, float]:
    """Greedy and sampled answers to held-out training problems as metrics; the global generators stay as they were."""
    begun, seeds, metrics = time.perf_counter(), [seed, Stream.VALIDATION, step], dict[str, float]()
    parts = [prompts[start : start + rollout.max_rows] for start in range(0, len(prompts), rollout.max_rows)]

    def answers(greedy: bool) -> Iterator[list[dict[str, Any]]]:
        for part in parts:
            yield answer(sampler, part, reward, samples=1, seed=seeds, greedy=greedy)

    with random_state_kept():
        for how, names in (("greedy", ["accuracy"]), ("sampled", ["accuracy", "reward_mean"])):
            tracked = track(answers(how == "greedy"), "validation", len(prompts), "problems")
            summary = summarize(chain(*tracked))
            metrics |= {f"validation/{how}_{name}": summary[name] for name in (*names, "length_mean")}
    text = "step %d: validation accuracy %.1f %% greedy, %.1f %% sampled, %.1f tokens"
    greedy_accuracy, sampled_accuracy = (100 * metrics[f"validation/{how}_accuracy"] for how in ("greedy", "sampled"))
    log.info(text, step, greedy_accuracy, sampled_accuracy, metrics["validation/sampled_length_mean"])
    return metrics | {"time/validation_s": time.perf_counter() - begun}


def answer(
    sampler: Sampler, prompts: Sequence[Prompt], reward: Reward, *, samples: int, seed: Sequence[int], greedy: bool
) -> list[dict[str, Any]]:
    """``samples`` scored completions of each prompt as rows for a file, decoded and graded in one batch."""
    completions = sampler.sample(prompts, samples, seed, greedy=greedy)
    return [completion_row(replace(c, score=s)) for c, s in zip(completions, reward(completions), strict=True)]


def completion_row(completion: Completion) -> dict[str, Any]:
    """A scored completion as one line of a file."""
    about = {"completion": completion.text, "sample": completion.sample}
    length = {"tokens": len(completion.token_ids), "truncated": not completion.finished}
    return asked_of(completion.problem) | about | vars(completion.score) | length


def asked_of(problem: Problem) -> dict[str, str]:
    """The part of ``completion_row`` that describes the problem."""
    return {"problem": problem.id, "question": problem.question, "answer": problem.answer}
