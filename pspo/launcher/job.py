"""What one job does: compose, validate, run."""

from collections.abc import Sequence

import submitit

from pspo.config import compose
from pspo.run.outcome import result


class Job:
    """One run, told by its overrides alone.

    A requeue after a lost node gets the pickle of the submission back, so that nothing may be kept here that a run
    finds out: its directory and its newest checkpoint are found on the disk.
    """

    def __init__(self, overrides: Sequence[str]) -> None:
        self.overrides = list(overrides)

    def __call__(self) -> float | None:
        """Run; whatever it raises is the job's failure. Returns what ``result`` does."""
        from pspo.run.job import run

        return result(run(compose(self.overrides), self.overrides))

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit queues again after a signal: the same job."""
        return submitit.helpers.DelayedSubmission(self)
