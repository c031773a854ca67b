import gzip
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import filelock
import pytest
import wandb

from pspo import sync
from pspo.base.schema import ConfigError
from tests.test_tracker import WANDB, offline, open_tracker  # noqa: F401

# Takes parts as `wandb sync` does: keeps a record of the order, leaves its mark, and fails for what is told to fail.
STUB = """
import pathlib, sys
for folder in map(pathlib.Path, sys.argv[1:]):
    with open(BOOK, "a") as book:
        book.write(f"{folder.name}\\n")
    (part,) = folder.glob("*.wandb")
    if b"refused" in part.read_bytes():
        print("wandb: ERROR the server refused it"); break
    part.with_suffix(".wandb.synced").touch()
"""


class Server(BaseHTTPRequestHandler):
    """As much of the W&B server as ``wandb sync`` needs: it keeps the history of each run. Or it lets nobody in."""

    history: ClassVar[dict[str, list[str]]] = {}
    refuses: ClassVar[bool] = False

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        answer = {} if self.refuses or "/graphql" not in self.path else {"data": self.asked(json.loads(body))}
        if "file_stream" in self.path and not self.refuses:
            for name, part in json.loads(body).get("files", {}).items():
                if name == "wandb-history.jsonl":
                    self.history[self.path.split("/")[4]][part["offset"] :] = part["content"]
        content = json.dumps(answer).encode()
        self.send_response(401 if self.refuses else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def asked(self, request):
        run, owner = (request.get("variables") or {}).get("name"), {"id": "e", "name": "me"}
        if "upsertBucket" in request["query"]:
            self.history.setdefault(run, [])
            project = {"id": "p", "name": "pspo", "entity": owner}
            return {"upsertBucket": {"bucket": {"id": "b", "name": run, "project": project}, "inserted": True}}
        if "RunResumeStatus" in request["query"]:
            lines = self.history.get(run)
            counts = {"historyLineCount": len(lines or []), "eventsLineCount": 0, "logLineCount": 0}
            tails = {"historyTail": json.dumps((lines or [])[-1:]), "eventsTail": "[]"}
            texts = {"summaryMetrics": "{}", "config": "{}", "wandbConfig": '{"t": 1}'}
            bucket = {"id": "b", "name": run, **counts, **tails, **texts}
            return {"model": {"id": "p", "name": "pspo", "entity": owner, "bucket": lines and bucket}}
        return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}

    do_POST = do_PUT = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A W&B on this machine, with a login; returns the steps that it has of a run."""
    listening = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    monkeypatch.setattr(Server, "history", {})
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listening.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    yield lambda run: [json.loads(line)["step"] for line in Server.history[run]]
    listening.shutdown()


@pytest.fixture
def book(tmp_path, monkeypatch):
    """What the stub was given, in order."""
    stub = tmp_path / "stub.py"
    stub.write_text(f"BOOK = {str(tmp_path / 'book')!r}\n{STUB}")
    monkeypatch.setattr(sync, "COMMAND", [sys.executable, str(stub)])
    monkeypatch.setattr(sync, "_check_reach", lambda: None)
    return lambda: (tmp_path / "book").read_text().split() if (tmp_path / "book").exists() else []


def make(group, name, *starts, content=b"rows"):
    directory = group / name
    for start in starts:
        folder = directory / "wandb" / f"offline-run-20260101_{start}-{name}"
        folder.mkdir(parents=True)
        (folder / f"run-{name}.wandb").write_bytes(content)
    (directory / "wandb.json").write_text(json.dumps({"id": name, "sent": 3}))
    return directory


def test_parts_go_in_the_order_of_their_start_and_only_once(tmp_path, book):
    group = tmp_path / "g"
    make(group, "b", "120000", "090000", "110000")
    make(group, "a", "130000")
    outcomes = sync.sync(group)
    assert [(outcome.run, outcome.uploaded, outcome.left) for outcome in outcomes] == [("a", 1, 0), ("b", 3, 0)]
    times = [name.split("_")[1] for name in book()]
    assert times == ["130000-a", "090000-b", "110000-b", "120000-b"]
    assert sync.sync(group) == []
    assert len(book()) == 4
    make(tmp_path / "later", "b", "140000")
    (tmp_path / "later/b/wandb/offline-run-20260101_140000-b").rename(group / "b/wandb/offline-run-20260101_140000-b")
    assert [(outcome.run, outcome.uploaded) for outcome in sync.sync(group)] == [("b", 1)]
    assert book()[4:] == ["offline-run-20260101_140000-b"]


def test_what_was_not_taken_is_left_for_the_next_time(tmp_path, book):
    group = tmp_path / "g"
    make(group, "a", "090000")
    make(group, "a2", "100000", content=b"refused")
    last = make(group, "a3", "100000", "110000") / "wandb" / "offline-run-20260101_110000-a3" / "run-a3.wandb"
    last.write_bytes(b"refused")
    outcomes = {outcome.run: outcome for outcome in sync.sync(group)}
    assert (outcomes["a"].uploaded, outcomes["a"].left) == (1, 0)
    assert (outcomes["a2"].uploaded, outcomes["a2"].left) == (0, 1)
    assert outcomes["a2"].why == "W&B says: ERROR the server refused it"
    assert (outcomes["a3"].uploaded, outcomes["a3"].left) == (1, 1)
    last.write_bytes(b"now it is taken")
    before = len(book())
    assert [(outcome.run, outcome.uploaded) for outcome in sync.sync(group)] == [("a2", 0), ("a3", 1)]
    assert book()[before:] == ["offline-run-20260101_100000-a2", "offline-run-20260101_110000-a3"]


def test_the_part_of_a_run_at_work_is_left(tmp_path, book):
    directory = make(tmp_path / "g", "a", "090000", "100000")
    with filelock.FileLock(directory / ".lock", timeout=0):
        (outcome,) = sync.sync(tmp_path / "g")
        assert (outcome.uploaded, outcome.left) == (1, 1)
        assert "at work" in outcome.why
        (outcome,) = sync.sync(tmp_path / "g")
        assert (outcome.uploaded, outcome.left) == (0, 1)
    (outcome,) = sync.sync(tmp_path / "g")
    assert (outcome.uploaded, outcome.left) == (1, 0)
    assert [name[-8:-2] for name in book()] == ["090000", "100000"]


def record(directory, *steps):
    """One process of a run, recorded by W&B itself; the next one goes on where it ends."""
    wandb.teardown()  # what it has read of the environment before
    tracker = open_tracker(directory, WANDB)
    tracker.rewind({"metrics_rows": steps[0] - 1})
    for step in steps:
        tracker.log({"reward/mean": step / 7}, step)
    tracker.commit(steps[-1])
    tracker.close()
    wandb.teardown()


@pytest.fixture
def recorded(tmp_path, offline):  # noqa: F811
    """A group with one run."""
    (tmp_path / "g" / "a").mkdir(parents=True)
    record(tmp_path / "g" / "a", 1, 2)
    return tmp_path / "g"


def test_the_parts_of_a_requeued_run_become_one_history_without_gap_or_double_step(recorded, server, monkeypatch):
    run = json.loads((recorded / "a" / "wandb.json").read_text())["id"]
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        time.sleep(1.1)  # a part is named by the second of its start
        record(recorded / "a", 3, 4, 5)
    (outcome,) = sync.sync(recorded)
    assert (outcome.uploaded, outcome.left, outcome.why) == (2, 0, "")
    assert server(run) == [1, 2, 3, 4, 5]
    assert sync.sync(recorded) == []
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        record(recorded / "a", 6, 7)
    (outcome,) = sync.sync(recorded)
    assert (outcome.uploaded, outcome.left) == (1, 0)
    assert server(run) == [1, 2, 3, 4, 5, 6, 7]


def test_a_server_that_refuses_is_told_with_its_own_words(recorded, server, monkeypatch):
    monkeypatch.setattr(Server, "refuses", True)
    (outcome,) = sync.sync(recorded)
    assert (outcome.uploaded, outcome.left) == (0, 1)
    assert "401" in outcome.why


def test_without_a_login_one_sentence_says_what_to_do(recorded, server, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(recorded / "none"))
    with pytest.raises(ConfigError, match="no login here; run `wandb login` or set WANDB_API_KEY"):
        sync.sync(recorded)


def test_without_a_network_it_ends_at_once(recorded, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"W&B cannot be reached at http://127\.0\.0\.1:9 .*; run this on a node"):
        sync.sync(recorded)


def test_no_such_group(tmp_path):
    with pytest.raises(ConfigError, match="is no directory; give outputs/<group>"):
        sync.sync(tmp_path / "none")
