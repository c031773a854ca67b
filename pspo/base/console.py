"""The console, the log, and the phase of the work, which on a terminal is a line that is rewritten."""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Self, TypeVar

from rich.console import Console
from rich.markup import escape

from pspo.base.files import write_text

console = Console(stderr=True)
log = logging.getLogger("pspo")
T = TypeVar("T")

TELL_S = 30.0  # seconds between two reports of the phase, in a log and in .phase


class Phase:
    """A part of the work that a person waits for: ``with Phase("training", 30, unit="steps") as phase: ... phase(12)``.

    Without ``with`` it lasts until the next phase. Inside a phase that counts, as a validation in the training, a phase
    gets a line only if one is due. ``total`` is None in a phase that does not count; ``done`` units come from before.
    """

    current: ClassVar["Phase | None"] = None
    file: ClassVar[Path | None] = None  # .phase, which pspo.status reads

    def __init__(self, name: str, total: float | None = None, *, done: float = 0, unit: str = "") -> None:
        self.name, self.total, self.done, self.unit, self.info = name, total, done, unit, ""
        self.first, self.begun, self.outer = done, time.monotonic(), Phase.current
        self.line, Phase.current = console.status(name), self
        if self.outer is None or self.outer.total is None:
            self.tell()

    def __call__(self, done: float, info: str = "") -> None:
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
        """Seconds to the end at the mean pace; None before the first unit, or without a total."""
        if self.total is None or self.done <= self.first:
            return None
        return (time.monotonic() - self.begun) * (self.total - self.done) / (self.done - self.first)

    def __str__(self) -> str:
        share = f", {100 * self.done / self.total:.0f} %" if self.total else ""
        counts = "" if self.total is None else f": {self.done:.0f} of {self.total:.0f} {self.unit}".rstrip() + share
        left = "" if self.left_s is None else f"{duration(self.left_s)} left"
        return ", ".join(filter(None, [self.name + counts, self.info, left]))

    def tell(self) -> None:
        """Write a line in every log that is no terminal, and ``.phase``."""
        log.info("%s", str(self), extra={"phase": True})
        if self.file is not None:
            progress = {"phase": self.name, "done": self.done, "total": self.total, "left_s": self.left_s}
            with contextlib.suppress(OSError):  # a full disk stops a run where it must save
                write_text(self.file, json.dumps(progress | {"time": time.time()}))


def track(chunks: Iterable[Sequence[T]], name: str, total: int, unit: str = "") -> Iterator[Sequence[T]]:
    """Iterate over chunks of ``total`` items as a phase that counts items."""
    with Phase(name, total, unit=unit) as phase:
        for chunk in chunks:
            yield chunk
            phase(phase.done + len(chunk))


def duration(seconds: float) -> str:
    """``1:20:00``."""
    minutes, left = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{left:02d}"


class _ConsoleHandler(logging.Handler):
    """Prints above the phase's line; not wrapped, so that a path can be copied; no traceback, which is in run.log."""

    def emit(self, record: logging.LogRecord) -> None:
        if not (hasattr(record, "phase") and console.is_terminal):  # where the phase has its own line
            style = "yellow" if record.levelno >= logging.WARNING else "dim"
            console.print(record.getMessage(), style=style, markup=False, highlight=False, soft_wrap=True)


def log_to_console() -> None:
    """Send the log to the console."""
    if not any(isinstance(handler, _ConsoleHandler) for handler in log.handlers):
        log.addHandler(_ConsoleHandler())
    log.setLevel(logging.INFO)
    log.propagate = False


@contextlib.contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Send the log to a file as well, and write the phase every ``TELL_S``, there and in ``.phase`` of its folder."""
    handler = logging.FileHandler(path, encoding="utf-8")
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "time/%Y-%m-%dT%H:%M:%S+00:00")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    log.addHandler(handler)
    Phase.file, ended = path.with_name(".phase"), threading.Event()
    Phase.file.unlink(missing_ok=True)  # of a process that was killed

    def tell() -> None:
        while not ended.wait(TELL_S):
            if Phase.current is not None:
                Phase.current.tell()

    thread = threading.Thread(target=tell, daemon=True)
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
