"""The command: compose, run, and tell a mistake in one sentence.

python -m pspo.run objective=pspo model=qwen1_5b
"""

import os
import sys
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pspo.base.console import log
from pspo.base.files import SaveError
from pspo.base.schema import ConfigError, unknown
from pspo.config import CONF, open_keys, resolve
from pspo.host.memory import NoRoomError
from pspo.launcher import RunsFailed
from pspo.reward import RewardError
from pspo.run.help import help_text
from pspo.run.job import run
from pspo.run.outcome import result
from pspo.update import NonFiniteError

FAILURES = (NonFiniteError, NoRoomError, SaveError, RewardError, RunsFailed)
EXPECTED = (ConfigError, HydraException, OmegaConfBaseException, *FAILURES)
"""Errors that are told in one sentence; any other is a bug and shows its traceback."""


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def main(composed: DictConfig) -> float | None:
    """One run, or one job of a multirun; returns what a sweeper may maximise."""
    values = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(values, dict)
    overrides = [override.lstrip("+") for override in HydraConfig.get().overrides.task]
    try:
        return result(run(resolve({str(name): value for name, value in values.items()}), overrides))
    except EXPECTED as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            log.error("pspo: %s", error)  # Hydra tells of the first failed job alone, and at the end
            raise error.with_traceback(None) from None  # whose frames would keep this job's weights until then
        _leave(error)


def cli() -> None:
    """``python -m pspo.run``: a user's mistake is one sentence and exit status 2, a failed run is status 1."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        sys.stdout.write(help_text())
        return
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come to us, and we say them in one sentence
    sys.argv[1:] = open_keys(sys.argv[1:])
    try:
        main()
    except EXPECTED as error:
        _leave(error)
    except KeyboardInterrupt:
        sys.exit("\npspo: stopped; the same command resumes from the last checkpoint")


def _leave(error: Exception) -> NoReturn:
    """Say one sentence; exit with 2 for a configuration to mend and 1 for a run that failed."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        error = unknown(option, error.options, group)
    sys.stderr.write(f"pspo: {' '.join(str(error).split())}\n")
    sys.exit(1 if isinstance(error, FAILURES) else 2)


if __name__ == "__main__":
    cli()
