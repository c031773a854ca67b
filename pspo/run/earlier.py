"""What earlier runs left behind: runs to leave as they are, to move aside, and to continue with a longer budget."""

import json
import shutil
from pathlib import Path
from typing import Any

from pspo import checkpoint
from pspo.base.console import log
from pspo.base.files import new_directory, read_lines, write_text
from pspo.budget import Progress
from pspo.config import Config, identity, read, science
from pspo.host import environment
from pspo.run.lock import hold


def is_done(config: Config, directory: Path) -> bool:
    """Whether the run is finished and is to stay so; says so, and whether other code made it."""
    if not (directory / "DONE").is_file() or _is_rerun(config, directory):
        return False
    log.info("already done: %s; rerun=all makes it again, another seed or group makes a new run", directory)
    if _has_changed(config, directory):
        log.warning("the code has changed since that run was made; rerun=changed makes it again")
    return True


def found(config: Config, directory: Path) -> str:
    """What there is of a run: done, changed (done by other code), again (by ``rerun``), failed, resume or new."""
    if _is_rerun(config, directory):
        return "again"
    if (directory / "DONE").is_file():
        return "changed" if _has_changed(config, directory) else "done"
    if (directory / "FAILED").is_file():
        return "failed"
    return "resume" if (directory / "config.yaml").is_file() else "new"


def set_aside(config: Config, directory: Path) -> None:
    """Move a run that is to be made again to ``.replaced/`` of its group; nothing is deleted."""
    if not _is_rerun(config, directory):
        return
    with hold(directory):
        number = 1
        while (target := directory.parent / ".replaced" / f"{directory.name}.{number}").exists():
            number += 1
        target.parent.mkdir(exist_ok=True)
        directory.rename(target)
    log.info("the earlier run is now %s", target)


def check(config: Config, directory: Path) -> None:
    """Refuse a checkpoint that cannot be resumed and a run that cannot be continued. Raises ConfigError."""
    if not _is_rerun(config, directory):
        checkpoint.check(directory / "checkpoints", identity(config))
    if config.continue_from is None or (
        checkpoint.names(directory / "checkpoints") and not _is_rerun(config, directory)
    ):
        return
    source = Path(config.continue_from)
    if not (source / "DONE").is_file():
        raise config.refuse("continue_from", "is not the directory of a finished run; name one that holds DONE")
    before = read(source / "config.yaml")
    there, here = _flat(science(before)), _flat(science(config))
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name) and not name.startswith("budget."):
            raise config.refuse(
                "continue_from",
                f"only the budget may differ, but {name} is {there.get(name)} there and {here.get(name)} here",
            )
    for key, value in {"optimizer.decay": config.optimizer.decay, "smoothing": config.smoothing.name}.items():
        if value == "linear":
            reason = (
                f"{key}=linear follows the budget, so that a longer run differs from its first step on; run it anew"
            )
            raise config.refuse("continue_from", reason)
    progress = _progress(source)
    if config.budget.spent(progress):
        spent = getattr(progress, config.budget.unit)
        raise config.refuse(
            "continue_from", f"has spent {spent} {config.budget.unit} already; set a longer budget.{config.budget.unit}"
        )
    if config.selection == "best" and progress.steps % config.evaluation.every:
        raise config.refuse(
            "continue_from",
            f"its last validation, at step {progress.steps}, is one that a longer run with evaluation.every="
            f"{config.evaluation.every} does not make, and selection=best may have gone by it; run it anew",
        )


def carry_over(config: Config, directory: Path) -> None:
    """Begin ``directory`` with all that the run it continues had come to; a checkpoint comes last and seals it."""
    if config.continue_from is None or checkpoint.names(directory / "checkpoints"):
        return
    source = Path(config.continue_from)
    checkpoint.check(source / "checkpoints", identity(read(source / "config.yaml")))
    found = checkpoint.newest(source / "checkpoints")
    steps = _progress(source).steps
    if found is None or found[1]["state"]["progress"]["steps"] != steps:
        raise config.refuse("continue_from", f"its last checkpoint, of step {steps}, is missing or torn; run it anew")
    path, saved, meta = found
    rows = read_lines(source / "metrics.jsonl")[: saved["tracker"]["metrics_rows"]]
    if steps % config.evaluation.every:  # validated because it was the last, which it no longer is
        validated = ("validation/", "time/validation_s")
        rows[-1] = {name: value for name, value in rows[-1].items() if not name.startswith(validated)}
    write_text(directory / "metrics.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for name in ("completions.jsonl", "diagnostics.jsonl"):
        shutil.copyfile(source / name, directory / name)
    (directory / "evaluation").mkdir(exist_ok=True)
    for answers in (source / "evaluation").glob("*_before.jsonl"):
        shutil.copyfile(answers, directory / "evaluation" / answers.name)
    for best in (source / "checkpoints").glob("best_*"):
        with new_directory(directory / "checkpoints" / best.name) as beside:
            shutil.copytree(best, beside, dirs_exist_ok=True)
    about = {"identity": identity(config), "time/wall_s": meta["time/wall_s"]}
    checkpoint.save(directory / "checkpoints", path.name, saved, about)
    log.info("continuing %s from step %d", source, steps)


def code(config: Config) -> str:
    """A digest of the code that a run is made by, as ``DONE`` records it."""
    return environment.code_digest(*config.reward.source_files())


def _is_rerun(config: Config, directory: Path) -> bool:
    if config.rerun == "all":
        return (directory / "DONE").is_file()
    return config.rerun == "changed" and _has_changed(config, directory)


def _has_changed(config: Config, directory: Path) -> bool:
    """Whether other code finished the run in ``directory`` or, where it is not finished, was at work on it."""
    done, record = directory / "DONE", directory / "environment.json"
    if done.is_file():
        return done.read_text().strip() != code(config)
    return record.is_file() and json.loads(record.read_text())["code"]["sha256"] != environment.code_digest()


def _progress(source: Path) -> Progress:
    """What a finished run has spent."""
    rows = read_lines(source / "metrics.jsonl")
    return Progress(**{name: rows[-1][f"budget/{name}"] for name in vars(Progress())}) if rows else Progress()


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
