"""The reversal task: its problems, its policy of two tokens without an end, and a whole run, stopped and resumed."""

import math

import pytest
import torch
from training import composed, configured

from pspo import dataset, model
from pspo.base.schema import ConfigError
from pspo.dataset import encode, order
from pspo.model import bits
from pspo.model.policy import stop_ids
from pspo.reward import Attempt, default_reward
from pspo.rollout import OwnSampler
from pspo.supervise import solution_rows
from pspo.tracker import Tracker
from pspo.trainer import Trainer

CPU = torch.device("cpu")


def reversal(*overrides):
    small = ["rollout.prompts=4", "rollout.group_size=4", "budget.steps=4", "checkpoint.every=1"]
    return composed("model=reversal", "tracker=jsonl", "dataset.num_bits=3", *small, *overrides)


@pytest.fixture
def policy(cache):
    return model.load(reversal().model, 0, CPU)


def test_every_prompt_is_a_problem_of_all_splits_and_its_reverse_the_answer():
    splits = dataset.load(reversal("dataset.num_validation=2").dataset, seed=0)
    assert [p.question for p in splits.train] == ["000", "001", "010", "011", "100", "101", "110", "111"]
    assert [p.answer for p in splits.train] == ["000", "100", "010", "110", "001", "101", "011", "111"]
    assert splits.test == {"reversal": splits.train}
    assert len(splits.validation) == 2
    assert set(splits.validation) < set(splits.train)
    for wrong, reason in (
        ("dataset.num_validation=9", "there are 8 prompts of 3 bits"),
        ("dataset.path=x", "dataset=reversal is made, not read"),
        ("dataset.shots=1", "reads bits alone"),
    ):
        with pytest.raises(ConfigError, match=reason):
            reversal(wrong)


def test_prompts_are_drawn_on_their_own_whatever_the_slices():
    drawn = order(128, 0, 0, 100, replacement=True)
    assert drawn[:8] == [116, 42, 98, 51, 94, 6, 100, 81]  # a change here breaks the resume of every run
    assert drawn == [i for start in range(0, 100, 7) for i in order(128, 0, start, 7, replacement=True)][:100]
    assert drawn != order(128, 1, 0, 100, replacement=True)
    assert 55 < len(set(drawn)) < 85  # 128 (1 − (1 − 1/128)^100) = 69.6 are expected to be different


def test_only_the_same_text_is_right():
    (problem,) = (p for p in dataset.load(reversal().dataset, 0).train if p.question == "110")
    reward = default_reward("exact")
    scores = reward([Attempt(text, problem) for text in ("011", "11", "0110", "011 ", "110")])
    assert [score.reward for score in scores] == [1, 0, 0, 0, 0]
    reward.check_gold([problem])


def test_the_tokenizer_has_a_token_for_each_bit_and_the_text_comes_back(tmp_path):
    for encoder in (made := bits.make_tokenizer(), saved(made, tmp_path)):
        assert len(encoder) == 2
        assert encoder.encode("0110") == [0, 1, 1, 0]
        assert encoder.decode([0, 1, 1, 0], skip_special_tokens=True) == "0110"
        assert not encoder.all_special_ids


def saved(encoder, directory):
    encoder.save_pretrained(directory)
    return model.source.read_tokenizer(directory)


def test_the_first_weights_are_those_of_flax(policy):
    """LeCun's normal, cut at two standard deviations, for every kernel; embeddings 1 / √width; positions 0.02."""
    wide = bits.make_model(
        configured("model=reversal", "model.architecture.hidden_size=512").model.architecture, 0, "sdpa"
    )
    for name, weight in wide.named_parameters():
        std = weight.std().item()
        if name.endswith("bias"):
            assert weight.abs().max() == 0
        elif "ln_" in name:
            assert (weight == 1).all()
        elif "wpe" in name:
            assert weight.shape == (14, 512)
            assert std == pytest.approx(0.02, rel=0.03)
        else:
            fan_in = weight.shape[1]
            assert std == pytest.approx(1 / math.sqrt(fan_in), rel=0.05)
            if "wte" not in name:
                assert weight.abs().max() <= 2 / 0.8796 / math.sqrt(fan_in) + 1e-6
    assert wide.lm_head.weight is not wide.transformer.wte.weight
    again = bits.make_model(reversal().model.architecture, 0, "sdpa")
    assert all((a == b).all() for a, b in zip(again.parameters(), policy.model.parameters(), strict=True))
    assert policy.shares_prompts


def test_completions_have_the_one_length_and_are_finished_there_also_when_loaded_again(policy, tmp_path):
    config = reversal()
    prompts, dropped = encode(policy.tokenizer, config.dataset, dataset.load(config.dataset, 0).train)
    assert dropped == 0
    assert [prompt.token_ids for prompt in prompts[:2]] == [[0, 0, 0], [0, 0, 1]]
    assert policy.stop_ids == []
    expected = OwnSampler(policy, config.rollout).sample(prompts, 4, [1, 2])
    assert {(len(c.token_ids), len(c.text), c.finished) for c in expected} == {(3, 3, True)}
    assert {row.token_ids[-1] for row in solution_rows(policy.tokenizer, prompts, config.dataset)} == {0, 1}
    model.save(policy, tmp_path / "model")
    loaded = model.load(composed("model=hf", f"model.path={tmp_path / 'model'}").model, 0, CPU)
    again = OwnSampler(loaded, config.rollout).sample(prompts, 4, [1, 2])
    assert [(c.token_ids, c.finished) for c in again] == [(c.token_ids, c.finished) for c in expected]


def test_a_tokenizer_with_special_tokens_and_no_end_is_still_refused(policy):
    encoder = bits.make_tokenizer()
    encoder.add_special_tokens({"pad_token": "_"})
    with pytest.raises(ConfigError, match="names no end-of-text token"):
        stop_ids(policy.model, encoder)


def trained(directory, *overrides):
    """The weights after four steps, or after as many as one process makes before it is killed."""
    directory.mkdir(exist_ok=True)
    config = reversal("dataset.num_validation=0", *overrides)
    policy = model.load(config.model, config.seed, CPU)
    prompts, _ = encode(policy.tokenizer, config.dataset, dataset.load(config.dataset, config.seed).train)
    trainer = Trainer(config, directory, policy, prompts, [], config.reward, Tracker(config.tracker, directory))
    trainer.resume()
    trainer.run()
    return list(policy.model.parameters())


def test_a_run_under_muon_that_was_stopped_ends_with_the_same_weights(cache, tmp_path):
    product = [
        "objective=clip",
        "loss.importance=product",
        "loss.kl=k3",
        "loss.kl_weight=0.04",
        "loss.reference=rollout",
    ]
    whole = trained(tmp_path / "whole", *product)
    trained(tmp_path / "parts", *product, "budget.steps=2")
    parts = trained(tmp_path / "parts", *product)
    assert all((a == b).all() for a, b in zip(whole, parts, strict=True))
    first = bits.make_model(reversal().model.architecture, 0, "sdpa")
    assert not all((a == b).all() for a, b in zip(whole, first.parameters(), strict=True))


def test_parameter_groups_are_those_of_the_published_optimizer(policy):
    """Kernels of attention, biases and norms go to Adam; an embedding's rows are Flax's in, its columns the out."""
    made = reversal().optimizer.make([{"params": list(policy.trainable().items())}])
    adam, muon = made.parts
    assert isinstance(adam, torch.optim.AdamW)
    assert isinstance(muon, torch.optim.Muon)
    factors = {group["param_names"][0].removeprefix("transformer."): group["lr_factor"] for group in muon.param_groups}
    layers = {f"h.{i}.mlp.{name}.weight": 1.0 for i in range(2) for name in ("c_fc", "c_proj")}
    assert factors == layers | {
        "lm_head.weight": 1.0,
        "wte.weight": math.sqrt(64 / 2),
        "wpe.weight": pytest.approx(math.sqrt(64 / 6)),
    }
    (by_adam,) = adam.param_groups
    assert {name for name in by_adam["param_names"] if "attn" in name and name.endswith("weight")} == {
        f"transformer.h.{i}.attn.{name}.weight" for i in range(2) for name in ("c_attn", "c_proj")
    }
    assert len(by_adam["param_names"]) + len(factors) == len(policy.trainable())
    assert (by_adam["lr"], by_adam["weight_decay"], by_adam["eps"]) == (1e-3, 0.0, 1e-8)
    assert {(group["lr"], group["weight_decay"], group["momentum"]) for group in muon.param_groups} == {
        (1e-3, 0.0, 0.95)
    }
