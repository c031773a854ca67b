import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pspo.base.schema import ConfigError, build
from pspo.budget import Budget, Progress

UNITS = ("steps", "prompts", "completion_tokens")
NONE = dict.fromkeys(UNITS)
units = pytest.mark.parametrize("unit", UNITS)


def budget(**values):
    return Budget(**NONE | values)


@units
def test_one_unit_is_what_a_run_may_spend(unit):
    made = build(Budget, NONE | {unit: 7})
    assert (made.unit, made.total) == (unit, 7)


@pytest.mark.parametrize("given_units", [(), *itertools.combinations(UNITS, 2), UNITS])
def test_no_unit_and_two_units_are_refused(given_units):
    got = ", ".join(f"budget.{name}=3" for name in given_units) or "none"
    message = f"give exactly one of budget.steps, budget.prompts and budget.completion_tokens, got {got}; set the"
    for make in (lambda values: Budget(**values), lambda values: build(Budget, values)):
        with pytest.raises(ConfigError, match=re.escape(message)):
            make(NONE | dict.fromkeys(given_units, 3))


@pytest.mark.parametrize(
    ("unit", "value", "told"),
    [
        ("steps", -1, "in [0, inf)"),
        ("prompts", 0, "in [1, inf)"),
        ("completion_tokens", 0, "in [1, inf)"),
        ("steps", 1.5, "a whole number or null"),
        ("prompts", "all", "a whole number or null"),
    ],
)
def test_bad_values_are_refused(unit, value, told):
    with pytest.raises(ConfigError, match=re.escape(f"budget.{unit} must be {told}, got {value!r}")):
        budget(**{unit: value})


def test_no_steps_is_a_run_that_only_evaluates():
    assert budget(steps=0).spent(Progress())
    assert budget(steps=0).fraction(Progress()) == 1


@units
@given(total=st.integers(1, 10**9), done=st.integers(0, 2 * 10**9), other=st.integers(0, 10**9))
def test_fraction_and_spent_count_their_own_unit(unit, total, done, other):
    made = budget(**{unit: total})
    progress = Progress(**{**dict.fromkeys((*UNITS, "optimizer_steps"), other), unit: done})
    assert made.fraction(progress) == min(1.0, done / total)
    assert made.spent(progress) == (done >= total) == (made.fraction(progress) == 1)


@units
def test_a_run_spends_its_budget_from_nothing_to_all(unit):
    made, progress, fractions = budget(**{unit: 10}), Progress(), []
    while not made.spent(progress):
        fractions.append(made.fraction(progress))
        setattr(progress, unit, getattr(progress, unit) + 4)
    assert fractions == [0.0, 0.4, 0.8]
    assert made.fraction(progress) == 1


def test_all_counters_are_metrics():
    assert Progress(1, 2, 3, 4, 5).metrics() == {
        "budget/steps": 1,
        "budget/prompts": 2,
        "budget/completion_tokens": 3,
        "budget/prompts_used": 4,
        "budget/optimizer_steps": 5,
    }
