"""What a person sees: one console, one log, progress bars on a terminal and quiet elsewhere."""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True)
log = logging.getLogger("pspo")
T = TypeVar("T")


def progress_bar(*, transient: bool = True) -> Progress:
    """A bar with a rate of its own in ``{task.fields[info]}``; nothing at all where the output is not a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[info]}"),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=transient)


def track(chunks: Iterable[Sequence[T]], description: str, total: int) -> Iterator[Sequence[T]]:
    """Iterate over chunks of ``total`` items with a progress bar that counts items, with their rate."""
    with progress_bar() as bar:
        task = bar.add_task(description, total=total, info="")
        for chunk in chunks:
            yield chunk
            bar.advance(task, len(chunk))
            speed = bar.tasks[task].speed
            bar.update(task, info=f"{speed:.1f}/s" if speed else "")


def log_to_console() -> None:
    """Send the log to the console."""
    if not any(isinstance(handler, _ConsoleHandler) for handler in log.handlers):
        log.addHandler(_ConsoleHandler())
    log.setLevel(logging.INFO)
    log.propagate = False


@contextlib.contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Send the log to a file as well; the clock stands in a field of its own that begins with ``time/``."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(_Clocked("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


class _ConsoleHandler(logging.Handler):
    """Lines above a progress bar, not wrapped, so that a path can be copied; no traceback, which stands in run.log."""

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        console.print(record.getMessage(), style=style, markup=False, highlight=False, soft_wrap=True)


class _Clocked(logging.Formatter):
    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return "time/" + datetime.fromtimestamp(record.created, UTC).isoformat(timespec="seconds")
