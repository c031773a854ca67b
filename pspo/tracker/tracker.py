"""Metrics of a run: one JSON line per step in ``metrics.jsonl``, always, and the same numbers to Weights & Biases.

W&B sees a row only when the checkpoint that contains it is durable, so steps that a crash takes back are never sent;
on resume it gets what it lacks. Losing W&B costs one warning, never the run.
"""

import contextlib
import json
import logging
import math
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, cast

from pspo.base.files import JsonLines, write_json
from pspo.base.schema import Schema, key

log = logging.getLogger("pspo")

INIT_TIMEOUT_S = 20.0  # an unreachable server costs this much once, at the start of a run
FINISH_TIMEOUT_S = 60.0  # what is not uploaded by then stays on disk for `wandb sync`
FLUSH_INTERVAL_S = 0.1  # W&B's own 15 s lose up to 15 s of rows to SIGKILL
SETTLED_S = 1.0  # rows sent longer ago than this have been flushed


@dataclass(frozen=True, kw_only=True)
class TrackerConfig(Schema, block="tracker"):
    """Where metrics go besides ``metrics.jsonl``, which is always written."""

    name: Literal["jsonl", "wandb"] = key("jsonl: metrics.jsonl alone; wandb: Weights & Biases beside it")

    @classmethod
    def select(cls, values: Mapping[str, Any]) -> type[Self]:
        """``WandbConfig`` unless the name is jsonl, which has no other keys."""
        return cls if values.get("name") == "jsonl" else cast(type[Self], WandbConfig)


@dataclass(frozen=True, kw_only=True)
class WandbConfig(TrackerConfig, block="tracker"):
    """Weights & Biases; WANDB_MODE, WANDB_API_KEY and ``wandb login`` decide whether online, offline or not at all."""

    project: str = key("W&B project")
    entity: str | None = key("W&B user or team; null takes the login's own")


class Tracker:
    """Writes the metrics of one run directory.

    W&B starts in a thread, and is waited for where it gets its first row. Call ``rewind`` once before the first ``log``
    when the directory may hold an earlier attempt.
    """

    def __init__(
        self,
        config: TrackerConfig,
        directory: Path,
        *,
        run_name: str,
        group: str,
        job_type: str,
        resolved_config: Mapping[str, Any],
    ) -> None:
        self._lines = JsonLines(directory / "metrics.jsonl")
        self._pending: list[dict[str, Any]] = []
        self._opening: Future[_Wandb | None] | None = None
        if isinstance(config, WandbConfig):
            names = {"name": run_name, "group": group, "job_type": job_type}
            thread = ThreadPoolExecutor(1, thread_name_prefix="wandb")  # for two seconds, most of them waiting
            self._opening = thread.submit(_open, config, directory, names, resolved_config)
            thread.shutdown(wait=False)

    def log(self, metrics: Mapping[str, float | int], step: int) -> None:
        """Append the row of ``step``. JSON has no NaN or infinity: they are written as null."""
        row: dict[str, Any] = {"step": step}
        row |= {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._lines.append(row)
        self._pending.append(row)

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps: the rows of ``metrics.jsonl`` so far, on disk by now."""
        return {"metrics_rows": self._lines.sync()}

    def rewind(self, state: Mapping[str, int] | None) -> None:
        """Cut ``metrics.jsonl`` back to a checkpoint's ``state`` (None: to nothing) and send W&B the rows it lacks.

        Raises ValueError if the file is shorter than the checkpoint says.
        """
        num_rows = state["metrics_rows"] if state else 0
        path = self._lines.path
        if self._lines.num_rows() < num_rows:
            raise ValueError(f"{path} is shorter than its checkpoint says ({num_rows} rows); restore it or start anew")
        self._lines.cut(num_rows)
        self._pending = self._lines.rows()
        if self._pending:
            self.commit(self._pending[-1]["step"])

    def commit(self, step: int) -> None:
        """Send W&B the rows up to ``step``; call it when the checkpoint that contains them is durable."""
        rows = [row for row in self._pending if row["step"] <= step]
        self._pending = [row for row in self._pending if row["step"] > step]
        if self._wandb is not None:
            self._wandb.send(rows)

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Put final numbers into the W&B summary, nested keys joined by ``/``."""
        if self._wandb is not None:
            self._wandb.summarize(_flatten(summary))

    def close(self, exit_code: int = 0) -> None:
        """Finish the W&B run; rows not committed are not sent. May be called twice."""
        opened, self._opening = self._wandb, None
        if opened is not None:
            opened.finish(exit_code)

    @property
    def _wandb(self) -> "_Wandb | None":
        return None if self._opening is None else self._opening.result()


def _open(*arguments: Any) -> "_Wandb | None":
    """W&B, or where it fails in a way that it has no error for, one warning."""
    try:
        return _Wandb(*arguments)
    except Exception as error:  # noqa: BLE001  in a thread, whose error would be told steps later
        log.warning("W&B is off for the rest of this run, metrics.jsonl goes on: %s: %s", _name(error), error)
        return None


class _Wandb:
    """One W&B run that several processes, one after the other, may continue.

    So that there is neither a gap nor a double step, what arrived is read back from W&B itself: from the server online,
    from the transaction log offline. ``wandb.json`` keeps the id and a step up to which all rows did arrive for
    certain, for when `wandb sync --clean` has removed the log.
    """

    def __init__(
        self, config: WandbConfig, directory: Path, names: Mapping[str, str], resolved_config: Mapping[str, Any]
    ) -> None:
        # Half a second that tracker=jsonl does not pay. The last four errors are no wandb.Error and have no public
        # name, but are what the SDK lets through when its service process is gone.
        import pydantic
        import wandb
        from wandb.sdk.lib.service.service_token import WandbServiceConnectionError
        from wandb.sdk.mailbox import MailboxClosedError
        from wandb.sdk.mailbox.mailbox_handle import HandleAbandonedError, ServerResponseError

        self._sdk: Any = wandb
        self._failures = (
            wandb.Error,
            OSError,
            subprocess.TimeoutExpired,
            pydantic.ValidationError,  # a WANDB_* variable with an impossible value
            WandbServiceConnectionError,
            HandleAbandonedError,
            MailboxClosedError,
            ServerResponseError,
        )
        self._directory = directory.resolve()
        self._run: Any = None
        self._id, self._sent = "", -1
        self._mark, self._mark_at = -1, -math.inf
        self._guard(lambda: self._start(config, names, resolved_config))

    def _start(self, config: WandbConfig, names: Mapping[str, str], resolved_config: Mapping[str, Any]) -> None:
        settings = self._sdk.Settings(
            silent=True,
            console="off",
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S,
            x_transaction_log_flush_interval=FLUSH_INTERVAL_S,
        )
        mode = self._sdk.setup(settings=settings).settings.mode
        if mode == "disabled":
            return
        self._load()
        arguments = {
            "project": config.project,
            "entity": config.entity,
            **names,
            "id": self._id,
            "resume": "allow",
            "dir": str(self._directory),
            "config": dict(resolved_config),
            "settings": settings,
        }
        on_disk = self._last_step_on_disk()
        try:
            # Without a stored login wandb.init would ask for one at a terminal; login(prompt=False) only looks.
            offline = mode in ("offline", "dryrun") or not self._sdk.login(prompt=False, verify=False)
            run = self._sdk.init(**arguments, mode="offline" if offline else mode)
        except self._sdk.errors.CommError as error:  # a compute node without a network, or a bad key
            log.warning("W&B cannot be reached and is recorded offline (`wandb sync` uploads it later): %s", error)
            self._sdk.teardown()  # the failed attempt holds the id
            self._sdk.setup(settings=settings)
            run = self._sdk.init(**arguments, mode="offline")
        # The server drops steps below its own count and needs all others.
        self._sent = max(self._sent, on_disk) if run.offline else run.starting_step - 1
        self._mark = self._sent
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        self._run = run

    def send(self, rows: list[dict[str, Any]]) -> None:
        """Log the rows that W&B does not have yet."""
        self._guard(lambda: self._send(rows))

    def _send(self, rows: list[dict[str, Any]]) -> None:
        if self._run is None:
            return
        if time.monotonic() > self._mark_at + SETTLED_S:
            self._save(self._mark)
            self._mark, self._mark_at = self._sent, time.monotonic()
        for row in rows:
            if row["step"] > self._sent:
                values = {name: math.nan if value is None else value for name, value in row.items()}
                self._run.log(values, step=row["step"], commit=True)
                self._sent = row["step"]

    def summarize(self, values: Mapping[str, Any]) -> None:
        """Update the run's summary."""
        if self._run is not None:
            self._guard(lambda: self._run.summary.update(values))

    def finish(self, exit_code: int) -> None:
        """Write out what is left; the run is finished, or failed if ``exit_code`` is not 0."""
        self._guard(lambda: self._finish(exit_code))

    def _finish(self, exit_code: int) -> None:
        if self._run is not None:
            self._run.finish(exit_code=exit_code)
            self._save(self._sent)

    def _guard(self, call: Callable[[], None]) -> None:
        """Call W&B; an error of the SDK costs one warning and ends W&B for this process."""
        try:
            call()
        except self._failures as error:
            log.warning("W&B is off for the rest of this run, metrics.jsonl goes on: %s: %s", _name(error), error)
            self._run = None
            # Frees the broken service, so that the next run of this process gets a new one.
            with contextlib.suppress(*self._failures):
                self._sdk.teardown()

    def _load(self) -> None:
        """Take up the id and the step of ``wandb.json``, or begin it."""
        record = self._directory / "wandb.json"
        if record.exists():
            saved = json.loads(record.read_text())
            self._id, self._sent = saved["id"], saved["sent"]
        else:
            self._id = secrets.token_hex(4)
            self._save(-1)

    def _save(self, sent: int) -> None:
        write_json(self._directory / "wandb.json", {"id": self._id, "sent": sent})

    def _last_step_on_disk(self) -> int:
        """The last step in the transaction logs of earlier processes, newest first; -1 if there is none."""
        folders = self._directory.glob(f"wandb/*run-*-{self._id}*")
        for folder in sorted(folders, key=lambda path: path.name.removeprefix("offline-"), reverse=True):
            command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
            output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
            try:
                records = [json.loads(line) for line in output.splitlines()]
                steps = [int(record["history"]["item"]["step"]) for record in records if record["type"] == "history"]
            except (ValueError, KeyError):  # a log that W&B itself cannot tell about
                continue
            if steps:
                return max(steps)
        return -1


def _name(error: BaseException) -> str:
    return type(error).__name__


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
