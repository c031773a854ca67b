"""Published accuracies beside ours with what differs, and what the whole published table costs in GPU-hours."""

from dataclasses import dataclass

import pandas as pd

from pspo.base.schema import as_dict, keys_of
from pspo.compare.arms import Group, science_of
from pspo.compare.comparison import Comparison
from pspo.config import Config, compose, groups

PAPER = "Dwyer, Sobey and Chapman 2025, arXiv 2509.21282"
HARNESS = "public harness, 5-shot"
CLIP_CODE = "the authors' code gives this arm eps 0 and pspo's learning rate, not what the text says"
PAPER_SEEDS = 5


@dataclass(frozen=True)
class Published:
    """A published accuracy; ``low`` and ``high`` differ where a range was reported."""

    model: str
    arm: str
    set: str
    low: float
    high: float
    source: str
    remark: str = ""


PUBLISHED = (
    Published("qwen0_5b", "clip", "gsm8k", 0.176, 0.176, PAPER, CLIP_CODE),
    Published("qwen0_5b", "pspo", "gsm8k", 0.397, 0.397, PAPER),
    Published("qwen1_5b", "clip", "gsm8k", 0.378, 0.378, PAPER, CLIP_CODE),
    Published("qwen1_5b", "pspo", "gsm8k", 0.594, 0.594, PAPER),
    Published("qwen2_math1_5b", "pspo", "gsm8k", 0.799, 0.799, f"{PAPER}, version 2, temperature 0"),
    Published("qwen2_math1_5b", "pspo", "math", 0.596, 0.596, f"{PAPER}, version 2, temperature 0"),
    Published("qwen0_5b", "untrained", "gsm8k", 0.35, 0.35, HARNESS),
    Published("qwen1_5b", "untrained", "gsm8k", 0.60, 0.60, HARNESS),
    Published("qwen2_math1_5b", "untrained", "gsm8k", 0.63, 0.71, HARNESS),
)
"""Of noclip, the paper says "similar to PSPO" without a number."""


def beside(comparison: Comparison) -> pd.DataFrame:
    """One row for each published number and each arm of its model and objective, or without an arm where there is none.

    ``differs`` has the keys whose values are not those of the paper's recipe, ours first.
    """
    runs = comparison.group.results.runs.set_index("run", drop=False)
    rows = []
    for number in PUBLISHED:
        about = {"model": number.model, "published_arm": number.arm, "set": number.set, "published": number.low}
        about |= {"published_high": number.high, "source": number.source, "remark": number.remark}
        matching = 0
        for row in comparison.arms.to_dict("records"):
            run = runs.loc[comparison.group.arms[row["arm"]][0]]
            kind = "untrained" if run["budget.steps"] == 0 else run["objective.name"]
            if (run["model.name"], kind, row["set"]) == (number.model, number.arm, number.set):
                ours = {name: row[name] for name in ("arm", "selection", "seeds", "mean", "low", "high")}
                rows.append(about | ours | {"differs": _differs(run.to_dict(), number)})
                matching += 1
        if not matching:
            rows.append(about | {"arm": None, "differs": ""})
    return pd.DataFrame(rows)


def _differs(ours: dict[str, object], number: Published) -> str:
    recipe = _recipe(number.model, number.arm)
    if recipe is None:
        return "dataset.shots" if number.arm == "untrained" and ours.get("dataset.shots") != 5 else ""
    published = science_of({name: value for name, _, value in keys_of(Config, as_dict(recipe))})
    mine = science_of(ours)
    keys = [key for key in published if key not in ("model.path", "model.hub_id") and mine.get(key) != published[key]]
    return ", ".join(f"{key} {mine.get(key)} ({published[key]})" for key in keys)


def _recipe(model: str, objective: str) -> Config | None:
    name = f"paper_{model}_{objective}"
    return compose([f"experiment={name}"]) if name in groups()["experiment"] else None


def cost(group: Group, step_s: float | None = None) -> pd.DataFrame:
    """GPU-hours to train every recipe ``experiment=paper_*`` with the paper's five seeds; evaluation comes on top.

    Seconds a step are ``step_s``, else the median of the group's steps by the same model and objective, else by the
    same model; NaN where no run has that model.
    """
    runs, steps = group.results.runs, group.results.steps
    rows = []
    for name in groups()["experiment"]:
        if name.startswith("paper_"):
            recipe = compose([f"experiment={name}"])
            same = runs[(runs["model.name"] == recipe.model.name)]
            own = same[same["objective.name"] == recipe.objective.name]
            measured = steps.loc[steps["run"].isin((own if len(own) else same)["run"]), "time/step_s"]
            seconds = measured.median() if step_s is None else step_s
            hours = PAPER_SEEDS * (recipe.budget.steps or 0) * seconds / 3600
            rows.append({"experiment": name, "steps": recipe.budget.steps, "step_s": seconds, "gpu_hours": hours})
    return pd.DataFrame(rows)
