"""Make or renew the W&B workspace of a group: its runs grouped by arm, in the sections of the comparison's page.

python -m pspo.dashboard outputs/<group> [--by objective.alpha]
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pspo.base.command import answering
from pspo.base.files import read_json, write_json
from pspo.base.schema import ConfigError
from pspo.compare.arms import group
from pspo.report.panels import SECTIONS, Panel
from pspo.results import Results, load
from pspo.tracker.wandb import check_login


def renew(directory: Path, by: Sequence[str] = ()) -> str:
    """Save the workspace of ``outputs/<group>`` at W&B, the one of ``dashboard.json`` where it still exists.

    Returns the workspace's address, which ``dashboard.json`` keeps. Raises ConfigError for a group without a run at W&B
    and where W&B cannot be reached.
    """
    results = load(directory, texts=False)
    # A sweep is watched while its runs train, so every run counts as finished here.
    keys = group(replace(results, runs=results.runs.assign(state="done")), by).by
    project, entity = _project(results, directory)
    check_login()
    import wandb
    from wandb_workspaces import workspaces

    record, name = directory / "dashboard.json", results.runs["group"].iloc[0]
    workspace = _saved(read_json(record).get("url"))
    if workspace is None:
        owner = entity or wandb.Api().default_entity
        workspace = workspaces.Workspace(entity=owner, project=project, name=f"{name}: comparison")
    workspace.sections, workspace.runset_settings = _sections(results), _runs(name, keys)
    workspace.settings = workspaces.WorkspaceSettings(max_runs=100)
    address = str(workspace.save().url)
    write_json(record, {"url": address})
    return address


def _project(results: Results, directory: Path) -> tuple[str, str | None]:
    """The W&B project and entity of the group's runs. Raises ConfigError where there is none, or more than one."""
    runs = results.runs
    mirrored = runs[runs["tracker.name"] == "wandb"]
    if mirrored.empty:
        raise ConfigError(f"no run of {directory} has tracker=wandb; W&B has nothing that a workspace could show")
    places = mirrored[["tracker.project", "tracker.entity"]].astype(object)
    places = places.where(places.notna(), None).drop_duplicates()
    if len(places) > 1:
        raise ConfigError(f"the runs of {directory} are in {len(places)} W&B projects; a workspace shows one of them")
    project, entity = places.iloc[0]
    return project, entity


def _saved(address: str | None) -> Any:
    """The workspace at an address; None where there is none any more."""
    from wandb_workspaces import workspaces

    try:
        return workspaces.Workspace.from_url(address) if address else None
    except ValueError:  # deleted at W&B, or its project
        return None


def _sections(results: Results) -> list[Any]:
    """The panels' sections; to "Evaluation" come the accuracies on the test sets and the completions."""
    from wandb_workspaces.reports import v2 as reports
    from wandb_workspaces.workspaces import Section

    sections = []
    for title, panels in SECTIONS.items():
        drawn: list[Any] = [_plot(part) for panel in panels for part in panel.parts()]
        if title == "Evaluation":
            answers = results.answers
            sets = [] if answers.empty else sorted(set(answers.loc[answers["when"] == "after", "set"]))
            drawn += [
                reports.BarPlot(
                    title=f"Accuracy on {name} after training",
                    metrics=[reports.SummaryMetric(f"evaluation/{name}/after/accuracy")],
                    groupby_aggfunc="mean", groupby_rangefunc="minmax",
                )
                for name in sets
            ]  # fmt: skip
            drawn.append(reports.WeavePanelSummaryTable(table_name="completions"))
            drawn.append(reports.MediaBrowser(title="Figures", media_keys=["figures/curves"]))
        sections.append(Section(name=title, panels=drawn, is_open=True))
    return sections


def _plot(panel: Panel) -> Any:
    """A panel as W&B's line plot: mean over an arm's runs, band from the lowest run to the highest, as on the page."""
    from wandb_workspaces.reports import v2 as reports

    return reports.LinePlot(
        title=panel.title, x="Step", y=list(panel.curves), log_y=panel.log or None,
        groupby_aggfunc="mean", groupby_rangefunc="minmax",
    )  # fmt: skip


def _runs(name: str, keys: Sequence[str]) -> Any:
    """The runs of the group alone, grouped by the keys that set the arms apart."""
    from wandb_workspaces import expr, workspaces

    return workspaces.RunsetSettings(
        filters=[expr.Metric("Group") == name],
        groupby=[expr.Config(key) for key in keys],
        order=[expr.Ordering(expr.Metric("Name"), ascending=True)],
    )


def main() -> None:
    """``python -m pspo.dashboard``: exit status 2 for a mistake."""
    parser = argparse.ArgumentParser(prog="python -m pspo.dashboard", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("group", type=Path, help="outputs/<group>")
    parser.add_argument(
        "--by", action="append", default=[], help="key that sets the arms apart; all that differ, if not given"
    )
    arguments = parser.parse_args()
    with answering(ConfigError, stopped="stopped; the same command begins again"):
        sys.stdout.write(f"{renew(arguments.group, arguments.by)}\n")


if __name__ == "__main__":
    main()
