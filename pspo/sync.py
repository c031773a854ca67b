"""Send Weights & Biases what it lacks of a group's runs, from a machine with a network; safe to repeat.

python -m pspo.sync outputs/<group>
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from pspo.base.command import answering, expanded
from pspo.base.files import read_json, read_lines, write_json
from pspo.base.schema import ConfigError
from pspo.tracker import Mirror, check_login


def sync(directory: Path) -> Iterator[tuple[str, int, str]]:
    """Send the rows that W&B lacks of every run of a group with ``tracker=wandb``, and the summary of a finished run.

    Yields the name of each run, the rows sent, and why W&B still lacks rows ("" where it has all). A run that is not
    DONE may take back the rows after its newest checkpoint, so they are left for a later call. A run is passed over
    once W&B's own last step has shown that all its rows arrived. Raises ConfigError.
    """
    if not directory.is_dir():
        raise ConfigError(f"{directory} is no directory; give outputs/<group>")
    for path in sorted(directory.rglob("wandb.json")):
        run, record = path.parent, read_json(path)
        steps, done = [row["step"] for row in read_lines(run / "metrics.jsonl")], (run / "DONE").is_file()
        if not done:
            newest = max((int(saved.name.split("_")[1]) for saved in run.glob("checkpoints/step_*")), default=-1)
            steps = [step for step in steps if step <= newest]
        arrived = [*steps[-1:], done]
        if not steps or record.get("arrived") == arrived:
            continue
        check_login()
        mirror = _send(run, steps[-1], done)
        num_sent = mirror.num_sent
        if num_sent and not mirror.error:  # W&B's last step, which a second mirror asks for, shows whether they arrived
            mirror = _send(run, steps[-1], done)
        unsent = f"W&B still lacks {mirror.num_sent}; see {run / 'wandb'}" if mirror.num_sent else ""
        if not (error := " ".join((mirror.error or unsent).split())):
            write_json(path, record | {"arrived": arrived})
        yield run.name, num_sent, error


def _send(run: Path, last_step: int, done: bool) -> Mirror:
    mirror = Mirror(run, replay=True)
    mirror.send(last_step)
    if done:
        mirror.summarize(read_json(run / "summary.json"))
    mirror.close(int((run / "FAILED").is_file()))
    return mirror


def main() -> None:
    """``python -m pspo.sync``: exit status 1 where W&B still lacks rows, 2 for a mistake."""
    parser = argparse.ArgumentParser(prog="python -m pspo.sync", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("group", type=expanded, help="outputs/<group>")
    group, errors = parser.parse_args().group, list[str]()
    with answering(ConfigError, stopped="stopped; the same command sends what W&B lacks"):
        for run, num_sent, error in sync(group):
            sys.stdout.write(f"{run}: {num_sent} rows sent{f', not all: {error}' if error else ''}\n")
            errors.append(error)
    sys.stdout.write("" if errors else "W&B has all rows of the runs with tracker=wandb\n")
    sys.exit(1 if any(errors) else 0)


if __name__ == "__main__":
    main()
