import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forked import SMALL, command, make, output_of

from pspo.base.schema import ConfigError
from pspo.config import compose
from pspo.model import tiny
from pspo.prefetch import exports, load

ROOT = Path(__file__).parents[1]
COMMIT = "c" * 40
GUARD = """
import socket, sys
connect, resolve = socket.socket.connect, socket.getaddrinfo
def refuse(self, address):
    if self.family != socket.AF_UNIX and str(address[0]) not in ("127.0.0.1", "::1", "localhost"):
        sys.stderr.write(f"NETWORK {address}\\n"); raise OSError(101, "no network in this test")
    return connect(self, address)
def asked(host, *rest, **more):
    if host not in (None, "127.0.0.1", "::1", "localhost"):
        sys.stderr.write(f"NETWORK {host}\\n"); raise socket.gaierror(-2, "no network in this test")
    return resolve(host, *rest, **more)
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = asked
"""


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download of whole repositories needs."""

    repositories: ClassVar[dict[str, dict[str, bytes]]] = {}
    asked: ClassVar[list[str]] = []

    def do_GET(self):
        self.asked.append(self.path)
        path = self.path.partition("?")[0].removeprefix("/")
        about = re.fullmatch(r"api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/.*)?", path)
        wanted = re.fullmatch(rf"(?:datasets/)?([^/]+/[^/]+)/resolve/(?:main|{COMMIT})/(.*)", path)
        files = self.repositories.get((about and about[2]) or (wanted and wanted[1]) or "", {})
        if about and files:
            listed = [
                {"type": "file", "rfilename": name, "path": name, "size": len(data), "oid": digest(data)}
                for name, data in files.items()
            ]
            found = {"id": about[2], "sha": COMMIT, "siblings": listed, "private": False, "tags": [], "downloads": 0}
            self.answer(json.dumps(listed if about[3] == "tree" else found).encode(), "application/json")
        elif wanted and wanted[2] in files:
            self.answer(files[wanted[2]], "application/octet-stream")
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def answer(self, content, kind):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{digest(content)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def digest(content):
    return hashlib.sha1(content).hexdigest()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub on this machine with GSM8K in small, and a tiny policy in the place of one of the paper's; its address."""
    folder = tmp_path_factory.mktemp("repositories")
    texts = ["Tom has 3 pens and buys 4 more.", "3+4=7\n#### 7"]
    tokenizer = tiny.train_tokenizer(texts, 128)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    model = tiny.make_model(tiny.WordsArchitecture(task="embedded", vocab_size=128, **sizes), tokenizer, 0, "eager")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Hub.repositories["Qwen/Qwen2.5-0.5B"] = {path.name: path.read_bytes() for path in folder.iterdir()}
    gsm8k = Hub.repositories["openai/gsm8k"] = {}
    for split, num in (("train", 40), ("test", 8)):
        rows = [{"question": f"{split} {i}+1?", "answer": f"{i}+1={i + 1}\n#### {i + 1}"} for i in range(num)]
        pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
        gsm8k[f"main/{split}-00000-of-00001.parquet"] = (folder / "rows.parquet").read_bytes()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def node(hub, tmp_path, monkeypatch):
    """Caches that are empty, on a node that reaches the hub, or with ``node(online=False)`` does not."""

    def go(*, online):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", not online)
        url = hub if online else "http://127.0.0.1:9"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    go(online=True)
    return go


def call(tmp_path, *arguments, **more):
    """One of our modules in a process with the same caches, whose network is this machine's alone."""
    names = {"HF_HOME": tmp_path / "hf", "XDG_CACHE_HOME": tmp_path / "cache", "WANDB_MODE": "offline"}
    site = tmp_path / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(GUARD)  # for its child processes too
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "WANDB"))}
    environment |= {name: str(value) for name, value in names.items()} | more
    environment["PYTHONPATH"] = f"{site}:{ROOT}"
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)


PAPER = ["model=qwen0_5b", "dataset=gsm8k", "dataset.num_validation=8"]
QUICK = [
    "model.autocast=false", "rollout.prompts=2", "rollout.group_size=2", "rollout.max_new_tokens=8", "budget.steps=1",
    "evaluate.every=1", "threads=1",
]  # fmt: skip


def test_what_was_fetched_is_not_asked_for_again_and_serves_a_run_without_a_network(node, tmp_path):
    config = compose(PAPER)
    load(config)
    assert len(Hub.asked) > 4
    Hub.asked.clear()
    load(config)
    assert Hub.asked == []
    node(online=False)
    load(config)

    def cut_off():
        huggingface_hub.constants.HF_HUB_OFFLINE = False  # as in a job that does not even set it
        exec(GUARD, {})

    run = command(*PAPER, *QUICK)
    assert make(tmp_path, tmp_path / "cache", work=run, hook=cut_off) == 0, output_of(tmp_path)
    assert "NETWORK" not in output_of(tmp_path)
    assert list(tmp_path.glob("outputs/main/*/DONE"))
    assert list(tmp_path.glob("outputs/main/*/wandb.json"))  # for pspo.sync


def test_the_guard_of_these_tests_sees_a_network_that_is_asked(node, tmp_path):
    code = "import urllib.request; urllib.request.urlopen('http://pspo.invalid')"
    (tmp_path / "asks.py").write_text(code)
    assert "NETWORK pspo.invalid" in call(tmp_path, "asks").stderr


@pytest.mark.process
def test_the_embedded_policy_of_a_seed_is_made_for_the_jobs(node, tmp_path):
    config = compose([*SMALL, "seed=1"])
    load(config)
    made = list((tmp_path / "cache" / "pspo" / "warm_start").glob("*/model.safetensors"))
    assert len(made) == 1
    node(online=False)
    load(config)
    assert list((tmp_path / "cache" / "pspo" / "warm_start").glob("*/model.safetensors")) == made
    assert f"export XDG_CACHE_HOME={tmp_path / 'cache'}" in exports([config])


def test_a_damaged_weight_file_is_found(node, tmp_path):
    load(compose(PAPER))
    (weights,) = tmp_path.glob("hf/hub/models--*/snapshots/*/model.safetensors")
    os.truncate(weights.resolve(), weights.stat().st_size - 1000)
    with pytest.raises(ConfigError, match=r"model.safetensors is damaged .*; delete it"):
        load(compose(PAPER))


def test_the_exports_say_where_the_caches_are(node, tmp_path, monkeypatch):
    lines = exports([compose(PAPER)])
    assert lines[:3] == [
        f"export HF_HOME={tmp_path / 'hf'}",
        f"export HF_HUB_CACHE={tmp_path / 'hf' / 'hub'}",
        "export HF_HUB_OFFLINE=1",
    ]
    assert lines[-1].startswith("export WANDB_MODE=offline")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "/else where")
    assert "export HF_HUB_CACHE='/else where'" in exports([compose([*PAPER, "tracker=jsonl"])])


def test_what_is_missing_is_named_with_the_command_that_fetches_it(node):
    node(online=False)
    with pytest.raises(ConfigError, match=r"model\.hub_id=Qwen/Qwen2\.5-0\.5B is not in the cache") as told:
        load(compose(["model=qwen0_5b", "dataset=embedded"]))
    (command,) = re.findall(r"`python -m pspo\.prefetch (.*?)` on a node with internet", str(told.value))
    node(online=True)
    load(compose([*command.split(), "dataset=embedded"]))
    node(online=False)
    load(compose(["model=qwen0_5b", "dataset=embedded"]))


@pytest.mark.slow
def test_the_command(hub, tmp_path):
    done = call(tmp_path, "pspo.prefetch", *PAPER, "seed=0,1", HF_ENDPOINT=hub)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("verified offline: dataset=gsm8k (32 train, 8 validation, 8 gsm8k)") == 2
    assert done.stdout.startswith(f"# in the jobs:\nexport HF_HOME={tmp_path / 'hf'}\n")
    done = call(tmp_path, "pspo.prefetch", "datasets=gsm8k")
    assert done.returncode == 2
    assert "unknown key datasets (did you mean dataset?)" in done.stderr
