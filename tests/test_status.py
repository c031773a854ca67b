import json
import os
import subprocess
import sys
import time

import filelock
import pytest
from rich.console import Console

from pspo import report
from pspo.base.schema import ConfigError
from pspo.config import read as config_of
from pspo.host import slurm
from pspo.run.lock import is_held
from pspo.status.__main__ import cancel, retry, table
from pspo.status.state import STATES, collect

OWNER = {"host": "node7", "pid": 1234, "job_id": "7_0", "requeues": 0, "restart": 0, "started": "2026-01-01T00:00:00"}


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """Stands in SLURM's place: ``answers("7_0|RUNNING|0|0|0|None")`` is what squeue prints; scancel keeps a record."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    monkeypatch.setenv("PATH", f"{binaries}:{os.environ['PATH']}")

    def answer(*jobs):
        lines = "\n".join(jobs)
        script(binaries / "squeue", f"cat <<'END'\n{lines}\nEND" if jobs else "echo Invalid job id >&2; exit 1")
        script(binaries / "sacct", "echo JobID; exit 1")
        script(binaries / "scancel", f'echo "$@" >> {binaries}/cancelled')

    answer.cancelled = binaries / "cancelled"
    return answer


@pytest.fixture
def no_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def make(group, name, *, steps=0, owner=None, failed=None, done=False):
    """A run directory as a run leaves it after so many steps of ten."""
    directory = group / name
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text("budget:\n  steps: 10\n  prompts: null\n  completion_tokens: null\n")
    (directory / ".lock").touch()
    rows = [{"step": 0, "validation/greedy_accuracy": 0.1, "time/validation_s": 3}]
    rows += [{"step": i, "budget/steps": i, "reward/mean": i / 10, "time/step_s": 2} for i in range(1, steps + 1)]
    if steps:
        (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for path, content in ((".owner", owner), ("FAILED", failed)):
        if content is not None:
            (directory / path).write_text(json.dumps(content))
    if done:
        summary = {"evaluation": {"embedded": {"after": {"accuracy": 0.75}, "before": {"accuracy": 0.5}}}}
        (directory / "summary.json").write_text(json.dumps(summary))
        (directory / "DONE").write_text("")
    return directory


def submitted(group, job, *runs, cluster="slurm", age_s=0):
    """The record of a submission; returns its folder."""
    folder = group / ".submitit" / job
    folder.mkdir(parents=True)
    rows = [{"task": f"{job}_{i}", "directory": str(group / run), "overrides": [run]} for i, run in enumerate(runs)]
    record = {"cluster": cluster, "job_id": job, "folder": str(folder), "launcher": {}, "runs": rows}
    (folder / "runs.json").write_text(json.dumps(record))
    then = time.time() - age_s
    os.utime(folder / "runs.json", (then, then))
    return folder


def only_row(group):
    (row,) = collect(group).rows
    assert row.state in STATES
    return row


def test_a_finished_run(tmp_path, no_slurm):
    make(tmp_path / "g", "a", steps=10, done=True)
    row = only_row(tmp_path / "g")
    assert (row.state, row.done, row.budget, row.unit, row.reward) == ("done", 10, 10, "steps", 1.0)
    assert row.accuracy == {"embedded": 0.75}
    assert row.eta_s is None


def test_a_running_run_is_known_by_its_lock_alone(tmp_path, no_slurm):
    directory = make(tmp_path / "g", "a", steps=4, owner=OWNER | {"job_id": None, "restart": 2})
    with filelock.FileLock(directory / ".lock", timeout=0):
        row = only_row(tmp_path / "g")
        assert is_held(directory)
    assert (row.state, row.done, row.restarts, row.phase, row.eta_s) == ("running", 4, 2, "importing", None)
    assert only_row(tmp_path / "g").state == "cut off"
    assert not is_held(directory)


def test_the_phase_of_a_running_run_is_told_with_the_time_that_it_has_left(tmp_path, no_slurm):
    directory = make(tmp_path / "g", "a", steps=4, owner=OWNER | {"job_id": None})
    told = {"phase": "testing on svamp, after", "done": 120, "total": 300, "left_s": 4000.0, "time": 0}
    (directory / ".phase").write_text(json.dumps(told))
    with filelock.FileLock(directory / ".lock", timeout=0):
        row, text = only_row(tmp_path / "g"), shown(tmp_path / "g")
    assert (row.phase, row.eta_s) == ("testing on svamp, after 120/300", 4000)
    assert "testing on svamp, after 120/300, 1:06:40 left" in text
    row = only_row(tmp_path / "g")  # its process was killed, and .phase is still there
    assert (row.state, row.phase, row.eta_s) == ("cut off", "", None)


def test_a_phase_without_numbers_is_told_without_them(tmp_path, no_slurm):
    directory = make(tmp_path / "g", "a", owner=OWNER | {"job_id": None})
    told = {"phase": "saving the model", "done": 0, "total": None, "left_s": None, "time": 0}
    (directory / ".phase").write_text(json.dumps(told))
    with filelock.FileLock(directory / ".lock", timeout=0):
        assert (only_row(tmp_path / "g").phase, only_row(tmp_path / "g").eta_s) == ("saving the model", None)


def test_a_torn_last_line_and_broken_records_are_passed_over(tmp_path, no_slurm):
    directory = make(tmp_path / "g", "a", steps=4)
    with (directory / "metrics.jsonl").open("ab") as file:
        file.write('{"step": 5, "budget/steps": 5, "note": "é'.encode()[:-1])
    (directory / ".owner").write_text("vm, process 12")
    (directory / "FAILED").write_text("{")
    assert (only_row(tmp_path / "g").done, only_row(tmp_path / "g").state) == (4, "cut off")


JOB = "7_0|{}|{}|{}|{}|{}"
ENDS = {
    JOB.format("PENDING", 0, 0, 0, "Resources"): ("waiting", "Resources"),
    JOB.format("PENDING", 0, 0, 2, "BeginTime"): ("requeued", "BeginTime"),
    JOB.format("RUNNING", 0, 0, 0, "None"): ("running", "no process holds the run's lock: it starts, or ends"),
    JOB.format("OUT_OF_MEMORY", "0:125", "0:0", 0, "OutOfMemory"): ("out of memory", "its job is OUT_OF_MEMORY"),
    JOB.format("TIMEOUT", 0, 15, 0, "TimeLimit"): ("timed out", "its job is TIMEOUT"),
    JOB.format("CANCELLED", 0, 15, 0, "None"): ("cancelled", "its job is CANCELLED"),
    JOB.format("NODE_FAIL", 0, 0, 0, "NodeDown"): ("node failure", "its job is NODE_FAIL"),
    JOB.format("FAILED", 137 * 256, 9, 0, "NonZeroExitCode"): ("failed", "killed by signal 9, probably memory"),
    JOB.format("FAILED", 9, 0, 0, "JobLaunchFailure"): ("failed", "killed by signal 9, probably memory"),
    JOB.format("FAILED", 139 * 256, 0, 0, "NonZeroExitCode"): ("failed", "killed by signal 11"),
    JOB.format("FAILED", 512, 0, 0, "NonZeroExitCode"): ("failed", "exit code 2, NonZeroExitCode"),
    JOB.format("COMPLETED", 0, 0, 0, "None"): ("cut off", "its job is COMPLETED"),
    "": ("lost", "its job is unknown to SLURM"),
}


@pytest.mark.parametrize("job", ENDS, ids=lambda job: job.replace("|", " ") or "unknown")
@pytest.mark.parametrize("begun", [True, False], ids=["begun", "never begun"])
def test_what_slurm_says_of_a_run_that_says_nothing(tmp_path, answers, job, begun):
    answers(*filter(None, [job]))
    submitted(tmp_path / "g", "7", "a")
    if begun:
        make(tmp_path / "g", "a", steps=3, owner=OWNER)
    row = only_row(tmp_path / "g")
    assert (row.state, row.why) == ENDS[job]
    assert row.job_id == "7_0"


def test_a_run_that_raised_says_why_itself(tmp_path, answers):
    answers(JOB.format("FAILED", 256, 256, 0, "NonZeroExitCode"))
    submitted(tmp_path / "g", "7", "a", age_s=9)
    error = "Traceback\n  line\nValueError: it [is] broken"
    directory = make(tmp_path / "g", "a", owner=OWNER, failed={"kind": "error", "error": error, "job_id": "7_0"})
    row = only_row(tmp_path / "g")
    assert (row.state, row.why) == ("failed", error)
    assert "ValueError: it [is] broken" in shown(tmp_path / "g")
    record = {"kind": "out of memory", "error": "OutOfMemoryError: CUDA", "job_id": "7_0"}
    (directory / "FAILED").write_text(json.dumps(record))
    assert only_row(tmp_path / "g").state == "out of memory"


def test_the_step_daemon_tells_of_memory_in_the_log(tmp_path, answers):
    answers(JOB.format("FAILED", 137 * 256, 9, 0, "NonZeroExitCode"))
    folder = submitted(tmp_path / "g", "7", "a")
    (folder / "7_0_0_log.err").write_text("slurmstepd: error: Detected 1 oom_kill event in StepId=7.0.\n")
    assert only_row(tmp_path / "g").state == "out of memory"


def test_a_run_that_ended_before_its_directory_began_is_told_by_its_log(tmp_path, answers):
    answers(JOB.format("FAILED", 256, 256, 0, "NonZeroExitCode"))
    folder = submitted(tmp_path / "g", "7", "a")
    log = "Traceback\n  line\nKeyError: 'bug'\nsrun: error: vm: task 0: Exited with exit code 1\n"
    (folder / "7_0_0_log.err").write_text(log)
    assert (only_row(tmp_path / "g").state, only_row(tmp_path / "g").why) == ("failed", log.partition("\nsrun")[0])


def test_the_newest_submission_counts_unless_an_older_one_is_at_work(tmp_path, answers):
    answers("7_0|FAILED|9|0|0|None", "8_0|CANCELLED|0|0|0|None")
    group = tmp_path / "g"
    submitted(group, "7", "a", age_s=9)
    submitted(group, "8", "a")
    assert (only_row(group).state, only_row(group).job_id) == ("cancelled", "8_0")
    answers("7_0|PENDING|0|0|0|Priority", "8_0|CANCELLED|0|0|0|None")
    assert (only_row(group).state, only_row(group).job_id) == ("waiting", "7_0")


def test_a_failure_of_an_earlier_submission_is_not_that_of_the_newest(tmp_path, answers):
    answers(JOB.format("CANCELLED", 0, 0, 0, "None"))
    make(tmp_path / "g", "a", owner=OWNER, failed={"kind": "error", "error": "old", "job_id": "6_0"})
    then = time.time() - 60
    os.utime(tmp_path / "g" / "a" / "FAILED", (then, then))
    submitted(tmp_path / "g", "7", "a")
    assert only_row(tmp_path / "g").state == "cancelled"


def test_without_slurm_nothing_is_claimed_of_its_jobs(tmp_path, no_slurm):
    submitted(tmp_path / "g", "7", "a")
    row = only_row(tmp_path / "g")
    assert (row.state, row.why) == ("cut off", "no process holds the run's lock; the same command resumes it")
    assert slurm.job_states(["7_0"]) == {}
    assert not slurm.is_gone("7_0")


def test_a_run_that_waits_for_a_slot_on_this_machine(tmp_path, no_slurm):
    code = "import time; print('up', flush=True); time.sleep(600)"
    launcher = subprocess.Popen([sys.executable, "-c", code, "pspo"], stdout=subprocess.PIPE)
    try:
        assert launcher.stdout.readline() == b"up\n"  # an instant earlier the process may not have its name yet
        folder = submitted(tmp_path / "g", f"local_20260101_000000_{launcher.pid}", "a", cluster="local")
        record = json.loads((folder / "runs.json").read_text())
        record["runs"][0]["task"] = ""
        (folder / "runs.json").write_text(json.dumps(record))
        row = only_row(tmp_path / "g")
        assert (row.state, row.why) == ("waiting", f"for a slot of process {launcher.pid}")
    finally:
        launcher.kill()
        launcher.communicate()
    assert only_row(tmp_path / "g").state == "cut off"
    record["runs"][0]["task"] = "99"
    (folder / "runs.json").write_text(json.dumps(record))
    (folder / "99_0_log.err").write_text("pspo: no such model\n")
    assert (only_row(tmp_path / "g").state, only_row(tmp_path / "g").why) == ("failed", "pspo: no such model")


def test_a_controller_that_does_not_answer_says_nothing_of_jobs(tmp_path, answers, monkeypatch):
    answers()
    script(tmp_path / "bin" / "squeue", "exec sleep 60")
    monkeypatch.setattr(slurm, "TIMEOUT_S", 0.2)
    assert slurm.job_states(["7"]) == {}
    assert not slurm.is_gone("7")
    script(tmp_path / "bin" / "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    assert not slurm.is_gone("7")


def test_accounting_remembers_what_the_queue_has_forgotten(tmp_path, answers):
    answers()
    lines = "JobID|State|ExitCode|DerivedExitCode\n7_0|CANCELLED by 0|0:0|0:15\n7_1|OUT_OF_MEMORY|0:125|0:0"
    script(tmp_path / "bin" / "sacct", f"cat <<'END'\n{lines}\nEND")
    states = slurm.job_states(["7_0", "7_1", "7_2"])
    assert [states[job].state for job in ("7_0", "7_1", "7_2")] == ["CANCELLED", "OUT_OF_MEMORY", slurm.UNKNOWN]
    assert slurm.is_gone("7_0")
    assert not any(state.alive for state in states.values())


def test_cancel_names_what_it_cancels_and_leaves_what_has_ended(tmp_path, answers, capsys):
    answers("7_0|RUNNING|0|0|0|None", "7_1|PENDING|0|0|0|Resources", "7_2|COMPLETED|0|0|0|None")
    submitted(tmp_path / "g", "7", "a", "b", "c")
    cancel(collect(tmp_path / "g"))
    assert answers.cancelled.read_text() == "7_0 7_1\n"
    assert capsys.readouterr().out == "cancel 7_0 (running)\ncancel 7_1 (pending)\n"


def test_retry_has_nothing_to_do_for_what_was_cancelled_or_never_submitted(tmp_path, answers, capsys):
    answers(JOB.format("CANCELLED", 0, 0, 0, "None"))
    submitted(tmp_path / "g", "7", "a")
    make(tmp_path / "g", "b", steps=3)
    retry(collect(tmp_path / "g"))
    errors = capsys.readouterr().err
    assert "b was not submitted by a launcher" in errors
    assert "nothing to retry" in errors


def shown(group, width=200):
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table(collect(group)))
    return console.export_text()


def test_the_table_has_a_row_for_each_run_and_counts_the_states(tmp_path, no_slurm):
    make(tmp_path / "g", "alpha", steps=10, done=True)
    make(tmp_path / "g", "beta", steps=3)
    text = shown(tmp_path / "g")
    assert ": 1 done, 1 cut off" in text
    assert "10/10 steps" in text
    assert "75.0 % embedded" in text


def test_a_name_that_leaves_overrides_out_is_explained(tmp_path, no_slurm):
    directory = make(tmp_path / "g", "pspo_alpha=0.1_+2_seed0_12345678")
    (directory / "overrides.yaml").write_text("- objective.alpha=0.1\n- rollout.prompts=8\n- rollout.group_size=4\n")
    assert only_row(tmp_path / "g").overrides == ["objective.alpha=0.1", "rollout.prompts=8", "rollout.group_size=4"]
    assert "_+2 in a name stands for two overrides more; --json lists all of them." in shown(tmp_path / "g")
    make(tmp_path / "h", "pspo_alpha=0.1_seed0_12345678")
    assert "_+2" not in shown(tmp_path / "h")


@pytest.mark.parametrize("width", [80, 120, 300])
def test_a_long_name_and_a_long_error_are_read_whole_in_a_terminal_of_any_width(tmp_path, no_slurm, width):
    error = "ConfigError: " + " ".join(f"the reason number {i} why it failed;" for i in range(20))
    names = [
        f"pspo_alpha=0.{i}_" + "_".join(f"key-{k}={i}" for k in range(8)) + f"_seed{i}_0000000{i}" for i in range(3)
    ]
    for name in names:
        make(tmp_path / "g", name, steps=10, failed={"kind": "error", "error": error})
    lines = shown(tmp_path / "g", width).splitlines()
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    assert text.count(error) == 3
    for name in names:
        assert f"{name} failed" in text or f"{name[:80]} {name[80:]} failed" in text
    assert text.count("10/10 steps reward 1.000") == 3


def test_large_budgets_are_told_in_full(tmp_path, no_slurm):
    directory = make(tmp_path / "g", "a", steps=3)
    (directory / "config.yaml").write_text("budget: {steps: null, prompts: null, completion_tokens: 12345678}")
    assert "0/12345678 completion_tokens" in shown(tmp_path / "g")


def test_the_command(tmp_path):
    make(tmp_path / "g", "a", steps=3)
    command = [sys.executable, "-m", "pspo.status"]
    done = subprocess.run([*command, str(tmp_path / "g"), "--json"], capture_output=True, text=True, check=True)
    (row,) = json.loads(done.stdout)
    assert (row["run"], row["state"], row["done"], row["budget"]) == ("a", "cut off", 3, 10)
    missing = subprocess.run([*command, str(tmp_path / "none")], capture_output=True, text=True, check=False)
    assert (missing.returncode, missing.stderr) == (2, f"pspo: {tmp_path}/none is no directory; give outputs/<group>\n")


def test_a_single_run_is_not_a_group(tmp_path):
    with pytest.raises(ConfigError, match="is a single run; give its group"):
        collect(make(tmp_path / "g", "a"))


def test_a_run_directory_of_the_version_before_rooms_is_read(tmp_path, no_slurm):
    """As of commit 5a55f11, which named the block ``evaluation`` and the directory by dotted keys."""
    group = tmp_path / "main"
    directory = group / "pspo_alpha=0.3_optimizer.lr=1e-05_seed1_d4d609e9"
    (directory / "evaluation").mkdir(parents=True)
    config = "group: main\nobjective: {name: pspo, alpha: 0.3}\nevaluation: {every: 2}\nbudget: {steps: 2}\n"
    result = {"accuracy": 0.75, "ci95_low": 0.4, "ci95_high": 0.9, "n": 8, "reward_mean": 0.8, "length_mean": 9.0}
    result |= {"truncated_rate": 0.0, "unparsed_rate": 0.1}
    row = {"step": 1, "reward/mean": 0.3, "budget/steps": 1, "policy/kl_old_new_k3": 0.01, "time/step_s": 0.2}
    summary = {
        "status": "done", "run": directory.name, "objective": {"name": "pspo", "alpha": 0.3}, "seed": 1, "steps": 2,
        "optimizer_steps": 8, "prompts": 8, "completion_tokens": 99, "selection": "last", "selected_step": 2,
        "notes": [], "evaluation": {"embedded": {"before": result, "after": result}}, "time/wall_s": 12.0,
    }  # fmt: skip
    files = {
        "config.yaml": config,
        "overrides.yaml": "- objective.alpha=0.3\n- optimizer.lr=1e-05\n- seed=1\n",
        "environment.json": json.dumps({"threads": 1, "packages": {}, "code": {"sha256": "0"}}),
        "metrics.jsonl": json.dumps(row) + "\n" + json.dumps(row | {"step": 2, "budget/steps": 2}) + "\n",
        "completions.jsonl": "",
        "diagnostics.jsonl": "",
        "summary.json": json.dumps(summary),
        "run.log": "",
        "DONE": "0\n",
        ".lock": "",
        ".owner": json.dumps(OWNER | {"job_id": None}),
    }
    for name, content in files.items():
        (directory / name).write_text(content)
    row = only_row(group)
    assert (row.state, row.done, row.budget, row.accuracy) == ("done", 2, 2, {"embedded": 0.75})
    assert f"\n{directory.name}\n    done  2/2 steps  reward 0.300  75.0 % embedded" in shown(group)
    report.write_curves(directory)
    report.write_report(directory)
    assert "75.0" in (directory / "report.html").read_text()
    with pytest.raises(
        ConfigError, match=r"config\.yaml was written by another version of pspo, with other keys: unknown key"
    ):
        config_of(directory / "config.yaml")
