import json
import sys
from dataclasses import is_dataclass, replace

import pytest
import torch
from training import configured, make_trainer, scripted
from transformers import get_linear_schedule_with_warmup

from pspo.base.schema import Schema
from pspo.budget import Progress
from pspo.dataset import order
from pspo.report.metrics import meaning
from pspo.tracker import Tracker
from pspo.trainer import State, Trainer


def idle_trainer(policy, directory, *overrides):
    config = configured("tracker=jsonl", "optimizer.decay=linear", *overrides)
    tracker = Tracker(config.tracker, directory)
    return Trainer(config, directory, policy, [], [], None, tracker)


def rates(trainer, num_steps, tokens_per_step=7):
    """The learning rates of all optimizer steps, as ``_learn`` asks for them."""
    config, state, found = trainer.config, trainer.state, []
    progress = state.progress
    for _ in range(num_steps):
        start = config.budget.fraction(progress)
        progress.steps += 1
        progress.prompts += config.rollout.prompts
        progress.completion_tokens += tokens_per_step
        learning_rates, state.warmup_fraction = config.optimizer.rates(
            progress.optimizer_steps,
            config.update.steps,
            start,
            config.budget.fraction(progress),
            state.warmup_fraction,
        )
        found += learning_rates
        progress.optimizer_steps += config.update.steps
    return found


@pytest.mark.parametrize("warmup", [0, 1, 3, 4, 9])
@pytest.mark.parametrize(
    "budget",
    [
        ["budget.steps=6"],
        ["budget.steps=null", "budget.prompts=192"],
        ["budget.steps=null", "budget.completion_tokens=42"],
    ],
)
def test_linear_decay_is_that_of_transformers_in_any_unit_of_budget(tiny_policy, tmp_path, budget, warmup):
    trainer = idle_trainer(tiny_policy(), tmp_path, f"optimizer.warmup_steps={warmup}", *budget)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=trainer.config.optimizer.lr)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, 24)
    expected = []
    for _ in range(24):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    found = rates(trainer, 6)
    assert found[warmup:] == pytest.approx(expected[warmup:], rel=1e-9)
    lr = trainer.config.optimizer.lr
    assert found[:warmup] == pytest.approx([lr * (i + 1) / warmup for i in range(warmup)])


def test_a_resumed_schedule_goes_on_where_it_was(tiny_policy, tmp_path):
    overrides = ["optimizer.warmup_steps=5", "budget.steps=6"]
    whole = rates(idle_trainer(tiny_policy(), tmp_path, *overrides), 6)
    for cut in range(1, 6):
        first = idle_trainer(tiny_policy(), tmp_path, *overrides)
        before = rates(first, cut)
        second = idle_trainer(tiny_policy(), tmp_path, *overrides)
        state = first.state
        second.state = State(Progress(**vars(state.progress)), warmup_fraction=state.warmup_fraction)
        assert before + rates(second, 6 - cut) == whole


# --- a step of a run


def test_a_step_touches_at_most_fourteen_types_of_records(tiny_policy, tmp_path):
    """With a value model, a reference and a counterfactual probe; settings, each a ``Schema``, are no records."""
    records = set()

    def watch(frame, event, _):
        own = type(frame.f_locals.get("self"))
        if event == "call" and frame.f_code.co_name == "__init__" and own.__module__.startswith("pspo."):
            records.update({own} if is_dataclass(own) and not issubclass(own, Schema) else ())

    overrides = ["advantage=gae", "loss.kl=k3", "loss.kl_weight=0.1", "diagnostics.counterfactual_every=1"]
    sys.setprofile(watch)
    try:
        make_trainer(tiny_policy(), tmp_path, "budget.steps=1", *overrides).run()
    finally:
        sys.setprofile(None)
    assert {Trainer, State, Progress} <= records
    assert len(records) <= 14, sorted(record.__name__ for record in records)


def trainer_of(policy, directory, reward, *overrides):
    overrides = ("budget.steps=2", "rollout.max_redraws=2", *overrides)
    return make_trainer(policy, directory, *overrides, reward=reward, num_problems=20)


def weights(policy):
    return torch.cat([p.detach().flatten().clone() for p in policy.trainable().values()])


def test_generated_and_used_prompts_are_both_counted(tiny_policy, tmp_path):
    places = order(20, 0, 0, 20)
    trainer = trainer_of(tiny_policy(), tmp_path, scripted({places[i] for i in (0, 2, 3, 5)}))
    first, second = trainer._step(), trainer._step()
    assert (first["budget/prompts"], first["budget/prompts_used"]) == (3, 2)  # 0, 1 and 2
    assert (second["budget/prompts"], second["budget/prompts_used"]) == (6, 4)  # 3, 4 and 5
    assert second["budget/optimizer_steps"] == 8
    assert first["budget/completion_tokens"] > 0


@pytest.mark.parametrize(
    ("overrides", "spread"),
    [
        pytest.param([], set(), id="no spread"),
        pytest.param(["advantage=gae"], set(), id="no spread, value model"),
        pytest.param(["loss.kl=k3", "loss.kl_weight=0.1"], set(), id="no spread, reference"),
        pytest.param(["rollout.max_redraws=0", "loss.mask_truncated=true"], set(range(20)), id="all truncated"),
    ],
)
def test_a_run_goes_on_where_a_step_has_nothing_to_learn_from(tiny_policy, tmp_path, overrides, spread):
    """No optimizer step, the weights are as before, and the run comes to its end."""
    policy = replace(tiny_policy(), stop_ids=[-1])  # no token ends a completion
    before = weights(policy)
    trainer = trainer_of(policy, tmp_path, scripted(spread), *overrides)
    state = trainer.run()
    assert state.progress.steps == 2
    assert state.progress.optimizer_steps == 0
    assert torch.equal(weights(policy), before)
    assert state.progress.prompts == (12 if not spread else 4)


@pytest.mark.parametrize(
    ("overrides", "metric"),
    [
        (["objective=tpo", "update.num_minibatches=2"], "gradient/zero_advantage_share"),
        (["loss.drop=m2", "loss.drop_limit=1e-6"], "loss/dropped_rate"),
        (
            ["experiment=grpo", "loss.importance=product", "loss.reference=rollout", "loss.gate=delight"],
            "policy/kl_reference",
        ),
    ],
)
def test_what_takes_the_whole_batch_or_completion_runs(tiny_policy, tmp_path, overrides, metric):
    trainer = make_trainer(tiny_policy(), tmp_path, *overrides)
    before = [p.detach().clone() for p in trainer.policy.trainable().values()]
    trainer.run()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(metric in row for row in rows if row["step"] > 0)
    assert {key for row in rows for key in row if meaning(key) is None} == set()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.policy.trainable().values(), strict=True))
