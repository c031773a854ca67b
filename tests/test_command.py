import subprocess
import sys

import pytest
from forked import TINY, command, make, output_of

import pspo.compare.__main__
import pspo.doctor.__main__
import pspo.evaluate.__main__
import pspo.judge.__main__
import pspo.objective.__main__
import pspo.run.__main__
import pspo.status.__main__
from pspo import dashboard, prefetch, supervise, sweep, sync
from pspo.base.command import overview

MAINS = {
    "pspo.compare": (pspo.compare.__main__.main, (pspo.compare.__main__, "load")),
    "pspo.dashboard": (dashboard.main, (dashboard, "renew")),
    "pspo.doctor": (pspo.doctor.__main__.main, (pspo.doctor.__main__, "examine")),
    "pspo.evaluate": (pspo.evaluate.__main__.cli, (pspo.evaluate.__main__, "main")),
    "pspo.judge": (pspo.judge.__main__.main, (pspo.judge.__main__, "judge")),
    "pspo.objective": (pspo.objective.__main__.main, (pspo.objective.__main__, "draw_weights")),
    "pspo.prefetch": (prefetch.main, (prefetch, "prefetch")),
    "pspo.run": (pspo.run.__main__.cli, (pspo.run.__main__, "main")),
    "pspo.status": (pspo.status.__main__.main, (pspo.status.__main__, "collect")),
    "pspo.supervise": (supervise.cli, (supervise, "supervise")),
    "pspo.sweep": (sweep.cli, (pspo.run.__main__, "main")),
    "pspo.sync": (sync.main, (sync, "sync")),
}
"""Every command: its function, and one that it calls when it works."""


def python_m(*words):
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_python_m_pspo_lists_every_command_with_what_it_does():
    status, listed, _ = python_m("pspo")
    assert status == 0
    lines = listed.splitlines()
    assert [line.split()[2] for line in lines[:-1] if "pspo.lanes" not in line] == sorted(MAINS)
    assert all(len(line.split()) > 5 for line in lines[:-1])


@pytest.mark.parametrize(
    "words", ["pspo.loss", "pspo.rollout --help", "pspo.report", "pspo.nothing", "pspo.base.schema"]
)
def test_a_module_that_is_no_command_says_so_and_lists_the_commands(words):
    name = words.split()[0]
    told = f"pspo: {name} is no command; the commands, each of which has --help:\n{overview()}"
    assert python_m(*words.split()) == (2, "", told)


def test_modules_are_still_imported_by_other_commands():
    assert python_m("timeit", "-n", "1", "import pspo.base.schema")[0] == 0
    done = subprocess.run([sys.executable, "-um", "pspo"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count("python -m pspo.run ")) == (0, 1)


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("name", MAINS)
def test_every_command_has_help_and_writes_nothing(name, flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, flag])
    try:
        MAINS[name][0]()
    except SystemExit as left:  # argparse
        assert not left.code  # noqa: PT017
    assert f"python -m {name}" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", MAINS)
def test_ctrl_c_is_one_sentence_and_status_130(name, tmp_path, monkeypatch, capsys):
    def stopped(*given, **named):
        raise KeyboardInterrupt

    main, place = MAINS[name]
    monkeypatch.chdir(tmp_path)
    words = {"pspo.run": [], "pspo.supervise": [], "pspo.sweep": ["alpha"], "pspo.prefetch": ["model=tiny"]}
    words["pspo.judge"] = ["here", "--base-url", "http://localhost", "--model", "m"]
    monkeypatch.setattr(sys, "argv", [name, *words.get(name, ["here"])])
    monkeypatch.setattr(*place, stopped)
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 130
    assert capsys.readouterr().err.startswith("pspo: stopped")


REFUSED = {
    "objective.alpha=2": "pspo: objective.alpha must be in [0, 1), got 2.0: at 1",
    "dataset=jsonl dataset.path=nothing.jsonl": "nothing.jsonl",
    "output_dir=mine.py": "pspo: output_dir=mine.py: cannot write in ",
    "modle=tiny": "did you mean model?",
}


@pytest.mark.parametrize("words", REFUSED)
def test_cfg_job_prints_the_configuration_and_refuses_what_a_run_refuses(words, cache, tmp_path):
    assert make(tmp_path, cache, work=command("--cfg", "job", *TINY, *words.split())) == 2
    output = output_of(tmp_path)
    assert REFUSED[words] in output
    assert output.index("group_size: 4") < output.index("pspo: ")
    assert words.partition("=")[0].split(".")[-1] + ":" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.py", "output.txt"]


@pytest.mark.parametrize("flag", [["--cfg", "job"], ["--cfg=job"], ["-c", "job"], ["--cfg", "job", "--resolve"]])
def test_cfg_job_of_what_a_run_takes_ends_well(flag, cache, tmp_path):
    assert make(tmp_path, cache, work=command(*flag, *TINY)) == 0
    assert "pspo:" not in output_of(tmp_path)
    assert "alpha: 0.1" in output_of(tmp_path)


NOT_THERE = {
    "objective=PSPO": "unknown objective PSPO (did you mean pspo?); known: aspo",
    "model=Qwen/Qwen3-0.6B": "model=Qwen/Qwen3-0.6B is no option; write model=hf model.hub_id=Qwen/Qwen3-0.6B, or",
    "seed=0,1": "seed=0,1 gives one run several values; add -m to make a run with each, or quote a value",
    "seed=[0,1]": "it takes one value: -m seed=0,1 makes a run with each",
}


@pytest.mark.parametrize("words", NOT_THERE)
def test_near_misses_are_told_by_the_command(words, cache, tmp_path):
    assert make(tmp_path, cache, work=command(words)) == 2
    (line,) = output_of(tmp_path).splitlines()
    assert line.startswith("pspo: ")
    assert NOT_THERE[words] in line


OPTIONS_THAT_ARE_NO_NAME = {
    "objective=[pspo,noclip]": "pspo: objective takes one option; -m objective=pspo,noclip makes a run with each",
    "smoothing=0.1": "pspo: unknown smoothing 0.1; known: adaptive",
    "hydra/launcher=3": "pspo: unknown hydra/launcher 3; known: basic",
    "=3": "pspo: force-add of config groups is not supported",
    "clip": "pspo: clip is no key=value; python -m pspo.run --help lists the keys",
    "-m --cfg job seed=0,1": "pspo: --cfg and --info show one run; hydra.launcher.dry_run=true lists those of -m",
}


@pytest.mark.parametrize("words", OPTIONS_THAT_ARE_NO_NAME)
def test_what_is_no_option_is_told_in_one_sentence(words, cache, tmp_path):
    assert make(tmp_path, cache, work=command(*words.split())) == 2
    (line,) = output_of(tmp_path).splitlines()
    assert line.startswith(OPTIONS_THAT_ARE_NO_NAME[words])


def test_the_home_directory_may_be_written_short_behind_every_option(monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/nowhere/me")
    for name in ("pspo.status", "pspo.sync", "pspo.compare", "pspo.dashboard"):
        monkeypatch.setattr(sys, "argv", [name, "~/outputs"])
        with pytest.raises(SystemExit):
            MAINS[name][0]()
        assert "pspo: /nowhere/me/outputs is " in capsys.readouterr().err
