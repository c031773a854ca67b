"""Adapters through a run: saved beside the merged model, and a KL reference that is the same weights without them."""

import copy
import dataclasses
import json
import signal

import pytest
import torch
import transformers
from forked import at, ends, fork, make, only_run, output_of, wait
from test_model import CPU, adapted, assert_one_sentence, configured, logprobs, prompts, saved, train  # noqa: F401
from training import learner_of, make_trainer

from pspo import model
from pspo.advantage import Group
from pspo.base.files import read_json, read_lines
from pspo.base.schema import ConfigError
from pspo.evaluate.__main__ import main
from pspo.model import Policy
from pspo.model.config import LoraConfig
from pspo.objective import default_objective
from pspo.rollout import OwnSampler
from pspo.trainer import Trainer
from pspo.update.rows import Row, make_rows, score

peft = pytest.importorskip("peft")
COMPLETION = [20, 21, 22, 2]


def rows_of(prompts):  # noqa: F811
    return [Row(prompt.token_ids, COMPLETION, [0.0] * 4, [0.0] * 4) for prompt in prompts]


# The adapters alone


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(q|v)_proj"])
def test_saved_adapters_on_the_base_model_are_the_merged_model(saved, prompts, tmp_path, targets):  # noqa: F811
    """By peft alone, as a user of the hub loads them."""
    directory, _ = saved
    lora = LoraConfig(rank=4, alpha=16, target_modules=targets)
    policy = model.load(configured(directory, lora=lora), 0, CPU)
    train(policy, prompts)
    model.save_adapters(policy, tmp_path / "adapter")
    ids = torch.tensor([prompts[0].token_ids])
    with torch.no_grad():
        trained = policy.model(ids).logits.log_softmax(-1)
        model.save(policy, tmp_path / "model", prompts[0].token_ids)
        base = transformers.AutoModelForCausalLM.from_pretrained(directory)
        plain = base(ids).logits.log_softmax(-1)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")(ids).logits.log_softmax(-1)
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")(ids).logits.log_softmax(-1)
    torch.testing.assert_close(loaded, trained, atol=1e-5, rtol=0)
    torch.testing.assert_close(loaded, merged, atol=1e-4, rtol=0)
    assert (loaded - plain).abs().max() > 0.1
    about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(directory)
    assert isinstance(about["target_modules"], str) or about["target_modules"] == sorted(about["target_modules"])
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    with pytest.raises(ConfigError, match="holds adapters alone; give the folder of the merged model") as caught:
        model.check(configured(tmp_path / "adapter"))
    assert_one_sentence(str(caught.value))


# The reference


def test_the_reference_is_the_same_weights_with_the_adapters_off(saved, prompts):  # noqa: F811
    """Its log-probabilities are those of a deep copy that was made before training, to the bit; nothing is copied."""
    policy = adapted(saved[0])
    reference, before = policy.frozen(), copy.deepcopy(policy)
    train(policy, prompts)
    names = policy.trainable().keys()
    rows = rows_of(prompts)
    found, _ = score(reference, rows, 1.0, 1000, None)
    assert found == score(before, rows, 1.0, 1000, None)[0]
    moved, _ = score(policy, rows, 1.0, 1000, None)
    assert max(abs(a - b) for x, y in zip(moved, found, strict=True) for a, b in zip(x, y, strict=True)) > 0.1
    assert reference.model is policy.model
    assert policy.trainable().keys() == names
    train(policy, prompts)  # still learns, and the reference stays
    assert score(reference, rows, 1.0, 1000, None)[0] == found


def test_a_failure_while_the_adapters_are_off_leaves_them_on(saved, prompts):  # noqa: F811
    policy = adapted(saved[0])
    train(policy, prompts)
    names, expected = policy.trainable().keys(), score(policy, rows_of(prompts), 1.0, 1000, None)
    with pytest.raises(RuntimeError, match="no room"), policy.frozen().scoring():
        raise RuntimeError("no room")
    assert policy.trainable().keys() == names
    assert score(policy, rows_of(prompts), 1.0, 1000, None) == expected


def storages(policy):
    return {p.data_ptr(): p.numel() for p in policy.model.parameters()}


def test_memory_holds_one_copy_of_the_weights(saved, prompts):  # noqa: F811
    policy, whole = adapted(saved[0]), model.load(configured(saved[0]), 0, CPU)
    assert storages(policy.frozen()) == storages(policy)
    assert not storages(whole.frozen()).keys() & storages(whole).keys()  # without adapters there is no other way
    reference = policy.frozen()
    train(policy, prompts)
    learner = learner_of(policy, default_objective("noclip"), loss={"kl": "k3", "kl_weight": 0.1}, reference=reference)
    assert storages(learner.reference) == storages(learner.policy)


def test_a_run_with_a_kl_penalty_is_the_one_of_a_copied_reference(saved, tmp_path, monkeypatch):  # noqa: F811
    """Metrics and weights to the bit, over steps whose reference differs from the policy, also where it is resumed."""
    overrides = ["loss.kl=k3", "loss.kl_weight=0.5", "optimizer.lr=3e-2", "optimizer.warmup_steps=0"]

    def copied(policy):
        return dataclasses.replace(policy, model=copy.deepcopy(policy.model).requires_grad_(False).eval())

    ended = []
    for name, frozen in (("shared", Policy.frozen), ("copied", copied)):
        monkeypatch.setattr(Policy, "frozen", frozen)
        make_trainer(adapted(saved[0]), tmp_path / name, *overrides, "budget.steps=2").run()
        trainer = make_trainer(adapted(saved[0]), tmp_path / name, *overrides)
        trainer.run()
        rows = read_lines(tmp_path / name / "metrics.jsonl")
        assert rows[-1]["policy/kl_reference"] > 1e-3
        timeless = [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows]
        ended.append((timeless, {n: p.detach().clone() for n, p in trainer.policy.trainable().items()}))
        assert (trainer.learner.reference.model is trainer.policy.model) is (name == "shared")
    (metrics, weights), (others, copied_weights) = ended
    assert metrics == others
    assert all(torch.equal(weights[name], copied_weights[name]) for name in weights)


def test_what_the_trainer_says_is_what_the_saved_reference_says(saved, prompts):  # noqa: F811
    """``make_rows`` asks the reference; its numbers are the base model's own."""
    policy = adapted(saved[0])
    reference = policy.frozen()
    train(policy, prompts)
    learner = learner_of(policy, default_objective("noclip"), loss={"kl": "k3", "kl_weight": 0.1}, reference=reference)
    completions = OwnSampler(policy, learner.rollout).sample(prompts, 4, [1])
    rows, _ = make_rows(completions, torch.rand(3, 4), Group(name="group", ddof=1, eps=1e-4), learner)
    base = model.load(configured(saved[0]), 0, CPU)
    with torch.no_grad():
        expected = logprobs(base, [(row.prompt_ids, row.token_ids) for row in rows])
    for row, values in zip(rows, expected.tolist(), strict=True):
        assert row.reference_logprobs == pytest.approx(values[: len(row.token_ids)], abs=1e-5)


# Whole runs

LORA = [
    "model.lora.rank=4", "loss.kl=k3", "loss.kl_weight=0.1", "optimizer.lr=1e-2", "optimizer.warmup_steps=0",
    "budget.steps=3", "checkpoint.keep=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory, cache):
    cwd = tmp_path_factory.mktemp("adapted")
    assert make(cwd, cache, LORA) == 0, output_of(cwd)
    return cwd


@pytest.mark.process
def test_a_run_with_adapters_resumes_to_the_same_files(made, cache, tmp_path):
    killed = fork(tmp_path, cache, LORA, hook=at(Trainer, "_learn", 2, signal.SIGKILL))
    assert wait(killed) == -signal.SIGKILL
    assert make(tmp_path, cache, LORA) == 0, output_of(tmp_path)
    expected = ends(only_run(made))
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors", "model/model.safetensors"} <= set(
        expected
    )
    assert ends(only_run(tmp_path)) == expected
    assert "is low for adapters" not in output_of(tmp_path)


@pytest.mark.process
def test_a_run_with_adapters_is_evaluated_and_continued(made, cache, tmp_path, monkeypatch):
    """The merged model and the last checkpoint, whose adapters go onto the base model, give the same answers."""
    run = only_run(made)
    monkeypatch.chdir(made)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    for words in ([], ["checkpoint=step_000003"]):
        main([f"run={run}", *words, "evaluate.name=further", "evaluate.sets=[validation]"])
    texts = [
        [row["completion"] for row in read_lines(run / "evaluation" / when / "further" / "validation_t0.jsonl")]
        for when in ("after", "step_000003")
    ]
    assert texts[0] == texts[1] != []
    longer = [*LORA, "budget.steps=4"]
    assert make(tmp_path / "whole", cache, longer) == 0, output_of(tmp_path / "whole")
    assert make(tmp_path / "continued", cache, [*longer, f"continue_from={run}"]) == 0, output_of(
        tmp_path / "continued"
    )
    whole, continued = (only_run(tmp_path / name) for name in ("whole", "continued"))
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (continued / name).read_bytes() == (whole / name).read_bytes()
    assert read_json(continued / "summary.json")["steps"] == 4
