"""Fill the caches on a node with internet, for jobs on nodes without; the overrides are those of the run.

python -m pspo.prefetch model=qwen1_5b dataset=gsm8k seed=0,1,2
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open

from pspo import dataset, model
from pspo.base.command import answering
from pspo.base.console import log, log_to_console
from pspo.base.schema import ConfigError
from pspo.config import Config, compose, compose_all
from pspo.host import environment
from pspo.model import source
from pspo.model.folder import cache_directory
from pspo.run import evaluation
from pspo.run.__main__ import EXPECTED
from pspo.sweep import expand

VERIFY = "--verify"
"""The flag with which the command starts itself, offline, to load what it has fetched."""


def prefetch(overrides: Sequence[str]) -> list[str]:
    """Download or make what the runs need and load it offline; returns shell lines for the jobs. Raises ConfigError."""
    configs = compose_all(job.overrides for job in expand(None, overrides))
    for config in configs:
        fetch(config)
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    verified = subprocess.run([sys.executable, "-m", "pspo.prefetch", VERIFY, *overrides], env=offline, check=False)
    if verified.returncode:
        raise ConfigError("what was fetched cannot be loaded offline; delete it from the cache and repeat this command")
    return exports(configs)


def fetch(config: Config) -> None:
    """Bring the data set and the policy of one run into the caches, unless they are there. Raises ConfigError."""
    evaluation.problems(config, dataset.load(config.dataset, config.seed))
    model.check(config.model)
    if not config.model.made_here:
        source.locate(config.model)
        return
    threads = environment.choose_threads(config.threads)
    log.info("warm start for seed %d and %d CPU threads: jobs with other threads make their own", config.seed, threads)
    _make_warm_start(config)


def verify(config: Config) -> None:
    """Load offline what ``fetch`` brought: all problems, the tokenizer, every weight file's table of contents.

    The weights themselves would need more memory than a login node may give. Raises ConfigError.
    """
    problems = dataset.load(config.dataset, config.seed)
    splits = {"train": problems.train, "validation": problems.validation} | evaluation.problems(config, problems)
    if config.model.made_here:
        _make_warm_start(config)
        policy = "the embedded policy"
    else:
        directory = source.locate(config.model)
        policy = f"{directory} ({_count_tensors(directory)} tensors)"
    dataset.encode(model.tokenizer(config.model), config.dataset, next(filter(None, splits.values()))[:1])
    counts = ", ".join(f"{len(split)} {name}" for name, split in splits.items())
    log.info("verified offline: dataset=%s (%s), %s", config.dataset.name, counts, policy)


def _make_warm_start(config: Config) -> None:
    """Load the embedded policy, which makes its warm start for these CPU threads where the cache has none."""
    environment.settle(environment.choose_threads(config.threads))
    model.load(config.model, config.seed, torch.device("cpu"))


def exports(configs: Sequence[Config]) -> list[str]:
    """Shell lines that let a job find the caches and keep it off the network."""
    paths = {"HF_HOME": constants.HF_HOME, "HF_HUB_OFFLINE": "1"}
    if Path(constants.HF_HUB_CACHE) != Path(constants.HF_HOME) / "hub":
        paths["HF_HUB_CACHE"] = constants.HF_HUB_CACHE
    if any(config.model.made_here for config in configs):
        paths["XDG_CACHE_HOME"] = str(cache_directory().parent.absolute())
    lines = [f"export {name}={shlex.quote(path)}" for name, path in paths.items()]
    if any(config.tracker.name == "wandb" for config in configs):
        lines.append("export WANDB_MODE=offline  # later, with internet: python -m pspo.sync outputs/<group>")
    return lines


def _count_tensors(directory: Path) -> int:
    """How many tensors the weight files hold; safetensors compares the files' lengths with their headers."""
    names = set()
    for path in directory.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                names.update(file.keys())
        except SafetensorError as error:
            raise ConfigError(f"{path} is damaged ({error}); delete it and repeat this command") from error
    return len(names)


def main() -> None:
    """``python -m pspo.prefetch``: exit status 2 where something cannot be had."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        sys.stdout.write((__doc__ or "") + "\n")
        return
    log_to_console()
    overrides = [argument for argument in sys.argv[1:] if argument != VERIFY]
    with answering(*EXPECTED, stopped="stopped; the same command fetches what is missing"):
        if VERIFY not in sys.argv[1:]:
            sys.stdout.write("\n".join(["# in the jobs:", *prefetch(overrides)]) + "\n")
            return
        for job in expand(None, overrides):
            verify(compose(job.overrides))


if __name__ == "__main__":
    main()
