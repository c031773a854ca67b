"""Arms, caveats, verdicts and the command, on run directories that a test has written."""

import sys

import numpy as np
import pytest
from comparison import write_run

from pspo.base.schema import ConfigError
from pspo.compare import __main__ as command
from pspo.compare.arms import Selection, group, samples
from pspo.compare.comparison import choose, compare, tables
from pspo.compare.published import PUBLISHED, beside, cost
from pspo.results import load

GREEDY = Selection("gsm8k")
NOCLIP, CLIP = ["objective=noclip"], ["objective=clip"]
ALPHAS = [["objective=pspo_geometric", f"objective.alpha={alpha}"] for alpha in (0.5, 0.1)]


def answers(seed, share=0.5, num_problems=40):
    """The first problems are the easiest of every seed."""
    generator = np.random.default_rng(seed)
    return generator.random(num_problems) < np.clip(share + np.linspace(0.3, -0.3, num_problems), 0, 1)


@pytest.fixture
def outputs(tmp_path):
    """Three seeds of noclip and of two settings of pspo_geometric, under matched conditions."""
    for seed in (2, 0, 1):
        write_run(tmp_path / "demo", NOCLIP, seed, answers(seed))
        for arm, (overrides, gain) in enumerate(zip(ALPHAS, (0.0, 0.3), strict=True)):
            write_run(tmp_path / "demo", overrides, seed, answers(10 + 10 * arm + seed, 0.5 + gain))
    return tmp_path / "demo"


def scores(group, selection):
    """Each arm's mean score over samples, seeds × problems."""
    return {label: totals / counts for label, (totals, counts) in samples(group, selection).items()}


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["pspo.compare", *map(str, arguments)])
    command.main()


def test_arms_are_what_differs_between_runs(outputs):
    found = group(load(outputs))
    assert list(found.arms) == ["noclip", "pspo_geometric alpha=0.1", "pspo_geometric alpha=0.5"]
    assert found.by == ["objective.name", "objective.alpha"]
    assert [path[-1] for path in found.arms["noclip"]] == ["0", "1", "2"]
    assert (found.warnings, found.left_out) == ([], [])
    assert group(load(outputs), ["objective.alpha"]).arms == found.arms  # an alpha is of its objective
    assert list(group(load(outputs), ["objective.name"]).arms) == ["noclip", "pspo_geometric"]


def test_names_of_arms_and_keys_are_checked(outputs):
    found = group(load(outputs))
    assert found.arm("noclip") == "noclip"
    assert found.arm("pspo_geometric alpha=0.1") == "pspo_geometric alpha=0.1"
    for name in ("pspo_geometric", "clip"):  # two arms, and none
        with pytest.raises(ConfigError, match=r"noclip, pspo_geometric alpha=0\.1"):
            found.arm(name)
    for name in ("optimizer.lr", "objective.alhpa"):
        with pytest.raises(ConfigError, match=rf"{name}.* known: objective.name, objective.alpha"):
            group(load(outputs), [name])


def test_scores_are_seeds_by_problems(outputs):
    table = scores(group(load(outputs)), GREEDY)["noclip"]
    assert table.index.tolist() == [0, 1, 2]
    for seed in (0, 1, 2):
        assert table.loc[seed, [str(n) for n in range(40)]].tolist() == answers(seed).tolist()
    assert scores(group(load(outputs)), Selection("gsm8k", score="strict"))["noclip"].to_numpy().max() == 0
    assert scores(group(load(outputs)), Selection("svamp")) == {}


def test_samples_are_averaged_and_seeds_count_once(tmp_path):
    write_run(tmp_path / "a", NOCLIP, 0, [[1, 0], [1, 1], [0, 0]])
    write_run(tmp_path / "b", NOCLIP, 0, [[1, 1], [1, 1]])
    found = group(load([tmp_path / "a", tmp_path / "b"]))
    assert scores(found, GREEDY)["noclip"].to_numpy().tolist() == [[0.75, 1, 0]]
    assert any("several runs of seed 0" in sentence for sentence in found.warnings)


@pytest.mark.parametrize(
    ("overrides", "settings", "sentence"),
    [
        (["optimizer.lr=1e-3"], {}, "what is compared: optimizer.lr is 0.001 (clip), 5e-05 (noclip)"),
        ([], {"code": "other"}, "runs were made by different code: its digest is other (clip), c0de (noclip)"),
        ([], {"spent": (200, 5000)}, "arms have spent unequal budgets: mean prompts from 100 (noclip) to 200 (clip)"),
        ([], {"spent": (100, 9000)}, "mean completion tokens from 5,000 (noclip) to 9,000 (clip)"),
        ([], {"state": "FAILED"}, "clip: lacks seed 0 (failed)"),
        ([], {"state": ""}, "clip: lacks seed 0 (unfinished)"),
        ([], {"truncated": 0.25}, "more than 20 % truncated completions in training: clip 25 %"),
        ([], {"problems": [f"other {n}" for n in range(40)]}, "gsm8k (greedy): runs answered different problems"),
        ([], {"test_set": "svamp"}, "svamp (greedy): no answers of noclip"),
    ],
)  # fmt: skip
def test_what_is_not_matched_is_named_first(tmp_path, monkeypatch, capsys, overrides, settings, sentence):
    write_run(tmp_path / "demo", NOCLIP, 0, answers(0))
    write_run(tmp_path / "demo", NOCLIP, 1, answers(1))
    write_run(tmp_path / "demo", [*CLIP, *overrides], 0, answers(2), **settings)
    write_run(tmp_path / "demo", [*CLIP, *overrides], 1, answers(3), **(settings | {"state": "DONE"}))
    found = group(load(tmp_path / "demo"))
    assert any(sentence in warning for warning in found.warnings), found.warnings
    run(monkeypatch, tmp_path / "demo", "--set", "gsm8k")
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.index(sentence) < shown.index("gsm8k, greedy")


def test_an_objectives_own_knob_is_a_part_of_it(tmp_path):
    """Objectives at settings of their own are what is compared; a knob at two values in one arm, or a rate, is not."""

    def confounds():
        warned = group(load(tmp_path / "demo"), ["objective.name"]).warnings
        return [warning.split(": ")[1].split()[0] for warning in warned if "more than what is compared" in warning]

    arms = [*NOCLIP], [*CLIP, "objective.eps_low=0.1"], ["objective=pspo", "optimizer.lr=1e-3"]
    for overrides in arms:
        write_run(tmp_path / "demo", overrides, 0, answers(0))
    assert confounds() == ["optimizer.lr"]
    write_run(tmp_path / "demo", CLIP, 1, answers(0))
    assert confounds() == ["objective.eps_low", "optimizer.lr"]


def test_vacuous_trust_regions_are_named(tmp_path):
    for overrides in (NOCLIP, ["objective=pspo", "objective.alpha=0.3"], CLIP):
        write_run(tmp_path / "demo", overrides, 0, answers(0))
    (rescaling,) = group(load(tmp_path / "demo")).warnings
    assert rescaling.startswith("pspo: alpha=0.3 is a mere rescaling here")
    one_update = ["update.num_epochs=1", "update.num_minibatches=1"]
    for overrides in (NOCLIP, CLIP):
        write_run(tmp_path / "one", [*overrides, *one_update], 0, answers(0))
    (inert,) = group(load(tmp_path / "one")).warnings
    assert inert.startswith("clip, noclip: one optimizer step per rollout")


def test_what_cannot_be_read_is_named_and_left_out(outputs):
    (outputs / "broken").mkdir()
    (outputs / "broken" / "config.yaml").write_text("objective: [")
    failed = write_run(outputs, CLIP, 0, answers(0), state="FAILED")
    found = group(load([outputs, outputs / "missing"]))
    assert list(found.arms) == ["noclip", "pspo_geometric alpha=0.1", "pspo_geometric alpha=0.5"]
    for name in ("broken", "missing", failed.name):
        assert sum(name in sentence for sentence in found.left_out) == 1
    with pytest.raises(ConfigError, match="no finished run"):
        group(load(failed))


def test_untrained_models_are_arms(outputs):
    write_run(outputs.parent / "evaluate", ["budget.steps=0"], 0, answers(5))
    found = group(load([outputs, outputs.parent / "evaluate"]))
    assert list(found.arms)[-1] == "untrained"
    assert found.warnings == []
    row = compare(found, [GREEDY]).differences.set_index("arm").loc["untrained"]
    assert (row["paired"], row["seeds"]) == ("problems", 1)


def test_untrained_models_are_named_by_their_shots(outputs):
    for shots in (0, 5):
        overrides = [
            "budget.steps=0",
            "dataset=gsm8k",
            f"dataset.shots={shots}",
            f"dataset.max_prompt_tokens={512 + shots}",
        ]
        write_run(outputs.parent / "evaluate", overrides, 0, answers(5))
    found = group(load([outputs, outputs.parent / "evaluate"]))
    assert list(found.arms)[-2:] == ["untrained 0-shot", "untrained 5-shot"]
    assert compare(found, [GREEDY], "untrained 5-shot").against == "untrained 5-shot"


def test_untrained_models_alone_are_compared(tmp_path, monkeypatch, capsys):
    for shots in (0, 5):
        run_directory = write_run(
            tmp_path / "evaluate", ["budget.steps=0", f"dataset.shots={shots}"], 0, answers(shots)
        )
        (run_directory / "metrics.jsonl").unlink()
    run(monkeypatch, tmp_path / "evaluate")
    assert "minus untrained 0-shot" in capsys.readouterr().out
    assert (tmp_path / "evaluate" / "comparison.html").is_file()


def test_files_of_one_name_are_two_arms(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text("def reward(text, problem): return 1")
        reward = ["reward=custom", f"reward.function={tmp_path}/{folder}/mine.py:reward"]
        write_run(tmp_path / "demo", [*NOCLIP, *reward], 0, answers(0))
    assert len(group(load(tmp_path / "demo")).arms) == 2


def test_verdicts_say_what_the_design_can_see(outputs):
    result = compare(group(load(outputs)), [GREEDY])
    rows = result.differences.set_index("arm")
    equal, better = rows.loc["pspo_geometric alpha=0.5"], rows.loc["pspo_geometric alpha=0.1"]
    assert result.against == "noclip"
    assert better["verdict"].startswith("better: +") == (better["p_holm"] < 0.05)
    assert equal["verdict"].startswith("equal as far as this design can see: ±")
    assert f"±{100 * equal['detectable']:.1f} points" in equal["verdict"]
    assert (rows["low"] < rows["difference"]).all()
    assert (rows["difference"] < rows["high"]).all()
    assert rows["p_holm"].tolist() == sorted(rows["p_holm"], reverse=rows["p"].is_monotonic_decreasing)
    assert any(
        "is over the 2 differences shown that have one test, t over seeds and problems" in n for n in result.notes
    )


def test_the_same_answers_are_no_difference(tmp_path):
    for seed in (0, 1):
        for overrides in (NOCLIP, CLIP):
            write_run(tmp_path / "demo", overrides, seed, answers(seed))
    (row,) = compare(group(load(tmp_path / "demo")), [GREEDY]).differences.to_dict("records")
    assert (row["difference"], row["p"], row["verdict"]) == (0, 1, "equal: the same score on every problem")


def test_two_single_models_get_mcnemar_and_wilson(tmp_path):
    right, wrong = np.arange(40) < 30, np.arange(40) < 20
    write_run(tmp_path / "demo", NOCLIP, 0, wrong)
    write_run(tmp_path / "demo", CLIP, 0, right)
    result = compare(group(load(tmp_path / "demo")), [GREEDY])
    (row,) = result.differences.to_dict("records")
    assert row["test"] == "McNemar"
    assert row["p"] == row["p_holm"] == pytest.approx(2 * 0.5**10)
    low, high = result.arms.set_index("arm").loc["noclip", ["low", "high"]]
    assert (low, high) == pytest.approx((0.35199, 0.64801), abs=1e-4)  # Wilson of 20 in 40
    assert any("one seed" in note for note in result.notes)


def test_pass_at_k_of_sampled_answers(tmp_path):
    for seed in (0, 1):
        write_run(
            tmp_path / "demo",
            NOCLIP,
            seed,
            [[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]],
            evaluation="paper",
            temperature=0.8,
        )
    found = group(load(tmp_path / "demo"))
    (selection,) = choose(found, {})
    assert (selection.evaluation, selection.temperature) == ("paper", 0.8)
    table = compare(found, [selection]).pass_at_k.set_index("k")["pass_at_k"]
    assert table.to_dict() == pytest.approx({1: (1 / 4 + 0 + 1) / 3, 2: (1 / 2 + 0 + 1) / 3, 4: 2 / 3})


def test_selections_default_to_greedy_at_the_lowest_temperature(tmp_path):
    for evaluation, test_set, temperature in (
        ("greedy", "gsm8k", 0),
        ("paper", "gsm8k", 0.8),
        ("paper", "gsm8k", 0.2),
        ("paper", "svamp", 0.4),
    ):
        write_run(
            tmp_path / "demo", NOCLIP, 0, answers(0), evaluation=evaluation, test_set=test_set, temperature=temperature
        )
    found = group(load(tmp_path / "demo"))
    assert choose(found, {}) == [GREEDY]
    paper = choose(found, {"evaluation": ["paper"]}, score="strict")
    assert [(s.set, s.temperature, s.score) for s in paper] == [("gsm8k", 0.2, "strict"), ("svamp", 0.4, "strict")]
    wanted = {"set": ["gsm8k"], "evaluation": ["paper"], "temperature": [0.8]}
    assert [s.temperature for s in choose(found, wanted)] == [0.8]
    for wanted, words in (
        ({"set": ["svamp"]}, "unknown set svamp; known: gsm8k"),
        ({"evaluation": ["judge"]}, "unknown evaluation judge; known: greedy, paper"),
        ({"temperature": [0.3]}, r"unknown temperature 0\.3.*; known: 0\.0"),
        ({"when": ["before"]}, "unknown when before; known: after"),
    ):
        with pytest.raises(ConfigError, match=words):
            choose(found, wanted)


def test_the_command_fits_eighty_columns(outputs, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    run(monkeypatch, outputs, "--against", "pspo_geometric alpha=0.5")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any("minus pspo_geometric alpha=0.5, points" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing"], "missing"),
        (["demo", "--set", "mmlu"], "unknown set mmlu; known: gsm8k"),
        (["demo", "--against", "ppo"], "unknown arm ppo"),
        (["demo", "--page", "no/such/folder/x.html"], "no/such/folder"),
    ],
)
def test_a_mistake_is_one_sentence(outputs, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(outputs.parent)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *arguments)
    shown = capsys.readouterr().err
    assert ended.value.code == 2
    assert shown.count("\n") == 1
    assert words in shown


@pytest.mark.process
def test_published_numbers_stand_beside_ours_with_what_differs(tmp_path, monkeypatch, capsys):
    for seed in (0, 1):
        write_run(tmp_path / "paper", ["experiment=paper_qwen0_5b_clip"], seed, answers(seed))
        write_run(tmp_path / "paper", ["experiment=paper_qwen0_5b_pspo", "optimizer.lr=1e-6"], seed, answers(seed))
    found = group(load(tmp_path / "paper"))
    rows = beside(compare(found, [GREEDY]))
    assert len(rows) == len(PUBLISHED)
    ours = rows.dropna(subset="arm").set_index("published_arm")
    assert ours.loc["clip", ["published", "differs"]].tolist() == ["17.6", "nothing that is configured"]
    assert ours.loc["pspo", "published"] == "39.7"
    assert ours.loc["pspo", "differs"] == "optimizer.lr 1e-06 (5e-07)"
    hours = cost(found).set_index("experiment")["gpu_hours"]
    answers_s = 66 * (1319 + 1000 + 2305 + 500) * 0.01  # one before; one and 4 x 16 after; 0.64 s a rollout of 16 x 4
    assert hours["paper_qwen0_5b_clip"] == pytest.approx(5 * (1311 * 2.0 + answers_s) / 3600)  # two seconds a step
    assert np.isnan(hours["paper_qwen1_5b_clip"])
    assert cost(found, step_s=3.6)["gpu_hours"].tolist() == pytest.approx([5 * (1311 + 66 * 5124 / 64) / 1000] * 6)
    run(monkeypatch, tmp_path / "pap*", "--published")
    shown = " ".join(capsys.readouterr().out.split())
    assert "published 17.6 %" in shown
    assert "together" in shown


def test_without_a_measured_arm_the_published_table_has_no_cost(outputs, monkeypatch, capsys):
    run(monkeypatch, outputs, "--published")
    shown = " ".join(capsys.readouterr().out.split())
    assert "no arm here" in shown
    assert "give --step-s" in shown
    assert "together" not in shown


def test_holms_family_is_the_differences_with_one_kind_of_test(outputs):
    write_run(outputs.parent / "evaluate", ["budget.steps=0"], 0, answers(5))
    result = compare(group(load([outputs, outputs.parent / "evaluate"])), [GREEDY])
    rows = result.differences.set_index("arm")
    assert rows["test"].tolist() == ["t over seeds and problems", "t over seeds and problems", "t over problems"]
    assert rows.loc["untrained", "p_holm"] == rows.loc["untrained", "p"]  # one of its kind
    alone = compare(group(load(outputs)), [GREEDY]).differences.set_index("arm")
    assert rows["p_holm"].drop("untrained").tolist() == pytest.approx(alone["p_holm"].tolist())


def test_a_run_of_another_version_is_named_and_left_out(outputs):
    old = write_run(outputs, CLIP, 0, answers(0))
    (old / "config.yaml").write_text((old / "config.yaml").read_text() + "no_such_key: 1\n")
    found = group(load(outputs))
    assert "clip" not in found.arms
    assert [old.name in sentence and "another version" in sentence for sentence in found.left_out] == [True]


def test_only_numbers_that_are_missing_are_left_blank(tmp_path):
    for name in ("nano", "other"):
        (tmp_path / name).mkdir()
        write_run(tmp_path / "demo", [*NOCLIP, "model=hf", f"model.path={tmp_path / name}"], 0, answers(0))
    table, *_ = tables(compare(group(load(tmp_path / "demo")), [GREEDY]))
    assert table.shown["arm"].tolist() == ["model.path=nano", "model.path=other"]
    assert "IQM" not in table.shown
