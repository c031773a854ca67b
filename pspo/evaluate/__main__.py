"""Answer held-out problems with the weights of runs, or with a model that no run has trained.

python -m pspo.evaluate run='outputs/first/*' evaluate=paper [checkpoint=step_000010] [hydra/launcher=local|slurm]
python -m pspo.evaluate model=hf model.path=<folder> evaluate.sets=[gsm8k,svamp] evaluate.path=<folder of data sets>

run=             run directories, groups or patterns, parted by commas; without it, the keys of pspo.run choose a model
checkpoint=      a checkpoint of the runs, such as step_000010; without it, the runs' last weights
evaluate=        greedy, quick or paper; evaluate.sets, .temperatures, .samples, ... (docs/keys.md) change it
dataset.shots=5  worked examples in every prompt; dataset.prompt='Q: {question}' replaces the chat template
--show-prompt    print the first prompt of every test set with its tokens, and answer nothing

The answers lie in <run>/evaluation/<when>/<evaluate.name>; the same command answers only what is missing there.
"""

import glob
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pspo import model
from pspo.base.command import answering, leave
from pspo.base.console import log, log_to_console
from pspo.base.schema import ConfigError
from pspo.config import launcher_keys
from pspo.launcher import Planned, RunsFailed, configure
from pspo.results import directories
from pspo.run.__main__ import EXPECTED, FAILED
from pspo.run.evaluation import Evaluation, answer, of_model, of_run, prompts, split


def main(arguments: Sequence[str]) -> None:
    """Answer, or hand the evaluations to a launcher. Raises ConfigError, and RunsFailed where one has failed."""
    show = "--show-prompt" in arguments
    words = [argument for argument in arguments if argument != "--show-prompt"]
    for word in words:
        if "=" not in word:
            raise ConfigError(f"{word} is no key=value; python -m pspo.evaluate --help has the arguments")
    launcher = [word for word in words if word.startswith(("hydra/", "hydra."))]
    own, overrides = split([word for word in words if word not in launcher])
    if "run" not in own:
        if "checkpoint" in own:
            raise ConfigError(f"checkpoint={own['checkpoint']} needs run=<run directory>")
        evaluations = [of_model(overrides)]
    else:
        evaluations = _of_runs(own["run"], own.get("checkpoint"), overrides)
    if show:
        for evaluation in evaluations[:1]:
            _show(evaluation)
    elif launcher:
        _launch(
            evaluations, launcher, [*overrides, *([f"checkpoint={own['checkpoint']}"] if "checkpoint" in own else [])]
        )
    else:
        for evaluation in evaluations:
            answer(evaluation)


def _of_runs(patterns: str, checkpoint: str | None, overrides: Sequence[str]) -> list[Evaluation]:
    """The evaluation of every run that a pattern names; runs that cannot be evaluated are named and left out."""
    paths = [match for pattern in patterns.split(",") for match in sorted(glob.glob(os.path.expanduser(pattern)))]
    runs = [run for path in paths for run in directories(Path(path))]
    evaluations, refusals = [], list[ConfigError]()
    for run in runs:
        try:
            evaluations.append(of_run(run, checkpoint, overrides))
        except ConfigError as refusal:
            refusals.append(refusal)
    if not evaluations:
        raise refusals[0] if refusals else ConfigError(f"run={patterns} names no directory; give outputs/<group>/<run>")
    log_to_console()
    for sentence in refusals:
        log.warning("left out: %s", sentence)
    return evaluations


def _launch(evaluations: Sequence[Evaluation], launcher: Sequence[str], overrides: Sequence[str]) -> None:
    kind, values = launcher_keys(launcher)
    if kind == "basic":
        raise ConfigError("hydra/launcher=basic makes no jobs; take local or slurm, or leave it out")
    planned = [
        Planned(
            overrides=[f"run={each.run}", *overrides] if (each.run / "config.yaml").is_file() else list(overrides),
            directory=each.directory,
            state="done" if each.is_done else "new",
            command="evaluate",
        )
        for each in evaluations
    ]
    outcomes = configure(kind, values, launcher).launch(planned)
    if failed := next((outcome for outcome in outcomes if isinstance(outcome, RunsFailed)), None):
        raise failed


def _show(evaluation: Evaluation) -> None:
    """Print what the model sees: the first prompt of every set as text, then each of its tokens with its number."""
    encoder = model.tokenizer(evaluation.config.model)
    for name, some in prompts(evaluation)[0].items():
        ids = some[0].token_ids
        tokens = " ".join(f"{encoder.decode([i])!r}:{i}" for i in ids)
        title = f"--- {name}, {some[0].problem.id}, {len(ids)} tokens"
        sys.stdout.write(f"{title}\n{encoder.decode(ids)}\n--- its tokens\n{tokens}\n")


def cli() -> None:
    """``python -m pspo.evaluate``: exit status 2 for a mistake, 1 where an evaluation has failed."""
    if {"-h", "--help"} & set(sys.argv[1:]) or not sys.argv[1:]:
        sys.stdout.write(__doc__ or "")
        return
    with answering(*(set(EXPECTED) - set(FAILED)), stopped="stopped; the same command answers what is missing"):
        try:
            main(sys.argv[1:])
        except FAILED as error:
            leave(error, 1)


if __name__ == "__main__":
    cli()
