"""Run directories as training and evaluation leave them, with answers that a test has made up."""

import functools
import json

import numpy as np
import yaml

from pspo.base.schema import as_dict
from pspo.config import compose


@functools.cache
def composed(*overrides):
    return as_dict(compose(overrides))


def write_run(
    group, overrides, seed, correct, *, evaluation="greedy", temperature=0.0, test_set="gsm8k", problems=None,
    state="DONE", code="c0de", truncated=0.0, spent=(100, 5000),
):  # fmt: skip
    """A run directory; ``correct`` has 0 or 1 for each problem, or for each problem and sample."""
    config = composed("tracker=jsonl", *overrides) | {"seed": seed, "group": group.name}
    directory = group / f"{'_'.join(overrides).replace('/', '-')}_seed{seed}"
    answers = directory / "evaluation" / "after" / evaluation
    answers.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (directory / "inputs.json").write_text(json.dumps({"code": code}))
    step = {"step": 1, "completion/truncated_rate": truncated, "time/step_s": 2.0, "time/rollout_s": 0.64}
    step |= {"budget/steps": 1, "budget/prompts": spent[0], "budget/completion_tokens": spent[1]}
    (directory / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    correct = np.asarray(correct).reshape(len(correct), -1)
    about = {"parsed": True, "strict": False, "timed_out": False, "tokens": 9, "truncated": False, "completion": "!"}
    about |= {"question": "?", "answer": "1"}
    rows = [
        {"problem": problem, "sample": sample, "correct": bool(value), "reward": float(value)} | about
        for problem, samples in zip(problems or map(str, range(len(correct))), correct, strict=True)
        for sample, value in enumerate(samples)
    ]
    path = answers / f"{test_set}_t{temperature:g}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if state:
        (directory / state).write_text("{}")
    return directory
