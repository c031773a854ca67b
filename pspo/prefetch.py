"""Fill the caches on a node with internet, for jobs on nodes without it; takes the overrides of the runs.

python -m pspo.prefetch model=qwen1_5b dataset=gsm8k seed=0,1,2
"""

import shlex
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
from pspo.config import Config, compose_all
from pspo.host import environment
from pspo.model import source
from pspo.run import evaluation
from pspo.run.__main__ import EXPECTED
from pspo.sweep import expand


def prefetch(overrides: Sequence[str]) -> list[str]:
    """Fetch or make what the runs need, then load it offline; returns shell lines for the jobs. Raises ConfigError."""
    configs = compose_all(job.overrides for job in expand(None, overrides))
    for config in configs:
        load(config)
    constants.HF_HUB_OFFLINE = True
    for config in configs:
        log.info("verified offline: %s", load(config))
    return exports(configs)


def load(config: Config) -> str:
    """Load the data set and the policy of one run, fetched or made where the caches lack them; returns a description.

    Weight files are not read whole, for the memory of a login node. Raises ConfigError.
    """
    problems = dataset.load(config.dataset, config.seed)
    splits = {"train": problems.train, "validation": problems.validation} | evaluation.problems(config, problems)
    threads = environment.choose_threads(config.threads)
    if config.model.made_here:
        torch.set_num_threads(threads)
        model.load(config.model, config.seed, torch.device("cpu"))
        policy = f"the embedded policy of seed {config.seed} for jobs with {threads} CPU threads"
    else:
        policy = str(source.locate(config.model))
        for path in Path(policy).glob("*.safetensors"):
            try:
                with safe_open(path, framework="pt"):  # compares the file's length with its header
                    pass
            except SafetensorError as error:
                raise ConfigError(f"{path} is damaged ({error}); delete it and repeat this command") from error
    dataset.encode(model.tokenizer(config.model), config.dataset, next(filter(None, splits.values()))[:1])
    counts = ", ".join(f"{len(split)} {name}" for name, split in splits.items())
    return f"dataset={config.dataset.name} ({counts}), {policy}"


def exports(configs: Sequence[Config]) -> list[str]:
    """Shell lines that let a job find the caches and keep it off the network."""
    paths = {"HF_HOME": constants.HF_HOME, "HF_HUB_CACHE": constants.HF_HUB_CACHE, "HF_HUB_OFFLINE": "1"}
    paths["XDG_CACHE_HOME"] = str(
        source.cache_directory().parent.absolute()
    )  # warm starts, and models converted from GGUF
    lines = [f"export {name}={shlex.quote(path)}" for name, path in paths.items()]
    if any(config.tracker.name == "wandb" for config in configs):
        lines.append("export WANDB_MODE=offline  # later, with internet: python -m pspo.sync outputs/<group>")
    return lines


def main() -> None:
    """``python -m pspo.prefetch``: exit status 2 where something cannot be had."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        sys.stdout.write((__doc__ or "") + "\n")
        return
    log_to_console()
    with answering(*EXPECTED, stopped="stopped; the same command fetches what is missing"):
        sys.stdout.write("\n".join(["# in the jobs:", *prefetch(sys.argv[1:])]) + "\n")


if __name__ == "__main__":
    main()
