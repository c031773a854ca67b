"""What a run that failed leaves behind: ``FAILED``, with the kind of failure and its last lines."""

import contextlib
import errno
import json
import logging
import traceback
from collections.abc import Iterator
from pathlib import Path

from pspo.base.files import SaveError, read_lines, write_json
from pspo.base.schema import ConfigError
from pspo.host.memory import NoRoomError, is_out_of_memory
from pspo.reward import RewardError
from pspo.run.lock import Owner
from pspo.update import NonFiniteError, SamplerGapError

log = logging.getLogger("pspo")

LAST_LINES = 20
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@contextlib.contextmanager
def recorded(directory: Path, owner: Owner) -> Iterator[None]:
    """Record in ``FAILED`` what the block raises, and raise it on; the record of an earlier attempt is removed."""
    path = directory / "FAILED"
    path.unlink(missing_ok=True)
    try:
        yield
    except Exception as raised:
        error = _told(raised, directory)
        if not isinstance(error, ConfigError):
            log.exception("the run failed; the same command resumes from its last checkpoint")
        lines = "".join(traceback.format_exception(error)).splitlines()[-LAST_LINES:]
        record = {"kind": kind(error), "error": "\n".join(lines), "job_id": owner.job_id, "restart": owner.restart}
        with contextlib.suppress(OSError):  # the very disk may be the failure
            write_json(path, record)
        if error is raised:
            raise
        raise error from raised


def kind(error: BaseException) -> str:
    """In one or two words: out of memory, non-finite, cannot save, reward, configuration, or error."""
    if isinstance(error, NoRoomError) or is_out_of_memory(error):
        return "out of memory"
    kinds = {
        NonFiniteError: "non-finite",
        SamplerGapError: "sampler gap",
        SaveError: "cannot save",
        RewardError: "reward",
        ConfigError: "configuration",
    }
    return next((name for cls, name in kinds.items() if isinstance(error, cls)), "error")


def _told(error: Exception, directory: Path) -> Exception:
    """A full or read-only disk as one sentence; any other error as it is."""
    if not isinstance(error, OSError) or error.errno not in NO_ROOM:
        return error
    return SaveError(
        f"cannot write {error.filename or directory} ({error.strerror}); make room or mend the permissions, "
        "then run the same command again to resume from the last checkpoint"
    )


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
