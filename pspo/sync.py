"""Send Weights & Biases what it lacks of a group's runs, from a machine with a network; safe to repeat.

python -m pspo.sync outputs/<group>
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pspo.base.command import answering
from pspo.base.files import read_lines, write_json
from pspo.base.schema import ConfigError
from pspo.tracker.wandb import Mirror, check_login


@dataclass(frozen=True)
class Outcome:
    """The rows of one run sent now, and why W&B still lacks rows; "" where it has all."""

    run: str
    num_sent: int
    error: str


def sync(directory: Path) -> list[Outcome]:
    """Send the rows that W&B lacks of every run of a group with ``tracker=wandb``, and the summary of a finished run.

    A run that is not DONE may take back the rows after its newest checkpoint, so they are left for a later call. A run
    is passed over once W&B's own last step has shown that all its rows arrived. Raises ConfigError.
    """
    if not directory.is_dir():
        raise ConfigError(f"{directory} is no directory; give outputs/<group>")
    durable = {path.parent: _durable_rows(path.parent) for path in sorted(directory.rglob("wandb.json"))}
    records = {run: json.loads((run / "wandb.json").read_text()) for run in durable}
    lacking = [run for run, rows in durable.items() if rows and records[run].get("arrived") != _state(run, rows)]
    if lacking:
        check_login()
    return [_send(run, durable[run], records[run]) for run in lacking]


def _send(run: Path, rows: list[dict[str, Any]], record: dict[str, Any]) -> Outcome:
    state, num_sent = _state(run, rows), 0
    for _ in range(2):  # the second mirror learns from W&B's last step whether the rows of the first arrived
        mirror = Mirror(run, replay=True)
        mirror.send(rows)
        if state["done"]:
            mirror.summarize(json.loads((run / "summary.json").read_text()))
        mirror.close(int((run / "FAILED").is_file()))
        if mirror.error or not mirror.num_sent:
            break
        num_sent = num_sent or mirror.num_sent
    error = mirror.error or (f"W&B still lacks {mirror.num_sent}; see {run / 'wandb'}" if mirror.num_sent else "")
    if not error:
        write_json(run / "wandb.json", record | {"arrived": state})
    return Outcome(run.name, num_sent, " ".join(error.split()))


def _durable_rows(run: Path) -> list[dict[str, Any]]:
    rows = read_lines(run / "metrics.jsonl")
    if (run / "DONE").is_file():
        return rows
    newest = max((int(path.name.split("_")[1]) for path in run.glob("checkpoints/step_*")), default=-1)
    return [row for row in rows if row["step"] <= newest]


def _state(run: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What W&B is to have of a run: all rows up to a step, and the summary where the run is done."""
    return {"step": rows[-1]["step"], "done": (run / "DONE").is_file()}


def main() -> None:
    """``python -m pspo.sync``: exit status 1 where W&B still lacks rows, 2 for a mistake."""
    parser = argparse.ArgumentParser(prog="python -m pspo.sync", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("group", type=Path, help="outputs/<group>")
    with answering(ConfigError, stopped="stopped; the same command sends what W&B lacks"):
        outcomes = sync(parser.parse_args().group)
    for run in outcomes:
        sys.stdout.write(f"{run.run}: {run.num_sent} rows sent{f', not all: {run.error}' if run.error else ''}\n")
    sys.stdout.write("" if outcomes else "W&B has all rows of the runs with tracker=wandb\n")
    sys.exit(1 if any(run.error for run in outcomes) else 0)


if __name__ == "__main__":
    main()
