import json
import sys

import filelock
import pytest

from pspo import sync
from pspo.base.schema import ConfigError
from tests.test_tracker import finish, no_login_of_this_machine, record, server  # noqa: F401
from tests.wandb_server import make_run


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "g" / "a")


@pytest.fixture
def offline(monkeypatch):
    """Where runs are: no network. ``sync`` is told otherwise by its own command alone."""
    monkeypatch.setenv("WANDB_MODE", "offline")


def save(run, step):
    """As a checkpoint of that step stands there."""
    (run / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)


def end(run):
    (run / "summary.json").write_text(json.dumps({"evaluation": {"embedded": {"after": {"accuracy": 0.5}}}}))
    (run / "DONE").touch()


def synced(group):
    return list(sync.sync(group))


@pytest.mark.process
def test_offline_runs_arrive_whole_and_once(run, server, offline):  # noqa: F811
    other = make_run(run.with_name("b"))
    for directory, steps in ((run, range(6)), (other, range(3))):
        record(directory, *steps)
        save(directory, steps[-1])
        end(directory)
    assert server.lines == {}
    assert synced(run.parent) == [("a", 6, ""), ("b", 3, "")]
    assert (server.steps(run), server.steps(other)) == ([*range(6)], [*range(3)])
    assert [row["reward/mean"] for row in server.history(run)] == [step / 7 for step in range(6)]
    assert {told["displayName"] for told in server.told.values()} == {"a", "b"}
    assert all(told["groupName"] == "smoke" for told in server.told.values())
    assert [summary["evaluation/embedded/after/accuracy"] for summary in server.summary.values()] == [0.5, 0.5]
    server.status.append(("graphql", 500))  # nothing more is asked
    assert synced(run.parent) == []


@pytest.mark.process
def test_a_requeued_run_is_sent_piece_by_piece_up_to_its_newest_checkpoint(run, server, offline):  # noqa: F811
    record(run, 0, 1, 2, 3)
    assert synced(run.parent) == []  # no checkpoint: the next attempt begins anew
    save(run, 2)
    assert synced(run.parent) == [("a", 3, "")]
    assert server.steps(run) == [0, 1, 2]
    assert synced(run.parent) == []
    record(run, 3, 4, 5, state={"metrics_rows": 3})
    save(run, 5)
    end(run)
    assert synced(run.parent) == [("a", 3, "")]
    assert server.steps(run) == list(range(6))
    assert synced(run.parent) == []


@pytest.mark.process
def test_a_run_that_lost_wandb_midway_gets_what_it_lacks_and_goes_on_online(run, server, monkeypatch):  # noqa: F811
    record(run, 0, 1)
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        state = record(run, 2, 3, state={"metrics_rows": 2})
    save(run, 3)
    assert synced(run.parent) == [("a", 2, "")]
    record(run, 4, state=state)
    assert server.steps(run) == list(range(5))


@pytest.mark.process
def test_a_row_lost_on_the_way_is_told_and_sent_the_next_time(run, server, offline):  # noqa: F811
    record(run, 0, 1)
    save(run, 1)
    server.status.append(("file_stream", 403))
    ((_, _, error),) = sync.sync(run.parent)
    assert "W&B still lacks 2" in error
    server.status.clear()
    assert synced(run.parent) == [("a", 2, "")]
    assert server.steps(run) == [0, 1]


def test_a_server_that_refuses_is_told_with_its_own_words_and_stops_no_other_run(run, server, offline):  # noqa: F811
    for directory in (run, make_run(run.with_name("b"))):
        record(directory, 0)
        save(directory, 0)
    server.status.append((json.loads((run / "wandb.json").read_text())["id"], 401))
    (_, _, error), second = sync.sync(run.parent)
    assert "401" in error
    assert second == ("b", 1, "")


def test_a_run_whose_rows_another_process_sends_is_left(run, server, offline):  # noqa: F811
    record(run, 0)
    save(run, 0)
    with filelock.FileLock(run / ".wandb.lock", timeout=0):
        assert synced(run.parent) == [("a", 0, "another process sends it the rows of this run")]
    assert synced(run.parent) == [("a", 1, "")]


def test_a_run_that_was_not_to_be_mirrored_is_not_sent(run, server, monkeypatch):  # noqa: F811
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        record(run, 0)
    save(run, 0)
    assert synced(run.parent) == []


@pytest.fixture
def lacking(run, offline):
    """A group of which W&B has nothing yet."""
    record(run, 0)
    save(run, 0)
    return run.parent


def test_without_a_login_one_sentence_says_what_to_do(lacking, server, monkeypatch):  # noqa: F811
    monkeypatch.delenv("WANDB_API_KEY")
    with pytest.raises(ConfigError, match="no login here; run `wandb login` or set WANDB_API_KEY"):
        synced(lacking)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(ConfigError, match="WANDB_MODE=disabled forbids"):
        synced(lacking)


def test_without_a_network_it_ends_at_once(lacking, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"W&B cannot be reached at http://127\.0\.0\.1:9 .*; run this on a node"):
        synced(lacking)


def test_no_such_group(tmp_path):
    with pytest.raises(ConfigError, match="is no directory; give outputs/<group>"):
        synced(tmp_path / "none")


def test_the_command_says_what_was_sent(lacking, server, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(sys, "argv", ["pspo.sync", str(lacking)])
    for expected in ("a: 1 rows sent\n", "W&B has all rows of the runs with tracker=wandb\n"):
        with pytest.raises(SystemExit, match="0"):
            sync.main()
        assert capsys.readouterr().out == expected
