import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_linear_schedule_with_warmup

from pspo.base.schema import ConfigError, build
from pspo.optimizer import OPTIMIZERS, SGD, AdamW, Muon, Optimizer

SHARED = {"lr": 0.5, "warmup_steps": 4, "decay": "linear", "max_grad_norm": 1.0}
ADAMW = {"name": "adamw", **SHARED, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.1, "sharded": False}
MUON = ADAMW | {"name": "muon", "momentum": 0.9, "adjust_lr_fn": "original"}
MUON |= {"matrices": r".*(a|embed)\.weight", "embeddings": r"embed\.weight"}
PLAIN = {"name": "sgd", **SHARED, "momentum": 0.3}


# --- the learning rate


def by_the_library(lr, warmup_steps, total):
    """The learning rate of every step under transformers' schedule."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=lr)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup_steps, total)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(("warmup_steps", "total"), [(0, 1), (0, 10), (1, 10), (4, 10), (140, 200)])
def test_linear_schedule_is_transformers_but_for_the_warm_up_one_step_ahead(warmup_steps, total):
    config = replace(AdamW(**ADAMW), warmup_steps=warmup_steps)
    got = [config.lr_at(k, k / total, warmup_steps / total) for k in range(total)]
    expected = by_the_library(config.lr, warmup_steps, total)
    assert got[warmup_steps:] == pytest.approx(expected[warmup_steps:], rel=1e-12)
    # theirs is k / W, ours (k + 1) / W: no step is wasted at a learning rate of 0
    assert got[:warmup_steps] == pytest.approx(
        [e + config.lr / warmup_steps for e in expected[:warmup_steps]], rel=1e-12
    )
    assert max(got) == config.lr
    assert min(got) > 0


@given(
    warmup_steps=st.integers(0, 20),
    step=st.integers(0, 100),
    fractions=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
)
def test_constant_after_the_warm_up(warmup_steps, step, fractions):
    config = replace(SGD(**PLAIN), warmup_steps=warmup_steps, decay="constant")
    warmup_fraction, fraction = fractions
    expected = 0.5 * min(1, (step + 1) / max(warmup_steps, 1))
    assert config.lr_at(step, fraction, warmup_fraction) == pytest.approx(expected, rel=1e-12)


@given(fractions=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted))
def test_linear_decay_falls_from_the_end_of_the_warm_up_to_zero_at_the_end_of_the_budget(fractions):
    config = SGD(**PLAIN)
    warmup_fraction, fraction = fractions
    assert 0 <= config.lr_at(100, fraction, warmup_fraction) <= config.lr
    assert config.lr_at(100, 1.0, warmup_fraction) == 0
    if warmup_fraction < 1:
        assert config.lr_at(4, warmup_fraction, warmup_fraction) == pytest.approx(config.lr, rel=1e-9)


def test_by_hand():
    config = SGD(**PLAIN)
    assert [config.lr_at(k, 0.05 * k, 0.0) for k in range(4)] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert config.lr_at(4, 0.2, 0.2) == pytest.approx(0.5)
    assert config.lr_at(9, 0.6, 0.2) == pytest.approx(0.25)


# --- the torch optimizers


def test_make_hands_every_field_on():
    weight = torch.nn.Parameter(torch.ones(2))
    adamw = AdamW(**ADAMW).make([weight])
    assert type(adamw) is torch.optim.AdamW
    told = {name: adamw.defaults[name] for name in ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")}
    assert told == {
        "lr": 0.5, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, "amsgrad": False, "maximize": False
    }  # fmt: skip
    sgd = SGD(**PLAIN).make([weight])
    assert type(sgd) is torch.optim.SGD
    told = {name: sgd.defaults[name] for name in ("lr", "momentum", "dampening", "weight_decay", "nesterov")}
    assert told == {"lr": 0.5, "momentum": 0.3, "dampening": 0, "weight_decay": 0, "nesterov": False}
    assert adamw.param_groups[0]["params"] == sgd.param_groups[0]["params"] == [weight]


def test_make_takes_an_iterator():
    model = torch.nn.Linear(2, 2)
    assert len(AdamW(**ADAMW).make(iter(model.parameters())).param_groups[0]["params"]) == 2


def named(*shapes):
    return [(name, torch.nn.Parameter(torch.ones(shape))) for name, shape in shapes]


def test_muon_takes_the_named_matrices_adamw_all_else_and_a_step_is_theirs():
    torch.manual_seed(0)
    groups = [{"params": named(("a.weight", (4, 2)), ("embed.weight", (2, 8)), ("a.bias", (4,)), ("head", (3, 2)))}]
    made = Muon(**MUON).make(groups)
    assert [group["param_names"] for group in made.param_groups] == [["a.bias", "head"], ["a.weight"], ["embed.weight"]]
    assert [group.get("lr_factor", 1.0) for group in made.param_groups] == [1, 1, 2]  # √(8 / 2)
    theirs = {name: torch.nn.Parameter(p.detach().clone()) for group in groups for name, p in group["params"]}
    parts = [
        torch.optim.AdamW([theirs["a.bias"], theirs["head"]], 0.5, (0.8, 0.95), 1e-6, 0.1, fused=True),
        torch.optim.Muon([theirs["a.weight"]], 0.5, weight_decay=0.1, momentum=0.9, adjust_lr_fn="original"),
        torch.optim.Muon([theirs["embed.weight"]], 1.0, weight_decay=0.1, momentum=0.9, adjust_lr_fn="original"),
    ]
    for _ in range(3):
        for name, parameter in groups[0]["params"]:
            parameter.grad = torch.randn_like(parameter)
            theirs[name].grad = parameter.grad.clone()
        for group in made.param_groups:  # as an update sets them
            group["lr"] = 0.5 * group.get("lr_factor", 1.0)
        for part in [made, *parts]:
            part.step()
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in groups[0]["params"])
    again = Muon(**MUON).make(groups)
    again.load_state_dict(made.state_dict())
    assert str(again.state_dict()) == str(made.state_dict())
    made.zero_grad()
    assert all(parameter.grad is None for _, parameter in groups[0]["params"])


def test_muon_without_matrices_or_without_anything_else():
    only = Muon(**MUON).make([{"params": named(("a.weight", (4, 2))), "lr_factor": 3.0}])
    assert [(group["param_names"], group["lr_factor"]) for group in only.param_groups] == [(["a.weight"], 3.0)]
    with pytest.raises(ConfigError, match=r"optimizer.matrices=.*: no trained matrix has such a name"):
        Muon(**MUON).make([{"params": named(("a.bias", (4,)))}])


# --- configuration


@pytest.mark.parametrize("values", [ADAMW, PLAIN, MUON], ids=lambda v: v["name"])
def test_name_selects_the_class(values):
    made = build(Optimizer, values)
    assert type(made) is OPTIMIZERS[values["name"]]
    assert vars(made) == values


BAD = [
    *[(v, "lr", x, "in (0, inf)") for v in (ADAMW, PLAIN) for x in (0.0, -1e-6, math.inf, math.nan)],
    *[(v, "warmup_steps", -1, "in [0, inf)") for v in (ADAMW, PLAIN)],
    *[(v, "warmup_steps", 1.5, "a whole number") for v in (ADAMW, PLAIN)],
    *[(v, "decay", "cosine", "one of constant, linear") for v in (ADAMW, PLAIN)],
    *[(v, "max_grad_norm", x, "in (0, inf]") for v in (ADAMW, PLAIN) for x in (0.0, -1.0, math.nan)],
    *[(ADAMW, name, x, "in [0, 1)") for name in ("beta1", "beta2") for x in (1.0, -0.1, math.nan)],
    *[(ADAMW, "eps", x, "in (0, inf)") for x in (0.0, -1e-8, math.inf)],
    *[(ADAMW, "weight_decay", x, "in [0, inf)") for x in (-0.1, math.inf)],
    *[(PLAIN, "momentum", x, "in [0, 1)") for x in (1.0, -0.1)],
]


@pytest.mark.parametrize(("good", "field", "value", "told"), BAD)
def test_bad_fields_are_refused(good, field, value, told):
    values = {**good, field: value}
    for make in (lambda: OPTIMIZERS[good["name"]](**values), lambda: build(Optimizer, values)):
        with pytest.raises(ConfigError, match=re.escape(f"optimizer.{field} must be {told}, got {value!r}")):
            make()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**ADAMW, "name": "adam"}, "unknown optimizer adam (did you mean adamw?); known: adamw, sgd"),
        ({**PLAIN, "beta1": 0.9}, "unknown key optimizer.beta1"),
        (PLAIN | {"name": "adamw"}, "unknown key optimizer.momentum"),
        ({k: v for k, v in PLAIN.items() if k != "lr"}, "optimizer.lr has no value"),
    ],
)
def test_bad_blocks_are_refused(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        build(Optimizer, values)


def test_no_bound_on_the_gradient_norm_is_infinity():
    assert replace(SGD(**PLAIN), max_grad_norm=math.inf).max_grad_norm == math.inf
