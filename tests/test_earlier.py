import json
import shutil
import signal

import pytest
from forked import REWARD, TINY, at, command, ends, fingerprint, log_of, make, only_run, output_of
from huggingface_hub import constants
from training import composed

from pspo import checkpoint
from pspo.base.files import write_json
from pspo.base.schema import ConfigError
from pspo.config import compose, identity, science
from pspo.run.earlier import INPUTS, History, inputs, look, run_directory, shorter
from pspo.tracker import Tracker


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    """A run of 3 steps: its last validation is one that a longer run does not make."""
    cwd = tmp_path_factory.mktemp("finished")
    assert make(cwd, cache, ["budget.steps=3"]) == 0
    return only_run(cwd)


@pytest.mark.process
def test_a_longer_budget_continues_a_finished_run_to_the_bit(finished, unbroken, cache, tmp_path):
    before = ends(finished)
    assert make(tmp_path, cache, [f"continue_from={finished}"]) == 0, output_of(tmp_path)
    assert only_run(tmp_path).name == unbroken.name
    assert ends(only_run(tmp_path)) == ends(unbroken)
    assert f"continuing {finished} from step 3" in log_of(tmp_path)
    assert ends(finished) == before
    shutil.rmtree(only_run(tmp_path) / "model")
    (only_run(tmp_path) / "DONE").unlink()
    assert make(tmp_path, cache, [f"continue_from={tmp_path / 'gone'}"]) == 0  # it has checkpoints of its own now
    assert ends(only_run(tmp_path)) == ends(unbroken)


@pytest.mark.process
def test_the_command_continues_a_finished_run_with_the_budget_alone(finished, unbroken, cache, tmp_path):
    """All of ``TINY`` comes from the run that is continued; its path is given relative to the working directory."""
    shutil.copytree(finished, tmp_path / "outputs" / "main" / finished.name)
    source = f"continue_from=outputs/main/{finished.name}"
    assert make(tmp_path, cache, work=command(source, "budget.steps=5")) == 0, output_of(tmp_path)
    (directory,) = (tmp_path / "outputs" / "main").glob("pspo_steps=5_seed0_*")
    assert directory.name[-8:] == unbroken.name[-8:]
    for name in ("metrics.jsonl", "completions.jsonl", "model/model.safetensors"):
        assert fingerprint(directory)[name] == fingerprint(unbroken)[name]
    assert json.loads((directory / "summary.json").read_text())["steps"] == 5


@pytest.mark.process
def test_a_longer_budget_keeps_the_best_weights_so_far(cache, tmp_path):
    best = ["selection=best"]
    assert make(tmp_path / "short", cache, [*best, "budget.steps=2"]) == 0
    assert make(tmp_path / "long", cache, [*best, "budget.steps=4"]) == 0
    source = only_run(tmp_path / "short")
    assert make(tmp_path / "continued", cache, [*best, "budget.steps=4", f"continue_from={source}"]) == 0
    assert ends(only_run(tmp_path / "continued")) == ends(only_run(tmp_path / "long"))


@pytest.mark.process
def test_all_settings_but_the_budget_come_from_the_run_that_is_continued(finished):
    source = f"continue_from={finished}"
    config = compose([source, "budget.steps=5"])
    assert science(config) == science(composed(*TINY))
    assert (config.tracker.name, config.threads, config.rerun) == ("jsonl", 1, "never")
    beside = ["group=longer", "tracker=wandb", "threads=2", "rollout.max_rows=4", "checkpoint.every=9", "rerun=resume"]
    other = compose([*beside, source, "++budget.steps=5"])
    assert science(other) == science(config)
    assert (other.group, other.tracker.name, other.threads, other.rollout.max_rows) == ("longer", "wandb", 2, 4)
    assert (other.checkpoint.every, other.rerun, other.continue_from) == (9, "resume", str(finished))


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["optimizer.lr=1e-6"], r"only the budget may differ, but optimizer\.lr is .* there and 1e-06 here"),
        (["objective.alpha=0.2"], r"only the budget may differ, but objective\.alpha is 0\.1 there and 0\.2 here"),
        (["objective=clip"], r"only the budget may differ, but objective\.alpha is 0\.1 there and None here"),
        (["experiment=dapo"], r"only the budget may differ, but dataset\.num_test is 8 there and"),
        (["seed=1"], r"but seed is 0 there and 1 here"),
        (["budget.steps=3", "seed=0"], r"has spent 3 steps already; set a longer budget\.steps"),
        (["budget.steps=null", "budget.prompts=12"], r"has spent 12 prompts already; set a longer budget\.prompts"),
    ],
)
def test_what_cannot_be_continued_is_one_sentence(finished, tmp_path, monkeypatch, overrides, reason):
    monkeypatch.chdir(finished.parents[2])  # where the reward's file lies
    config = compose([f"continue_from={finished}", *overrides])
    with pytest.raises(ConfigError, match=reason) as caught:
        look(config, tmp_path / "new")
    assert str(caught.value).startswith("continue_from=")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_a_schedule_that_follows_the_budget_is_not_continued(finished, tmp_path):
    linear = tmp_path / "linear"
    linear.mkdir()
    for name in ("DONE", "summary.json"):
        shutil.copyfile(finished / name, linear / name)
    text = (finished / "config.yaml").read_text()
    assert "decay: constant" in text
    (linear / "config.yaml").write_text(text.replace("decay: constant", "decay: linear"))
    with pytest.raises(ConfigError, match=r"optimizer\.decay=linear follows the budget"):
        look(compose([f"continue_from={linear}", "budget.steps=9"]), tmp_path / "new")


def test_a_run_that_is_not_finished_is_not_continued(finished, tmp_path):
    with pytest.raises(ConfigError, match="not the directory of a finished run"):
        look(compose([f"continue_from={finished.parent}"]), tmp_path / "new")


def test_a_run_that_was_made_from_other_data_is_not_continued(finished, tmp_path, monkeypatch):
    source = tmp_path / finished.name
    shutil.copytree(finished, source)
    monkeypatch.chdir(finished.parents[2])  # where the reward's file lies
    longer = [f"continue_from={source}", "budget.steps=9"]
    assert look(compose(longer), tmp_path / "new").state == "new"
    write_json(source / INPUTS, json.loads((source / INPUTS).read_text()) | {"mine.py": "beef"})
    with pytest.raises(ConfigError, match=r"since that run began, mine\.py changed; rerun=resume continues it"):
        look(compose(longer), tmp_path / "new")
    assert look(compose([*longer, "rerun=resume"]), tmp_path / "new").state == "new"


def test_a_longer_budget_that_starts_anew_names_the_run_that_it_could_continue(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(finished.parents[2])
    for overrides, expected in [
        (["budget.steps=9"], finished),
        (["budget.steps=2"], None),
        (["seed=1"], None),
        (["optimizer.decay=linear"], None),
    ]:
        config = composed(*TINY, *overrides)
        assert shorter(config, finished.parent / "new") == expected
        assert shorter(config, tmp_path / "main" / "new") is None


def test_a_run_whose_last_checkpoint_is_torn_is_not_continued(finished, cache, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(finished, source)
    (source / "checkpoints" / "step_000003" / "state.pt").write_bytes(b"torn")
    assert make(tmp_path, cache, [f"continue_from={source}"]) == 1
    assert "its last checkpoint, of step 3, is missing or torn" in output_of(tmp_path)
    assert json.loads((only_run(tmp_path) / "FAILED").read_text())["kind"] == "configuration"


@pytest.mark.process
def test_a_finished_run_is_made_again_on_request_and_the_earlier_one_kept(finished, cache, tmp_path):
    steps = ["budget.steps=3"]
    shutil.copytree(finished, tmp_path / "outputs" / "main" / finished.name)
    before = ends(finished)

    def rerun(how):
        assert make(tmp_path, cache, [*steps, f"rerun={how}"]) == 0
        replaced = tmp_path / "outputs" / "main" / ".replaced"
        return sorted(path.name for path in replaced.iterdir()) if replaced.exists() else []

    assert rerun("never") == rerun("changed") == []
    made_from = only_run(tmp_path) / INPUTS
    write_json(made_from, json.loads(made_from.read_text()) | {"code": "beef"})
    assert rerun("never") == rerun("resume") == []
    assert "since that run began, code changed; rerun=changed makes it again" in output_of(tmp_path)
    assert rerun("changed") == [f"{finished.name}.1"]
    assert rerun("changed") == [f"{finished.name}.1"]
    assert rerun("all") == [f"{finished.name}.1", f"{finished.name}.2"]
    assert ends(only_run(tmp_path)) == before
    assert ends(tmp_path / "outputs" / "main" / ".replaced" / f"{finished.name}.2") == before


@pytest.mark.process
def test_an_unfinished_run_notices_an_edited_reward(unbroken, cache, tmp_path):
    """A reward whose place alone has changed is another file, and so is the same place with another content."""
    killed = at(Tracker, "log", 4, signal.SIGKILL)
    own = ["reward.function=own.py:reward"]
    tmp_path.joinpath("own.py").write_text(REWARD)
    assert make(tmp_path, cache, own, hook=killed) == -signal.SIGKILL
    directory = only_run(tmp_path)
    saved = checkpoint.names(directory / "checkpoints")
    tmp_path.joinpath("own.py").write_text(REWARD.replace("% 7", "% 5"))

    assert make(tmp_path, cache, work=command(*TINY, *own)) == 2
    told = output_of(tmp_path).splitlines()[-1]
    assert told.startswith(f"pspo: rerun='never': {directory.relative_to(tmp_path)} is unfinished, and since it began ")
    assert told.endswith("own.py changed; rerun=changed begins it anew, and rerun=resume resumes it nevertheless")
    assert checkpoint.names(directory / "checkpoints") == saved

    assert make(tmp_path, cache, [*own, "rerun=resume"]) == 0
    note = "resumed although own.py changed since this run began"
    assert note in json.loads((directory / "summary.json").read_text())["notes"]
    assert make(tmp_path, cache, own) == 0
    assert "since that run began, own.py changed; rerun=changed makes it again" in output_of(tmp_path)

    (directory / "DONE").unlink()
    assert make(tmp_path, cache, [*own, "rerun=changed"]) == 0
    assert note not in json.loads((directory / "summary.json").read_text())["notes"]
    assert (directory.parent / ".replaced" / f"{directory.name}.1" / "checkpoints").is_dir()


@pytest.mark.process
def test_a_run_that_has_saved_nothing_begins_with_the_edited_reward(cache, tmp_path):
    """So a user mends the reward whose error ended the run, and gives the same command again."""
    own, file = ["reward.function=own.py:reward", "budget.steps=1"], tmp_path / "own.py"
    file.write_text(REWARD)
    killed = at(Tracker, "log", 1, signal.SIGKILL)
    assert make(tmp_path, cache, own, hook=killed) == -signal.SIGKILL
    assert list(only_run(tmp_path).glob("evaluation/*"))
    file.write_text(REWARD.replace("% 7", "% 5"))
    assert make(tmp_path, cache, own) == 0
    once = ends(only_run(tmp_path))
    shutil.rmtree(only_run(tmp_path))
    assert make(tmp_path, cache, own) == 0
    assert ends(only_run(tmp_path)) == once


def write_model(folder):
    folder.mkdir()
    for name in ("config.json", "a.safetensors", "b.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"):
        (folder / name).write_text('{"model_type": "qwen2"}' if name == "config.json" else "{}")


@pytest.mark.parametrize("name", ["data/train.jsonl", "data/test.jsonl", "model/b.safetensors", "own.py"])
@pytest.mark.parametrize("how", ["edited", "removed"])
def test_a_run_knows_the_files_that_it_is_made_from(tmp_path, monkeypatch, name, how):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(REWARD)
    (tmp_path / "data").mkdir()
    for split in ("train", "validation", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    write_model(tmp_path / "model")
    own = ["model=hf", "model.path=model", "dataset=jsonl", "dataset.path=data", "reward=custom"]
    own.append("reward.function=own.py:reward")
    config, directory = compose([*own, "dataset.num_validation=1"]), tmp_path / "run"
    directory.mkdir()
    (directory / "config.yaml").touch()
    checkpoint.save(directory / "checkpoints", "step_000001", {}, {"identity": identity(config)})
    assert look(config, directory) == History("resume", [])  # a run of the first version recorded nothing
    write_json(directory / INPUTS, inputs(config))
    (tmp_path / "model" / "README.md").write_text("no part of the model")
    assert look(config, directory) == History("resume", [])
    path = tmp_path / name
    if how == "edited":
        content, about = path.read_bytes(), path.stat()
        path.write_bytes(content[:-1] + b" ")  # of the same length
        assert path.stat().st_size == about.st_size
    else:
        path.unlink()
    with pytest.raises(ConfigError, match=rf"is unfinished, and since it began {name} changed; rerun=changed begins"):
        look(config, directory)
    assert look(compose([*own, "dataset.num_validation=1", "rerun=changed"]), directory) == History("again", [name])
    assert look(compose([*own, "dataset.num_validation=1", "rerun=resume"]), directory) == History("resume", [name])
    (directory / "DONE").touch()
    assert look(config, directory) == History("changed", [name])
    assert look(compose([*own, "dataset.num_validation=1", "rerun=changed"]), directory) == History("again", [name])
    path.unlink(missing_ok=True)
    shutil.rmtree(tmp_path / "data")
    assert look(config, directory).state in ("done", "changed")  # a finished run stays where its data has gone


def test_a_run_knows_the_commits_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def publish(commit):
        for repo, file in (("models--Qwen--Qwen2.5-0.5B", "config.json"), ("datasets--openai--gsm8k", "train.jsonl")):
            snapshot = tmp_path / repo / "snapshots" / commit
            snapshot.mkdir(parents=True)
            (snapshot / file).write_text("{}")
            (tmp_path / repo / "refs").mkdir(exist_ok=True)
            (tmp_path / repo / "refs" / "main").write_text(commit)

    config, directory = compose(["model=qwen0_5b", "dataset=gsm8k"]), tmp_path / "run"
    directory.mkdir()
    write_json(directory / INPUTS, {"code": "another"})
    (directory / "DONE").touch()
    assert look(config, directory) == History("done", [])  # a node without the cache compares nothing
    publish("a" * 40)
    first = inputs(config)
    assert first["Qwen/Qwen2.5-0.5B"] == first["openai/gsm8k"] == "a" * 40
    write_json(directory / INPUTS, first)
    assert look(config, directory) == History("done", [])
    publish("b" * 40)
    assert look(config, directory) == History("changed", ["Qwen/Qwen2.5-0.5B", "openai/gsm8k"])


def test_a_checkpoint_of_another_configuration_is_refused_before_anything_is_written(finished, cache, tmp_path):
    config = composed(*TINY, "seed=5")
    directory = tmp_path / run_directory(config, ["seed=5"])
    shutil.copytree(finished / "checkpoints", directory / "checkpoints")
    assert make(tmp_path, cache, ["seed=5"]) == 1
    assert f"is a checkpoint of another configuration ({finished.name[-8:]})" in output_of(tmp_path)
    assert [path.name for path in directory.iterdir()] == ["checkpoints"]


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    config = composed(*TINY)
    checkpoint.save(tmp_path / "checkpoints", "step_000001", {}, {"identity": identity(config)})
    look(config, tmp_path)
    path = tmp_path / "checkpoints" / "step_000001" / "meta.json"
    for change in ({"format": 99}, {"format": None}):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ConfigError, match=r"was saved by pspo .* reads format"):
            look(config, tmp_path)
    path.write_text("torn")
    look(config, tmp_path)
