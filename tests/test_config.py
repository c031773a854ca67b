import dataclasses
import difflib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from training import composed

from pspo.base.files import CONF
from pspo.base.grammar import quoted
from pspo.base.schema import ConfigError, Schema, as_dict, build, key, keys_of
from pspo.config import Config, compose, groups, identity, open_keys, read, resolve, science
from pspo.run.__main__ import help_text
from pspo.run.earlier import run_directory, short_names
from pspo.sweep import expand

DOCS = Path(__file__).parents[1] / "docs"
KEYS = DOCS / "keys.md"
OPTIONS = [(group, option) for group, options in groups().items() for option in options]
REQUIRED = {
    ("reward", "custom"): ["reward.function=mine.py:f"],
    ("dataset", "jsonl"): ["dataset.path=mine.jsonl"],
    ("dataset", "reversal"): ["reward=exact"],
    ("model", "hf"): ["model.hub_id=owner/name"],
    ("objective", "custom"): [f"objective.function={Path(__file__).with_name('own_objective.py')}:Own"],
}


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_to_a_valid_configuration(group, option):
    config = composed(f"{group}={option}", *REQUIRED.get((group, option), []))
    assert isinstance(config, Config)
    if hasattr(config, group) and group != "smoothing":
        assert getattr(config, group).name == option


def test_changing_the_objective_changes_the_objective_block_alone():
    base = as_dict(composed("objective=noclip"))
    for objective in groups()["objective"]:
        other = as_dict(composed(f"objective={objective}", *REQUIRED.get(("objective", objective), [])))
        assert {name for name in base if base[name] != other[name]} <= {"objective"}


@pytest.mark.parametrize(("preset", "alpha"), [("none", 0.1), ("light", 0.05), ("paper", 0.1), ("strong", 0.3)])
def test_smoothing_sets_alpha_and_nothing_else(preset, alpha):
    base, smoothed = as_dict(composed()), as_dict(composed(f"smoothing={preset}"))
    assert smoothed["objective"]["alpha"] == alpha
    assert {name for name in base if base[name] != smoothed[name]} <= {"objective", "smoothing"}
    assert identity(composed(f"smoothing={preset}")) == identity(composed(f"objective.alpha={alpha}"))


def test_alpha_given_twice_is_refused():
    for overrides in (
        ["smoothing=strong", "objective.alpha=0.7"],
        ["smoothing=strong", "experiment=paper_qwen0_5b_pspo"],
    ):
        with pytest.raises(ConfigError, match=r"smoothing=strong sets alpha to 0\.3, but objective\.alpha="):
            composed(*overrides)


PATHS = [
    "outputs/main/pspo_seed=1_budget.steps=3_seed0_d4d609e9",
    *("/a/b=c", "a=", "/a/data (2).jsonl", "/a b/c", "/größe/日本", "/a/{b}", "/a/[b]", "/a/$b", "(", "[", "x,"),
    *("it's", 'say "x"', "'\"", "a\\", "/it's\\", "C:\\x", "#&;!^<>`|?*@%:", "~no-such-user/x"),
]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_a_value_as_it_stands(path):
    argument = f"continue_from={path}"
    assert compose([argument]).continue_from == path
    assert quoted(quoted(argument)) == quoted(argument)


@given(st.text(st.characters(codec="utf-8", exclude_characters=",\\", exclude_categories=["Cc"])))
def test_hydra_reads_any_path_as_it_stands(text):
    """A comma makes a list, and the backslash before a special character is Hydra's own way to quote it."""
    path = f"/{text}/x"
    assert OverridesParser.create().parse_override(quoted(f"key={path}")).value() == path


def test_text_that_is_something_else_is_told_to_be_quoted():
    for value in ("2024", "1e5", "true", "[~/a]"):
        with pytest.raises(
            ConfigError, match=r"continue_from must be text or null, got .*; to have it as text, quote it"
        ):
            compose([f"continue_from={value}"])
        assert compose([f'continue_from="{value}"']).continue_from == value
    with pytest.raises(ConfigError, match=r"continue_from must be text in UTF-8, got 'caf\\udce9'; rename"):
        compose(["continue_from=caf\udce9"])  # a byte of Latin 1, as Python hands it over


def test_the_home_directory_may_be_written_short(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    files = ["model.path", "dataset.path", "reward.function", "output_dir", "continue_from"]
    options = ["model=qwen0_5b", "dataset=gsm8k", "reward=custom"]
    short, long = (compose([*options, *(f"{key}={home}/x y:f" for key in files)]) for home in ("~", "/home/me"))
    assert short == long
    assert identity(short) == identity(long)
    assert short.reward.function == "/home/me/x y:f"
    assert compose(["dataset.system_prompt=~/x"]).dataset.system_prompt == "~/x"


def test_lists_of_paths_are_quoted_item_by_item(tmp_path):
    assert quoted("seed=1,2") == "seed=1,2"
    assert quoted("dataset.path=~/a,/b,'c,d',e (1)") == "dataset.path='~/a',/b,'c,d','e (1)'"
    assert (
        quoted("hydra.launcher.setup=[module load x,source ~/y]") == "hydra.launcher.setup=[module load x,'source ~/y']"
    )
    jobs = [job.overrides for job in expand(None, [quoted("dataset.path=~/a,/b (1)")])]
    assert jobs == [["dataset.path='~/a'"], ["dataset.path='/b (1)'"]]
    (tmp_path / "é.yaml").write_text("common: [output_dir=~/o (1)]\nlists: {dataset.path: [~/a, /b é]}")
    jobs = [job.overrides for job in expand(str(tmp_path / "é.yaml"), [])]
    assert jobs == [["group=é", "output_dir='~/o (1)'", f"dataset.path='{path}'"] for path in ("~/a", "/b é")]


def test_what_bounds_memory_alone_does_not_name_a_run():
    base = identity(composed())
    for override in ("update.max_tokens=99", "rollout.max_rows=9", "model.gradient_checkpointing=true", "threads=1"):
        assert identity(composed(override)) == base


def test_a_hub_model_trains_on_gsm8k_unless_a_dataset_is_given():
    for model in groups()["model"]:
        chosen = [f"model={model}", *REQUIRED.get(("model", model), [])]
        assert composed(*chosen).dataset.name == {"tiny": "embedded", "reversal": "reversal"}.get(model, "gsm8k")
        if model != "reversal":
            assert composed(*chosen, "dataset=svamp").dataset.name == "svamp"


def test_bits_are_read_by_their_own_policy_and_compared_as_text():
    with pytest.raises(ConfigError, match=r"dataset.name='svamp': model=reversal reads and writes bits alone"):
        composed("model=reversal", "dataset=svamp")
    with pytest.raises(ConfigError, match=r"reward.name='plain': to it 011 and 11 are one number"):
        composed("model=hf", "model.hub_id=a/b", "dataset=reversal")
    assert composed("model=reversal", "dataset.num_bits=9").rollout.max_new_tokens == 9
    with pytest.raises(ConfigError, match=r"optimizer.matrices='\(': is no regular expression"):
        composed("optimizer=muon", "optimizer.matrices=(")


def test_settings_of_the_embedded_task_are_not_taken_silently_for_another_model():
    for source in ("model.hub_id=owner/name", "model.path=/models/mine"):
        with pytest.raises(ConfigError, match=r"model=tiny has the embedded task's lengths.*choose model=hf"):
            composed(source)
        assert composed("model=hf", source).optimizer.lr < composed().optimizer.lr


def test_weights_of_the_hub_and_of_the_package_are_different_runs():
    names = [identity(composed(f"model={name}")) for name in ("smollm2", "smollm2_q4")]
    assert names[0] != names[1]
    assert identity(composed("model=smollm2", "model.path=/models/smollm2")) not in names


PAPER = {  # paper.md: lr, eps, epochs
    "paper_qwen0_5b_clip": (1e-6, 0.1, 2),
    "paper_qwen0_5b_noclip": (1e-6, None, 1),
    "paper_qwen0_5b_pspo": (5e-7, None, 2),
    "paper_qwen1_5b_clip": (5e-7, 0.2, 2),
    "paper_qwen1_5b_noclip": (1e-6, None, 1),
    "paper_qwen1_5b_pspo": (5e-7, None, 2),
}


@pytest.mark.parametrize("arm", PAPER)
def test_the_papers_arms_have_the_published_settings(arm):
    lr, eps, epochs = PAPER[arm]
    config = composed(f"experiment={arm}")
    _, model, objective = re.fullmatch(r"(paper)_(qwen\d_5b)_(\w+)", arm).groups()
    assert (config.model.name, config.objective.name, config.dataset.name) == (model, objective, "gsm8k")
    assert (config.optimizer.lr, config.update.num_epochs, config.selection) == (lr, epochs, "best")
    assert getattr(config.objective, "eps_low", None) == getattr(config.objective, "eps_high", None) == eps
    assert getattr(config.objective, "alpha", 0.1) == 0.1
    assert config.rollout.prompts * config.rollout.group_size == 64
    assert (config.rollout.temperature, config.rollout.top_p, config.rollout.max_new_tokens) == (0.8, 0.9, 128)
    assert (config.advantage.ddof, config.advantage.eps) == (1, 1e-4)
    assert (config.optimizer.warmup_steps, config.optimizer.decay, config.optimizer.max_grad_norm) == (140, "linear", 1)
    assert (config.optimizer.beta1, config.optimizer.beta2, config.optimizer.eps) == (0.9, 0.999, 1e-8)
    assert config.budget.steps == 7000 // 16 * 3


BAD = {
    "objective.alpha=1": "objective.alpha must be in [0, 1), got 1",
    "objective.alpha=-0.1": "objective.alpha must be in [0, 1), got -0.1",
    "objective=clip objective.eps_low=0": "objective.eps_low must be in (0, 1], got 0",
    "objective=clip objective.eps_high=-1": "objective.eps_high must be in (0, inf), got -1",
    "objective=clip smoothing=paper": "objectives with alpha: pspo",
    "objective=clip +objective.alpha=0.3": "known: objective.name, objective.eps_low, objective.eps_high",
    "objective.alpah=0.3": "did you mean objective.alpha?",
    "+optimizer.lrr=0.3": "did you mean optimizer.lr?",
    "modle=tiny": "did you mean model?",
    "rollout.group_size=1": "rollout.group_size must be in [2, inf), got 1",
    "rollout.group_size=2.5": "rollout.group_size must be a whole number, got 2.5",
    "budget.prompts=5": "exactly one of budget.steps, budget.prompts and budget.completion_tokens",
    "budget.steps=null": "got none",
    "update.num_minibatches=257": "must be at most the 256 completions",
    "selection=worst": "selection must be one of last, best, got 'worst'",
    "selection=best dataset.num_validation=0": "needs validation problems",
    "model.warm_start=null": "give a local folder or .gguf file",
    "dataset.num_test=9999": "dataset.num_test=9999: there are 517 different ones",
    "seed=-1": "seed must be in [0, 4294967295], got -1",
    "group=../up": "names a directory",
    "optimizer.lr=nan": "optimizer.lr must be in (0, inf), got nan",
    "model.architecture.num_heads=3": "must divide model.architecture.hidden_size",
    "model.dtype=bfloat16": "model.dtype must be one of float32, float64",
    "model=qwen0_5b model.hub_id=null": "choose model=tiny or one that has a hub_id",
    "reward=custom": "reward.function has no value",
    "tracker=jsonl tracker.project=x": "unknown key tracker.project",
    "dataset.path=x": "dataset=embedded is made, not read",
    "model.lora=3": "model.lora must be a block of keys, got 3",
    "alpha=0.3": "unknown key alpha (did you mean objective.alpha or smoothing.alpha?); known: group, output_dir",
    "lr=1e-5": "unknown key lr (did you mean optimizer.lr?)",
    "eps=1e-3": "(did you mean advantage.eps or optimizer.eps?)",
    "lora.rank=4": "unknown key lora.rank (did you mean model.lora.rank?)",
    "evaluation.every=3": "unknown key evaluation.every (did you mean evaluate.every?)",
    "optimiser.lr=1e-5": "unknown key optimiser.lr (did you mean optimizer.lr?)",
    "alhpa=0.3": "unknown key alhpa (did you mean objective.alpha?)",
    "objective=PSPO": "unknown objective PSPO (did you mean pspo?)",
    "objective=clipp": "unknown objective clipp (did you mean clip?)",
    "model=owner/name": "write model=hf model.hub_id=owner/name, or model.path=owner/name for a folder",
    "model=/models/mine": "model=/models/mine is no option; write model=hf",
    "dataset=mine.jsonl": "dataset=mine.jsonl is no option; write dataset=jsonl dataset.path=mine.jsonl",
    "reward=mine.py:f": "reward=mine.py:f is no option; write reward=custom reward.function=mine.py:f",
    "seed=0,1": "seed=0,1 gives one run several values; add -m to make a run with each, or quote a value",
    "seed=[0,1]": "seed must be a whole number, got [0, 1]; it takes one value: -m seed=0,1 makes a run with each",
    "diagnostics.counterfactual=[3]": "diagnostics.counterfactual must be a list, each item text, got [3]",
}


@pytest.mark.parametrize("command", BAD)
def test_a_mistake_is_told_in_one_sentence(command):
    with pytest.raises(ConfigError) as caught:
        compose(command.split())
    assert BAD[command] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_keys_are_opened_to_the_schema_and_groups_are_not():
    given = ["objective=pspo", "objective.alpha=0.1", "+new.key=1", "~seed", "-m", "hydra.job.chdir=true", "seed=1,2"]
    opened = [
        "objective=pspo",
        "++objective.alpha=0.1",
        "++new.key=1",
        "~seed",
        "-m",
        "hydra.job.chdir=true",
        "++seed=1,2",
    ]
    assert open_keys(given) == opened


def subclasses(cls):
    return {
        sub
        for direct in cls.__subclasses__()
        if direct.__module__.startswith("pspo.")
        for sub in (direct, *subclasses(direct))
    }


@pytest.mark.process
def test_keys_md_is_what_the_code_makes():
    """Run `python docs/keys.py > docs/keys.md` after a deliberate change."""
    done = subprocess.run([sys.executable, DOCS / "keys.py"], capture_output=True, text=True, check=True)
    recorded, now = KEYS.read_text().splitlines(), done.stdout.splitlines()
    assert recorded == now, "\n".join(difflib.unified_diff(recorded, now, "recorded", "now", lineterm="", n=0))


def documented():
    return [re.split(r" (?<!\\)\| ", line.strip("| ")) for line in KEYS.read_text().splitlines() if line[:3] == "| `"]


def test_keys_md_has_every_key_of_every_schema_with_meaning_values_and_default():
    from pspo import supervise  # noqa: F401
    from pspo.launcher.base import Launcher  # whose subclasses are known from here on

    blocks = {cls for cls in subclasses(Schema) if cls.block} | {Config, Launcher}
    known = {
        cls.dotted(field.name)
        for cls in blocks
        for field in dataclasses.fields(cls)
        if field.metadata and field.name != "name"
    }
    assert {dotted.strip("`") for dotted, _, _, _ in documented()} == known
    assert all(meaning and values and default for _, meaning, values, default in documented())


def test_every_key_is_read_by_code():
    source = "\n".join(path.read_text() for path in CONF.parent.glob("pspo/**/*.py"))
    for dotted, *_ in documented():
        name = dotted.strip("`").rpartition(".")[2]
        assert re.search(rf"\.{name}\b|[\[(, ]\"{name}\"[\],)]", source), f"{dotted} is a key that nothing reads"


def test_values_stand_in_yaml_and_not_in_python():
    def defaults(cls):
        return [f.name for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING]

    assert [defaults(cls) for cls in subclasses(Schema) if defaults(cls)] == []


def test_the_directory_is_named_by_what_was_run(tmp_path):
    overrides = [f"output_dir={tmp_path}", "objective=clip", "objective.eps_low=0.3", "seed=3", "tracker=jsonl"]
    config = composed(*overrides)
    directory = run_directory(config, overrides)
    assert directory == tmp_path / "main" / f"clip_eps_low=0.3_seed3_{identity(config)}"
    directory.mkdir(parents=True)
    same = [*overrides, "objective.eps_high=0.2", "checkpoint.keep=9", "device=cpu"]  # a default spelt out
    assert run_directory(composed(*same), same) == directory
    other = [*overrides, "rollout.top_p=0.9"]
    assert run_directory(composed(*other), other) != directory


NAMES = {
    "": "pspo",
    "optimizer.lr=1e-5 objective.alpha=0.3": "pspo_alpha=0.3_lr=1e-5",
    "++budget.steps=7 objective=clip objective.eps_low=0.1": "clip_eps_low=0.1_steps=7",
    "evaluate.every=3": "pspo_evaluate.every=3",  # as are checkpoint.every and diagnostics.every
    "advantage=group advantage.eps=1e-3": "pspo_group_advantage.eps=1e-3",
    "model.lora.rank=0 model.lora.alpha=8": "pspo_lora.alpha=8_rank=0",
    "model=qwen0_5b dataset=svamp": "pspo_svamp_qwen0_5b",
    "smoothing=paper": "pspo_smoothing=paper",  # there is a reward of that name
    "optimizer.lr=1e-5 optimizer.lr=2e-5": "pspo_lr=2e-5",
    "reward=custom reward.function=mine/graders.py:f": "pspo_reward=custom_function=graders.py-f",
    "dataset.system_prompt='Größe, (ja)?'": "pspo_system_prompt=Gr-e-ja-",
    "device=cpu threads=1 group=main tracker=jsonl": "pspo",
}


@pytest.mark.parametrize("words", NAMES)
def test_a_run_is_named_by_its_objective_first_in_words_as_short_as_are_clear(words, tmp_path):
    overrides = shlex.split(words, posix=False)
    if "(" in words:
        overrides = [words]
    name = run_directory(composed(*overrides, f"output_dir={tmp_path}"), overrides).name
    assert re.fullmatch(r"[A-Za-z0-9_.=+-]+_seed0_[0-9a-f]{8}", name)
    assert name.rpartition("_seed0_")[0] == NAMES[words]


def test_what_a_long_name_leaves_out_is_counted_and_no_word_is_cut(tmp_path):
    overrides = [
        f"dataset.system_prompt={'x' * 150}",
        "objective.alpha=0.25",
        "rollout.top_p=0.5",
        f"output_dir={tmp_path}",
    ]
    overrides += [
        "rollout.temperature=0.123456789",
        "update.num_minibatches=4",
        "update.num_epochs=3",
        "loss.kl_weight=0.0",
    ]
    name = run_directory(composed(*overrides), overrides).name
    assert len(name) < 110
    label = name.rpartition("_seed0_")[0]
    assert label == "pspo_alpha=0.25_kl_weight=0.0_temperature=0.123456789_top_p=0.5_num_epochs=3_+2"


def test_a_run_under_an_earlier_versions_name_is_found_by_its_hash(tmp_path):
    overrides = ["optimizer.lr=1e-5", f"output_dir={tmp_path}"]
    config = composed(*overrides)
    directory = tmp_path / "main" / f"pspo_optimizer.lr=1e-5_seed0_{identity(config)}"
    directory.mkdir(parents=True)
    assert run_directory(config, overrides) == directory


def test_the_ends_of_keys_are_as_short_as_they_are_clear():
    short = short_names(["a.x", "b.x", "b.c.y", "y", "z.d.y", "w.v", "v.w.v", "e.f.g", "h.f.g"])
    assert short == {
        "a.x": "a.x", "b.x": "b.x", "b.c.y": "c.y", "y": "y", "z.d.y": "d.y",
        "w.v": "v", "v.w.v": "v.w.v", "e.f.g": "e.f.g", "h.f.g": "h.f.g",
    }  # fmt: skip


def examples(text):
    return re.findall(r"^  (python -m pspo\.run.*)$", text, re.MULTILINE)


def test_help_names_groups_options_keys_and_five_examples():
    text = help_text()
    for group, options in groups().items():
        for word in (group, *options):
            assert word in text
    assert len(examples(text)) == 5
    assert {name for name, _, _ in keys_of(Config, as_dict(compose()))} <= set(text.replace("=", " ").split())
    assert max(map(len, text.splitlines())) <= 150


def test_examples_of_the_help_compose():
    for example in examples(help_text()):
        compose([word for word in example.split()[3:] if word != "-m" and "," not in word])


def test_as_dict_and_build_are_inverse():
    config = composed()
    assert resolve(as_dict(config)) == config
    assert yaml.safe_load(yaml.safe_dump(as_dict(config))) == as_dict(config)


def test_intervals_are_open_and_closed_as_written():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Block(Schema, block="block"):
        half: float = key("x", within="[0, 1)")
        items: list[int] = key("y")
        maybe: int | None = key("z", within="(0, 5]")

    good = {"half": 0, "items": [1], "maybe": None}
    made = build(Block, good)
    assert made.half == 0.0
    assert isinstance(made.half, float)
    for bad in (
        {"half": 1},
        {"half": float("nan")},
        {"half": "a"},
        {"half": True},
        {"items": [1.5]},
        {"maybe": 0},
        {"maybe": 6},
    ):
        with pytest.raises(ConfigError, match=rf"block\.{next(iter(bad))} must be"):
            build(Block, good | bad)
    with pytest.raises(ConfigError, match="maybe has no value"):
        build(Block, {"half": 0, "items": []})


def test_a_run_of_an_earlier_version_is_read_and_keeps_its_name_when_keys_are_added(tmp_path):
    config = compose(["objective=clip"])
    values = as_dict(config)
    del values["rollout"]["stop"], values["model"]["chat_template_kwargs"]
    OmegaConf.save(OmegaConf.create(values), tmp_path / "config.yaml")
    assert read(tmp_path / "config.yaml") == config
    assert not {"stop", "chat_template_kwargs"} & {*science(config)["rollout"], *science(config)["model"]}
    assert identity(compose(["objective=clip", "rollout.stop=[x]"])) != identity(config)
    with pytest.raises(ConfigError, match="chat_template_kwargs has no value"):
        build(Config, values)
