import pytest
import torch
from training import configured
from transformers import get_linear_schedule_with_warmup

from pspo.budget import Progress
from pspo.tracker import Tracker
from pspo.trainer import State, Trainer


def make_trainer(policy, directory, *overrides):
    config = configured("tracker=jsonl", "optimizer.decay=linear", *overrides)
    tracker = Tracker(config.tracker, directory)
    return Trainer(config, directory, policy, [], [], None, tracker)


def rates(trainer, num_steps, tokens_per_step=7):
    """The learning rates of all optimizer steps, as ``_step`` asks for them."""
    progress, found = trainer.state.progress, []
    for _ in range(num_steps):
        start = trainer.config.budget.fraction(progress)
        progress.steps += 1
        progress.prompts += trainer.config.rollout.prompts
        progress.completion_tokens += tokens_per_step
        found += trainer._learning_rates(start, trainer.config.budget.fraction(progress))
        progress.optimizer_steps += trainer.config.update.steps
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
    trainer = make_trainer(tiny_policy(), tmp_path, f"optimizer.warmup_steps={warmup}", *budget)
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
    whole = rates(make_trainer(tiny_policy(), tmp_path, *overrides), 6)
    for cut in range(1, 6):
        first = make_trainer(tiny_policy(), tmp_path, *overrides)
        before = rates(first, cut)
        second = make_trainer(tiny_policy(), tmp_path, *overrides)
        state = first.state
        second.state = State(Progress(**vars(state.progress)), warmup_fraction=state.warmup_fraction)
        assert before + rates(second, 6 - cut) == whole
