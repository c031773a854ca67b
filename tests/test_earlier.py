import json
import shutil

import pytest
from forked import TINY, ends, log_of, make, only_run, output_of
from training import composed

from pspo import checkpoint
from pspo.base.schema import ConfigError
from pspo.config import identity, run_directory
from pspo.run.earlier import check


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    """A run of 3 steps: its last validation is one that a longer run does not make."""
    cwd = tmp_path_factory.mktemp("finished")
    assert make(cwd, cache, ["budget.steps=3"]) == 0
    return only_run(cwd)


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


def test_a_longer_budget_keeps_the_best_weights_so_far(cache, tmp_path):
    best = ["selection=best"]
    assert make(tmp_path / "short", cache, [*best, "budget.steps=2"]) == 0
    assert make(tmp_path / "long", cache, [*best, "budget.steps=4"]) == 0
    source = only_run(tmp_path / "short")
    assert make(tmp_path / "continued", cache, [*best, "budget.steps=4", f"continue_from={source}"]) == 0
    assert ends(only_run(tmp_path / "continued")) == ends(only_run(tmp_path / "long"))


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["optimizer.lr=1e-6"], r"only the budget may differ, but optimizer\.lr is .* there and 1e-06 here"),
        (["objective.alpha=0.2"], r"only the budget may differ, but objective\.alpha is 0\.1 there and 0\.2 here"),
        (["seed=1"], r"but seed is 0 there and 1 here"),
        (["budget.steps=3", "seed=0"], r"has spent 3 steps already; set a longer budget\.steps"),
        (["budget.steps=null", "budget.prompts=12"], r"has spent 12 prompts already; set a longer budget\.prompts"),
    ],
)
def test_what_cannot_be_continued_is_one_sentence(finished, tmp_path, overrides, reason):
    config = composed(*TINY, *overrides, f"continue_from={finished}")
    with pytest.raises(ConfigError, match=reason) as caught:
        check(config, tmp_path / "new")
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
        check(composed(*TINY, "optimizer.decay=linear", f"continue_from={linear}"), tmp_path / "new")


def test_a_run_that_is_not_finished_is_not_continued(finished, tmp_path):
    with pytest.raises(ConfigError, match="not the directory of a finished run"):
        check(composed(*TINY, f"continue_from={finished.parent}"), tmp_path / "new")


def test_a_run_whose_last_checkpoint_is_torn_is_not_continued(finished, cache, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(finished, source)
    (source / "checkpoints" / "step_000003" / "state.pt").write_bytes(b"torn")
    assert make(tmp_path, cache, [f"continue_from={source}"]) == 1
    assert "its last checkpoint, of step 3, is missing or torn" in output_of(tmp_path)
    assert json.loads((only_run(tmp_path) / "FAILED").read_text())["kind"] == "configuration"


def test_a_finished_run_is_made_again_on_request_and_the_earlier_one_kept(finished, cache, tmp_path):
    steps = ["budget.steps=3"]
    shutil.copytree(finished, tmp_path / "outputs" / "main" / finished.name)
    before = ends(finished)

    def rerun(how):
        assert make(tmp_path, cache, [*steps, f"rerun={how}"]) == 0
        replaced = tmp_path / "outputs" / "main" / ".replaced"
        return sorted(path.name for path in replaced.iterdir()) if replaced.exists() else []

    assert rerun("never") == rerun("changed") == []
    (only_run(tmp_path) / "DONE").write_text("another version\n")
    assert rerun("never") == []
    assert "the code has changed since that run was made; rerun=changed makes it again" in output_of(tmp_path)
    assert rerun("changed") == [f"{finished.name}.1"]
    assert rerun("changed") == [f"{finished.name}.1"]
    assert rerun("all") == [f"{finished.name}.1", f"{finished.name}.2"]
    assert ends(only_run(tmp_path)) == before
    assert ends(tmp_path / "outputs" / "main" / ".replaced" / f"{finished.name}.2") == before


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
    check(config, tmp_path)
    path = tmp_path / "checkpoints" / "step_000001" / "meta.json"
    for change in ({"format": 99}, {"format": None}):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ConfigError, match=r"was saved by pspo .* reads format"):
            check(config, tmp_path)
    path.write_text("torn")
    check(config, tmp_path)
