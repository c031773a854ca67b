"""Start-up beside what its imports cost: ``python -m benchmarks.startup [rounds] [key=value ...]``.

Seconds from the start of the process to where the default run is about to write its first completion, everything
loaded and the warm policy in the cache; beside a process that only imports torch, transformers, datasets and hydra, and
one that also imports the model's class, which the library does only when it is asked for. In turns, the first round a
warm-up; Python keeps its bytecode, as it does unless told otherwise.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

from benchmarks import measure

IMPORTS = "import torch, transformers, datasets, hydra; print('ready', flush=True)"
CLASSES = f"from transformers import AutoTokenizer, Qwen2ForCausalLM; {IMPORTS}"
RUN = """
import pspo.run.__main__
import pspo.run.evaluation

def ready(*_, **__):
    print("ready", flush=True)
    raise SystemExit

pspo.run.evaluation.answer = ready  # the test before training is what comes first
pspo.run.__main__.cli()
"""


def ready_s(code: str, *words: str) -> float:
    """Seconds until a Python process says that it is ready."""
    begun, cached = time.perf_counter(), {n: v for n, v in os.environ.items() if n != "PYTHONDONTWRITEBYTECODE"}
    with subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, text=True, env=cached
    ) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        elapsed = time.perf_counter() - begun
    if said != "ready\n":
        sys.exit(f"benchmarks.startup: the process ended with status {process.returncode} before it was ready")
    return elapsed


def main() -> None:
    """Both in turns."""
    parser = argparse.ArgumentParser(prog="benchmarks.startup", epilog="key=value sets the run's own configuration")
    parser.add_argument("rounds", nargs="?", type=int, default=7)
    asked = measure.arguments(parser)
    found: dict[str, list[float]] = {"ours": [], "imports": [], "imports and the model's class": []}
    for _ in range(asked.rounds + 1):
        with tempfile.TemporaryDirectory() as directory:
            found["ours"].append(ready_s(RUN, f"output_dir={directory}", *asked.overrides))
        found["imports"].append(ready_s(IMPORTS))
        found["imports and the model's class"].append(ready_s(CLASSES))
    ours, *others = [(beside, seconds[1:]) for beside, seconds in found.items()]
    rows = []
    for beside, seconds in others:
        values = measure.summary(ours[1]), beside, measure.summary(seconds), measure.ratio(ours[1], seconds)
        rows.append(measure.row("start-up to the first rollout, s", *values))
    measure.write("startup", rows, rounds=found, overrides=asked.overrides)


if __name__ == "__main__":
    main()
