"""Upload what runs recorded offline to Weights & Biases, from a node with internet; safe to repeat.

python -m pspo.sync outputs/<group>
"""

import argparse
import json
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from pspo.base.command import answering
from pspo.base.files import write_json
from pspo.base.schema import ConfigError
from pspo.status import held

COMMAND = [sys.executable, "-m", "wandb", "sync", "--include-synced"]  # which parts are new is decided here
RECORD = ".uploaded.json"
"""Beside the parts: the name of each uploaded one with its size."""

REACH_S = 10
UPLOAD_S = 1800
"""W&B retries for ever; what one run has not uploaded by then is told, and left for the next time."""


@dataclass(frozen=True)
class Outcome:
    """What became of one run: parts uploaded now, and parts left, with the reason."""

    run: str
    uploaded: int
    left: int
    why: str = ""


def sync(directory: Path) -> list[Outcome]:
    """Upload the new parts of every run of a group, those of one run in the order of their start.

    A requeued run has one part for each of its processes, all with one id, and each goes on with the steps where the
    one before ended. The part of a process at work is left until it has ended. Raises ConfigError.
    """
    if not directory.is_dir():
        raise ConfigError(f"{directory} is no directory; give outputs/<group>")
    runs = [path.parent for path in sorted(directory.rglob("wandb.json")) if (path.parent / "wandb").is_dir()]
    new = {run: parts for run in runs if (parts := _new_parts(run))}
    if new:
        _check_reach()
    return [_upload(run, parts) for run, parts in new.items()]


def _parts(run: Path) -> list[Path]:
    """The transaction logs of a run's offline processes; a folder's name begins with the time of its start."""
    identity = json.loads((run / "wandb.json").read_text())["id"]
    return [path for folder in sorted(run.glob(f"wandb/offline-run-*-{identity}")) for path in folder.glob("*.wandb")]


def _new_parts(run: Path) -> list[Path]:
    done = _uploaded(run)
    return [part for part in _parts(run) if done.get(part.parent.name) != part.stat().st_size]


def _uploaded(run: Path) -> dict[str, int]:
    path = run / "wandb" / RECORD
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _upload(run: Path, parts: list[Path]) -> Outcome:
    at_work = held(run)
    ready = [part for part in parts if not (at_work and part == _parts(run)[-1])]
    if not ready:
        return Outcome(run.name, 0, len(parts), "the run is at work; repeat this when it has ended")
    sizes = {part: part.stat().st_size for part in ready}
    for part in ready:  # W&B puts its mark there only when all has arrived: its exit status is 0 in any case
        _mark(part).unlink(missing_ok=True)
    try:
        done = subprocess.run(
            [*COMMAND, *[str(part.parent.relative_to(run)) for part in ready]],
            cwd=run,  # where W&B leaves its own log
            capture_output=True,
            text=True,
            timeout=UPLOAD_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        lines = [line.removeprefix("wandb: ").strip() for line in (done.stdout + done.stderr).splitlines()]
    except subprocess.TimeoutExpired:
        lines = [f"not done after {UPLOAD_S} s"]
    if any("No API key" in line or "Not authenticated" in line for line in lines):
        raise ConfigError("W&B has no login here; run `wandb login` or set WANDB_API_KEY, then repeat this command")
    arrived = {part.parent.name: sizes[part] for part in ready if _mark(part).exists()}
    write_json(run / "wandb" / RECORD, _uploaded(run) | arrived)
    errors = [line for line in lines if "error" in line.lower()] or lines
    if len(arrived) < len(ready):
        why = f"W&B says: {errors[-1] if errors else 'nothing'}"
    else:
        why = "the run is at work; its last part is left until it has ended" if at_work else ""
    return Outcome(run.name, len(arrived), len(parts) - len(arrived), why)


def _mark(part: Path) -> Path:
    return part.with_suffix(".wandb.synced")


def _check_reach() -> None:
    """Refuse a server that cannot be reached, which ``wandb sync`` would ask for ever. Raises ConfigError."""
    import wandb

    url = str(wandb.setup().settings.base_url)
    try:
        urllib.request.urlopen(url, timeout=REACH_S).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except OSError as error:
        raise ConfigError(
            f"W&B cannot be reached at {url} ({getattr(error, 'reason', error)}); run this on a node with internet, "
            "or set WANDB_BASE_URL"
        ) from error


def main() -> None:
    """``python -m pspo.sync``: exit status 1 where something is left, 2 for a mistake."""
    parser = argparse.ArgumentParser(prog="python -m pspo.sync", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("group", type=Path, help="outputs/<group>")
    with answering(ConfigError, stopped="stopped; the same command uploads what is left"):
        outcomes = sync(parser.parse_args().group)
    for outcome in outcomes:
        told = f"{outcome.uploaded} uploaded, {outcome.left} left" + (f": {outcome.why}" if outcome.why else "")
        sys.stdout.write(f"{outcome.run}: {told}\n")
    sys.stdout.write("" if outcomes else "nothing new to upload\n")
    sys.exit(1 if any(outcome.left for outcome in outcomes) else 0)


if __name__ == "__main__":
    main()
