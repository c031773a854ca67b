"""A process at work in a run directory, and how it ends: ``FAILED`` with the reason, or the result for a sweeper."""

import contextlib
import errno
import traceback
from collections.abc import Iterator
from pathlib import Path

from pspo.base.console import log, log_to_file
from pspo.base.files import SaveError, read_json, read_lines, write_json
from pspo.base.schema import ConfigError
from pspo.host import interrupt, ranks
from pspo.host.memory import NoRoomError, is_out_of_memory
from pspo.reward import RewardError
from pspo.run import lock
from pspo.update import NonFiniteError, SamplerGapError

TRACEBACK_LINES = 20  # the last ones, in FAILED
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
KINDS = {
    NoRoomError: "out of memory",
    NonFiniteError: "non-finite",
    FloatingPointError: "non-finite",
    SamplerGapError: "sampler gap",
    SaveError: "cannot save",
    RewardError: "reward",
    ConfigError: "configuration",
    ranks.RankError: "rank",
}


@contextlib.contextmanager
def at_work(directory: Path) -> Iterator[lock.Owner]:
    """Hold the lock of a run directory, log into its ``run.log``, note signals, and record in ``FAILED`` an error."""
    last = lock.owner(directory)
    with (
        lock.hold(directory) as owner,
        log_to_file(directory / "run.log"),
        recorded(directory, owner),
        interrupt.caught(),
    ):
        if last is not None and not last.ended:
            log.warning("%s, the last at work here, was killed: kill -9, out of memory, or a lost node", last)
        yield owner


@contextlib.contextmanager
def recorded(directory: Path, owner: lock.Owner) -> Iterator[None]:
    """Record the block's error in ``FAILED`` and raise it, a full disk as one sentence; an earlier record goes."""
    path = directory / "FAILED"
    path.unlink(missing_ok=True)
    about = {"job_id": owner.job_id, "restart": owner.restart}
    try:
        try:
            with ranks.watched(lambda reason: write_json(path, {"kind": "rank", "error": reason} | about)):
                yield
        except OSError as error:
            if error.errno not in CANNOT_WRITE:
                raise
            raise SaveError(
                f"cannot write {error.filename or directory} ({error.strerror}); make room or mend the permissions, "
                "then run the same command again to resume from the last checkpoint"
            ) from error
    except Exception as error:
        if not isinstance(error, ConfigError):
            log.exception("the run failed; the same command resumes from its last checkpoint")
        kinds = (kind for error_class, kind in KINDS.items() if isinstance(error, error_class))
        kind = "out of memory" if is_out_of_memory(error) else next(kinds, "error")
        lines = "".join(traceback.format_exception(error)).splitlines()[-TRACEBACK_LINES:]
        record = {"kind": kind, "error": "\n".join(lines)} | about
        with contextlib.suppress(OSError):  # the very disk may be the failure
            write_json(path, record)
        raise


def result(directory: Path) -> float | None:
    """The number that a sweeper may maximise: the last validation reward, or None; never a test set's."""
    rewards = [row.get("validation/sampled_reward_mean") for row in read_lines(directory / "metrics.jsonl")]
    return next((reward for reward in reversed(rewards) if reward is not None), None)


def failure(directory: Path) -> str | None:
    """The kind and the last line of the error that ended a run's last attempt, or None."""
    record = read_json(directory / "FAILED")
    return ": ".join([record["kind"], *record["error"].strip().splitlines()[-1:]]) if record else None
