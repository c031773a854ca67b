"""Published accuracies beside ours with what differs, and what the whole published table costs in GPU-hours."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from pspo.budget import gpu_hours
from pspo.compare.arms import ComparedRuns, settings_of
from pspo.compare.comparison import Comparison
from pspo.config import compose, groups, read

PAPER_SEEDS = 5
NUM_TEST_PROBLEMS = {"gsm8k": 1319, "svamp": 1000, "asdiv": 2305, "math500": 500}
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
KEYS = ["model", "published_arm", "set"]
"""First columns of ``PUBLISHED``, then accuracy in per cent and source. The paper has no number for noclip."""


def sentences(comparison: Comparison, step_s: float | None = None) -> Iterator[str]:
    """Each published number with the arms that it may be held to, then the cost of the published table."""
    yield "Published, and ours"
    for row in beside(comparison).to_dict("records"):
        text = "{model} {published_arm}, {set}: published {published} % ({source}); "
        ours = "ours {mean:.1%} [{low:.1%}, {high:.1%}], {arm}, {selection}, seeds: {seeds:.0f}; differs in {differs}"
        yield (text + ("no arm here" if pd.isna(row["arm"]) else ours)).format(**row)
    yield f"Training and evaluating the published table, {PAPER_SEEDS} seeds"
    costs = cost(comparison.group, step_s)
    for row in costs.dropna().to_dict("records"):
        run = "{steps} steps of {step_s:.2f} s, {answers:,} answers of {answer_s:.3f} s".format(**row)
        yield "{experiment}: {gpu_hours:.1f} GPU-hours; a run has ".format(**row) + run
    if missing := costs.loc[costs["gpu_hours"].isna(), "experiment"].to_list():
        yield f"no run here has measured a step of {', '.join(missing)}; give --step-s"
    if len(missing) < len(costs):
        yield f"together {costs['gpu_hours'].sum():.0f} GPU-hours"


def beside(comparison: Comparison) -> pd.DataFrame:
    """A row for each published number and each arm of its model and objective; ``arm`` is NaN where there is none.

    ``differs`` has the keys that are not as in the paper's recipe, with their values, ours first.
    """
    group, published = comparison.group, pd.DataFrame(PUBLISHED, columns=[*KEYS, "published", "source"])
    first = group.runs.reset_index().drop_duplicates("arm").rename(columns={"model.name": "model"})
    first["published_arm"] = first["objective.name"].where(first["budget.steps"] != 0, "untrained")
    ours = comparison.arms.merge(first[["arm", "run", "model", "published_arm"]], on="arm")
    rows = published.merge(ours, how="left", on=KEYS)
    recipes = "paper_" + rows["model"] + "_" + rows["published_arm"]
    differs = [_differs(*pair) if isinstance(pair[0], str) else "" for pair in zip(rows["run"], recipes, strict=True)]
    return rows.assign(differs=differs)


def _differs(run: str, experiment: str) -> str:
    if experiment not in groups()["experiment"]:
        return f"what cannot be told: there is no experiment={experiment}"
    ours, recipe = settings_of(read(Path(run, "config.yaml"))), settings_of(compose([f"experiment={experiment}"]))
    keys = [key for key in recipe if key != "model.path" and ours.get(key) != recipe[key]]
    return ", ".join(f"{key} {ours.get(key)} ({recipe[key]})" for key in keys) or "nothing that is configured"


def cost(group: ComparedRuns, step_s: float | None = None) -> pd.DataFrame:
    """``table_cost`` at the medians of the group's steps by the same model, or with ``step_s`` for both: too long."""
    times = ["time/step_s", "time/rollout_s"]
    steps = group.results.steps.reindex(columns=["run", *times]).join(group.runs["model.name"], on="run")
    medians = steps.groupby("model.name")[times].median().itertuples()
    measured = {name: (step, rollout) for name, step, rollout in medians}
    return table_cost(measured if step_s is None else dict.fromkeys(groups()["model"], (step_s, step_s)))


def table_cost(measured: Mapping[str, tuple[float, float]]) -> pd.DataFrame:
    """GPU-hours to train and to evaluate every recipe ``experiment=paper_*`` with the paper's five seeds.

    ``measured`` has the seconds of a step and of its rollout by the model's name; without them the cost is NaN. A test
    answer takes as long as a completion of a rollout.
    """
    rows = []
    for name in groups()["experiment"]:
        if name.startswith("paper_"):
            recipe = compose([f"experiment={name}"])
            evaluate, (seconds, rollout_s) = recipe.evaluate, measured.get(recipe.model.name, (math.nan, math.nan))
            of_problem = 1 + sum(evaluate.samples if t else 1 for t in evaluate.temperatures)  # one before training
            answers = of_problem * sum(NUM_TEST_PROBLEMS[each] for each in evaluate.sets or ())
            row: dict[str, Any] = {
                "experiment": name,
                "steps": recipe.budget.steps or 0,
                "step_s": seconds,
                "answers": answers,
            }
            row |= {"answer_s": rollout_s / (recipe.rollout.prompts * recipe.rollout.group_size)}
            hours = gpu_hours(PAPER_SEEDS, (row["steps"] * row["step_s"] + answers * row["answer_s"]) / 3600)
            rows.append(row | {"gpu_hours": hours})
    return pd.DataFrame(rows)
