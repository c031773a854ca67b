"""The doctor's real check of the chosen model: a step and its resume, speeds beside the machine's, what fits, cost."""

import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pspo import checkpoint, dataset, model
from pspo.base.files import read_json, read_lines
from pspo.base.schema import ConfigError
from pspo.base.statistics import Statistics
from pspo.budget import gpu_hours
from pspo.config import Config
from pspo.dataset import Problem, Prompt, embedded
from pspo.doctor import Finding, found, refused, size
from pspo.doctor.limits import free_gib, limits, row_bytes, speeds
from pspo.host import environment, speed
from pspo.host.memory import call_peak_gib
from pspo.model import source, warm_start
from pspo.reward import Answered, Reward, Score
from pspo.tracker import Tracker, TrackerConfig
from pspo.trainer import Trainer
from pspo.update.rows import GAP, Row, micro_batches
from pspo.update.step import MAX_GAP_NATS, accumulate

WORK_S = 4.0  # seconds that measured work takes at the machine's matrix rate; in truth some times as long
SAVE_S = 20.0  # a checkpoint that takes longer to write is not written, and resume not tried
USABLE_SHARE = 0.9  # of free memory
NUM_PROBLEMS = 256  # of the data set's, from which the prompts are


def checks(config: Config, folder: Path, bytes_per_s: float) -> Iterator[Finding]:
    """All findings that need the model, with a disk of so many bytes per second. Raises what a run raises."""
    device = environment.choose_device(config.device)
    torch.set_num_threads(environment.choose_threads(config.threads))
    rates, num_parameters = speeds(config, device), count_parameters(config)
    fits, saved = needs(config, num_parameters, free_gib(device), shutil.disk_usage(folder).free, bytes_per_s)
    yield from (rates, fits, saved)
    problems: Sequence[Problem] = embedded.load("train", NUM_PROBLEMS)
    try:
        problems = dataset.load(config.dataset, config.seed).train[:NUM_PROBLEMS]
    except ConfigError as error:
        yield refused("dataset", error)
    prompts, _ = dataset.encode(model.tokenizer(config.model), config.dataset, problems)
    if not prompts:
        raise config.dataset.refuse("max_prompt_tokens", "every prompt is longer; raise it")
    if fits.verdict != "fail":
        with tempfile.TemporaryDirectory(prefix=".pspo_doctor_", dir=folder) as place:
            saves = bytes_per_s > 0 and saved.numbers["write_s"] < SAVE_S
            yield from learning(config, rates.numbers, num_parameters, prompts, Path(place), saves)


def count_parameters(config: Config) -> int:
    """The number of the model's parameters, by its configuration alone. Raises ConfigError where it is not here."""
    settings = config.model
    folder = warm_start.cached(settings, config.seed) if settings.made_here else source.locate(settings)
    make: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        made = make(AutoConfig.from_pretrained(folder))
    return sum(parameter.numel() for parameter in made.parameters())


def needs(
    config: Config, num_parameters: int, free: float, disk_bytes: int, bytes_per_s: float
) -> tuple[Finding, Finding]:
    """Memory of weights, gradient and optimizer in ``free`` GiB; disk of a checkpoint, which is weights and moments."""
    weights, trains_all = num_parameters * getattr(torch, config.model.dtype).itemsize, not config.model.lora.rank
    needed = weights * (1 + 3 * trains_all + (config.loss.kl != "none")) / 2**30
    fail = "model.lora.rank=16, or a smaller model" * (needed > USABLE_SHARE * free)
    text = "{parameters:,} parameters; training holds {needed_gib:.2g} GiB of {free_gib:.1f} free, activations aside"
    fits = found("model", text, fail=fail, parameters=num_parameters, needed_gib=needed, free_gib=free)
    saved = 3 * weights * trains_all
    whole, write_s = saved * (config.checkpoint.keep + 1) + weights, saved / max(bytes_per_s, 1.0)
    warn = "checkpoint.keep=1, or output_dir=<a larger disk>" * (whole > disk_bytes)
    text = f"{size(saved)} with Adam, written in {{write_s:.2g}} s; a run takes up to {size(whole)} of disk"
    about = {"bytes": saved, "write_s": write_s, "run_bytes": whole}
    return fits, found("checkpoint", text, warn=warn, hint=f"checkpoint.every={config.checkpoint.every}", **about)


def learning(
    config: Config, rates: dict[str, Any], num_parameters: int, prompts: list[Prompt], place: Path, saves: bool
) -> Iterator[Finding]:
    """Two steps of a run, the second once more after a resume; then speeds, what fits, and what a whole run costs."""
    device, operations_per_s = environment.choose_device(config.device), rates["operations_per_s"]
    prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts) / len(prompts)
    short = shortened(config, num_parameters / operations_per_s, prompt_tokens)
    checkpoint.seed_global_generators(config.seed)

    def begin() -> Trainer:
        policy = model.load(config.model, config.seed, device)
        return Trainer(short, place, policy, prompts, [], cast(Reward, in_turns), Tracker(short.tracker, place))

    trainer = begin()
    if saves:
        trainer.run()
        rows = read_lines(place / "metrics.jsonl")
        del trainer
        trainer = begin()
        yield resumed(trainer, rows)
    else:
        rows = [trainer._step(), trainer._step()]
        yield found("resume", "not tried: a checkpoint takes too long to write", hint="output_dir=<a faster disk>")
    last, rollout, bound = rows[-1], short.rollout, MAX_GAP_NATS[config.model.autocast]
    text = "sampler and trainer differ by {gap:.1g} nats a token, where at most {bound:g} are rounding"
    yield found("gap", text, gap=last[GAP], bound=bound)
    num_rows, length = rollout.prompts * rollout.group_size, rollout.max_new_tokens
    at_once, context = min(rollout.max_rows, num_rows), prompt_tokens + length / 2
    sampled, learned = limits(trainer.policy, at_once, context, rates["bytes_per_s"], operations_per_s)
    tokens = last["budget/completion_tokens"] - rows[-2]["budget/completion_tokens"]
    rate = tokens / last["time/rollout_s"]
    text = "{rate:,.0f} tokens/s, {at_once} rows at a time: {share:.1%} of the machine's limit"
    yield found("decode", text, rate=rate, at_once=at_once, share=rate / min(sampled, 3 * learned))
    yield from fitting(config, trainer, prompts[0], learned)
    full = config.rollout.prompts * config.rollout.group_size * config.rollout.max_new_tokens / (num_rows * length)
    yield from cost(config, full * last["time/step_s"], full * last["time/rollout_s"], device)


def shortened(config: Config, parameter_s: float, prompt_tokens: float) -> Config:
    """Two steps of the run, checkpointed, with as many tokens and prompts as ``WORK_S`` allows.

    A token costs 2 operations for each parameter where it is decoded and 6 where it is learned from; ``parameter_s`` is
    the time of one operation for each parameter.
    """
    rollout, epochs = config.rollout, config.update.num_epochs
    for name, least in (("max_new_tokens", 16), ("prompts", 1), ("group_size", 2)):
        while (value := getattr(rollout, name)) > least:
            length, rows = rollout.max_new_tokens, rollout.prompts * rollout.group_size
            if rows * (2 * length + 6 * epochs * (length + prompt_tokens)) * parameter_s <= WORK_S:
                break
            rollout = replace(rollout, **{name: max(least, value // 2)})
    minibatches = min(config.update.num_minibatches, rollout.prompts * rollout.group_size)
    return replace(
        config, rollout=rollout, update=replace(config.update, num_minibatches=minibatches), selection="last",
        budget=replace(config.budget, steps=2, prompts=None, completion_tokens=None),
        checkpoint=replace(config.checkpoint, every=1, keep=2), tracker=TrackerConfig(name="jsonl"),
    )  # fmt: skip


def in_turns(completions: Sequence[Answered]) -> list[Score]:
    """Rewards 0 and 1 in turns, so that every group teaches something."""
    return [Score(float(i % 2), False, {}, False) for i in range(len(completions))]


def resumed(trainer: Trainer, unbroken: list[dict[str, Any]]) -> Finding:
    """The second step once more, from the checkpoint of the first: bitwise on a CPU, from the exact state on a GPU."""
    last = trainer.checkpoints / "step_000002"
    digest = read_json(last / "meta.json")["sha256"]
    shutil.rmtree(last)
    trainer.resume()
    newest = checkpoint.newest(trainer.checkpoints)
    saved = newest[1]["weights"] if newest else {}
    weights = checkpoint.weights(trainer.policy).items()
    restored = all(name in saved and torch.equal(weight.cpu(), saved[name]) for name, weight in weights)
    trainer.run()
    again = read_lines(trainer.directory / "metrics.jsonl")
    rows = [[{k: v for k, v in row.items() if "time/" not in k and "memory/" not in k} for row in run]
            for run in (unbroken, again)]  # fmt: skip
    bitwise = rows[0] == rows[1] and digest == read_json(last / "meta.json")["sha256"]
    is_exact = restored and (bitwise or trainer.policy.device.type == "cuda")
    fail = "threads=1, and this command again; where that does not mend it, report both outputs" * (not is_exact)
    text = "a step after a resume equals the unbroken one" + ("" if bitwise else ", though not") + " to the last bit"
    return found("resume", text, fail=fail, restored=restored, bitwise=bitwise)


def fitting(config: Config, trainer: Trainer, prompt: Prompt, limit: float) -> Iterator[Finding]:
    """The update's speed; the largest micro-batch, by memory's slope between two; and the rows of a rollout."""
    policy, rollout, prompt_tokens = trainer.policy, config.rollout, len(prompt.token_ids)
    num_rows, affordable = rollout.prompts * rollout.group_size, WORK_S * limit
    length = max(8, min(rollout.max_new_tokens, int(affordable / 2) - prompt_tokens))
    zeros, ids = [0.0] * length, (prompt.token_ids * length)[:length]
    row = Row(prompt.token_ids, ids, zeros, [1.0] * length, zeros, zeros, zeros)
    free, points = free_gib(policy.device), []
    most = max(2, min(int(affordable / (prompt_tokens + length)), num_rows))
    for number in (max(1, most // 4), most):
        work = partial(accumulate, trainer.learner, [row] * number, Statistics(), max_tokens=10**9)
        sizes = [batch.input_ids_RS.numel() for _, batch in micro_batches([row] * number, policy, 10**9)]
        points.append((max(sizes), call_peak_gib(work, policy.device)))
    rate = sum(sizes) / speed.seconds(work, policy.device)
    text = "{rate:,.0f} tokens/s, {size:,} at a time: {share:.1%} of the matrix rate"
    yield found("update", text, rate=rate, size=max(sizes), share=rate / limit)
    (less, low), (more, high) = points
    slope, chosen = max((high - low) / max(more - less, 1), 1e-9), config.update.max_tokens  # GiB of a token
    largest = max(1, more + int((USABLE_SHARE * free - high) / slope))
    warn = f"update.max_tokens={2 ** int(math.log2(largest))}, or model.gradient_checkpointing=true"
    text = "about {largest:,} tokens fit, at {kib:.0f} KiB each; update.max_tokens={chosen}"
    numbers: dict[str, Any] = {"largest": largest, "kib": slope * 2**20, "chosen": chosen}
    yield found("micro-batch", text, warn=warn * (chosen > largest), **numbers)
    mib, wanted = row_bytes(policy, prompt_tokens + rollout.max_new_tokens) / 2**20, min(rollout.max_rows, num_rows)
    fit = max(1, int(USABLE_SHARE * free * 2**10 / mib))
    text = "about {fit:,} rows fit, at {mib:.2g} MiB each; a step decodes {wanted} at a time"
    yield found("rollout rows", text, warn=f"rollout.max_rows={fit}" * (wanted > fit), fit=fit, mib=mib, wanted=wanted)


def cost(config: Config, step_s: float, rollout_s: float, device: torch.device) -> Iterator[Finding]:
    """Hours of this run and of the paper's table, by the function of a sweep's dry run."""
    from pspo.compare.published import table_cost  # with pandas and all that draws pages

    rollout, name = config.rollout, config.model.name
    tokens = rollout.prompts * rollout.group_size * rollout.max_new_tokens
    steps = math.ceil(config.budget.total / {"steps": 1, "prompts": rollout.prompts}.get(config.budget.unit, tokens))
    hours, unit = gpu_hours(1, steps * step_s / 3600), "GPU-hours" if device.type == "cuda" else "hours of this CPU"
    text, hint = "{steps} steps of {step_s:.2g} s: {hours:.2g} {unit}", f"hydra.launcher.hours_per_run={hours:.2g}"
    yield found("this run", text, hint=hint, steps=steps, step_s=step_s, hours=hours, unit=unit)
    table = table_cost({name: (step_s, rollout_s)})
    known, recipes = table.dropna(), {each.split("_")[1] + "_" + each.split("_")[2] for each in table["experiment"]}
    hint = " or ".join(f"model={each}" for each in sorted(recipes - {name}))
    if known.empty:
        yield found("paper's table", "no recipe trains model={name}", hint=f"{hint} measures it", name=name)
    else:
        text = "{num} of {of} recipes, 5 seeds each: {hours:.3g} {unit}"
        total = float(known["gpu_hours"].sum())
        yield found("paper's table", text, hint=f"{hint} for the rest", num=len(known), of=len(table), hours=total,
                    unit=unit)  # fmt: skip
