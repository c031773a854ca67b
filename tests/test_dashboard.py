import json

import pytest
import wandb

from benchmarks.comparison import make_group
from pspo import dashboard
from pspo.base.schema import ConfigError
from pspo.report.panels import SECTIONS
from tests.test_tracker import no_login_of_this_machine, server  # noqa: F401

WANDB = ["tracker=wandb", "tracker.project=lab"]
ARMS = [["objective=noclip", *WANDB], ["objective=pspo", "objective.alpha=0.1", *WANDB]]


@pytest.fixture(autouse=True)
def no_settings_of_the_last_test():
    yield
    wandb.teardown()


@pytest.fixture
def directory(tmp_path):
    return make_group(tmp_path / "outputs" / "g", ARMS, seeds=2, steps=1, problems=2, samples=0)


def section_of(server):  # noqa: F811
    """The only view's specification as W&B got it."""
    (view,) = server.views.values()
    return json.loads(view["spec"])["section"]


def test_what_is_sent_are_the_panels_of_the_page_grouped_by_arm(directory, server):  # noqa: F811
    address = dashboard.renew(directory)
    (view,) = server.views.values()
    assert {name: view[name] for name in ("entityName", "projectName", "displayName", "type")} == {
        "entityName": "me", "projectName": "lab", "displayName": "g: comparison", "type": "project-view",
    }  # fmt: skip
    assert address == f"{server.address}/me/lab?nw={view['name'].removeprefix('nw-').removesuffix('-v')}"
    assert json.loads((directory / "dashboard.json").read_text()) == {"url": address}
    section = section_of(server)
    sent = {
        part["name"]: [(panel["viewType"], panel["config"]) for panel in part["panels"]]
        for part in section["panelBankConfig"]["sections"]
    }
    assert list(sent) == list(SECTIONS)
    for name, panels in SECTIONS.items():
        lines = [config for kind, config in sent[name] if kind == "Run History Line Plot"]
        assert [config["chartTitle"] for config in lines] == [panel.title for panel in panels]
        assert [config["metrics"] for config in lines] == [list(panel.curves) for panel in panels]
        assert [config.get("yLogScale", False) for config in lines] == [panel.log for panel in panels]
        assert {(config["groupAgg"], config["groupArea"]) for config in lines} == {("mean", "minmax")}
    kinds = [kind for kind, _ in sent["Evaluation"]]
    assert kinds[-3:] == ["Bar Chart", "Weave", "Media Browser"]
    assert sent["Evaluation"][-3][1]["metrics"] == ["evaluation/embedded/after/accuracy"]
    (runs,) = section["runSets"]
    assert [key["name"] for key in runs["grouping"]] == ["objective.value.name", "objective.value.alpha"]
    assert '"g"' in json.dumps(runs["filters"])


def test_the_second_time_the_same_view_is_renewed(directory, server):  # noqa: F811
    first = dashboard.renew(directory)
    (saved,) = server.views.values()
    assert dashboard.renew(directory, by=["objective.alpha"]) == first
    (again,) = server.views.values()
    assert (again["id"], again["name"]) == (saved["id"], saved["name"])
    assert len(section_of(server)["panelBankConfig"]["sections"]) == len(SECTIONS)


def test_a_view_that_was_deleted_is_made_anew(directory, server):  # noqa: F811
    first = dashboard.renew(directory)
    server.views.clear()
    second = dashboard.renew(directory)
    assert first != second
    assert json.loads((directory / "dashboard.json").read_text()) == {"url": second}


def test_runs_that_still_train_are_shown_too(directory, server):  # noqa: F811
    for done in directory.glob("*/DONE"):
        done.unlink()
    dashboard.renew(directory)
    assert len(server.views) == 1


def test_mistakes_are_one_sentence_and_leave_no_trace(directory, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"W&B cannot be reached at http://127\.0\.0\.1:9"):
        dashboard.renew(directory)
    with pytest.raises(ConfigError, match=r"objective\.alhpa.*objective\.alpha"):
        dashboard.renew(directory, by=["objective.alhpa"])
    offline = make_group(tmp_path / "h", [["objective=noclip", "tracker=jsonl"]], 1, steps=1, problems=2)
    with pytest.raises(ConfigError, match=r"no run of .* has tracker=wandb"):
        dashboard.renew(offline)
    assert not (directory / "dashboard.json").exists()
