"""The doctor: every check under real conditions of its kind, and the whole command once."""

import dataclasses
import json
import math
import os
import resource
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
import wandb
from forked import SMALL
from huggingface_hub import constants
from training import configured, make_trainer
from wandb_server import serving

from pspo.base.files import read_lines
from pspo.base.schema import ConfigError
from pspo.budget import gpu_hours
from pspo.config import compose
from pspo.doctor import __main__ as command
from pspo.doctor import limits, machine, model, refused, size
from pspo.doctor.versions import versions
from pspo.host import machine as host
from pspo.host import slurm

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def named(findings):
    return {finding.name: finding for finding in findings}


def test_a_refusal_is_a_failure_whose_remedy_is_the_end_of_its_sentence():
    finding = refused("device", ConfigError("device=cuda, but there is none; set device=auto"))
    assert (finding.verdict, finding.value, finding.remedy) == (
        "fail",
        "device=cuda, but there is none",
        "set device=auto",
    )
    assert refused("x", OSError("no space")).remedy


def test_findings_fit_into_80_columns(capsys):
    finding = refused("a name as long", ConfigError(f"{'/a/path' * 30} cannot be written; {'set output_dir ' * 10}"))
    assert command.show([finding]) == [finding]
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "".join("".join(lines).split()).count("/a/path") == 30


# --- versions


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Packages on the path, by name: a version and what each requires."""

    def install(name, version, *requires):
        about = tmp_path / f"{name}-{version}.dist-info" / "METADATA"
        about.parent.mkdir()
        lines = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", "Requires-Python: >=3.11,<3.15"]
        about.write_text("\n".join([*lines, *(f"Requires-Dist: {each}" for each in requires)]) + "\n")

    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return install


VERSIONS = {
    "ok": (["torch<3,>=2.1", "one-two>=1"], ""),
    "fail": (["torch<2.2", "one-two>=1"], "pip install 'torch<2.2'"),
    "fail ": (["torch", "absent>=4"], "pip install 'absent>=4'"),
    "warn": (["torch", "one-two<1; extra == 'more'"], "pip install 'one-two<1'"),
    "ok ": (["torch", "one-two<1; extra == 'more'", "absent; extra == 'more'"], ""),
}


@pytest.mark.parametrize("verdict", VERSIONS)
def test_versions_are_held_to_the_ranges_of_the_package(verdict, installed):
    requires, remedy = VERSIONS[verdict]
    installed("torch", "2.3.1")
    installed("one_two", "1.5")
    installed("pspo", "0", *requires)
    finding = versions()
    assert (finding.verdict, finding.remedy) == (verdict.strip(), remedy)
    assert "torch 2.3.1" in finding.value


# --- device, memory, threads


def test_an_absent_gpu_and_apples_are_refused_in_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device=cuda, but this process sees no GPU"):
        machine.device(configured("device=cuda"))
    with pytest.raises(ConfigError, match="device must be one of auto, cpu, cuda, got 'mps': Apple's GPU"):
        compose(["device=mps"])
    assert machine.device(configured("device=cpu")).numbers["capability"] == torch.backends.cpu.get_cpu_capability()


def test_a_mac_is_told_which_device_it_takes(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    finding = machine.device(configured("device=cpu"))
    assert (finding.verdict, finding.remedy.partition(":")[0]) == ("warn", "device=cpu")


CGROUPS = {
    "2": {
        "proc/self/cgroup": "0::/jobs/mine\n",
        "sys/fs/cgroup/jobs/memory.max": f"{2**30}\n",
        "sys/fs/cgroup/jobs/memory.current": f"{2**29}\n",
        "sys/fs/cgroup/jobs/memory.stat": f"anon 5\ninactive_file {2**28}\n",
        "sys/fs/cgroup/jobs/mine/memory.max": "max\n",
        "sys/fs/cgroup/jobs/mine/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/jobs/cpu.max": "max 100000\n",
    },
    "1": {
        "proc/self/cgroup": "4:memory:/mine\n3:cpu,cpuacct:/mine\n",
        "sys/fs/cgroup/memory/mine/memory.limit_in_bytes": f"{2**30}\n",
        "sys/fs/cgroup/memory/mine/memory.usage_in_bytes": f"{2**29}\n",
        "sys/fs/cgroup/memory/mine/memory.stat": f"inactive_file 7\ntotal_inactive_file {2**28}\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2**62}\n",
        "sys/fs/cgroup/cpu,cpuacct/mine/cpu.cfs_quota_us": "150000\n",
        "sys/fs/cgroup/cpu,cpuacct/mine/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
    },
}


@pytest.mark.parametrize("version", CGROUPS)
def test_the_limits_of_a_cgroup_and_of_those_around_it_count(version, tmp_path):
    for name, text in CGROUPS[version].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    total, free = host.memory_gib(tmp_path)
    assert total == 1.0
    assert free == 0.75  # half is used, of it half a cache of files
    assert host.processor_quota(tmp_path) == 1.5


def test_without_cgroups_the_machine_itself_counts(tmp_path):
    total, free = host.memory_gib(tmp_path)
    assert total > free > 0
    assert host.processor_quota(tmp_path) == math.inf
    assert 0 <= host.busy([0], watch_s=0.1) <= 1


@pytest.mark.parametrize(
    ("threads", "busy", "verdict", "remedy"),
    [(4, 0.0, "ok", ""), (5, 0.0, "warn", "threads=4"), (4, 2.0, "warn", "threads=2"), (1, 2.0, "ok", ""),
     (1, 4.0, "warn", "stop the neighbours, or go elsewhere"), (3, 4.0, "warn", "threads=1")],
)  # fmt: skip
def test_threads_are_for_processors_that_nobody_else_uses(threads, busy, verdict, remedy, monkeypatch):
    monkeypatch.setattr(machine.environment, "processors", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(host, "processor_quota", lambda: math.inf)
    monkeypatch.setattr(host, "busy", lambda processors: busy)
    finding = machine.threads(configured(f"threads={threads}"))
    assert (finding.verdict, finding.remedy.partition(":")[0]) == (verdict, remedy)
    monkeypatch.setattr(host, "processor_quota", lambda: 0.5)
    assert machine.threads(configured("threads=2")).remedy.startswith("threads=1")


# --- caches, hub, W&B, SLURM, the disk


def test_a_cache_is_one_that_can_be_written(tmp_path):
    assert machine.cache("HF_HOME", tmp_path / "not" / "yet").verdict == "ok"
    (tmp_path / "file").touch()
    finding = machine.cache("HF_HOME", tmp_path / "file" / "hub")
    assert (finding.verdict, finding.remedy.partition("=")[0]) == ("fail", "export HF_HOME")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_full_disk_is_told_with_the_key(tmp_path):
    config, (soft, hard) = configured(f"output_dir={tmp_path}/out"), resource.getrlimit(resource.RLIMIT_FSIZE)
    assert machine.disk(config).verdict == "ok"
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        finding = machine.disk(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (finding.verdict, finding.remedy) == ("fail", "output_dir=<directory>")
    assert list(tmp_path.iterdir()) == []


def test_the_hub_answers_or_not_or_is_not_asked(monkeypatch):
    class NotFound(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), NotFound)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    assert machine.hub().verdict == "ok"
    server.shutdown()
    server.server_close()
    finding = machine.hub()
    assert finding.verdict == "warn"
    assert "python -m pspo.prefetch" in finding.remedy
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert machine.hub().verdict == "ok"


def test_wandb_has_a_login_or_the_remedy_is_told(monkeypatch):
    config = configured("tracker=wandb")
    assert machine.wandb(configured("tracker=jsonl")).verdict == "ok"
    with serving():
        assert machine.wandb(config).verdict == "ok"
        wandb.teardown()
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        finding = machine.wandb(config)
    wandb.teardown()
    assert (finding.verdict, "WANDB_MODE=offline" in finding.remedy) == ("warn", True)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert machine.wandb(config).verdict == "ok"


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """Stand-ins for SLURM's commands, on a path that has no others."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("PSPO_CLUSTER", raising=False)

    def make(**scripts):
        for name, script in scripts.items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / "bin" / name).chmod(0o755)

    return make


def test_partitions_and_their_limits_in_minutes(commands):
    assert slurm.partitions() == {}
    commands(sinfo="echo 'long|7-12:30:00\ngpu*|2:00:00\nfree|infinite\nshort|30:00\ngpu*|2:00:00'")
    limits = {"gpu": 120.0, "long": 7 * 1440 + 750.0, "free": math.inf, "short": 30.0}
    assert slurm.partitions() == limits
    assert next(iter(slurm.partitions())) == "gpu"


def test_the_keys_of_a_job_are_held_to_the_clusters_limits(commands):
    assert machine.cluster([]).verdict == "ok"  # no SLURM
    commands(sinfo="exit 1", scontrol="echo 'MaxArraySize = 1001'")
    assert machine.cluster([]).verdict == "warn"  # which does not answer
    commands(sinfo="echo 'gpu*|2:00:00'; echo 'free|infinite'")
    finding = machine.cluster([])  # the preset's 720 minutes
    assert (finding.verdict, finding.remedy) == ("warn", "hydra.launcher.time_min=120")
    assert finding.value == "gpu 120 min, free no limit; arrays of 1001; jobs ask for 720 min of gpu"
    assert machine.cluster(["hydra.launcher.time_min=90", "seed=1"]).verdict == "ok"
    assert machine.cluster(["hydra.launcher.partition=free"]).verdict == "ok"
    assert machine.cluster(["hydra.launcher.partition=gone"]).remedy == "hydra.launcher.partition=gpu"
    with pytest.raises(ConfigError, match=r"hydra\.launcher\.time_min must be in"):
        machine.cluster(["hydra.launcher.time_min=0"])


# --- the model


def test_a_checkpoint_of_3b_parameters_with_adam_is_36_gb():
    config = compose(["model=qwen3b", "model.hub_id=a/b"])  # keeps two checkpoints
    fits, saved = model.needs(config, 3 * 10**9, free=80.0, disk_bytes=10**12, bytes_per_s=1.2e9)
    assert saved.value.startswith("36 GB with Adam, written in 30 s; a run takes up to 120 GB of disk")
    assert (fits.verdict, saved.verdict) == ("ok", "ok")
    fits, saved = model.needs(config, 3 * 10**9, free=40.0, disk_bytes=10**11, bytes_per_s=1.2e9)
    assert fits.numbers["needed_gib"] == 3e9 * 16 / 2**30  # weights, gradient and two moments in float32
    assert (fits.verdict, fits.remedy.partition(",")[0]) == ("fail", "model.lora.rank=16")
    assert (saved.verdict, saved.remedy.partition(",")[0]) == ("warn", "checkpoint.keep=1")
    assert size(6.14e6) == "6.14 MB"


def test_the_tried_run_is_as_long_as_the_machine_is_fast():
    config = configured()
    assert model.shortened(config, 1e-9, 50).rollout == config.rollout
    short = model.shortened(config, 1e-4, 50)
    assert (short.rollout.max_new_tokens, short.rollout.group_size) == (16, config.rollout.group_size)
    assert 1 <= short.rollout.prompts < config.rollout.prompts
    least = model.shortened(config, 1.0, 50)
    assert (least.rollout.max_new_tokens, least.rollout.prompts, least.rollout.group_size) == (16, 1, 2)
    assert least.update.num_minibatches <= 2
    assert least.budget.steps == 2


def test_limits_of_a_policy_by_hand(tiny_policy):
    """Two layers, 2 key heads of 8 numbers, V = 128 tokens, in float32."""
    policy = tiny_policy()
    vocabulary, parameters = policy.model.config.vocab_size, sum(p.numel() for p in policy.model.parameters())
    row = 10 * 2 * 2 * 2 * 8 * 4 + 3 * vocabulary * 4
    assert limits.row_bytes(policy, 10) == row
    sampled, learned = limits.limits(policy, 4, 10, bytes_per_s=1e9, operations_per_s=1e9)
    assert sampled == pytest.approx(4 * 1e9 / (parameters * 4 + 4 * row))
    assert learned == pytest.approx(1e9 / (6 * parameters))


def two_steps(policy, directory):
    words = ["budget.steps=2", "checkpoint.every=1", "checkpoint.keep=2"]
    make_trainer(policy(), directory, *words).run()
    return make_trainer(policy(seed=1), directory, *words), read_lines(directory / "metrics.jsonl")


def test_a_resume_is_tried_and_a_false_one_is_told(tiny_policy, tmp_path):
    trainer, rows = two_steps(tiny_policy, tmp_path / "run")
    finding = model.resumed(trainer, rows)
    assert (finding.verdict, finding.numbers) == ("ok", {"restored": True, "bitwise": True})
    trainer, rows = two_steps(tiny_policy, tmp_path / "other")
    rows[-1]["loss/mean"] += 1e-9
    finding = model.resumed(trainer, rows)
    assert (finding.verdict, finding.numbers) == ("fail", {"restored": True, "bitwise": False})


def test_what_fits_is_told_with_the_key_where_it_does_not(tiny_policy, tmp_path, monkeypatch):
    config = configured("rollout.prompts=8", "rollout.group_size=8", "rollout.max_new_tokens=64")
    trainer = make_trainer(tiny_policy(attention="sdpa"), tmp_path / "run")
    found = named(model.fitting(config, trainer, trainer.train[0], limit=1e4))
    assert all(finding.verdict == "ok" for finding in found.values())
    assert found["micro-batch"].numbers["largest"] > config.update.max_tokens
    assert found["update"].numbers["rate"] > 0
    monkeypatch.setattr(model, "free_gib", lambda device: 1e-6)
    found = named(model.fitting(config, trainer, trainer.train[0], limit=1e4))
    assert (found["micro-batch"].verdict, found["rollout rows"].verdict) == ("warn", "warn")
    assert found["micro-batch"].remedy.startswith("update.max_tokens=1,")
    assert found["rollout rows"].remedy == "rollout.max_rows=1"


def test_the_cost_is_that_of_the_dry_run_and_of_the_published_table():
    config = compose(["model=qwen0_5b", "budget.steps=null", "budget.prompts=33"])  # three steps of 16 prompts
    run, table = model.cost(config, 60.0, 0.0, CPU)
    assert run.numbers["hours"] == gpu_hours(1, 3 / 60)
    assert run.remedy == "hydra.launcher.hours_per_run=0.05"
    assert (table.numbers["num"], table.numbers["of"]) == (3, 6)
    assert table.numbers["hours"] == pytest.approx(3 * 5 * 1311 / 60)
    assert table.remedy == "model=qwen1_5b for the rest"
    run, table = model.cost(configured(), 60.0, 0.0, CPU)
    assert table.remedy == "model=qwen0_5b or model=qwen1_5b measures it"


def test_bfloat16_is_advised_by_what_is_measured(monkeypatch):
    config = configured()
    on = dataclasses.replace(config, model=dataclasses.replace(config.model, autocast=True))
    monkeypatch.setattr(limits.speed, "copy_rate", lambda device: 1e9)
    rates = {torch.float32: 2e9, torch.bfloat16: 8e9}
    monkeypatch.setattr(limits.speed, "matmul_rate", lambda dtype, device: rates[dtype])
    assert limits.speeds(config, CPU).remedy.startswith("model.autocast=true")
    assert limits.speeds(on, CPU).numbers["operations_per_s"] == 8e9
    rates[torch.bfloat16] = 1e9
    assert (limits.speeds(config, CPU).verdict, limits.speeds(config, CPU).remedy) == ("ok", "")
    assert limits.speeds(on, CPU).remedy.startswith("model.autocast=false")


# --- the command


@pytest.mark.process
def test_the_whole_command(cache, tmp_path):
    place = {"XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "pspo.doctor", *SMALL]
    done = subprocess.run(
        [*words, "--json"], cwd=tmp_path, env=os.environ | place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    findings = {row["name"]: row for row in json.loads(done.stdout)}
    assert all(row["verdict"] in ("ok", "warn") and set(row) >= {"value", "remedy"} for row in findings.values())
    for name in ("versions", "threads", "SLURM", "checkpoint", "gap", "decode", "update", "micro-batch", "this run"):
        assert name in findings
    assert findings["resume"]["numbers"] == {"restored": True, "bitwise": True}
    assert findings["gap"]["numbers"]["gap"] < 1e-5
    assert findings["checkpoint"]["numbers"]["bytes"] == 12 * findings["model"]["numbers"]["parameters"]
    assert list(tmp_path.iterdir()) == []
    words.append("model.path=/nowhere")
    done = subprocess.run(words, cwd=tmp_path, env=os.environ | place, capture_output=True, text=True, check=False)
    assert done.returncode == 2  # a mistake
    assert done.stderr.startswith("pspo: model.path='/nowhere': model=tiny has the embedded task's")


@pytest.mark.process
def test_a_model_that_is_not_here_is_a_finding(tmp_path):
    place = {"HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    words = [
        sys.executable,
        "-m",
        "pspo.doctor",
        "model=qwen0_5b",
        "tracker=jsonl",
        "threads=1",
        f"output_dir={tmp_path}",
    ]
    done = subprocess.run(words, env=os.environ | place, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "python -m pspo.prefetch" in " ".join(done.stdout.split())
    assert max(map(len, done.stdout.splitlines())) <= 80
