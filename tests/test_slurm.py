"""What the launcher, the signals, the lock and ``status`` promise, on a real SLURM: each run is hit in its middle."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pspo.base.files import read_lines
from pspo.base.schema import ConfigError
from pspo.host import slurm
from pspo.host.environment import history
from pspo.launcher import configure, make_plan
from pspo.status.__main__ import cancel, retry
from pspo.status.state import collect
from pspo.sync import sync
from tests.cluster import alive, cluster, wait_for  # noqa: F401
from tests.forked import SMALL, fingerprint, only_run
from tests.test_run import start
from tests.wandb_server import serving

ROOT = Path(__file__).parents[1]
STEPS = 24
REWARDS = """
import os, time
def slow(completion, problem):  # half a second for the 16 completions of a step
    time.sleep(float(os.environ.get("SLOWNESS_S", "0.03")))
    return float(len(completion) % 5)
def quick(completion, problem):
    return float(len(completion) % 5)
def raises(completion, problem):
    raise KeyError("a bug in a reward")
def killed(completion, problem):  # as the kernel does it when memory runs out
    os.kill(os.getpid(), 9)
"""
KEYS = {"cpus": 1, "gpus": 0, "memory_gib": 1, "time_min": 60, "notice_s": 10}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """The overrides of a run that takes a quarter of a minute, and the cache of its warm policy."""
    folder = tmp_path_factory.mktemp("settings")
    (folder / "mine.py").write_text(REWARDS)
    small = [key for key in SMALL if not key.startswith(("tracker", "budget", "checkpoint", "evaluate"))]
    own = [f"budget.steps={STEPS}", "evaluate.every=8", "checkpoint.every=5", "reward=custom"]
    return [*small, *own, f"reward.function={folder}/mine.py:slow"], folder / "cache"


@pytest.fixture(scope="module")
def unbroken(settings, tmp_path_factory):
    overrides, cache = settings
    cwd = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        status, output = start(cwd, cache, *overrides)
    assert status == 0, output
    return only_run(cwd)


@pytest.fixture
def node(cluster, settings, tmp_path, monkeypatch):  # noqa: F811
    """A login node of the cluster: its environment, and a directory of one's own."""
    names = {"XDG_CACHE_HOME": str(settings[1]), "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    for name, value in (cluster.environment | names | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PSPO_CLUSTER", str(tmp_path / "cluster.yaml"))
    (tmp_path / "cluster.yaml").write_text("partition: main\n")
    monkeypatch.chdir(tmp_path)
    return cluster


def launcher(**keys):
    import yaml

    values = yaml.safe_load((ROOT / "conf" / "hydra" / "launcher" / "slurm.yaml").read_text())
    values = {name: value for name, value in values.items() if not name.startswith("_")}
    return configure("slurm", values | KEYS | keys, list(keys))


def submit(overrides, **keys):
    """Submit one run; returns its job and its directory."""
    (run,) = make_plan([overrides])
    launcher(**keys).launch([run])
    group = collect(run.directory.parent)
    return group.tasks[run.directory.name].job_id, run.directory


def rows(directory):
    path = directory / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def reach_the_middle(job, directory):
    wait_for(lambda: rows(directory) > STEPS // 3, what=lambda: f"{job}: {log(directory)}")
    assert rows(directory) < STEPS - 4, "the run is too fast for this test"


def log(directory):
    texts = [path.read_text() for path in directory.parent.glob(".submitit/*/*.err")]
    return "\n".join([str(collect(directory.parent).rows), *texts])[-4000:]


def state(directory):
    (row,) = [row for row in collect(directory.parent).rows if row.run == directory.name]
    return row


def wait_for_end(directory):
    wait_for((directory / "DONE").exists, what=lambda: log(directory))
    wait_for(lambda: state(directory).state == "done")


def lasting(directory):
    """The fingerprint without processes and the checkpoints before the last, which a broken run has elsewhere."""
    left_out = rf"environment\.json|checkpoints/(?!step_{STEPS:06d})"
    return {name: hash for name, hash in fingerprint(directory).items() if not re.match(left_out, name)}


def assert_unbroken(directory, unbroken):
    assert lasting(directory) == lasting(unbroken)
    with serving() as server:
        assert list(sync(directory.parent)) == [(directory.name, STEPS + 1, "")]
        assert server.steps(directory) == list(range(STEPS + 1))


@pytest.mark.slurm
def test_usr2(node, settings, unbroken):
    job, directory = submit(settings[0])
    reach_the_middle(job, directory)
    node.call("scancel", "--signal=USR2", job)
    wait_for(lambda: slurm.job_states([job])[job].restarts == 1, what=lambda: log(directory))
    assert state(directory).state in ("requeued", "running")
    wait_for_end(directory)
    assert_unbroken(directory, unbroken)
    assert "restart 1" in (directory / "run.log").read_text()
    assert state(directory).restarts == 1


@pytest.mark.slurm
def test_two_ranks_are_stopped_and_requeued_together(node, settings, unbroken):
    """A task for each GPU of the job; the resumed run is that of two undisturbed ranks, to the bit."""
    _, whole = submit([*settings[0], "group=whole"], gpus=2)
    wait_for_end(whole)
    job, directory = submit([*settings[0], "group=broken"], gpus=2)
    reach_the_middle(job, directory)
    node.call("scancel", "--signal=USR2", job)
    wait_for(lambda: slurm.job_states([job])[job].restarts == 1, what=lambda: log(directory))
    wait_for_end(directory)
    groups = {"config.yaml": "", "overrides.yaml": ""}  # which name it
    assert lasting(directory) | groups == lasting(whole) | groups
    one, two = (read_lines(path / "metrics.jsonl") for path in (unbroken, directory))
    assert [row["step"] for row in two] == [row["step"] for row in one]
    assert two[1]["reward/mean"] == pytest.approx(one[1]["reward/mean"], abs=0.5)  # tokens may flip in float32


@pytest.mark.slurm
def test_two_nodes_go_on_after_one_of_their_ranks_was_killed(node, settings):
    keys = {"gpus": 1, "nodes": 2, "partition": "pair"}
    _, whole = submit([*settings[0], "group=whole"], **keys)
    wait_for_end(whole)
    assert [(entry["ranks"], entry["nodes"]) for entry in history(whole)] == [(2, 2)]
    job, directory = submit([*settings[0], "group=broken"], **keys)
    reach_the_middle(job, directory)
    assert state(directory).phase.endswith("2 ranks on 2 nodes")
    (pid,) = rank_of(job, 1)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: state(directory).state == "failed", what=lambda: log(directory))
    submit([*settings[0], "group=broken"], **keys, retry_failed=True)
    wait_for_end(directory)
    groups = {"config.yaml": "", "overrides.yaml": ""}
    assert lasting(directory) | groups == lasting(whole) | groups


def rank_of(job, rank):
    """The processes of a rank of a job."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            python = b"submitit" in (path.parent / "cmdline").read_bytes()
            if python and f"SLURM_JOB_ID={job}".encode() in words and f"SLURM_PROCID={rank}".encode() in words:
                yield int(path.parent.name)


@pytest.mark.slurm
def test_preemption(node, settings, unbroken):
    be_preempted(node, settings, unbroken)


@pytest.mark.slurm
def test_preemption_where_sigterm_is_all_that_is_sent(node, settings, unbroken):
    """SLURM then requeues nothing that ends by itself, so the run asks for it."""
    with node.configured("SlurmctldParameters=preempt_send_user_signal", "#"):
        directory = be_preempted(node, settings, unbroken)
    assert "SIGTERM to a job that SLURM still calls running" in (directory / "run.log").read_text()


def be_preempted(node, settings, unbroken):
    job, directory = submit(settings[0])
    reach_the_middle(job, directory)
    urgent = node.submit("sleep 5", "--partition=high", "--cpus-per-task=8", "--mem=100")
    wait_for(lambda: slurm.job_states([job])[job].restarts == 1, what=lambda: log(directory))
    node.wait_for_state(urgent, "RUNNING", "COMPLETED")
    wait_for_end(directory)
    assert_unbroken(directory, unbroken)
    assert state(directory).restarts == 1
    return directory


@pytest.mark.slurm
def test_a_real_timeout(node, settings, unbroken, monkeypatch):
    """Without notice, as --signal=USR2@0 has it: SLURM ends the job, and a retry resumes it."""
    monkeypatch.setenv("SLOWNESS_S", "0.15")  # SLURM looks at time limits twice a minute
    job, directory = submit(settings[0], additional={"signal": "USR2@0"})
    reach_the_middle(job, directory)
    node.call("scontrol", "update", f"JobId={job}", "EndTime=now+1")
    node.wait_for_state(job, "TIMEOUT")
    row = wait_for(lambda: (row := state(directory)).state == "timed out" and row, what=lambda: log(directory))
    assert row.job_id == job
    retry(collect(directory.parent))
    wait_for_end(directory)
    assert_unbroken(directory, unbroken)


@pytest.mark.slurm
def test_requeue_by_an_administrator(node, settings, unbroken):
    job, directory = submit(settings[0])
    reach_the_middle(job, directory)
    node.call("scontrol", "requeue", job)
    wait_for(lambda: slurm.job_states([job])[job].restarts == 1, what=lambda: log(directory))
    wait_for_end(directory)
    assert_unbroken(directory, unbroken)


@pytest.mark.slurm
def test_kill_9(node, settings, unbroken):
    job, directory = submit(settings[0])
    reach_the_middle(job, directory)
    os.kill(json.loads((directory / ".owner").read_text())["pid"], signal.SIGKILL)
    node.wait_for_state(job, "FAILED")
    row = state(directory)
    assert (row.state, row.why) == ("failed", "killed by signal 9, probably memory")
    retry(collect(directory.parent))
    wait_for_end(directory)
    assert_unbroken(directory, unbroken)
    assert state(directory).job_id != job


@pytest.mark.slurm
def test_a_stopped_slurmd(node, settings, unbroken, monkeypatch):
    """The node is lost to SLURM, while the run's process goes on: it must not meet its successor in the directory."""
    monkeypatch.setenv("SLOWNESS_S", "0.4")  # SLURM takes half a minute to see it, in which the run must not end
    job, directory = submit(settings[0])
    reach_the_middle(job, directory)
    pid = json.loads((directory / ".owner").read_text())["pid"]
    node.stop_node()
    try:
        assert alive(pid)
        wait_for(lambda: slurm.job_states([job])[job].restarts == 1, what=lambda: log(directory))
    finally:
        node.start_node()
    wait_for_end(directory)
    wait_for(lambda: not slurm.job_states([job])[job].alive)
    assert_unbroken(directory, unbroken)
    assert not alive(pid)


@pytest.mark.slurm
def test_a_cancelled_run_stays_cancelled(node, settings):
    job, directory = submit(settings[0])
    reach_the_middle(job, directory)
    cancel(collect(directory.parent))
    node.wait_for_state(job, "CANCELLED")
    wait_for(lambda: state(directory).state == "cancelled", what=lambda: log(directory))
    group = collect(directory.parent)
    retry(group)
    assert collect(directory.parent).tasks == group.tasks
    assert slurm.job_states([job])[job].restarts == 0
    assert list((directory / "checkpoints").glob("step_*"))  # TERM saved
    assert not (directory / "DONE").exists()


def command(module, *arguments, timeout=3600):
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False, timeout=timeout
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slurm
def test_an_alpha_sweep_on_two_gpus(node, settings):
    quick = [key.replace(":slow", ":quick") for key in settings[0]]
    sweep = ["objective=pspo", "objective.alpha=0.05,0.1,0.2,0.4", "seed=0,1,2", "budget.steps=2"]
    keys = ["hydra.launcher.cpus=1", "hydra.launcher.gpus=1", "hydra.launcher.memory_gib=1"]
    status, _, errors = command("pspo.run", "-m", *quick, *sweep, "hydra/launcher=slurm", *keys)
    assert status == 0, errors
    most = 0
    while (group := collect(Path("outputs/main"))).unfinished:
        states = [job.state for job in group.jobs.values()]
        assert len(states) == 12
        most = max(most, states.count("RUNNING"))
    assert most == 2
    status, output, _ = command("pspo.status", "outputs/main", "--json")
    assert status == 0
    table = json.loads(output)
    assert [row["state"] for row in table] == ["done"] * 12, table
    assert {row["job_id"].partition("_")[0] for row in table} == {table[0]["job_id"].partition("_")[0]}
    assert all(0 <= row["accuracy"]["embedded"] <= 1 and row["done"] == 2 for row in table)
    status, _, errors = command("pspo.run", "-m", *quick, *sweep, "hydra/launcher=slurm", *keys)
    assert status == 0, errors
    assert len(list(Path("outputs/main/.submitit").glob("*/runs.json"))) == 1  # all done, so nothing was submitted


@pytest.mark.slurm
def test_runs_are_evaluated_in_one_array(node, settings):
    """Two runs made here; their further answers as jobs of SLURM, which a second command finds given."""
    quick = [key.replace(":slow", ":quick") for key in settings[0]]
    status, _, errors = command("pspo.run", "-m", *quick, "budget.steps=1", "seed=0,1")
    assert status == 0, errors
    further = ["run=outputs/main/*", "evaluate.name=further", "evaluate.temperatures=[0,1]", "evaluate.samples=2"]
    keys = [f"hydra.launcher.{key}" for key in ("cpus=1", "gpus=0", "memory_gib=1", "wait=true")]
    status, output, errors = command("pspo.evaluate", *further, "hydra/launcher=slurm", *keys)
    assert status == 0, errors
    assert "2 in all" in output
    for run in Path("outputs/main").glob("pspo_*"):
        assert len((run / "evaluation" / "after" / "further" / "embedded_t1.jsonl").read_text().splitlines()) == 16
        assert (run / "evaluation" / "after" / "further" / "DONE").is_file()
    assert {row.state for row in collect(Path("outputs/main")).rows} == {"done"}
    status, output, errors = command("pspo.evaluate", *further, "hydra/launcher=slurm", *keys)
    assert status == 0, errors
    assert "0 submitted" in output


@pytest.mark.slurm
def test_a_sweep_above_the_array_size_of_the_cluster(node, settings):
    """Five runs where an array may have two: all are made, and at most three at one time."""
    quick = [key.replace(":slow", ":quick") for key in settings[0]]
    keys = [f"hydra.launcher.{key}" for key in ("cpus=1", "gpus=0", "memory_gib=1", "array_parallelism=3")]
    most = 0
    with node.configured("MaxArraySize=1000", "MaxArraySize=2"):
        assert slurm.max_array_size() == 2
        sweep = [*quick, "budget.steps=1", "seed=range(0,5)", *keys]
        status, output, errors = command("pspo.run", "-m", *sweep, "hydra/launcher=slurm")
        assert status == 0, errors
        while (group := collect(Path("outputs/main"))).unfinished:
            most = max(most, [job.state for job in group.jobs.values()].count("RUNNING"))
    assert most == 3
    assert [row.state for row in group.rows] == ["done"] * 5
    records = [json.loads(path.read_text()) for path in Path("outputs/main/.submitit").glob("*/runs.json")]
    assert sorted(len(record["runs"]) for record in records) == [1, 2, 2]
    assert output.count(" in all") == 3


@pytest.mark.slurm
def test_failures_are_told_apart_and_stop_nobody(node, settings):
    mine = next(key for key in settings[0] if key.startswith("reward.function="))
    functions = ",".join(mine.partition("=")[2].replace(":slow", f":{name}") for name in ("quick", "raises", "killed"))
    own = ["budget.steps=1", f"reward.function={functions}", "seed=0"]
    keys = ["cpus=1", "gpus=0", "memory_gib=1", "wait=true"]
    keys = [f"hydra.launcher.{key}" for key in keys]
    base = [key for key in settings[0] if key != mine]
    status, _, errors = command("pspo.run", "-m", *base, *own, "hydra/launcher=slurm", *keys)
    assert status == 1, errors
    assert "2 of 3 runs failed" in errors
    rows = collect(Path("outputs/main")).rows
    assert sorted(row.state for row in rows) == ["done", "failed", "failed"]
    raised, killed = sorted((row for row in rows if row.state == "failed"), key=lambda row: "signal 9" in row.why)
    assert "raised KeyError: 'a bug in a reward' on problem embedded/" in raised.why.splitlines()[-1]
    assert json.loads(Path("outputs/main", raised.run, "FAILED").read_text())["kind"] == "reward"
    assert killed.why == "killed by signal 9, probably memory"
    assert [job.state for job in slurm.job_states([raised.job_id, killed.job_id]).values()] == ["FAILED", "FAILED"]


@pytest.mark.slurm
def test_bad_input_is_one_sentence_before_anything_is_submitted(node, settings, monkeypatch):
    with pytest.raises(ConfigError, match=r"sbatch refuses: .*partition"):
        submit(settings[0], partition="nowhere")
    assert not list(Path("outputs").glob("*/.submitit/*/runs.json"))
    known = {path for path in os.environ["PATH"].split(":") if not shutil.which("sbatch", path=path)}
    monkeypatch.setenv("PATH", ":".join(known))
    with pytest.raises(ConfigError, match="no sbatch on the path"):
        submit(settings[0])
    assert not list(Path("outputs").glob("*/*/config.yaml"))
