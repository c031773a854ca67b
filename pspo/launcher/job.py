"""What one job does: compose, validate, run."""

import json
from collections.abc import Sequence
from pathlib import Path

import submitit

from pspo.config import compose
from pspo.files import read_lines


class Job:
    """One run, told by its overrides alone.

    A requeue after a lost node gets the pickle of the submission back, so that nothing may be kept here that a run
    finds out: its directory and its newest checkpoint are found on the disk.
    """

    def __init__(self, overrides: Sequence[str]) -> None:
        self.overrides = list(overrides)

    def __call__(self) -> float | None:
        """Run; whatever it raises is the job's failure. Returns what ``result`` does."""
        from pspo.run import run

        return result(run(compose(self.overrides), self.overrides))

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit queues again after a signal: the same job."""
        return submitit.helpers.DelayedSubmission(self)


def result(directory: Path) -> float | None:
    """What a sweeper may maximise: the last validation reward, or None. Never a number from a test set."""
    rewards = [row.get("validation/sampled_reward_mean") for row in read_lines(directory / "metrics.jsonl")]
    return next((reward for reward in reversed(rewards) if reward is not None), None)


def failure(directory: Path) -> str | None:
    """In one line why a run's last attempt failed, or None."""
    path = directory / "FAILED"
    if not path.is_file():
        return None
    told = json.loads(path.read_text())
    lines = str(told.get("error", "")).strip().splitlines()
    return f"{told.get('kind', 'failed')}: {lines[-1]}" if lines else str(told.get("kind", "failed"))
