"""Train one policy with one objective and evaluate it, or with -m one for each combination of lists.

python -m pspo.run [group=option ...] [key=value ...]

Examples: the embedded task, the paper's run on a GPU, a matched comparison, alpha 0.3 without W&B, all from local files
  python -m pspo.run
  python -m pspo.run objective=pspo model=qwen1_5b
  python -m pspo.run -m objective=noclip,clip,pspo seed=0,1,2
  python -m pspo.run smoothing=strong tracker=jsonl
  python -m pspo.run model=qwen0_5b model.path=/models/qwen dataset.path=/data/gsm8k

-m runs all combinations of lists; --cfg job prints the composed configuration and checks it; --info says how it was
composed; --hydra-help lists Hydra's own flags. Other commands: python -m pspo.
"""

import contextlib
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from typing import Any, NoReturn, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pspo.base.command import answering, leave
from pspo.base.console import log
from pspo.base.files import CONF, SaveError
from pspo.base.schema import ConfigError, as_dict, keys_of
from pspo.config import Config, compose, explained, groups, open_keys, resolve
from pspo.host import ranks
from pspo.host.memory import NoRoomError
from pspo.launcher import RunsFailed, make_plan
from pspo.reward import RewardError
from pspo.run.job import run
from pspo.run.outcome import result
from pspo.update import UpdateError

FAILED = (UpdateError, FloatingPointError, NoRoomError, SaveError, RewardError, RunsFailed, ranks.RankError)
EXPECTED = (ConfigError, HydraException, OmegaConfBaseException, *FAILED)
"""Errors shown as one sentence; any other is a bug and shows its traceback."""


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def main(composed: DictConfig) -> float | None:
    """One run, or one job of a multirun; returns the number that a sweeper may maximise."""
    overrides = [override.lstrip("+") for override in HydraConfig.get().overrides.task]
    try:
        config = resolve(cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True)), overrides)
        return result(run(config, overrides))
    except EXPECTED as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            log.error("pspo: %s", error)  # Hydra reports the first failed job alone, and at the end
            raise error.with_traceback(None) from None  # whose frames would keep this job's weights until then
        _leave(error)


@contextlib.contextmanager
def reporting(again: str) -> Iterator[None]:
    """Around a command: a mistake is one sentence and exit status 2, a failed run 1, Ctrl-C 130 and what comes next."""
    with answering(stopped=f"stopped; the same command {again}"):
        try:
            yield
        except EXPECTED as error:
            _leave(error)


def _leave(error: Exception) -> NoReturn:
    leave(explained(error) if isinstance(error, HydraException) else error, 1 if isinstance(error, FAILED) else 2)


def help_text() -> str:
    """How the command is given, the options of every group, and every key with its default, meaning and range."""
    rows = [(f"  {name}", "  ".join(options)) for name, options in groups().items()] + [("", "")]
    for name, field, value in keys_of(Config, as_dict(compose())):
        meaning = f"{field.metadata.get('meaning')} {field.metadata.get('within') or ''}"
        rows.append((f"  {name}={'null' if value is None else value}", meaning))
    lines = [textwrap.fill(f"{label:<40} {text}", 118, subsequent_indent=" " * 41) for label, text in rows]
    return "\n".join([__doc__ or "", "Groups with their options, then keys with their defaults:", *lines, ""])


def cli() -> None:
    """``python -m pspo.run``."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(help_text())
        return
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises errors, which become one sentence here
    sys.argv[1:], flags = open_keys(arguments), {argument.partition("=")[0] for argument in arguments}
    with reporting("resumes from the last checkpoint"):
        if {"-m", "--multirun"} & flags and {"-c", "--cfg", "-i", "--info"} & flags:
            raise ConfigError("--cfg and --info show one run; hydra.launcher.dry_run=true lists those of -m or a sweep")
        if {"-m", "--multirun"} & flags and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("torchrun starts the ranks of one run; give one value to each key, without -m")
        with ranks.joined():
            main()
        if {"-c", "--cfg"} & flags:  # Hydra shows it unchecked
            make_plan([[argument for argument in arguments if re.match(r"[^-].*=|~", argument)]])


if __name__ == "__main__":
    cli()
