import contextlib
import json
import os
import pickle
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import submitit
import yaml

from pspo.base.files import CONF
from pspo.base.schema import ConfigError
from pspo.config import compose
from pspo.launcher import Job, Planned, RunsFailed, configure, make_plan
from pspo.launcher.local import Local
from pspo.launcher.slurm import Slurm
from pspo.run.earlier import run_directory
from pspo.run.outcome import result


def preset(kind, **values):
    told = yaml.safe_load((CONF / "hydra" / "launcher" / f"{kind}.yaml").read_text())
    return {name: value for name, value in told.items() if name[0] != "_"} | values


@pytest.fixture(autouse=True)
def no_cluster_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("PSPO_CLUSTER", raising=False)


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """Stand-ins for SLURM's commands, on a path that has no others."""
    place = tmp_path / "bin"
    place.mkdir()
    monkeypatch.setenv("PATH", str(place))

    def make(**scripts):
        for name, script in scripts.items():
            (place / name).write_text(f"#!/bin/sh\n{script}\n")
            (place / name).chmod(0o755)

    return make


def runs(tmp_path, *names, state="new"):
    return [Planned(overrides=[f"name={name}"], directory=tmp_path / "main" / name, state=state) for name in names]


BAD = {
    "time_min=x": "hydra.launcher.time_min must be a whole number, got 'x'",
    "time_min=0": "hydra.launcher.time_min must be in [1, inf), got 0",
    "time_min=2": "hydra.launcher.notice_s=180: must be less than hydra.launcher.time_min=2 minutes",
    "memory_gib=0": "hydra.launcher.memory_gib must be in (0, inf), got 0",
    "gpus=-1": "hydra.launcher.gpus must be in [0, inf), got -1",
    "{gpus: 0, gpu_type: a100}": "hydra.launcher.gpu_type='a100': needs hydra.launcher.gpus of at least 1",
    "nodes=0": "hydra.launcher.nodes must be in [1, inf), got 0",
    "setup=module load cuda": "hydra.launcher.setup must be a list, each item text, got 'module load cuda'",
    "{additional: {nice: [1]}}": "hydra.launcher.additional.nice must be text, a number or true, got [1]",
    "partion=gpu": "unknown key hydra.launcher.partion (did you mean hydra.launcher.partition?)",
    "hours_per_run=0": "hydra.launcher.hours_per_run must be in (0, inf), got 0",
}


@pytest.mark.parametrize("text", BAD)
def test_a_mistake_is_told_in_one_sentence(text):
    name, _, value = text.partition("=")
    values = yaml.safe_load(text) if text[0] == "{" else {name: yaml.safe_load(value)}
    with pytest.raises(ConfigError) as caught:
        configure("slurm", preset("slurm", **values), [])
    assert BAD[text] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_clusters_file_comes_over_the_preset_and_the_command_line_over_both(tmp_path, monkeypatch):
    file = tmp_path / "config" / "pspo" / "cluster.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("partition: gpu\naccount: me\ntime_min: 60\nadditional: {reservation: mine, nice: 1}\n")
    composed = preset("slurm", time_min=90, additional={"nice": 2})
    made = configure("slurm", composed, ["hydra.launcher.time_min=90", "++hydra.launcher.additional.nice=2"])
    assert (made.partition, made.account, made.time_min, made.cpus) == ("gpu", "me", 90, 8)
    assert made.additional == {"reservation": "mine", "nice": 2}
    file.write_text("partion: gpu\n")
    with pytest.raises(ConfigError, match=rf"unknown key hydra.launcher.partion .*; {file} counts too"):
        configure("slurm", composed, [])
    monkeypatch.setenv("PSPO_CLUSTER", str(tmp_path / "other.yaml"))
    with pytest.raises(ConfigError, match=r"PSPO_CLUSTER=.*there is no such file"):
        configure("slurm", composed, [])


def test_no_sbatch_is_told_before_anything_is_written(commands, tmp_path):
    with pytest.raises(ConfigError, match="no sbatch on the path"):
        configure("slurm", preset("slurm"), []).launch(runs(tmp_path, "a"))
    assert not (tmp_path / "main").exists()


@pytest.mark.parametrize("more", ["", 'Try "sbatch --help" for more information'])
def test_what_sbatch_refuses_is_told(commands, tmp_path, capfd, more):
    commands(sbatch=f"echo 'sbatch: error: Invalid qos specification' >&2; echo '{more}' >&2; exit 1", srun="")
    with pytest.raises(ConfigError, match=r"sbatch refuses: sbatch: error: Invalid qos specification$"):
        configure("slurm", preset("slurm", qos="x"), []).launch(runs(tmp_path, "a", "b"))
    assert "sbatch" not in capfd.readouterr().err  # told once, in the sentence


def test_a_sweep_is_one_array_and_what_is_in_the_queue_is_not_submitted_again(commands, tmp_path, capsys):
    commands(
        sbatch=f"echo Submitted batch job 42; echo x >> {tmp_path}/calls",
        srun="",
        squeue="echo '42_1|PENDING|0|0|0|None'",
    )
    launcher = configure("slurm", preset("slurm", additional={"mail-type": "END"}), [])
    planned = [*runs(tmp_path, "a", "b", "c"), *runs(tmp_path, "d", state="done"), *runs(tmp_path, "e", state="failed")]
    assert launcher.launch(planned) == [None] * 5
    folder = tmp_path / "main" / ".submitit" / "42"
    record = json.loads((folder / "runs.json").read_text())
    assert (record["cluster"], record["job_id"]) == ("slurm", "42")
    assert [(run["task"], Path(run["directory"]).name) for run in record["runs"]] == [
        ("42_0", "a"), ("42_1", "b"), ("42_2", "c"),
    ]  # fmt: skip
    assert build_again(record["launcher"]) == launcher
    script = (folder / "42_submission.sh").read_text()
    for line in (
        "array=0-2%3",
        "signal=USR2@180",
        "mail-type=END",
        "requeue",
        "cpus-per-task=8",
        "gres=gpu:1",
        "mem=32768M",
    ):
        assert f"#SBATCH --{line}\n" in script
    with (folder / "42_1_submitted.pkl").open("rb") as file:
        submission = pickle.load(file)
    assert submission.function.overrides == ["name=b"]
    assert submission._timeout_countdown >= 10**6
    output = capsys.readouterr().out
    assert "5 runs: 3 new, 1 done, 1 failed; 3 submitted" in output
    assert f"watch  python -m pspo.status {tmp_path / 'main'}" in output

    configure("slurm", preset("slurm", retry_failed=True), []).launch(planned)
    record = json.loads((folder / "runs.json").read_text())
    assert [Path(run["directory"]).name for run in record["runs"]] == ["a", "c", "e"]
    assert len((tmp_path / "calls").read_text().splitlines()) == 2


def build_again(values):
    return configure("slurm", values, [f"hydra.launcher.{name}=" for name in values])


def test_waiting_ends_when_slurm_has_forgotten_the_jobs_and_a_failed_one_is_told(commands, tmp_path, monkeypatch):
    monkeypatch.setattr("pspo.launcher.slurm.POLL_S", 0.01)
    commands(sbatch="echo Submitted batch job 7", srun="", squeue="exit 0")
    planned = runs(tmp_path, "a", "b")
    planned[0].directory.mkdir(parents=True)
    (planned[0].directory / "DONE").touch()
    rows = [{"validation/sampled_reward_mean": 0.25}, {"reward/mean": 1.0}]
    (planned[0].directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done, failed = configure("slurm", preset("slurm", wait=True), []).launch(planned)
    assert done == 0.25
    assert isinstance(failed, RunsFailed)
    assert re.fullmatch(r"1 of 2 runs failed: \S+/main/b \(job 7_1 is unknown to SLURM\)", str(failed))


@pytest.mark.parametrize(
    ("max_array_size", "parallelism", "arrays"),
    [
        (3, 64, ["0-2%3", "0-2%3", "0-2%3"]),
        (4, 7, ["0-2%2", "0-2%2", "0-2%2"]),
        (8, 6, ["0-3%3", "0-4%3"]),
        (9, 6, ["0-8%6"]),
        (1001, 6, ["0-8%6"]),
        (5, 1, ["0-3%1", "0-4%1"]),
    ],
)
def test_a_sweep_above_the_clusters_array_size_is_split(commands, tmp_path, max_array_size, parallelism, arrays):
    """The largest index of an array is MaxArraySize - 1; the bound on jobs at one time is divided among the arrays."""
    commands(
        scontrol=f"echo 'MaxArraySize            = {max_array_size}'",
        sbatch=f"echo x >> {tmp_path}/calls; n=0; while read -r _; do n=$((n+1)); done < {tmp_path}/calls; "
        "echo Submitted batch job $n",
        srun="",
        squeue="exit 0",
    )
    planned = runs(tmp_path, *"abcdefghi")
    configure("slurm", preset("slurm", array_parallelism=parallelism), []).launch(planned)
    group = tmp_path / "main" / ".submitit"
    records = [json.loads((group / str(i + 1) / "runs.json").read_text()) for i in range(len(arrays))]
    assert [Path(run["directory"]).name for record in records for run in record["runs"]] == list("abcdefghi")
    scripts = [(group / str(i + 1) / f"{i + 1}_submission.sh").read_text() for i in range(len(arrays))]
    assert [re.search("--array=(.*)", script)[1] for script in scripts] == arrays
    for i, record in enumerate(records):
        assert [run["task"] for run in record["runs"]] == [f"{i + 1}_{j}" for j in range(len(record["runs"]))]


def test_what_was_submitted_before_a_refusal_is_recorded_and_told(commands, tmp_path):
    refuse = "sbatch: error: AssocMaxSubmitJobLimit"
    commands(
        scontrol="echo MaxArraySize = 2",
        sbatch=f"[ -e {tmp_path}/called ] && echo '{refuse}' >&2 && exit 1; : > {tmp_path}/called; "
        "echo Submitted batch job 7",
        srun="",
        squeue="exit 0",
    )
    with pytest.raises(
        ConfigError, match=rf"refuses: {refuse}; 2 of 4 runs are in the queue, and this command submits"
    ):
        configure("slurm", preset("slurm"), []).launch(runs(tmp_path, *"abcd"))
    record = json.loads((tmp_path / "main" / ".submitit" / "7" / "runs.json").read_text())
    assert [Path(run["directory"]).name for run in record["runs"]] == ["a", "b"]


def test_a_dry_run_tells_the_cost_and_the_sbatch_text(tmp_path, capsys):
    launcher = configure("slurm", preset("slurm", dry_run=True, gpus=2, hours_per_run=1.5, gpu_type="a100"), [])
    planned = [*runs(tmp_path, "a", "b"), *runs(tmp_path, "c", state="resume"), *runs(tmp_path, "d", state="done")]
    assert launcher.launch(planned) == [None] * 4
    output = capsys.readouterr().out
    assert "4 runs: 2 new, 1 resume, 1 done; 3 to run\ncost: 3 runs x 1.5 h x 2 GPU = 9 GPU-hours" in output
    for line in ("--array=0-2%3", "--gres=gpu:a100:2", "--time=720"):
        assert f"#SBATCH {line}\n" in output
    assert list(tmp_path.iterdir()) == []


def test_the_plan_tells_what_became_of_each_run(tmp_path):
    jobs = [[f"output_dir={tmp_path}", "tracker=jsonl", f"seed={seed}"] for seed in (0, 1, 2, 3, 0)]
    planned = make_plan([[f"++{each}" for each in job] for job in jobs])
    assert [run.state for run in planned] == ["new"] * 5
    assert planned[0] == planned[4]
    for run, files in zip(planned, ["config.yaml", "config.yaml FAILED", "config.yaml DONE"], strict=False):
        run.directory.mkdir(parents=True)
        for name in files.split():
            (run.directory / name).write_text("{}")
    (planned[2].directory / "inputs.json").write_text('{"code": "that of another day"}')
    assert [run.state for run in make_plan(jobs)] == ["resume", "failed", "changed", "new", "resume"]
    assert make_plan([[*jobs[2], "rerun=changed"]])[0].state == "again"
    for run, job in zip(planned, jobs, strict=True):
        assert run.directory == run_directory(compose(job), job)


def test_a_job_is_its_overrides_and_is_queued_again_as_it_was():
    job = pickle.loads(pickle.dumps(Job(("seed=1", "objective=clip"))))
    assert vars(job) == {"overrides": ["seed=1", "objective=clip"], "command": "run"}
    again = job.checkpoint()
    assert isinstance(again, submitit.helpers.DelayedSubmission)
    assert again.function is job


def test_the_result_is_the_last_validation_reward(tmp_path):
    assert result(tmp_path) is None


STUB = """# A run that records when, where and with what it ran.
import json, os, pathlib, sys, time
name, directory, seconds = (each.partition("=")[2] for each in sys.argv[2:])
began, place = time.time(), pathlib.Path(directory)
place.mkdir(parents=True)
time.sleep(float(seconds))
if name == "bad":
    raise RuntimeError("no luck")
names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "SLURM_CPUS_PER_TASK")
told = {"began": began, "ended": time.time(), "processors": sorted(os.sched_getaffinity(0))}
(place / "told.json").write_text(json.dumps(told | {name: os.environ.get(name) for name in names}))
(place / "DONE").touch()
"""


def slots(tmp_path, monkeypatch, names, seconds=0.5, **values):
    monkeypatch.setattr(Local, "interpreter", (sys.executable, "-c", STUB))
    launcher = configure("local", preset("local", **values), [])
    planned = [
        Planned(overrides=[f"name={name}", f"directory={place}", f"seconds={seconds}"], directory=place, state="new")
        for name in names
        for place in [tmp_path / "main" / name]
    ]
    return launcher, planned


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_slots_share_the_machine_and_a_failed_run_stops_no_other(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "64")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    environment, processors = dict(os.environ), os.sched_getaffinity(0)
    launcher, planned = slots(tmp_path, monkeypatch, ["a", "bad", "b", "c"])
    outcomes = launcher.launch(planned)
    assert [isinstance(outcome, RunsFailed) for outcome in outcomes] == [False, True, False, False]
    assert "1 of 4 runs failed" in str(outcomes[1])
    told = [json.loads((run.directory / "told.json").read_text()) for run in planned if run.directory.name != "bad"]
    for one in told:
        assert int(one["OMP_NUM_THREADS"]) == len(one["processors"]) == len(processors) // 2
        assert one["SLURM_CPUS_PER_TASK"] is None
        assert one["CUDA_VISIBLE_DEVICES"] in ("3", "5")
    at_work = [sum(one["began"] <= other["began"] < one["ended"] for one in told) for other in told]
    assert max(at_work) <= 2
    for one in told:
        for other in told:
            if one is not other and one["began"] <= other["began"] < one["ended"]:
                assert not set(one["processors"]) & set(other["processors"])
                assert one["CUDA_VISIBLE_DEVICES"] != other["CUDA_VISIBLE_DEVICES"]
    (path,) = tmp_path.glob("main/.submitit/*/runs.json")
    assert all(run["task"] for run in json.loads(path.read_text())["runs"])
    assert (dict(os.environ), os.sched_getaffinity(0)) == (environment, processors)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"slots": 10**6}, "processors here, and a slot needs one"), ({"gpus": 3, "slots": 1}, "there are 2 GPUs here")],
)
def test_more_slots_than_the_machine_has_are_refused(tmp_path, monkeypatch, values, message):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1" if "gpus" in values else "")
    launcher, planned = slots(tmp_path, monkeypatch, ["a"], **values)
    with pytest.raises(ConfigError, match=message):
        launcher.launch(planned)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["in the foreground", "started with &"])
def sigint(request):
    """What a shell makes of SIGINT, and what all processes that are started here inherit."""
    before = signal.signal(signal.SIGINT, request.param)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_stopped_launcher_stops_its_runs(tmp_path, monkeypatch, sigint):
    monkeypatch.setattr("pspo.launcher.local.STOP_TIMEOUT_S", 0.5)
    launcher, planned = slots(tmp_path, monkeypatch, ["a", "b"], seconds=600, slots=1)

    def terminate():
        deadline = time.monotonic() + 600
        while not planned[0].directory.is_dir() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    handler, thread = signal.getsignal(signal.SIGTERM), threading.Thread(target=terminate)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        launcher.launch(planned)
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not planned[1].directory.exists()
    deadline = time.monotonic() + 600
    while (alive := at_work(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive


def at_work(folder):
    """The processes with a folder in their command line; those that have ended have none."""
    commands = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            commands[path.parent.name] = path.read_bytes()
    return [pid for pid, command in commands.items() if bytes(folder) in command]


def test_slurm_and_local_are_what_the_presets_say():
    assert isinstance(configure("slurm", preset("slurm"), []), Slurm)
    assert isinstance(configure("local", preset("local"), []), Local)
