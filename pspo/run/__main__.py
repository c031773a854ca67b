"""Train one policy with one objective and evaluate it, or with -m one for each combination of lists.

python -m pspo.run objective=pspo model=qwen1_5b
"""

import os
import re
import sys
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
from pspo.base.schema import ConfigError
from pspo.config import explained, open_keys, resolve
from pspo.host.memory import NoRoomError
from pspo.launcher import RunsFailed, make_plan
from pspo.reward import RewardError
from pspo.run.help import help_text
from pspo.run.job import run
from pspo.run.outcome import result
from pspo.update import UpdateError

FAILED = (UpdateError, NoRoomError, SaveError, RewardError, RunsFailed)
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


def cli() -> None:
    """``python -m pspo.run``: a user's mistake is one sentence and exit status 2, a failed run is status 1."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(help_text())
        return
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises errors, which become one sentence here
    sys.argv[1:] = open_keys(arguments)
    with answering(stopped="stopped; the same command resumes from the last checkpoint"):
        try:
            main()
            if {"-c", "--cfg"} & {argument.partition("=")[0] for argument in arguments}:  # Hydra shows it unchecked
                make_plan([[argument for argument in arguments if re.match(r"[^-].*=|~", argument)]])
        except EXPECTED as error:
            _leave(error)


def _leave(error: Exception) -> NoReturn:
    """Print one sentence; exit with 2 for a configuration to mend and 1 for a run that failed."""
    leave(explained(error) if isinstance(error, HydraException) else error, 1 if isinstance(error, FAILED) else 2)


if __name__ == "__main__":
    cli()
