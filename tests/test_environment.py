import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pspo
from pspo.base.schema import ConfigError
from pspo.host import environment

PACKAGE = Path(pspo.__file__).parent


def test_threads_are_as_configured_else_slurms_else_those_allowed(monkeypatch):
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    assert environment.choose_threads(None) == len(os.sched_getaffinity(0))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "7")
    assert environment.choose_threads(None) == 7
    assert environment.choose_threads(3) == 3


def test_a_gpu_asked_for_and_absent_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert environment.choose_device("auto") == environment.choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="device=cuda, but this process sees no GPU"):
        environment.choose_device("cuda")


def test_the_code_is_named_by_the_content_of_the_whole_package(tmp_path):
    assert environment.PACKAGE == PACKAGE
    copy = tmp_path / "pspo"
    shutil.copytree(PACKAGE, copy)
    assert environment.code_digest(copy) == environment.code_digest()
    for path in ("loss.py", "objective/clip.py"):
        (copy / path).write_text("a")
        environment.code_digest.cache_clear()
        assert environment.code_digest(copy) != environment.code_digest()
        shutil.copyfile(PACKAGE / path, copy / path)


def test_a_copy_inside_another_repository_records_no_commit(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    shutil.copytree(PACKAGE, tmp_path / "pspo")
    code = "import torch; from pspo.host import environment as e; print(e.describe(1, torch.device('cpu'))['code'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "'commit': None, 'uncommitted_changes': None" in done.stdout


def test_the_record_is_a_function_of_the_machine_alone():
    assert environment.describe(2, torch.device("cpu")) == environment.describe(2, torch.device("cpu"))


def test_every_process_has_an_entry_and_what_differs_is_told_key_by_key(tmp_path):
    first = environment.describe(2, torch.device("cpu"))
    assert first["capability"] == torch.backends.cpu.get_cpu_capability()
    assert environment.record(tmp_path, first) == []
    assert environment.record(tmp_path, first | {"host": "other", "platform": "other", "time/started": "now"}) == []
    changes = {
        "code": first["code"] | {"sha256": "beef", "commit": "another"},
        "packages": first["packages"] | {"torch": "2.0"},
        "cpu": "AMD",
        "capability": "NEON",
        "device": "NVIDIA H200",
        "threads": 64,
    }
    assert sorted(environment.record(tmp_path, first | changes)) == [
        f"capability was {first['capability']}, is NEON",
        f"code.sha256 was {first['code']['sha256']}, is beef",
        f"cpu was {first['cpu']}, is AMD",
        "device was cpu, is NVIDIA H200",
        f"packages.torch was {first['packages']['torch']}, is 2.0",
        "threads was 2, is 64",
    ]
    assert [entry["threads"] for entry in environment.history(tmp_path)] == [2, 2, 64]


def test_the_record_of_the_first_version_is_the_first_entry(tmp_path):
    """It was one mapping, of the last process, without the vector capability."""
    now = environment.describe(2, torch.device("cpu"))
    old = {name: value for name, value in now.items() if name != "capability"} | {"threads": 3}
    (tmp_path / "environment.json").write_text(json.dumps(old))
    assert environment.record(tmp_path, now) == ["threads was 3, is 2"]
    assert environment.history(tmp_path) == [old, now]


def test_a_threads_barrier_spins_for_a_bounded_time():
    code = "import os, pspo; print(os.environ['GOMP_SPINCOUNT'])"
    command = [sys.executable, "-c", code]
    unset = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    assert subprocess.run(command, env=unset, capture_output=True, text=True, check=True).stdout == "10000\n"
    kept = subprocess.run(command, env=unset | {"GOMP_SPINCOUNT": "5"}, capture_output=True, text=True, check=True)
    assert kept.stdout == "5\n"
