"""``python -m pspo.evaluate``: answers of a run's weights, of a checkpoint, of a model that no run has trained."""

import json
import shutil

import pytest
from forked import fingerprint, make, only_run, output_of

from pspo.base.files import read_lines
from pspo.base.schema import ConfigError
from pspo.evaluate.__main__ import main
from pspo.results import load

FURTHER = ["evaluate.name=further", "evaluate.sets=[embedded,validation]", "evaluate.temperatures=[0,1]"]


@pytest.fixture(scope="module")
def made(tmp_path_factory, cache):
    """A directory in which a run has been made."""
    cwd = tmp_path_factory.mktemp("evaluated")
    assert make(cwd, cache, ["budget.steps=2", "checkpoint.keep=2"]) == 0, output_of(cwd)
    return cwd


@pytest.fixture
def run(made, cache, monkeypatch):
    monkeypatch.chdir(made)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return only_run(made)


def answers(run, when, name, file):
    return read_lines(run / "evaluation" / when / name / file)


def test_a_runs_last_weights_answer_further_sets_and_nothing_else_changes(run, capsys):
    before = fingerprint(run)
    main([f"run={run.parent}", *FURTHER, "evaluate.samples=2"])
    assert "1x2" not in capsys.readouterr().out
    assert len(answers(run, "after", "further", "embedded_t0.jsonl")) == 8
    assert len(answers(run, "after", "further", "embedded_t1.jsonl")) == 16
    assert len(answers(run, "after", "further", "validation_t1.jsonl")) == 8
    greedy = [row["completion"] for row in answers(run, "after", "greedy", "embedded_t0.jsonl")]
    assert [row["completion"] for row in answers(run, "after", "further", "embedded_t0.jsonl")] == greedy
    assert {name: x for name, x in fingerprint(run).items() if "further" not in name} == before
    file = run / "evaluation" / "after" / "further" / "embedded_t1.jsonl"
    whole, modified = file.read_bytes(), file.stat().st_mtime_ns
    main([f"run={run.parent}/*", *FURTHER, "evaluate.samples=2"])
    assert file.stat().st_mtime_ns == modified
    main([f"run={run}", *FURTHER, "evaluate.samples=3"])
    assert [row for row in read_lines(file) if row["sample"] < 2] == [json.loads(line) for line in whole.splitlines()]
    assert len(read_lines(file)) == 24
    assert set(load(run).answers["evaluation"]) == {"greedy", "further"}


def test_a_checkpoint_answers_under_its_own_name(run):
    main([f"run={run}", "checkpoint=step_000001", *FURTHER])
    assert len(answers(run, "step_000001", "further", "embedded_t0.jsonl")) == 8
    with pytest.raises(ConfigError, match=r"checkpoint=step_000009: .* has step_000001, step_000002"):
        main([f"run={run}", "checkpoint=step_000009"])


def test_a_model_that_no_run_has_trained_answers_as_an_arm_of_its_own(run):
    own = ["dataset=embedded", "dataset.num_test=8", "rollout.max_new_tokens=8", "threads=1"]
    main(["model=hf", f"model.path={run / 'model'}", "model.autocast=false", *own])
    (bare,) = (run.parents[1] / "evaluate").iterdir()
    assert bare.name.startswith("model_")
    trained = [row["completion"] for row in answers(run, "after", "greedy", "embedded_t0.jsonl")]
    assert [row["completion"] for row in answers(bare, "after", "greedy", "embedded_t0.jsonl")] == trained
    assert load(bare).runs[["state", "budget.steps"]].to_numpy().tolist() == [["done", 0]]
    main([f"run={bare}", "evaluate.name=more", "evaluate.temperatures=[0.5]"])
    assert len(answers(bare, "after", "more", "embedded_t0.5.jsonl")) == 8


def test_what_the_model_sees_is_shown_with_its_tokens(run, capsys):
    main([f"run={run}", "--show-prompt", "dataset.shots=1", "dataset.max_prompt_tokens=500", "evaluate.name=shown"])
    shown = capsys.readouterr().out
    assert shown.startswith("--- embedded, embedded/")
    assert "#### " in shown
    assert not (run / "evaluation" / "after" / "shown").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["run=nowhere"], "run=nowhere names no directory"),
        (["checkpoint=step_000001"], "needs run="),
        (["quick"], "quick is no key=value"),
        (["run={run}", "objective=clip"], "objective is a setting of the run .* what may differ: evaluate"),
        (["run={run}", "evaluate.sets=[gsm80k]"], r"evaluate.sets gsm80k \(did you mean gsm8k\?\); known: gsm8k"),
        (["run={run}", "evaluate.temperatures=[]"], "evaluate.temperatures=.*: give one number or more"),
        (["run={run}", "hydra/launcher=basic"], "makes no jobs"),
        (["run={run}", "evaluate.top_p=0.5"], "holds answers with another top_p; give evaluate.name="),
    ],
)
def test_a_mistake_is_one_sentence(run, words, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        main([word.format(run=run) for word in words])
    assert "\n" not in str(caught.value)


def test_an_unfinished_run_is_named_and_left_out(run, capsys):
    other = run.parent / "unfinished"
    other.mkdir()
    (other / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    with pytest.raises(ConfigError, match=r"unfinished is not done; wait for its end, or give checkpoint="):
        main([f"run={other}"])
    main([f"run={run},{other}", "evaluate.name=left"])
    assert "left out: run=" in capsys.readouterr().err
    assert (run / "evaluation" / "after" / "left" / "DONE").is_file()
    shutil.rmtree(other)


@pytest.mark.process
def test_slots_of_this_machine_evaluate_runs(run, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(__file__).rpartition("/tests/")[0])
    main([f"run={run}", "evaluate.name=slots", "hydra/launcher=local", "hydra.launcher.slots=1"])
    assert (run / "evaluation" / "after" / "slots" / "DONE").is_file()


def test_edited_data_rewards_and_models_are_noticed(run, tmp_path):
    file, reward, folder = tmp_path / "mine.jsonl", tmp_path / "own.py", tmp_path / "base"
    file.write_text('{"question": "1+1?", "answer": 2}\n{"question": "2+2?", "answer": 4}\n')
    reward.write_text("def reward(text, problem): return 0")
    shutil.copytree(run / "model", folder)

    def answered(*words):
        main([*words, f"evaluate.sets=[{file}]", "reward=custom", f"reward.function={reward}:reward"])

    bare = ["model=hf", f"model.path={folder}", "model.autocast=false", "rollout.max_new_tokens=8", "threads=1"]
    bare += [f"output_dir={tmp_path / 'outputs'}"]
    trained = [f"run={run}", "evaluate.name=noticed"]
    for words in (trained, bare):
        answered(*words)
        answered(*words)  # already answered
    reward.write_text("def reward(text, problem): return 1")
    for words in (trained, bare):
        with pytest.raises(ConfigError, match=r"holds answers with another reward; give evaluate.name="):
            answered(*words)
    reward.write_text("def reward(text, problem): return 0")
    file.write_text(file.read_text().replace("2+2?", "3+1?"))
    with pytest.raises(ConfigError, match=r"holds answers with another data; give evaluate.name="):
        answered(*trained)
    file.write_text(file.read_text().replace("3+1?", "2+2?"))
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    with pytest.raises(ConfigError, match=r"config.json changed since .* began, whose answers are the earlier model's"):
        answered(*bare)
    answered(*trained)


def test_edited_problems_of_the_data_set_are_answered_again(run, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"question": "1+1?", "answer": 2}\n{"question": "2+2?", "answer": 4}\n')
    test = tmp_path / "test.jsonl"
    test.write_text('{"question": "5+1?", "answer": 6}\n{"question": "5+2?", "answer": 7}\n')
    words = [f"run={run}", "evaluate.name=own", "dataset=jsonl", f"dataset.path={tmp_path}", "dataset.num_validation=1"]
    main(words)
    file = run / "evaluation" / "after" / "own" / "jsonl_t0.jsonl"
    before = read_lines(file)
    test.write_text(test.read_text().replace("5+2?", "6+1?"))
    main(words)
    assert [row["question"] for row in read_lines(file)] == ["5+1?", "6+1?"]
    assert read_lines(file)[0] == before[0]
