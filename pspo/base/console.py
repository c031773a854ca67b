"""What a person sees: one console, one log, and the phase of the work: a bar on a terminal, lines in a log elsewhere."""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pspo.base.files import write_text

console = Console(stderr=True)
log = logging.getLogger("pspo")
T = TypeVar("T")

TELL_S = 30.0
"""Seconds from one line about a phase to the next, in a log and in ``.phase``."""


class Phase:
    """A part of the work that a person waits for: ``with Phase("training", total=30) as told: ... told(done)``.

    Without ``with`` it lasts until the next one. A phase inside one that counts, as a validation in the training, is
    told only if it is at work when a line is due.

    Args:
        name: what is done, for ``status`` and for logs.
        total: how much there is to do, in ``unit``; None where nothing is counted.
        done: how much of it was done before.
        unit: what ``total`` counts.
        transient: whether the bar disappears at the end.
    """

    current: "Phase | None" = None
    file: Path | None = None  # where a run tells its phase to other processes

    def __init__(
        self, name: str, total: float | None = None, *, done: float = 0, unit: str = "", transient: bool = True
    ) -> None:
        self.name, self.total, self.unit, self.done, self.info = name, total, unit, done, ""
        self.first, self.begun, self.outer, Phase.current = done, time.monotonic(), Phase.current, self
        columns = TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn()
        quiet = total is None or not console.is_terminal
        info = TextColumn("{task.fields[info]}")
        self.bar = Progress(*columns, info, console=console, disable=quiet, transient=transient)
        self.bar.add_task(name, total=total, completed=int(done), info="")
        if self.outer is None or self.outer.total is None:
            self.tell()

    def __call__(self, done: float, info: str = "") -> None:
        """Note how much is done, with a word on how it goes."""
        self.done, self.info = done, info
        self.bar.update(self.bar.task_ids[0], completed=int(done), info=info)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.stop()
        Phase.current = self.outer

    @property
    def left_s(self) -> float | None:
        """Seconds to the end at the mean pace since the phase began; None where none can be told."""
        if self.total is None or self.done <= self.first:
            return None
        return (self.total - self.done) * (time.monotonic() - self.begun) / (self.done - self.first)

    def tell(self) -> None:
        """A line in the logs that are no terminal, and the content of ``.phase``."""
        left_s, told = self.left_s, self.name
        if self.total is not None:
            told += f": {self.done:.0f} of {self.total:.0f} {self.unit}".rstrip()
            told += f", {100 * self.done / self.total:.0f} %" if self.total else ""
        told += (f", {self.info}" if self.info else "") + ("" if left_s is None else f", {duration(left_s)} left")
        log.info("%s", told, extra={"phase": True})
        if self.file is not None:
            about = {"phase": self.name, "done": self.done, "total": self.total, "left_s": left_s, "time": time.time()}
            with contextlib.suppress(OSError):  # a full disk is the business of what must be saved
                write_text(self.file, json.dumps(about))


def track(chunks: Iterable[Sequence[T]], name: str, total: int, unit: str = "") -> Iterator[Sequence[T]]:
    """Iterate over chunks of ``total`` items as a phase that counts items, with their rate."""
    with Phase(name, total, unit=unit) as told:
        for chunk in chunks:
            yield chunk
            spent_s = time.monotonic() - told.begun
            done = told.done + len(chunk)
            told(done, f"{done / spent_s:.1f}/s" if spent_s else "")


def duration(seconds: float) -> str:
    """``1:20:00``."""
    minutes, second = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


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
    """Lines above a progress bar, not wrapped, so that a path can be copied; no traceback, which stands in run.log."""

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, "phase") and console.is_terminal:
            return  # which has a bar
        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        console.print(record.getMessage(), style=style, markup=False, highlight=False, soft_wrap=True)


class _Clocked(logging.Formatter):
    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return "time/" + datetime.fromtimestamp(record.created, UTC).isoformat(timespec="seconds")
