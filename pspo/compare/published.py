"""Published accuracies beside ours with what differs, and what the whole published table costs in GPU-hours."""

from typing import Any

import numpy as np
import pandas as pd

from pspo.base.schema import as_dict, dotted
from pspo.compare.arms import Group, science_of
from pspo.compare.comparison import Comparison
from pspo.config import compose, groups

PAPER_SEEDS = 5
PAPER, VERSION_2 = "arXiv 2509.21282", "arXiv 2509.21282 version 2, temperature 0"
CLIP = f"{PAPER}; the authors' code gives this arm eps 0 and pspo's learning rate, unlike the text"
HARNESS = "public harness, 5-shot"
PUBLISHED = (
    ("qwen0_5b", "clip", "gsm8k", "17.6", CLIP),
    ("qwen0_5b", "pspo", "gsm8k", "39.7", PAPER),
    ("qwen1_5b", "clip", "gsm8k", "37.8", CLIP),
    ("qwen1_5b", "pspo", "gsm8k", "59.4", PAPER),
    ("qwen2_math1_5b", "pspo", "gsm8k", "79.9", VERSION_2),
    ("qwen2_math1_5b", "pspo", "math", "59.6", VERSION_2),
    ("qwen0_5b", "untrained", "gsm8k", "35", HARNESS),
    ("qwen1_5b", "untrained", "gsm8k", "60", HARNESS),
    ("qwen2_math1_5b", "untrained", "gsm8k", "63 to 71", HARNESS),
)
"""Model, arm, test set, accuracy in per cent, source. Of noclip the paper says "similar to PSPO", without a number."""


def beside(comparison: Comparison) -> pd.DataFrame:
    """A row for each published number and each arm of its model and objective; ``arm`` is None where there is none.

    ``differs`` has the keys that are not as in the paper's recipe, with their values, ours first.
    """
    runs = comparison.group.results.runs.set_index("run", drop=False)
    rows = []
    for model, kind, test_set, published, source in PUBLISHED:
        about = {"model": model, "published_arm": kind, "set": test_set, "published": published, "source": source}
        matching = []
        for row in comparison.arms.to_dict("records"):
            run = runs.loc[comparison.group.arms[row["arm"]][0]]
            ours = run["model.name"], "untrained" if run["budget.steps"] == 0 else run["objective.name"], row["set"]
            if ours == (model, kind, test_set):
                matching.append(row | about | {"differs": _differs(run.to_dict(), f"paper_{model}_{kind}")})
        rows += matching or [about | {"arm": None}]
    return pd.DataFrame(rows).replace({np.nan: None})


def _differs(run: dict[str, Any], experiment: str) -> str:
    if experiment not in groups()["experiment"]:
        return f"what cannot be told: there is no experiment={experiment}"
    ours, published = science_of(run), science_of(dotted(as_dict(compose([f"experiment={experiment}"]))))
    keys = [key for key in published if key != "model.path" and ours.get(key) != published[key]]
    return ", ".join(f"{key} {ours.get(key)} ({published[key]})" for key in keys) or "nothing that is configured"


def cost(group: Group, step_s: float | None = None) -> pd.DataFrame:
    """GPU-hours to train every recipe ``experiment=paper_*`` with the paper's five seeds; evaluation comes on top.

    Seconds a step are ``step_s``, else the median of the group's steps by the same model and objective, else by the
    same model; NaN where no run has that model.
    """
    names, rows = group.results.runs[["run", "model.name", "objective.name"]], []
    steps = group.results.steps.reindex(columns=["run", "time/step_s"]).merge(names, on="run")
    for name in groups()["experiment"]:
        if name.startswith("paper_"):
            recipe = compose([f"experiment={name}"])
            same = steps[steps["model.name"] == recipe.model.name]
            own = same[same["objective.name"] == recipe.objective.name]
            seconds = (own if len(own) else same)["time/step_s"].median() if step_s is None else step_s
            hours = PAPER_SEEDS * (recipe.budget.steps or 0) * seconds / 3600
            rows.append({"experiment": name, "steps": recipe.budget.steps, "step_s": seconds, "gpu_hours": hours})
    return pd.DataFrame(rows)
