"""An optimizer step that cannot be trusted stops the run in one sentence, and no checkpoint is made of it."""

import json
import math
import re
import signal
from dataclasses import replace

import pytest
import torch
from training import make_trainer

from pspo import checkpoint
from pspo.host import interrupt
from pspo.rollout import OwnSampler
from pspo.update import NonFiniteError, SamplerGapError, UpdateError, check_gap

STEPS = ["budget.steps=4", "checkpoint.every=1", "update.num_epochs=1", "update.num_minibatches=2"]


def weights(trainer):
    return [p.detach().clone() for group in trainer.optimizer.param_groups for p in group["params"]]


def steps(directory):
    return [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def assert_resumable_at(step, policy, directory, *overrides):
    """The newest checkpoint is that of ``step`` with finite weights, and the run goes on from there to its end."""
    assert steps(directory) == list(range(step + 1))
    resumed = make_trainer(policy, directory, *overrides)
    assert resumed.state.progress.steps == step
    assert resumed.state.progress.optimizer_steps == 2 * step
    assert all(p.isfinite().all() for p in weights(resumed))
    assert resumed.run().progress.steps == 4


# --- weights that are not finite


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("number", [5, 6])
@pytest.mark.parametrize("of", ["policy", "value model"])
def test_a_weight_that_an_optimizer_step_makes_non_finite_stops_the_run(tiny_policy, tmp_path, every, number, of):
    """In the first and in the last optimizer step of step 3; a single coordinate, which no estimate samples."""
    overrides = [*STEPS, f"diagnostics.every={every}", *(["advantage=gae"] if of == "value model" else [])]
    trainer, taken = make_trainer(tiny_policy(), tmp_path, *overrides), []

    def spoil(*_):
        taken.append(1)
        if len(taken) == number:
            group = trainer.optimizer.param_groups[0 if of == "policy" else 1]
            group["params"][0].detach().flatten()[1] = math.nan

    trainer.optimizer.register_step_post_hook(spoil)
    failure = tmp_path / "failed_step_000003.pt"
    told = "made weights that are not finite; nothing of this step is saved, so that the last checkpoint is good; lower"
    with pytest.raises(NonFiniteError, match=re.escape(told)) as caught:
        trainer.run()
    assert str(failure) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(taken) == number
    assert len(torch.load(failure, weights_only=True)) == 4  # the minibatch
    assert checkpoint.names(trainer.checkpoints)[0] == "step_000002"
    assert_resumable_at(2, tiny_policy(), tmp_path, *overrides)


@pytest.mark.parametrize("every", [0, 1])
def test_a_learning_rate_out_of_all_bounds_stops_the_run(tiny_policy, tmp_path, every):
    sgd = ["optimizer=sgd", "optimizer.lr=3e38", "optimizer.warmup_steps=0", "optimizer.max_grad_norm=.inf"]
    trainer = make_trainer(tiny_policy(), tmp_path, *STEPS, *sgd, f"diagnostics.every={every}")
    with pytest.raises(
        NonFiniteError, match=r"^learning rate 3e\+38 made weights that are not finite; .*optimizer\.lr"
    ):
        trainer.run()
    assert checkpoint.names(trainer.checkpoints) == []
    assert steps(tmp_path) == [0]


def test_a_signal_that_comes_with_a_weight_that_is_not_finite_saves_nothing(tiny_policy, tmp_path, monkeypatch):
    """A run that is told to stop saves the steps since its last checkpoint, but not a step that failed."""
    overrides = [*STEPS, "checkpoint.every=4"]
    trainer, taken = make_trainer(tiny_policy(), tmp_path, *overrides), []

    def spoil(*_):
        taken.append(1)
        if len(taken) == 3:
            monkeypatch.setattr(interrupt, "_received", signal.SIGTERM)
            trainer.optimizer.param_groups[0]["params"][0].detach().fill_(math.inf)

    trainer.optimizer.register_step_post_hook(spoil)
    with pytest.raises(NonFiniteError):
        trainer.run()
    assert checkpoint.names(trainer.checkpoints) == []


# --- a sampler that is another policy than the trainer


class Shifted:
    """A sampler whose log-probabilities are off by ``shift_nats`` from call ``first`` on."""

    def __init__(self, sampler, shift_nats, first=1):
        self.sampler, self.shift_nats, self.first, self.calls = sampler, shift_nats, first, 0

    def refresh(self, policy):
        self.sampler.refresh(policy)

    def sleep(self):
        self.sampler.sleep()

    def sample(self, *given, **named):
        self.calls += 1
        shift = self.shift_nats if self.calls >= self.first else 0.0
        completions = self.sampler.sample(*given, **named)
        return [replace(c, logprobs=[logprob + shift for logprob in c.logprobs]) for c in completions]


def shifted(trainer, *how):
    trainer.sampler = Shifted(trainer.sampler, *how)
    return trainer


@pytest.mark.parametrize("old_logprobs", ["sampler", "recompute"])
@pytest.mark.parametrize("shift_nats", [2e-3, -2e-3, 3.0])
def test_a_sampler_that_is_off_stops_the_run_before_anything_is_learned(
    tiny_policy, tmp_path, old_logprobs, shift_nats
):
    overrides = [*STEPS, f"update.old_logprobs={old_logprobs}"]
    trainer, taken = shifted(make_trainer(tiny_policy(), tmp_path, *overrides), shift_nats), []
    trainer.optimizer.register_step_pre_hook(lambda *_: taken.append(1))
    before = weights(trainer)
    with pytest.raises(
        SamplerGapError, match=r"differ from the sampler's by .* nats on average, .* 0\.001 of rounding"
    ):
        trainer.run()
    assert not taken
    assert all(map(torch.equal, weights(trainer), before))
    assert checkpoint.names(trainer.checkpoints) == []
    assert steps(tmp_path) == [0]


@pytest.mark.parametrize("old_logprobs", ["sampler", "recompute"])
def test_every_rollout_is_looked_at(tiny_policy, tmp_path, old_logprobs):
    overrides = [*STEPS, f"update.old_logprobs={old_logprobs}"]
    trainer = shifted(make_trainer(tiny_policy(), tmp_path, *overrides), 2e-3, 3)
    with pytest.raises(UpdateError, match="nothing was learned"):
        trainer.run()
    assert_resumable_at(2, tiny_policy(), tmp_path, *overrides)


@pytest.mark.parametrize("old_logprobs", ["sampler", "recompute"])
def test_a_sampler_that_is_off_by_rounding_goes_on(tiny_policy, tmp_path, old_logprobs):
    overrides = [*STEPS, f"update.old_logprobs={old_logprobs}"]
    trainer = shifted(make_trainer(tiny_policy(), tmp_path, *overrides), 5e-4)
    assert trainer.run().progress.optimizer_steps == 8
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["policy/sampler_gap_mean"] for row in rows[1:]] == pytest.approx([5e-4] * 4, rel=0.05)


@pytest.mark.parametrize("old_logprobs", ["sampler", "recompute"])
def test_products_in_bfloat16_have_a_wider_bound(tiny_policy, tmp_path, old_logprobs):
    def trainer_of(directory, shift_nats):
        policy = replace(tiny_policy(), autocast=True)
        return shifted(
            make_trainer(policy, directory, *STEPS, "budget.steps=1", f"update.old_logprobs={old_logprobs}"), shift_nats
        )

    assert trainer_of(tmp_path / "near", 0.1).run().progress.steps == 1
    with pytest.raises(SamplerGapError, match=r"more than the 0\.15 of rounding in bfloat16"):
        trainer_of(tmp_path / "far", 0.25).run()


@pytest.mark.parametrize("old_logprobs", ["sampler", "recompute"])
def test_a_sampler_with_other_weights_stops_the_run(tiny_policy, tmp_path, old_logprobs):
    trainer = make_trainer(tiny_policy(), tmp_path, *STEPS, f"update.old_logprobs={old_logprobs}")
    other = OwnSampler(tiny_policy(seed=1), trainer.config.rollout)
    other.refresh = lambda policy: None
    trainer.sampler = other
    with pytest.raises(SamplerGapError):
        trainer.run()


def test_a_gap_that_is_no_number_is_refused():
    """As of a sampler whose log-probs are NaN, under update.old_logprobs=recompute."""
    check_gap(1e-3, False)
    check_gap(0.15, True)
    for gap in (1.001e-3, math.inf, math.nan):
        with pytest.raises(SamplerGapError):
            check_gap(gap, False)
