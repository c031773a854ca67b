"""A W&B on this machine: as much of its server as the SDK asks when a run starts, goes on and ends."""

import contextlib
import gzip
import json
import os
import re
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock

import yaml

from pspo import tracker

tracker.INIT_TIMEOUT_S = tracker.CLOSE_TIMEOUT_S = 600.0  # a busy machine is no failure; tests of bounds set their own

CONFIG = {
    "tracker": {"name": "wandb", "project": "pspo-test", "entity": None},
    "group": "smoke",
    "objective": {"name": "pspo", "alpha": 0.1},
    "model": {"name": "hf", "hub_id": "Qwen/Qwen2.5-0.5B", "path": None},
    "dataset": {"name": "gsm8k"},
}


def make_run(directory, num_rows=0):
    """A run directory with what a mirror reads there."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    rows = [{"step": step, "reward/mean": step / 7} for step in range(num_rows)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


class Server:
    """Keeps the lines of history by the place that the sender gives them, so that a double step is a line too many.

    Attributes:
        lines: by run id, its history.
        told: by run id, the variables of the last request that described the run.
        summary: by run id, its summary.
        files: by run id, the content of its files by name.
        views: by its name, the variables of the last request that saved a workspace's view.
        status: (text, number) pairs; a request whose path or body contains the text gets that HTTP status, and with
            status 0 no answer at all.
    """

    def __init__(self):
        self.lines, self.told, self.summary, self.files, self.views = {}, {}, {}, {}, {}
        self.status, self.address = [], ""
        self.stopped = threading.Event()

    def history(self, directory):
        """What the server has of a run."""
        id = json.loads((directory / "wandb.json").read_text())["id"]
        return [json.loads(line) for line in self.lines.get(id, [])]

    def steps(self, directory):
        """The steps that the server has of a run, in its order."""
        history = self.history(directory)
        assert all(row["step"] == row["_step"] for row in history)
        return [row["step"] for row in history]

    def answer(self, path, body):
        """The JSON to answer a request with."""
        if "file_stream" in path:
            id = path.split("/")[4]
            for name, part in json.loads(body).get("files", {}).items():
                if name == "wandb-history.jsonl":
                    begin, content = part["offset"], part["content"]
                    assert begin <= len(self.lines[id]), "a gap"
                    self.lines[id][begin : begin + len(content)] = content
                if name == "wandb-summary.json":
                    self.summary[id] = json.loads(part["content"][-1])
            return {}
        if "/upload/" in path:
            _, _, id, name = path.split("/", 3)
            self.files.setdefault(id, {})[urllib.parse.unquote(name)] = body
            return {}
        if "/graphql" not in path:
            return {}
        request = json.loads(body)
        variables, owner = request.get("variables") or {}, {"id": "e", "name": "me"}
        id = variables.get("name")
        if "UpsertBucket" in request["query"]:
            self.lines.setdefault(id, [])
            self.told[id] = self.told.get(id, {}) | {name: value for name, value in variables.items() if value}
            project = {"id": "p", "name": "pspo", "entity": owner}
            return {"data": {"upsertBucket": {"bucket": {"id": "b", "name": id, "project": project}, "inserted": True}}}
        if "RunResumeStatus" in request["query"]:
            lines = self.lines.get(id)
            counts = {"historyLineCount": len(lines or []), "eventsLineCount": 0, "logLineCount": 0}
            tails = {"historyTail": json.dumps((lines or [])[-1:]), "eventsTail": "[]"}
            texts = {"summaryMetrics": "{}", "config": "{}", "wandbConfig": '{"t": 1}'}
            bucket = {"id": "b", "name": id, **counts, **tails, **texts}
            return {
                "data": {
                    "model": {"id": "p", "name": "pspo", "entity": owner, "bucket": None if lines is None else bucket}
                }
            }
        if re.search(r"query \w+ *\{\s*viewer", request["query"]):
            return {
                "data": {"viewer": owner | {"username": "me", "entity": "me", "flags": "{}", "teams": {"edges": []}}}
            }
        if "mutation UpsertView2" in request["query"]:
            self.views[id] = variables | {"id": "view-of-" + id}
            return {"data": {"upsertView": {"view": {"id": "view-of-" + id, "name": id}, "inserted": True}}}
        if "query View(" in request["query"]:
            views = [self.views[variables["viewName"]]] if variables["viewName"] in self.views else []
            edges = [{"node": {name: view[name] for name in ("id", "displayName", "spec")}} for view in views]
            return {"data": {"project": {"allViews": {"edges": edges}}}}
        if "query ArtifactType" in request["query"]:
            return {"data": {"project": None}}
        if "mutation CreateArtifact " in request["query"]:  # committed: the server says that it has the files already
            artifact = {"id": "QXJ0aWZhY3Q6MQ==", "state": "COMMITTED", "artifactSequence": {"latestArtifact": None}}
            return {"data": {"createArtifact": {"artifact": artifact}}}
        id = variables.get("run")
        files = [
            {"name": name, "uploadUrl": f"{self.address}/upload/{id}/{urllib.parse.quote(name)}"}
            for name in variables.get("files", [])
        ]
        return {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}


@contextlib.contextmanager
def serving():
    """A running server; in the block this process and its children know it and have a login."""
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            said = self.path + body.decode(errors="replace")
            status = next((status for text, status in server.status if text in said), 200)
            if not status:
                server.stopped.wait()
                return
            content = json.dumps({} if status >= 400 else server.answer(self.path, body)).encode()
            with contextlib.suppress(OSError):  # the client was killed
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        do_POST = do_PUT = do_GET

        def log_message(self, *_):
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    server.address = f"http://127.0.0.1:{listening.server_port}"
    login = {"WANDB_BASE_URL": server.address, "WANDB_API_KEY": "a" * 40}
    with mock.patch.dict(os.environ, login):
        os.environ.pop("WANDB_MODE", None)
        try:
            yield server
        finally:
            server.stopped.set()
            listening.shutdown()
            listening.server_close()


def wait_for(condition, what="", timeout_s=600):
    """Wait, however busy the machine, until ``condition()`` is true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.02)
