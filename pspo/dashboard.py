"""Make or renew the W&B workspace of a group: its runs grouped by arm, in the sections of the comparison's page.

python -m pspo.dashboard outputs/<group> [--by objective.alpha]
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pspo.base.command import answering, expanded
from pspo.base.files import read_json, write_json
from pspo.base.schema import ConfigError
from pspo.compare.arms import group
from pspo.report.panels import SECTIONS
from pspo.results import load
from pspo.tracker import check_login


def renew(directory: Path, by: Sequence[str] = ()) -> str:
    """Save the workspace of ``outputs/<group>`` at the address in ``dashboard.json``, or else as a new workspace.

    Returns its address, which ``dashboard.json`` keeps. Raises ConfigError for a group without a run at W&B, and where
    W&B cannot be reached.
    """
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise ConfigError("pspo.dashboard needs the package wandb-workspaces; pip install 'pspo[dashboard]'")
    results = load(directory, texts=False)
    runs = results.runs[results.runs["tracker.name"] == "wandb"]
    if runs.empty:
        raise ConfigError(f"no run of {directory} has tracker=wandb; W&B has nothing that a workspace could show")
    name, project, entity = runs[["group", "tracker.project", "tracker.entity"]].iloc[0]
    # A sweep is watched while it trains, so every run counts as finished here.
    keys = group(replace(results, runs=results.runs.assign(state="done")), by).by
    check_login()
    import wandb
    from wandb_workspaces import expr, workspaces

    record = directory / "dashboard.json"
    try:
        workspace = workspaces.Workspace.from_url(read_json(record).get("url", ""))
    except ValueError:  # there is none yet, or it has been deleted
        owner = entity if isinstance(entity, str) else str(wandb.Api().default_entity)
        workspace = workspaces.Workspace(entity=owner, project=project, name=f"{name}: comparison")
    after = results.answers.reindex(columns=["when", "set"]).query("when == 'after'")
    workspace.sections = _sections(sorted(after["set"].unique()))
    workspace.settings = workspaces.WorkspaceSettings(max_runs=100)
    arms: list[Any] = [expr.Config(key) for key in keys]
    workspace.runset_settings = workspaces.RunsetSettings(filters=[expr.Metric("Group") == name], groupby=arms)
    address = str(workspace.save().url)
    write_json(record, {"url": address})
    return address


def _sections(sets: Sequence[str]) -> list[Any]:
    """The panels' sections; "Evaluation" has accuracy on the test sets, the completions and the figures as well.

    Lines are means over the runs of an arm, bands go from the lowest run to the highest, as on the page.
    """
    from wandb_workspaces.reports.v2 import interface as reports
    from wandb_workspaces.workspaces import Section

    spread: dict[str, Any] = {"groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}
    drawn: dict[str, list[Any]] = {}
    for title, panels in SECTIONS.items():
        drawn[title] = [
            reports.LinePlot(title=panel.title, x="Step", y=list(panel.curves), log_y=panel.log or None, **spread)
            for panel in panels
        ]
    for name in sets:
        accuracy: dict[str, Any] = {"metrics": [f"evaluation/{name}/after/accuracy"], **spread}
        drawn["Evaluation"].append(reports.BarPlot(title=f"Accuracy on {name} after training", **accuracy))
    drawn["Evaluation"].append(reports.WeavePanelSummaryTable(table_name="completions"))
    drawn["Evaluation"].append(reports.MediaBrowser(title="Figures", media_keys=["figures/curves"]))
    return [Section(name=title, panels=panels, is_open=True) for title, panels in drawn.items()]


def main() -> None:
    """``python -m pspo.dashboard``: exit status 2 for a mistake."""
    parser = argparse.ArgumentParser(prog="python -m pspo.dashboard", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("group", type=expanded, help="outputs/<group>")
    parser.add_argument("--by", action="append", default=[], help="key that sets arms apart; default: all that differ")
    arguments = parser.parse_args()
    with answering(ConfigError, stopped="stopped; the same command begins again"):
        sys.stdout.write(f"{renew(arguments.group, arguments.by)}\n")


if __name__ == "__main__":
    main()
