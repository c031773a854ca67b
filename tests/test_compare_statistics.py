"""Intervals, tests and power over seeds and problems: hand-computed numbers, other packages, and simulation."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from errorbars import bootstrap_ci, wilson_ci
from errorbars.compare import paired_compare
from errorbars.leaderboard import holm_correction
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.stats import norm

from pspo.base.statistics import pass_at_k, wilson_interval
from pspo.compare import statistics
from pspo.compare.comparison import BOOTSTRAP_COVERAGE
from pspo.compare.statistics import difference, estimate

answers = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60)


def table(values, seeds=None, problems=None):
    values = np.asarray(values, dtype=float)
    return pd.DataFrame(values, index=seeds or range(len(values)), columns=problems or range(values.shape[1]))


def equal_arms(generator, repeats, num_seeds, num_problems, seed_std, arm_std=0.0):
    """Answers (0, 1) of pairs of arms of one true accuracy, repeats × 2 arms × seeds × problems, and that accuracy.

    The log-odds of a right answer are 1 + problem + problem in this arm (``arm_std``) + shared seed + own seed + noise.
    A ``seed_std`` of 0.3 moves an arm's accuracy by about 5 points.
    """
    normal = generator.standard_normal
    log_odds = 1 + 2 * normal((repeats, 1, 1, num_problems)) + arm_std * normal((repeats, 2, 1, num_problems))
    log_odds = log_odds + seed_std * (normal((repeats, 1, num_seeds, 1)) + normal((repeats, 2, num_seeds, 1)))
    log_odds = log_odds + 0.5 * normal((repeats, 2, num_seeds, num_problems))
    answers = generator.random(log_odds.shape) < 1 / (1 + np.exp(-log_odds))
    grid = np.linspace(-8, 8, 4001)
    std = math.sqrt(4 + arm_std**2 + 2 * seed_std**2 + 0.25)
    truth = np.average(1 / (1 + np.exp(-(1 + std * grid))), weights=norm.pdf(grid))
    return answers.astype(float), float(truth)


def rates(repeats, num_seeds, num_problems, seed_std, arm_std=0.0):
    """Share of equal arms that the 5 % test tells apart, and share of arms whose 95 % interval holds the truth."""
    generator = np.random.default_rng(num_seeds)
    arms, truth = equal_arms(generator, repeats, num_seeds, num_problems, seed_std, arm_std)
    rejected = [estimate(a - b).p < 0.05 for a, b in arms]
    covered = [abs(found.mean - truth) <= found.half_width for found in map(estimate, arms[:, 0])]
    return np.mean(rejected), np.mean(covered)


@pytest.mark.parametrize("num_seeds", [3, 5, 10])
def test_equal_arms_are_told_apart_about_as_often_as_promised(num_seeds):
    rejected, covered = rates(400, num_seeds, 100, 0.2)
    assert 0.02 < rejected < 0.085  # 400 of them: three standard errors about 5 %
    assert 0.915 < covered < 0.98


@pytest.mark.slow
@pytest.mark.parametrize("arm_std", [0.0, 0.7])
@pytest.mark.parametrize("seed_std", [0.1, 0.3])
@pytest.mark.parametrize("num_problems", [200, 500])
@pytest.mark.parametrize("num_seeds", [3, 5, 10])
def test_calibration(num_seeds, num_problems, seed_std, arm_std):
    """The 5 % test rejects 3 to 7 % of 2,000 pairs of equal arms, and 95 % intervals cover 93 to 97 %.

    Without any seed variance, and with three seeds, intervals are a little too wide: they cover 96 to 97.1 %.
    """
    rejected, covered = rates(2000, num_seeds, num_problems, seed_std, arm_std)
    assert 0.03 <= rejected <= 0.07
    assert 0.93 <= covered <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("num_seeds", [3, 5, 10])
def test_the_bootstrap_covers_what_is_printed_beside_it(num_seeds):
    shares = []
    for seed_std in (0.6, 0.0):
        arms, _ = equal_arms(np.random.default_rng(num_seeds), 2000, num_seeds, 200, seed_std)
        intervals = [statistics.percentiles(statistics.bootstrap(a - b).mean(1)) for a, b in arms]
        shares.append(100 * np.mean([interval["low"] <= 0 <= interval["high"] for interval in intervals]))
    assert np.abs(np.array(shares) - BOOTSTRAP_COVERAGE[num_seeds]).max() <= 1.5


@pytest.mark.slow
@pytest.mark.parametrize("num_seeds", [3, 5, 10])
def test_the_smallest_detectable_difference_is_detected_four_times_of_five(num_seeds):
    generator = np.random.default_rng(num_seeds)
    values = generator.normal(0, 1, (2000, 1, 100)) + generator.normal(0, 0.3, (2000, num_seeds, 1))
    values = values + generator.normal(0, 1, (2000, num_seeds, 100))
    variance = 0.3**2 / num_seeds + 1 / 100 + 1 / (100 * num_seeds)
    parts = [statistics.Part(0.3**2 / num_seeds + 1 / (100 * num_seeds), num_seeds, "seeds")]
    design = statistics.Estimate(0, (*parts, statistics.Part(1 / 100, 100, "problems")))
    assert design.se == pytest.approx(math.sqrt(variance))
    detected = np.mean([estimate(table + design.detectable).p < 0.05 for table in values])
    assert 0.72 < detected < 0.88


def test_a_table_by_hand():
    """[[1, 0], [1, 1], [0, 0], [1, 0]]ᵀ: row means 0.75 and 0.25, column means 0.5, 1, 0, 0.5, mean 0.5."""
    values = np.array([[1, 1, 0, 1], [0, 1, 0, 0]], dtype=float)
    of_seeds, of_problems, rest = statistics.mean_squares(values)
    assert of_seeds == pytest.approx(4 * (0.25**2 + 0.25**2) / 1)
    assert of_problems == pytest.approx(2 * (0 + 0.25 + 0.25 + 0) / 3)
    assert rest == pytest.approx((4 * 0.25**2 * 2) / 3)
    found = estimate(values)
    assert found.mean == 0.5
    assert found.se**2 == pytest.approx((of_seeds + of_problems - rest) / 8)
    assert 1 <= found.df <= 4


def test_seeds_that_agree_by_luck_leave_an_interval():
    values = np.array([[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0]], dtype=float)
    assert values.mean(1).std() == 0
    assert estimate(values).half_width > 0


def test_one_part_is_students_t():
    part = statistics.Part(0.04, 7, "problems")
    found = statistics.Estimate(0.3, (part,))
    assert found.df == pytest.approx(6, rel=1e-6)
    assert found.p == pytest.approx(2 * stats.t.sf(1.5, 6))
    assert found.half_width == pytest.approx(stats.t.ppf(0.975, 6) * 0.2)


def test_two_parts_lie_between_satterthwaite_and_cochran():
    parts = statistics.Part(0.02, 3, "seeds"), statistics.Part(0.02, 500, "problems")
    t_seeds, t_problems = stats.t.ppf(0.975, [2, 499])
    satterthwaite = stats.t.ppf(0.975, 0.04**2 / (0.02**2 / 2 + 0.02**2 / 499))
    found = statistics.Estimate(0, parts)
    assert found.half_width / found.se == pytest.approx((satterthwaite + (t_seeds + t_problems) / 2) / 2)


def test_equal_answers_are_no_difference():
    zero = estimate(np.zeros((3, 10)))
    assert (zero.p, zero.half_width, zero.detectable) == (1, 0, 0)
    assert estimate(np.ones((3, 10))).p == 0


@given(answers)
def test_two_single_models_as_errorbars_and_scipy_have_them(pairs):
    a, b = np.array(pairs, dtype=float).T
    (found, _, paired), theirs = difference(table([a]), table([b])), paired_compare(a, b)
    assert paired == "problems"
    assert found.mean == pytest.approx(theirs.mean_diff)
    assert found.se == pytest.approx(theirs.se_paired, abs=1e-12)
    assert statistics.mcnemar(a, b) == pytest.approx(theirs.mcnemar.p_value)
    if found.se > 0:
        assert found.p == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-4)
        assert found.mean - found.half_width == pytest.approx(theirs.ci_low, abs=1e-5)


def test_arms_of_different_problems_are_not_paired():
    generator = np.random.default_rng(0)
    a, b = generator.random((1, 30)), generator.random((1, 40))
    found, _, paired = difference(table(a, problems=[f"a{n}" for n in range(30)]), table(b))
    assert paired == "nothing"
    assert found.se == pytest.approx(math.sqrt(a.var(ddof=1) / 30 + b.var(ddof=1) / 40))
    assert found.p == pytest.approx(stats.ttest_ind(a[0], b[0], equal_var=False).pvalue, rel=0.02)


def test_pairing_is_by_name_and_by_seed():
    generator = np.random.default_rng(1)
    a, b = table(generator.random((3, 20))), table(generator.random((3, 20)))
    found, _, paired = difference(a, b)
    shuffled, _, shuffled_paired = difference(a, b.loc[[2, 0, 1], list(range(19, -1, -1))])
    assert paired == shuffled_paired == "seeds and problems"
    assert found.mean == pytest.approx(shuffled.mean)
    assert found.se == pytest.approx(shuffled.se)
    reverse, _, _ = difference(b, a)
    assert reverse.mean == pytest.approx(-found.mean)
    assert reverse.p == pytest.approx(found.p)


def test_other_seeds_on_the_same_problems_pair_problems_alone():
    generator = np.random.default_rng(2)
    difficulty = generator.normal(0, 1, 50)
    a, b = (table(difficulty + generator.normal(0, 0.1, (3, 50)), seeds=seeds) for seeds in ([0, 1, 2], [5, 6, 7]))
    found, draws, paired = difference(a, b)
    apart, apart_draws, apart_paired = difference(a, b.rename(columns=str))
    assert (paired, apart_paired) == ("problems", "nothing")
    assert found.se < apart.se / 3  # the problems' difficulty drops out
    interval, wide = statistics.percentiles(draws), statistics.percentiles(apart_draws)
    assert interval["high"] - interval["low"] < wide["high"] - wide["low"]


def test_an_arm_of_one_model_stands_against_each_seed():
    a, b = table(np.random.default_rng(3).random((4, 20))), table(np.random.default_rng(4).random((1, 20)), seeds=[9])
    assert difference(a, b)[0] == estimate(a.to_numpy() - b.to_numpy())


def test_the_detectable_difference_has_its_power():
    found = estimate(np.random.default_rng(5).random((4, 60)))
    critical = stats.t.ppf(0.975, found.df)
    assert stats.nct.sf(critical, found.df, found.detectable / found.se) == pytest.approx(0.8, abs=1e-6)


def test_seeds_needed_are_the_fewest_that_detect_the_mean():
    part, problems = statistics.Part(0.01**2, 3, "seeds"), statistics.Part(0.002**2, 500, "problems")
    found = statistics.Estimate(0.02, (part, problems))
    count = found.seeds_needed
    assert found.detectable > 0.02
    assert found.with_seeds(count).detectable <= 0.02 < found.with_seeds(count - 1).detectable
    assert found.with_seeds(3).se == pytest.approx(found.se)
    assert statistics.Estimate(0.001, (part, problems)).seeds_needed is None  # the problems alone vary more
    assert statistics.Estimate(0.02, (problems,)).seeds_needed is None


def test_interquartile_mean_by_hand():
    assert statistics.interquartile_mean(np.array([9, 1, 2, 3, 4, 5, 6, 100.0])) == (3 + 4 + 5 + 6) / 4
    assert statistics.interquartile_mean(np.array([[0, 1, 2, 9.0], [1, 1, 1, 1]])).tolist() == [1.5, 1]


def test_probability_of_improvement_counts_pairs():
    a, b = np.array([0.5, 0.7, 0.9]), np.array([0.5, 0.6, 0.4])
    wins = sum((x > y) + (x == y) / 2 for x, y in itertools.product(a, b)) / 9
    assert statistics.probability_of_improvement(a, b) == pytest.approx(wins)


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_as_errorbars_has_it(p_values):
    assert statistics.holm(p_values) == pytest.approx(holm_correction(p_values))


@given(st.integers(1, 6), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@given(st.integers(1, 500), st.data())
def test_wilson_as_errorbars_has_it(n, data):
    c = data.draw(st.integers(0, n))
    theirs = wilson_ci(c, n)
    assert wilson_interval(c, n) == pytest.approx((theirs.ci_low, theirs.ci_high), abs=1e-9)


def test_bootstrap_is_of_seeds_and_of_problems_and_repeats_itself():
    values = np.random.default_rng(6).random((1, 200))
    draws = statistics.bootstrap(values)
    assert draws.shape == (statistics.BOOTSTRAP_DRAWS, 1)
    np.testing.assert_allclose(draws, statistics.bootstrap(values), rtol=1e-12)
    theirs = bootstrap_ci(values[0])
    interval = {"low": theirs.ci_low, "high": theirs.ci_high}
    assert statistics.percentiles(draws.mean(1)) == pytest.approx(interval, abs=0.004)
    seeds = np.repeat([[0.0], [1.0]], 50, axis=1)  # problems agree, seeds do not: 0, 1/2 and 1 with 1/4, 1/2, 1/4
    assert np.bincount((2 * statistics.bootstrap(seeds).mean(1)).astype(int)) / 2000 == pytest.approx(
        [0.25, 0.5, 0.25], abs=0.04
    )
