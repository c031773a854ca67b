"""A run's directory: its name, what earlier processes left in it, and how a shorter run is continued there."""

import contextlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import torch
from omegaconf import OmegaConf

from pspo import checkpoint, dataset, model
from pspo.base.console import log
from pspo.base.files import digest, read_json, read_lines, write_json, write_text
from pspo.base.schema import ConfigError, as_dict, dotted, keys_of
from pspo.budget import Progress
from pspo.config import NOT_SCIENCE, Config, groups, identity, read, science
from pspo.host import environment
from pspo.run.lock import Owner, hold

INPUTS = "inputs.json"  # in a run directory: the result of inputs() when the run began
NAMELESS = (*NOT_SCIENCE, "evaluate", "objective", "seed")  # blocks and keys that add no word to a run's name
LABEL_CHARACTERS = 80  # in a run's name, for words; more words are counted as _+2. A file's name may have 255 bytes.


def run_directory(config: Config, overrides: Sequence[str]) -> Path:
    """``output_dir/group/<objective>_<its keys>_<other keys>_seed<seed>_<identity>``, or the one with that identity."""
    parent = Path(config.output_dir) / config.group
    earlier = sorted(parent.glob(f"*_{identity(config)}")) if parent.is_dir() else []
    return earlier[0] if earlier else parent / f"{_label(config, overrides)}_seed{config.seed}_{identity(config)}"


def _label(config: Config, overrides: Sequence[str]) -> str:
    """The objective, the overrides of its keys, then the others, as short as is clear, with no need of shell quotes."""
    keys = [key.removeprefix("objective.") for key, _, _ in keys_of(Config, as_dict(config))]
    short = short_names(key for key in keys if not key.startswith("evaluate.") or key == "evaluate.every")
    options = Counter(option for names in groups().values() for option in names)
    words: dict[str, str] = {}
    for override in overrides:
        name, _, value = override.lstrip("+").partition("=")
        if name.startswith("objective.") or name == "evaluate.every" or name.partition(".")[0] not in NAMELESS:
            value = re.sub(r"[^\w.+-]+", "-", Path(value).name.strip("[](){}\"' "), flags=re.ASCII)
            key_word = short.get(name.removeprefix("objective."), name)
            words[name] = value if name in groups() and options[value] == 1 else f"{key_word}={value}"
    label, num_left_out = config.objective.name, 0
    for name in sorted(words, key=lambda name: (not name.startswith("objective."), name)):
        fits = len(label) + 1 + len(words[name]) <= LABEL_CHARACTERS
        label, num_left_out = (f"{label}_{words[name]}", num_left_out) if fits else (label, num_left_out + 1)
    return f"{label}_+{num_left_out}" if num_left_out else label


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """``lr`` for ``optimizer.lr``: each key's shortest end, in whole words, that is of no other key as short as it."""
    parts = {key: key.split(".") for key in keys}
    ends = sorted((len(words), ".".join(words[at:]), key) for key, words in parts.items() for at in range(len(words)))
    owners: dict[str, list[tuple[int, str]]] = {}
    for depth, end, key in ends:
        owners.setdefault(end, []).append((depth, key))
    own = [(key, end) for end, [(depth, key), *others] in owners.items() if not others or others[0][0] > depth]
    return dict(sorted(own, key=lambda pair: -len(pair[1])))


@dataclass(frozen=True)
class History:
    """What earlier processes left in a run directory."""

    state: str  # new, resume, failed (by an error), done, changed (done, from other inputs), again (moved aside)
    changed: list[str]  # names of the inputs that differ today


def inputs(config: Config) -> dict[str, str]:
    """Digests of code, own reward and objective, data and model, or their commits on the hub. Raises ConfigError."""
    own = {str(path): digest(path) for path in (*config.reward.source_files(), *config.objective.source_files())}
    return {"code": environment.code_digest()} | own | dataset.digests(config.dataset) | model.digests(config.model)


def look(config: Config, directory: Path) -> History:
    """The state of a run. Raises ConfigError for checkpoints that this run must not resume from."""
    done, changed = (directory / "DONE").is_file(), _changed(config, directory)
    if (changed and config.rerun in ("changed", "all")) or (done and config.rerun == "all"):
        return History("again", changed)
    if done:
        return History("changed" if changed else "done", changed)
    checkpoint.check(directory / "checkpoints", identity(config))
    others = [name for name in changed if name != "code"]
    has_checkpoint = bool(checkpoint.names(directory / "checkpoints"))
    if has_checkpoint and others and config.rerun != "resume":
        reason = f"{directory} is unfinished, and since it began {', '.join(others)} changed"
        remedy = "rerun=changed begins it anew, and rerun=resume resumes it nevertheless"
        raise config.refuse("rerun", f"{reason}; {remedy}")
    if not has_checkpoint and config.continue_from is not None:
        check_source(config, Path(config.continue_from))
    begun = "resume" if (directory / "config.yaml").is_file() else "new"
    return History("failed" if (directory / "FAILED").is_file() else begun, changed)


def is_finished(config: Config, directory: Path) -> bool:
    """Whether a run is done and not to be made again; if so, logs that, and which inputs have changed since."""
    if not (directory / "DONE").is_file() or (history := look(config, directory)).state == "again":
        return False
    log.info("already done: %s; rerun=all makes it again, another seed or group makes a new run", directory)
    if history.changed:
        log.warning("since that run began, %s changed; rerun=changed makes it again", ", ".join(history.changed))
    return True


def set_aside(directory: Path) -> None:
    """Move a run that is to be made again to ``.replaced/`` of its group; nothing is deleted."""
    with hold(directory):
        targets = (directory.parent / ".replaced" / f"{directory.name}.{number}" for number in count(1))
        target = next(path for path in targets if not path.exists())
        target.parent.mkdir(exist_ok=True)
        directory.rename(target)
    log.info("the earlier run is now %s", target)


def begin(config: Config, directory: Path, overrides: Sequence[str], device: torch.device, owner: Owner) -> None:
    """Record inputs, settings and machine of a run's process, and set its CPU threads and seeds.

    With a checkpoint the recorded inputs stay, and the CPU threads are the first process's: sums round alike.
    """
    before, now = read_json(directory / INPUTS), inputs(config)
    if not (before and checkpoint.names(directory / "checkpoints")):
        if before not in ({}, now):
            shutil.rmtree(directory / "evaluation", ignore_errors=True)  # answers that were made from other inputs
        write_json(directory / INPUTS, now)
    entries = environment.history(directory)
    threads = environment.choose_threads(config.threads or (entries[0]["threads"] if entries else None))
    about = {"host": owner.host, "job_id": owner.job_id, "time/started": owner.started}
    for difference in environment.record(directory, environment.describe(threads, device) | about):
        log.warning("since the run's last process, %s", difference)
    write_text(directory / "config.yaml", OmegaConf.to_yaml(as_dict(config)))
    write_text(directory / "overrides.yaml", OmegaConf.to_yaml(list(overrides)))
    torch.set_num_threads(threads)
    checkpoint.seed_global_generators(config.seed)
    log.info("%s on %s with %d CPU threads", directory, device, threads)


def check_source(config: Config, source: Path) -> Progress:
    """The budget that the run in ``source`` has spent. Raises ConfigError where ``config`` cannot continue from it."""
    refuse = partial(config.refuse, "continue_from")
    if not (source / "DONE").is_file():
        raise refuse("is not the directory of a finished run; name one that holds DONE")
    there, here = dotted(science(read(source / "config.yaml"))), dotted(science(config))
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name) and not name.startswith("budget."):
            both = f"{name} is {there.get(name)} there and {here.get(name)} here"
            raise refuse(f"only the budget may differ, but {both}; leave it out, or run it anew")
    for name, value in {"optimizer.decay": config.optimizer.decay, "smoothing": config.smoothing.name}.items():
        if value == "linear":
            raise refuse(f"{name}=linear follows the budget, so that a longer run differs from step 1 on; run it anew")
    others = [name for name in _changed(config, source) if name != "code"]
    if others and config.rerun != "resume":
        raise refuse(f"since that run began, {', '.join(others)} changed; rerun=resume continues it nevertheless")
    last, unit = (read_lines(source / "metrics.jsonl") or [{}])[-1], config.budget.unit
    spent = Progress(**{name: last.get(f"budget/{name}", 0) for name in vars(Progress())})
    if config.budget.spent(spent):
        raise refuse(f"has spent {getattr(spent, unit)} {unit} already; set a longer budget.{unit}")
    if config.selection == "best" and spent.steps % config.evaluate.every:
        raise refuse(
            "selection=best may have gone by its last validation, which a longer run does not make; run it anew"
        )
    return spent


def shorter(config: Config, directory: Path) -> Path | None:
    """The longest finished run of the group that a new run in ``directory`` could continue from, if there is any."""
    sources = list[tuple[int, Path]]()
    for source in (done.parent for done in directory.parent.glob(f"*_seed{config.seed}_*/DONE")):
        with contextlib.suppress(ConfigError):
            sources.append((check_source(config, source).steps, source))
    return max(sources)[1] if sources else None


def carry_over(config: Config, directory: Path) -> None:
    """Copy the files and the last checkpoint of ``continue_from``; the checkpoint comes last, so that it seals them."""
    if config.continue_from is None or checkpoint.names(directory / "checkpoints"):
        return
    source = Path(config.continue_from)
    steps = check_source(config, source).steps
    checkpoint.check(source / "checkpoints", identity(read(source / "config.yaml")))
    newest = checkpoint.newest(source / "checkpoints")
    if newest is None or newest[1]["state"]["progress"]["steps"] != steps:
        raise config.refuse("continue_from", f"its last checkpoint, of step {steps}, is missing or torn; run it anew")
    path, saved, _ = newest
    rows = read_lines(source / "metrics.jsonl")[: saved["tracker"]["metrics_rows"]]
    if steps % config.evaluate.every:  # validated because it was the last, which it no longer is
        rows[-1] = {name: value for name, value in rows[-1].items() if "validation" not in name}
    write_text(directory / "metrics.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for name in ("completions.jsonl", "diagnostics.jsonl", INPUTS, environment.RECORD):
        shutil.copyfile(source / name, directory / name)
    for folder in (*source.glob("evaluation/before"), *source.glob("checkpoints/best_*")):
        shutil.copytree(folder, directory / folder.relative_to(source), dirs_exist_ok=True)
    checkpoint.save(directory / "checkpoints", path.name, saved, {"identity": identity(config)})
    log.info("continuing %s from step %d", source, steps)


def _changed(config: Config, directory: Path) -> list[str]:
    """Names of the inputs that differ from the recorded ones; [] on a node that does not see the data or the model."""
    before = read_json(directory / INPUTS)
    with contextlib.suppress(ConfigError):
        now = inputs(config) if before else {}
        return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return []
