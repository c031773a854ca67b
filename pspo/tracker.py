"""Metrics of a run: ``metrics.jsonl``, one JSON line per step, is the truth, Weights & Biases its mirror."""

import math
import os
import queue
import re
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import pandas

from pspo.base.console import log
from pspo.base.files import JsonLines, read_json, read_lines, read_yaml, write_json
from pspo.base.schema import ConfigError, Schema, key
from pspo.host import machine

INIT_TIMEOUT_S = FINISH_TIMEOUT_S = 20.0  # for a server's answer when a mirror opens, and for a run's last uploads
CLOSE_TIMEOUT_S, UPLOAD_TIMEOUT_S = 30.0, 1800.0  # for a mirror to end, whatever W&B does; one with ``replay``

COMPLETIONS_PER_STEP, MAX_COMPLETION_CHARACTERS = 2, 4000
COMPLETION_COLUMNS = ("step", "problem", "question", "answer", "completion", "reward", "correct", "tokens", "truncated")
"""The columns of W&B's table of completions, each a key of ``completions.jsonl``."""


@dataclass(frozen=True, kw_only=True)
class TrackerConfig(Schema, block="tracker"):
    """Where metrics go besides ``metrics.jsonl``, which is always written."""

    name: str = key("jsonl: metrics.jsonl alone; wandb: mirrored to Weights & Biases as well")


@dataclass(frozen=True, kw_only=True)
class WandbConfig(TrackerConfig, block="tracker"):
    """Weights & Biases; WANDB_MODE, WANDB_API_KEY and ``wandb login`` decide whether a run sends rows itself."""

    project: str = key("W&B project")
    entity: str | None = key("W&B user or team; null takes the login's own")


TrackerConfig.kinds = {"jsonl": TrackerConfig, "wandb": WandbConfig}


class Tracker:
    """Writes the metrics of one run directory, whose ``config.yaml`` a mirror reads.

    W&B gets a row when the checkpoint that contains the row is durable, so a step that a crash takes back is never
    sent. Call ``rewind`` once before the first ``log`` when the directory may hold an earlier attempt.
    """

    def __init__(self, config: TrackerConfig, directory: Path) -> None:
        self._lines = JsonLines(directory / "metrics.jsonl")
        mirrored = isinstance(config, WandbConfig) and os.environ.get("WANDB_MODE") != "disabled"
        self._mirror = Mirror(directory) if mirrored else None

    def log(self, metrics: Mapping[str, float | int], step: int) -> None:
        """Append the row of ``step``. JSON has no NaN or infinity: they are written as null."""
        row: dict[str, Any] = {"step": step}
        row |= {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._lines.append(row)

    def state(self) -> dict[str, int]:
        """What a checkpoint stores: the number of rows in ``metrics.jsonl``, flushed to the disk."""
        return {"metrics_rows": self._lines.sync()}

    def rewind(self, state: Mapping[str, int] | None) -> None:
        """Cut ``metrics.jsonl`` back to a checkpoint's ``state`` (None: to nothing) and send W&B the rows it lacks.

        Raises ValueError if the file is shorter than the checkpoint says.
        """
        num_rows, path = state["metrics_rows"] if state else 0, self._lines.path
        if self._lines.num_rows() < num_rows:
            raise ValueError(f"{path} is shorter than its checkpoint says ({num_rows} rows); restore it or start anew")
        self._lines.cut(num_rows)
        if rows := self._lines.rows():
            self.commit(rows[-1]["step"])

    def commit(self, step: int) -> None:
        """Send W&B the rows up to ``step``; call it when the checkpoint that contains them is durable."""
        if self._mirror is not None:
            self._mirror.send(step)

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Put final numbers into the W&B summary, nested keys joined by ``/``."""
        if self._mirror is not None:
            self._mirror.summarize(summary)

    def close(self, exit_code: int = 0) -> None:
        """Finish the W&B run, in bounded time; rows not committed are not sent. May be called twice."""
        mirror, self._mirror = self._mirror, None
        if mirror is not None:
            mirror.close(exit_code)


class Mirror:
    """Sends rows of one run directory to W&B from a thread, so that a slow, silent or dead server holds up nobody.

    W&B's own last step is the cursor: the first row sent is the one after it. So there is neither a gap nor a double
    step, whichever processes sent the earlier rows and whenever they were killed. A file lock admits one mirror of a
    run directory at a time. Where W&B is offline or has no login nothing is sent, and ``pspo.sync`` does it later, by
    a mirror with ``replay``. ``num_sent`` counts the rows sent; the first ``error`` ends a mirror, with one warning.
    """

    def __init__(self, directory: Path, *, replay: bool = False) -> None:
        self.directory, self.num_sent, self.error = directory.absolute(), 0, ""
        self._replay, self._next_step = replay, 0
        self._run: Any = None
        self._table: Any = None
        self._calls: queue.SimpleQueue[Callable[[Any], None] | int] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def send(self, last_step: int) -> None:
        """Log the rows up to ``last_step`` that W&B lacks, and the first completions of each step."""

        def call(run: Any) -> None:
            rows = read_lines(self.directory / "metrics.jsonl")
            unsent = [row for row in rows if self._next_step <= row["step"] <= last_step]
            for row in unsent:
                values = {name: math.nan if value is None else value for name, value in row.items()}
                run.log(values, step=row["step"], commit=row is not unsent[-1])
                self._next_step, self.num_sent = row["step"] + 1, self.num_sent + 1
            if unsent:
                run.log(self._completions({row["step"] for row in unsent}), step=unsent[-1]["step"], commit=True)

        self._calls.put(call)

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Update the summary of the W&B run, nested keys joined by ``/``, and add the run's figure if it is drawn."""
        (flat,) = pandas.json_normalize(dict(summary), sep="/").to_dict("records")

        def call(run: Any) -> None:
            import wandb

            figure = self.directory / "curves.png"
            run.summary.update(flat | ({"figures/curves": wandb.Image(str(figure))} if figure.is_file() else {}))

        self._calls.put(call)

    def close(self, exit_code: int = 0) -> None:
        """Finish the W&B run, as failed if ``exit_code`` is not 0; returns in bounded time, whatever W&B does."""
        self._calls.put(exit_code)
        timeout_s = UPLOAD_TIMEOUT_S if self._replay else CLOSE_TIMEOUT_S
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._fail(f"no end after {timeout_s:g} s")

    def _completions(self, steps: set[int]) -> dict[str, Any]:
        """W&B's table with the first completions of ``steps`` appended, under its key; {} where there are none."""
        import wandb

        lines = read_lines(self.directory / "completions.jsonl")
        rows = [row for row in lines if row["step"] in steps and row["sample"] < COMPLETIONS_PER_STEP]
        if rows and self._table is None:
            self._table = wandb.Table(columns=list(COMPLETION_COLUMNS), log_mode="INCREMENTAL")
        for row in rows:
            row["completion"] = row["completion"][:MAX_COMPLETION_CHARACTERS]
            self._table.add_data(*(row[column] for column in COMPLETION_COLUMNS))
        return {"completions": self._table} if rows else {}

    def _work(self) -> None:
        import wandb  # half a second that tracker=jsonl does not pay

        for act in (self._mirror, self._abandon, wandb.teardown):  # a broken service would serve the next run
            try:
                act()
            except (Exception, SystemExit) as error:  # noqa: BLE001  W&B's own, when its service is gone, are not public
                self._fail(f"{type(error).__name__}: {error}")

    def _mirror(self) -> None:
        try:
            timeout_s = 0 if self._replay else INIT_TIMEOUT_S
            held = filelock.FileLock(self.directory / ".wandb.lock", timeout=timeout_s).acquire()
        except filelock.Timeout:
            return self._fail("another process sends it the rows of this run")
        with held:
            run = self._run = self._open()
            if run is None:
                return
            self._next_step = run.starting_step
            while not isinstance(call := self._calls.get(), int):
                call(run)
            run.finish(exit_code=call)

    def _abandon(self) -> None:
        """Stop the threads of a W&B run that an error has left open; nothing where it is finished."""
        if self._run is not None:
            self._run.finish(exit_code=1)

    def _open(self) -> Any:
        """The W&B run under the id of ``wandb.json``; None where W&B is offline."""
        import wandb

        from pspo.host import environment  # torch, which an idle pspo.sync does not need

        record = self.directory / "wandb.json"
        if not record.exists():
            write_json(record, {"id": secrets.token_hex(4)})
        settings = wandb.Settings(
            silent=True,
            console="off",
            reinit="create_new",  # a run that W&B holds open in this process, of ours or of a user's, stays as it is
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S,
            finish_timeout_raises=True,
        )
        if self._replay:  # takes long, is wanted even under WANDB_MODE=offline, on another machine than the run's
            settings.mode, settings.finish_timeout = "online", 0.0
            settings.x_disable_stats = settings.x_disable_machine_info = True
        mode = wandb.setup(settings=settings).settings.mode
        # Without a stored login wandb.init would ask for one at a terminal; login(prompt=False) only looks.
        if mode in ("offline", "dryrun", "disabled") or not wandb.login(prompt=False, verify=False):
            log.info("W&B is offline; python -m pspo.sync %s sends it the metrics later", self.directory.parent)
            return None
        config = read_yaml(self.directory / "config.yaml")
        model = config["model"].get("hub_id") or config["model"].get("path") or config["model"]["name"]
        code = [process["code"] for process in environment.history(self.directory)][-1:]
        run = wandb.init(
            project=config["tracker"]["project"],
            entity=config["tracker"]["entity"],
            name=re.sub("_[0-9a-f]{8}$", "", self.directory.name),  # without the digest of the configuration
            group=config["group"],
            job_type=config["objective"]["name"],
            tags=[config["objective"]["name"], Path(model).name, config["dataset"]["name"]],
            id=read_json(record)["id"],
            resume="allow",
            dir=str(self.directory),
            config=config | {"code": code[0] if code else {}},
            settings=settings,
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    def _fail(self, error: str) -> None:
        if not self.error and not self._replay:
            rest = f"metrics.jsonl goes on, and python -m pspo.sync {self.directory.parent} sends W&B what it lacks"
            log.warning("W&B is off for the rest of this run (%s); %s", error, rest)
        self.error = self.error or error


def check_login() -> None:
    """Refuse a server that does not answer, which W&B would ask again for every run, and a missing login."""
    import wandb

    if os.environ.get("WANDB_MODE") == "disabled":
        raise ConfigError("WANDB_MODE=disabled forbids to send anything to W&B; unset it, then repeat this command")
    url = str(wandb.setup(settings=wandb.Settings(mode="online", silent=True)).settings.base_url)
    if reason := machine.unreachable(url):
        why = f"W&B cannot be reached at {url} ({reason})"
        raise ConfigError(f"{why}; run this on a node with internet, or set WANDB_BASE_URL")
    if not wandb.login(prompt=False, verify=False):
        raise ConfigError("W&B has no login here; run `wandb login` or set WANDB_API_KEY, then repeat this command")
