from dataclasses import replace

import pytest
from training import composed, configured

from pspo.objective import OBJECTIVES, default_objective
from pspo.run.advice import advice

INERT = "one optimizer step per rollout: every ratio is 1 and the trust region is inert"
RESCALING = "is a mere rescaling here: linear smoothing multiplies the gradient by 1 - alpha"
SGD = "linear smoothing multiplies the gradient by 1 - alpha: under optimizer=sgd this is noclip at a learning rate of"
MOVING = "an alpha that changes only weighs steps against each other"
WATCHED = "loss.kl=k3 with loss.kl_weight=0 does nothing in training"
ROLLOUT = "one optimizer step per rollout: the KL to the policy that sampled the rollout is 0 and has no gradient"
MASS = (
    "objective.eps=12.5 with objective.mass=true: probabilities differ by 1 at most, so every weight is that of noclip"
)
ALL = (INERT, RESCALING, SGD, MOVING, WATCHED, ROLLOUT, MASS)
SINGLE = ["update.num_epochs=1", "update.num_minibatches=1"]
KL = ["loss.kl=k3", "loss.kl_weight=0.04"]
ENTROPY = ["loss.entropy_weight=0.01"]

TABLE = [
    ("", [RESCALING]),  # the default run: pspo under AdamW
    ("objective.alpha=0.9", [RESCALING]),
    ("objective.alpha=0", []),  # this is noclip, and nobody expects more of it
    ("smoothing=strong", [RESCALING]),
    ("loss.importance=sequence", [RESCALING]),
    ("loss.importance=sequence_token", [RESCALING]),
    ("loss.aggregation=sequence", [RESCALING]),
    ("loss.mask_truncated=true", [RESCALING]),
    ("advantage=mean", [RESCALING]),
    ("diagnostics.every=0", [RESCALING]),
    # What gives alpha an effect.
    ("loss.kl=k3 loss.kl_weight=0.04", []),
    ("loss.kl=k3", [RESCALING, WATCHED]),
    ("objective=clip loss.kl=k3 loss.entropy_weight=0.01", [WATCHED]),
    ("loss.entropy_weight=0.01", []),
    ("advantage=gae", []),  # the value loss shares the trunk
    ("advantage=gae advantage.critic=separate", [RESCALING]),  # and here it does not
    ("smoothing=linear", [MOVING]),
    ("smoothing=adaptive", [MOVING]),
    ("smoothing=linear objective.alpha=0", [MOVING]),
    ("smoothing=linear loss.entropy_weight=0.01", []),
    ("smoothing=adaptive loss.kl=k3 loss.kl_weight=0.04", []),
    ("objective=pspo_geometric smoothing=linear", []),
    # Under SGD alpha is a factor on the learning rate, unless another term of the loss stays as it was.
    ("optimizer=sgd", [SGD]),
    ("optimizer=sgd optimizer.momentum=0.9", [SGD]),
    ("optimizer=sgd objective.alpha=0", []),
    ("optimizer=sgd loss.kl=k3 loss.kl_weight=0.04", []),
    ("optimizer=sgd loss.entropy_weight=0.01", []),
    ("optimizer=sgd advantage=gae", []),
    ("optimizer=sgd objective=pspo_geometric", []),
    # One optimizer step per rollout.
    ("update.num_epochs=1", [RESCALING]),
    ("update.num_minibatches=1", [RESCALING]),
    ("update.num_epochs=1 update.num_minibatches=1", [INERT, RESCALING]),
    ("update.num_epochs=1 update.num_minibatches=1 optimizer=sgd", [INERT, SGD]),
    ("update.num_epochs=1 update.num_minibatches=1 objective=clip", [INERT]),
    ("update.num_epochs=1 update.num_minibatches=1 loss.entropy_weight=0.01", [INERT]),
    # The published recipes.
    ("experiment=ppo", []),
    ("experiment=ppo_pspo", []),
    ("experiment=grpo", []),
    ("experiment=dapo", []),
    ("experiment=drpo", [MASS]),
    ("experiment=drpo objective.eps=1", []),
    ("experiment=tpo update.num_epochs=1", []),  # its target acts at a ratio of 1 too
    ("experiment=grpo loss.reference=rollout", []),
    ("experiment=grpo loss.reference=rollout update.num_epochs=1 update.num_minibatches=1", [INERT, ROLLOUT]),
    ("objective=pspo_relative", []),
    ("loss.gate=delight", [RESCALING]),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "told"), TABLE)
def test_what_is_said_of_a_run(overrides, told):
    sentences = advice(configured(*overrides.split()))
    assert [next(start for start in ALL if start in sentence) for sentence in sentences] == told


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "pspo"])
def test_nothing_is_said_of_other_objectives_but_that_they_are_inert(name):
    """pspo_geometric and pspo_clip are not linear in the ratio; the others have no alpha."""
    for options in ([], ["optimizer=sgd"]):
        config = replace(configured(*options), objective=default_objective(name))
        assert advice(config) == []
        sentences = advice(replace(config, update=configured(*SINGLE).update))
        assert [sentence.startswith(INERT) for sentence in sentences] == [True] * (not OBJECTIVES[name].needs_batch)


def test_a_mere_rescaling_is_told_with_its_alpha_and_with_what_would_change_it():
    (sentence,) = advice(configured("objective.alpha=0.25"))
    assert sentence.startswith("alpha=0.25 is a mere rescaling here")
    remedies = [["objective=pspo_geometric"], ["objective=pspo_clip"], KL, ENTROPY, ["smoothing=linear"]]
    for remedy in remedies:
        for override in remedy:
            name, _, value = override.partition("=")
            assert name in sentence or value in sentence
        assert not any(RESCALING in told for told in advice(configured(*remedy)))
    assert "optimizer=sgd" in sentence


def test_one_step_per_rollout_is_told_with_the_keys_that_change_it():
    (sentence, _) = advice(configured(*SINGLE))
    assert "update.num_epochs" in sentence
    assert "update.num_minibatches" in sentence


def about_lora(*overrides, **changes):
    pytest.importorskip("peft")
    config = composed(*overrides)
    told = advice(replace(config, optimizer=replace(config.optimizer, **changes)))
    return [sentence for sentence in told if "adapters" in sentence]


TENFOLD = [("hf model.path=/any", "1e-06", "1e-05"), ("qwen0_5b", "5e-07", "5e-06"), ("tiny", "5e-05", "0.0005")]


@pytest.mark.parametrize(("name", "lr", "tenfold"), TENFOLD)
def test_a_rate_that_is_low_for_adapters_is_told_with_tenfold_the_rate_for_all_weights(name, lr, tenfold):
    given = [*f"model={name}".split(), "model.lora.rank=8"]
    (sentence,) = about_lora(*given)
    assert sentence.startswith(f"optimizer.lr={lr} is low for adapters")
    assert "Schulman et al. 2025, LoRA Without Regret" in sentence
    assert sentence.endswith(f"model={name.split()[0]} has {lr} for all weights, so try optimizer.lr={tenfold}")
    assert about_lora(*given, lr=float(tenfold)) == about_lora(*given, lr=0.6 * float(tenfold)) == []
    assert len(about_lora(*given, lr=0.4 * float(tenfold))) == 1


def test_nothing_is_said_of_other_rates():
    """Of all weights, of an optimizer whose rate is of another kind, of a model without a rate of its own here."""
    assert about_lora("model=hf", "model.hub_id=a/b") == []
    assert about_lora("model=hf", "model.hub_id=a/b", "model.lora.rank=8", "optimizer=sgd") == []
    assert about_lora("model=hf", "model.hub_id=a/b", "model.lora.rank=8", "model.name=mine") == []
