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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pspo import model
from pspo.base.console import log, log_to_console
from pspo.base.schema import ConfigError
from pspo.config import launcher_keys
from pspo.launcher import Planned, RunsFailed, configure
from pspo.results import directories
from pspo.run.__main__ import reporting
from pspo.run.evaluation import Evaluation, of_words

SHOW_PROMPT = "--show-prompt"
COLUMNS = ("set", "temperature", "n", "samples")  # of the printed table; then RATES, in per cent
RATES = ("accuracy", "ci95_low", "ci95_high", "strict_accuracy", "truncated_rate")
TITLES = {"temperature": "T", "samples": "k", "ci95_low": "[95 %", "ci95_high": "]", "strict_accuracy": "strict"}


def main(arguments: Sequence[str]) -> None:
    """Answer, or hand the evaluations to a launcher. Raises ConfigError, and RunsFailed where one has failed."""
    launcher = [word for word in arguments if word.startswith(("hydra/", "hydra."))]
    words = [word for word in arguments if word not in (*launcher, SHOW_PROMPT)]
    for word in words:
        if "=" not in word:
            raise ConfigError(f"{word} is no key=value; python -m pspo.evaluate --help has the arguments")
    evaluations = _evaluations(words)
    if SHOW_PROMPT in arguments:
        _show(evaluations[0])
    elif launcher:
        _launch(evaluations, launcher)
    else:
        for evaluation in evaluations:
            sys.stdout.write(f"{table(evaluation.answer())}\nanswers {evaluation.directory}\n")


def _evaluations(words: Sequence[str]) -> list[Evaluation]:
    """The evaluation of every run that a pattern names; runs that cannot be evaluated are named and left out."""
    patterns = [pattern for word in words if word.startswith("run=") for pattern in word[len("run=") :].split(",")]
    if not patterns:
        return [of_words(words)]
    paths = [match for pattern in patterns for match in sorted(glob.glob(os.path.expanduser(pattern)))]
    others = [word for word in words if not word.startswith("run=")]
    evaluations, refusals = [], list[ConfigError]()
    for run in (run for path in paths for run in directories(Path(path))):
        try:
            evaluations.append(of_words([f"run={run}", *others]))
        except ConfigError as refusal:
            refusals.append(refusal)
    if not evaluations:
        nothing = ConfigError(f"run={','.join(patterns)} names no directory; give outputs/<group>/<run>")
        raise next(iter(refusals), nothing)
    log_to_console()
    for sentence in refusals:
        log.warning("left out: %s", sentence)
    return evaluations


def _launch(evaluations: Sequence[Evaluation], launcher: Sequence[str]) -> None:
    kind, values = launcher_keys(launcher)
    if kind == "basic":
        raise ConfigError("hydra/launcher=basic makes no jobs; take local or slurm, or leave it out")
    planned = [
        Planned(overrides=each.words, directory=each.directory, state=each.state, command="evaluate")
        for each in evaluations
    ]
    for outcome in configure(kind, values, launcher).launch(planned):
        if isinstance(outcome, RunsFailed):
            raise outcome


def _show(evaluation: Evaluation) -> None:
    """Print what the model sees: the first prompt of every set as text, then each of its tokens with its number."""
    encoder = model.tokenizer(evaluation.config.model)
    for name, prompts in evaluation.prompts()[0].items():
        ids = prompts[0].token_ids
        tokens = " ".join(f"{encoder.decode([i])!r}:{i}" for i in ids)
        title = f"--- {name}, {prompts[0].problem.id}, {len(ids)} tokens"
        sys.stdout.write("\n".join([title, encoder.decode(ids), "--- its tokens", tokens, ""]))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The numbers of every set and temperature for a person, in 80 columns."""
    frame = pd.DataFrame(rows).astype({"temperature": str})
    votes = [name for name in frame if name.startswith(("pass@", "maj@"))][-2:]
    rates = [name for name in (*RATES, *votes) if name in frame]
    frame = frame[[*COLUMNS, *rates]].assign(**100 * frame[rates])
    return str(frame.rename(columns=TITLES).to_string(index=False, float_format="{:.1f}".format, na_rep=""))


def cli() -> None:
    """``python -m pspo.evaluate``."""
    if {"-h", "--help"} & set(sys.argv[1:]) or not sys.argv[1:]:
        sys.stdout.write(__doc__ or "")
        return
    with reporting("answers what is missing"):
        main(sys.argv[1:])


if __name__ == "__main__":
    cli()
