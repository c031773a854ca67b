"""What a person sees: one console, one log, and the phase of the work, on a terminal as a line that is rewritten."""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, Self, TypeVar

from rich.console import Console
from rich.markup import escape

from pspo.base.files import write_text

console = Console(stderr=True)
log = logging.getLogger("pspo")
T = TypeVar("T")

TELL_S = 30.0
"""Seconds from one line about a phase to the next, in a log and in ``.phase``."""


class Phase:
    """A part of the work that a person waits for: ``with Phase("training", 30, unit="steps") as told: ... told(12)``.

    Without ``with`` it lasts until the next one. One inside another that counts, as a validation in the training, is
    told only if it is at work when a line is due. ``done`` of ``total`` (None: not counted) were done before.
    """

    current: ClassVar["Phase | None"] = None
    file: ClassVar[Path | None] = None  # where a run tells its phase to other processes

    def __init__(self, name: str, total: float | None = None, *, done: float = 0, unit: str = "") -> None:
        self.name, self.total, self.done, self.unit, self.info = name, total, done, unit, ""
        self.first, self.begun, self.outer = done, time.monotonic(), Phase.current
        self.line, Phase.current = console.status(name), self
        if self.outer is None or self.outer.total is None:
            self.tell()

    def __call__(self, done: float, info: str = "") -> None:
        """Note how much is done, with a word on how it goes."""
        self.done, self.info = done, info
        self.line.update(escape(str(self)))

    def __enter__(self) -> Self:
        if console.is_terminal:
            self.line.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.line.stop()
        Phase.current = self.outer

    @property
    def left_s(self) -> float | None:
        """Seconds to the end at the mean pace since the phase began; None where none can be told."""
        done = self.done - self.first
        if self.total is None or done <= 0:
            return None
        return (time.monotonic() - self.begun) * (self.total - self.done) / done

    def __str__(self) -> str:
        share = f", {100 * self.done / self.total:.0f} %" if self.total else ""
        counts = "" if self.total is None else f": {self.done:.0f} of {self.total:.0f} {self.unit}".rstrip() + share
        left = "" if self.left_s is None else f"{duration(self.left_s)} left"
        return ", ".join(filter(None, [self.name + counts, self.info, left]))

    def tell(self) -> None:
        """A line in every log that is no terminal, and the content of ``.phase``."""
        log.info("%s", str(self), extra={"phase": True})
        if self.file is not None:
            now = {"phase": self.name, "done": self.done, "total": self.total, "left_s": self.left_s}
            with contextlib.suppress(OSError):  # a full disk stops a run where it must save
                write_text(self.file, json.dumps(now | {"time": time.time()}))


def track(chunks: Iterable[Sequence[T]], name: str, total: int, unit: str = "") -> Iterator[Sequence[T]]:
    """Iterate over chunks of ``total`` items as a phase that counts items."""
    with Phase(name, total, unit=unit) as told:
        for chunk in chunks:
            yield chunk
            told(told.done + len(chunk))


def duration(seconds: float) -> str:
    """``1:20:00``."""
    minutes, left = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{left:02d}"


def log_to_console() -> None:
    """Send the log to the console."""
    if not any(isinstance(handler, _ConsoleHandler) for handler in log.handlers):
        log.addHandler(_ConsoleHandler())
    log.setLevel(logging.INFO)
    log.propagate = False


@contextlib.contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Send the log to a file as well, and tell the phase twice a minute, there and in ``.phase`` beside it.

    The clock stands in a field of its own that begins with ``time/``.
    """
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(_Clocked("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    Phase.file, ended = path.with_name(".phase"), threading.Event()
    Phase.file.unlink(missing_ok=True)  # of a process that was killed
    thread = threading.Thread(target=_tell, args=(ended,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        Phase.file.unlink(missing_ok=True)
        Phase.file = Phase.current = None
        log.removeHandler(handler)
        handler.close()


def _tell(ended: threading.Event) -> None:
    while not ended.wait(TELL_S):
        if Phase.current is not None:
            Phase.current.tell()


class _ConsoleHandler(logging.Handler):
    """Lines above the phase, not wrapped, so that a path can be copied; no traceback, which stands in run.log."""

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, "phase") and console.is_terminal:
            return  # where the phase is shown already
        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        console.print(record.getMessage(), style=style, markup=False, highlight=False, soft_wrap=True)


class _Clocked(logging.Formatter):
    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return "time/" + datetime.fromtimestamp(record.created, UTC).isoformat(timespec="seconds")
