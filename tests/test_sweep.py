import json
import multiprocessing
import os
import re
import sys
import time
from pathlib import Path

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from pspo import sweep
from pspo.base.files import CONF
from pspo.base.schema import ConfigError
from pspo.config import compose, groups
from pspo.launcher import Planned, make_plan
from pspo.run.earlier import run_directory

TWO_FACTORS = """
common: [optimizer.lr=1e-5, rollout.prompts=8]
arms:
  objective:
    noclip: [objective=noclip]
    clip: [objective=clip, objective.eps_low=0.1]
  updates:
    "1": [update.num_epochs=1, update.num_minibatches=1]
    "16": [update.num_epochs=4, update.num_minibatches=4]
lists:
  seed: range(0,3)
  rollout.temperature: [0.8, 1]
"""


@pytest.fixture
def loader():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def command(monkeypatch, capfd, tmp_path):
    """Run a command of the package in this process: exit status, output, errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    def command(cli, *arguments):
        monkeypatch.setattr(sys, "argv", [cli.__module__, *arguments])
        try:
            cli()
        except SystemExit as left:
            return left.code or 0, *capfd.readouterr()
        return 0, *capfd.readouterr()

    return command


def test_arms_times_lists_with_the_arms_named(write):
    jobs = sweep.expand(write(TWO_FACTORS), [])
    assert len(jobs) == 2 * 2 * 3 * 2
    assert len({tuple(job.overrides) for job in jobs}) == len(jobs)
    first, last = jobs[0], jobs[-1]
    assert first.arm == {"objective": "noclip", "updates": "1"}
    assert first.overrides == [
        "group=mine", "optimizer.lr=1e-5", "rollout.prompts=8", "objective=noclip", "update.num_epochs=1",
        "update.num_minibatches=1", "seed=0", "rollout.temperature=0.8",
    ]  # fmt: skip
    assert last.arm == {"objective": "clip", "updates": "16"}
    assert {"objective.eps_low=0.1", "update.num_epochs=4", "seed=2", "rollout.temperature=1"} <= set(last.overrides)


def test_the_command_line_takes_the_place_of_common_overrides_and_lists(write):
    jobs = sweep.expand(write(TWO_FACTORS), ["++seed=7", "rollout.temperature=1", "optimizer.lr=1,2", "group=other"])
    assert len(jobs) == 2 * 2 * 2
    for job in jobs:
        assert {"seed=7", "rollout.temperature=1", "group=other", "rollout.prompts=8"} <= set(job.overrides)
        assert "optimizer.lr=1e-5" not in job.overrides


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ("range(0,3)", ["seed=0", "seed=1", "seed=2"]),
        ("choice(4,5)", ["seed=4", "seed=5"]),
        ("4,5", ["seed=4", "seed=5"]),
        ("[4, 'range(6,8)']", ["seed=4", "seed=6", "seed=7"]),
        ("[[1, 2], [3, 4]]", ["seed=[1,2]", "seed=[3,4]"]),
        ("7", ["seed=7"]),
    ],
)
def test_lists_in_hydras_grammar_and_in_yamls(write, values, expected):
    jobs = sweep.expand(write(f"lists: {{seed: {values if values[0] == '[' else repr(values)}}}"), [])
    assert [job.overrides[1] for job in jobs] == expected


def test_without_a_file_the_command_line_is_the_sweep():
    jobs = sweep.expand(None, ["objective=noclip,clip", "++seed=range(0,2)", "tracker=jsonl", "~experiment"])
    assert [job.overrides[:2] for job in jobs] == [
        ["objective=noclip", "seed=0"], ["objective=noclip", "seed=1"], ["objective=clip", "seed=0"],
        ["objective=clip", "seed=1"],
    ]  # fmt: skip
    assert all(job.overrides[2:] == ["tracker=jsonl", "~experiment"] and job.arm == {} for job in jobs)


BAD = {
    "arms: {a: {x: [seed=1], x: [seed=2]}}": "two arms or keys have the name x",
    "arms: {a: {1: [seed=1], '1': [seed=2]}}": "two arms or keys have the name 1",
    "arm: {a: {x: [seed=1]}}": "unknown key arm.a (did you mean arms?); known: group, common, arms, lists",
    "arms: {a: {x: seed=1}}": "arms must be a table, each item a table, each item a list, each item text",
    "arms: {a: {x: [seed]}}": "a.x: 'seed' is no override; write key=value",
    "arms: {a: {x: [seed=1, seed=2]}}": "a.x: seed is given twice",
    "arms: {a: {x: ['seed=1,2']}}": "a.x: seed=1,2 has 2 values; they belong into lists",
    "arms: {a: {x: [seed=1]}, b: {y: [seed=2]}}": "the arms of b set seed, and so does arms.a",
    "{arms: {a: {x: [seed=1]}}, lists: {seed: '1,2'}}": "the arms of a set seed, and so does lists",
    "lists: {seed: 'interval(0,1)'}": "has no end of values",
    "common: [seed=1]": "no arms and no lists",
    "[a]": "must hold keys",
    "a: [": "is no YAML",
    "lists: {sede: 1}": "unknown key sede (did you mean seed?)",
    "arms: {a: {x: [optimizer.lr=1e-5], y: [optimizer.lr=0.00001]}}": "two arms are one and the same run",
    "{common: [seed=1], arms: {a: {x: [], y: [objective=pspo]}}}": "two arms are one and the same run",
    "arms: {a: {x: [objective=clip], y: [objective=clip, objective.alpha=0.1]}}": "unknown key objective.alpha",
}


@pytest.mark.parametrize("text", BAD)
def test_a_mistake_in_a_file_is_told_in_one_sentence(write, text):
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        sweep.plan(path, sweep.expand(path, []))
    assert BAD[text] in str(caught.value)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_arms_differ_in_is_not_the_command_lines(write):
    with pytest.raises(ConfigError, match=r"the arms of updates set update\.num_epochs, and so does the command line"):
        sweep.expand(write(TWO_FACTORS), ["update.num_epochs=2"])


@pytest.mark.parametrize("name", sweep.names())
def test_every_sweep_that_comes_with_pspo_composes(name, loader, tmp_path):
    path = sweep.find(name)
    assert path.read_text().startswith("# ")
    jobs = sweep.expand(str(path), [f"output_dir={tmp_path}", *([] if name == "smoke" else ["seed=0"])], loader)
    step = 1 if name == "smoke" else 1 + len(jobs) // 8  # of a large one, a sample
    planned = sweep.plan(str(path), jobs[::step])
    assert {run.directory.parent for run in planned} == {tmp_path / name}
    if name == "smoke":
        names = [re.search("objective=(\\w+)", " ".join(run.overrides))[1] for run in planned]
        assert names == [name for name in groups()["objective"] if name != "custom"]
    if name == "paper":
        for run in planned:
            assert compose(run.overrides).model.name == re.match(r"qwen\d_5b", run.arm["arm"])[0]


def test_arms_of_the_shipped_comparisons_differ_in_nothing_else(loader):
    for name, same in {"alpha": {"objective"}, "matched": {"objective", "update"}}.items():
        jobs = sweep.expand(str(sweep.find(name)), ["seed=0"], loader)
        configs = [compose(job.overrides) for job in jobs]
        differ = {key for key in vars(configs[0]) if any(getattr(c, key) != getattr(configs[0], key) for c in configs)}
        assert differ == same


def test_a_sweep_that_does_not_exist_lists_those_there_are(command):
    status, _, errors = command(sweep.cli, "alpah")
    assert status == 2
    assert errors == f"pspo: unknown sweep alpah (did you mean alpha?); known: {', '.join(sweep.names())}\n"
    assert command(sweep.cli, "mine.yaml")[0] == 2


def test_help_lists_the_sweeps(command):
    status, output, _ = command(sweep.cli)
    assert status == 0
    for name in sweep.names():
        assert name in output


@pytest.mark.parametrize("launcher", ["basic", "local", "slurm"])
def test_a_dry_run_prints_the_runs_and_writes_nothing(command, tmp_path, launcher):
    status, output, errors = command(
        sweep.cli, "alpha", "seed=0", f"hydra/launcher={launcher}", "hydra.launcher.dry_run=true"
    )
    assert status == 0, errors
    assert re.search(r"^new +objective=0\.05 +outputs/alpha/pspo_alpha=0\.05_seed0_\w{8}$", output, re.MULTILINE)
    assert "5 runs: 5 new" in output
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_output_directory_is_told(command, tmp_path):
    (tmp_path / "file").touch()
    status, _, errors = command(sweep.cli, "alpha", "seed=0", "output_dir=file", "hydra/launcher=local")
    assert status == 2
    assert re.fullmatch(r"pspo: .*output_dir=file: cannot write in \S+; set output_dir=<directory>\n", errors)


@pytest.mark.parametrize("refused", ["hydra/launcher=slurm", "hydra/launcher=local hydra.launcher.slots=1000000"])
def test_what_cannot_be_launched_here_is_told_and_nothing_is_written(command, tmp_path, monkeypatch, refused):
    monkeypatch.setenv("PATH", str(tmp_path / "no_sbatch"))
    status, _, errors = command(sweep.cli, "alpha", "seed=0", *refused.split())
    assert status == 2
    assert re.fullmatch(r"pspo: hydra.launcher.*\n", errors)
    assert list(tmp_path.iterdir()) == []


def test_the_arm_of_every_run_is_kept_for_reports(command, tmp_path, write):
    path = write(
        "arms: {objective: {a: [objective=noclip, budget.steps=0], b: [objective=clip]}}\nlists: {seed: '0,1'}"
    )
    jobs = sweep.expand(path, [f"output_dir={tmp_path}"])
    planned = sweep.plan(path, jobs)
    for part in (planned[:3], planned[1:]):  # the second submission knows other runs than the first
        sweep.record(path, part)
    rows = json.loads((tmp_path / "mine" / "sweep.json").read_text())
    assert [(row["sweep"], row["arm"]) for row in rows] == [("mine", {"objective": name}) for name in "aabb"]
    for row, run in zip(rows, planned, strict=True):
        assert row["overrides"] == run.overrides
        assert run_directory(compose(run.overrides), run.overrides).name == row["directory"]


def test_submissions_at_the_same_time_lose_no_run(tmp_path):
    context, names = multiprocessing.get_context("fork"), [f"{i}_{j}" for i in range(6) for j in range(15)]

    def submit(i):
        for name in names:
            if name.startswith(f"{i}_"):
                sweep.record("mine.yaml", [Planned(overrides=[], directory=tmp_path / "mine" / name, state="new")])

    processes = [context.Process(target=submit, args=(i,)) for i in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(row["directory"] for row in json.loads((tmp_path / "mine" / "sweep.json").read_text())) == sorted(
        names
    )


@pytest.mark.slow
def test_a_dry_run_of_1000_costs_little_more_than_hydras_own_compose_and_grows_linearly(tmp_path):
    def measure(seeds):
        arguments = [f"output_dir={tmp_path}", "objective.alpha=range(0.1,0.9,step=0.2)", f"seed=range(0,{seeds})"]
        began = time.process_time()
        planned = make_plan([job.overrides for job in sweep.expand(None, arguments)])
        ours = time.process_time() - began
        with initialize_config_dir(str(CONF), version_base="1.3"):
            began = time.process_time()
            for run in planned:
                hydra_compose("config", overrides=run.overrides)
            return len(planned), ours, time.process_time() - began

    few, few_s, _ = measure(25)
    many, many_s, hydra_s = measure(250)
    assert (few, many) == (100, 1000)
    print(f"1000 configs: {many_s:.1f} s, Hydra's compose {hydra_s:.1f} s; 100 configs: {few_s:.1f} s")
    assert many_s <= 1.3 * hydra_s
    assert many_s / many <= 1.3 * few_s / few


def test_a_wheel_carries_sweeps_beside_conf():
    assert sweep.SWEEPS.is_dir()
    assert Path(os.path.commonpath([sweep.SWEEPS, CONF])) == CONF.parent
