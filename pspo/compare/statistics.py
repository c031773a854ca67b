"""Means and differences over seeds and problems with calibrated intervals and tests, and what few seeds can decide.

Letters: S seeds, P problems, B bootstrap draws. The score of seed s on problem p is D_sp = μ + u_s + v_p + e_sp: seeds
and problems are both drawn from populations, and a seed moves many problems at once. A difference of two arms that
share seeds and problems is such a score too, and so is paired.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special, stats

Floats = NDArray[np.float64]

LEVEL, POWER = 0.05, 0.8
"""Level of every test, one minus which every interval covers; power of the smallest detectable difference."""
TRIMMED_SHARE, MIN_TRIMMED_SEEDS = 0.25, 4
"""Share of the seeds that the interquartile mean leaves out at each end; fewest seeds that have such a mean."""
BOOTSTRAP_DRAWS = 2000
MAX_SEEDS = 100  # an arm, beyond which ``seeds_needed`` does not look


@dataclass(frozen=True)
class Part:
    """A part of the variance of a mean: ``variance`` was estimated from ``count`` independent seeds or problems."""

    variance: float
    count: int
    of: Literal["seeds", "problems"]


@dataclass(frozen=True)
class Estimate:
    """A mean whose variance is a sum of parts, each with degrees of freedom of its own.

    The critical value is the midpoint of two classical ones: Student's t with Satterthwaite's degrees of freedom
    (1946, Biometrics Bull. 2:110), (Σ V_i)² / Σ (V_i² / f_i), which rejects up to 8 % of equal arms at three seeds, and
    Cochran's mean of the parts' t weighted by V_i (1964, Biometrics 20:191), which rejects down to 3.4 %. The midpoint
    holds at 3, 5 and 10 seeds, with small and with large seed variance (tests/test_compare_statistics.py).
    """

    mean: float
    parts: tuple[Part, ...]

    @cached_property
    def se(self) -> float:
        """The standard error √(Σ V_i)."""
        return math.sqrt(sum(part.variance for part in self.parts))

    @cached_property
    def df(self) -> float:
        """The degrees of freedom at which Student's t has the critical value of this estimate."""
        variances = np.array([part.variance for part in self.parts])
        dfs = np.array([part.count - 1.0 for part in self.parts])
        if not variances.any():
            return float(dfs.min())
        satterthwaite = variances.sum() ** 2 / (variances**2 / dfs).sum()
        cochran = variances @ special.stdtrit(dfs, 1 - LEVEL / 2) / variances.sum()
        critical = (special.stdtrit(satterthwaite, 1 - LEVEL / 2) + cochran) / 2
        return float(special.stdtridf(1 - LEVEL / 2, critical))

    @property
    def half_width(self) -> float:
        """Half of the width of the 95 % interval."""
        return float(special.stdtrit(self.df, 1 - LEVEL / 2)) * self.se

    @property
    def p(self) -> float:
        """The two-sided p-value of a mean of zero."""
        if self.se == 0:
            return float(self.mean == 0)
        return float(2 * special.stdtr(self.df, -abs(self.mean) / self.se))

    @property
    def detectable(self) -> float:
        """The smallest true mean that this design tells from zero with ``POWER`` at ``LEVEL``, by noncentral t."""
        critical = special.stdtrit(self.df, 1 - LEVEL / 2)
        return float(special.nctdtrinc(self.df, 1 - POWER, critical)) * self.se

    def with_seeds(self, count: int) -> "Estimate":
        """The same mean as ``count`` seeds an arm would show it: the seeds' part shrinks, the problems' part stays."""
        scaled = [Part(p.variance * p.count / count, count, p.of) if p.of == "seeds" else p for p in self.parts]
        return Estimate(self.mean, tuple(scaled))

    @property
    def seeds_needed(self) -> int | None:
        """The fewest seeds an arm that would detect the mean as it is; None where ``MAX_SEEDS`` would not."""
        enough = (n for n in range(2, MAX_SEEDS + 1) if self.with_seeds(n).detectable <= abs(self.mean))
        return next(enough, None) if any(part.of == "seeds" for part in self.parts) else None


def mean_squares(values_SP: Floats) -> tuple[float, float, float]:
    """Mean squares of seeds, of problems and of the rest, of a two-way table without replication.

    Their expectations are σ²_e + P σ²_u, σ²_e + S σ²_v and σ²_e. The first is at least the 2.5 % point of what σ²_u = 0
    gives: seeds that agree better than their sampling noise allows are luck, and no interval has width zero for it.
    """
    num_seeds, num_problems = values_SP.shape
    seed_S1, problem_P = values_SP.mean(1, keepdims=True), values_SP.mean(0)
    rest_SP = values_SP - seed_S1 - problem_P + values_SP.mean()
    rest = float((rest_SP**2).sum()) / ((num_seeds - 1) * (num_problems - 1))
    floor = rest * stats.chi2.ppf(LEVEL / 2, num_seeds - 1) / (num_seeds - 1)
    of_seeds = max(num_problems * float(seed_S1.var(ddof=1)), floor)
    return of_seeds, num_seeds * float(problem_P.var(ddof=1)), rest


def estimate(values_SP: Floats) -> Estimate:
    """The mean of scores or of paired differences over seeds and problems, both random.

    Var(mean) = MS_seeds / SP + max(MS_problems − MS_rest, 0) / SP, that is σ²_u / S + σ²_v / P + σ²_e / SP. One seed
    has the problems' part alone: then the mean is of that one model. There must be two problems or more.
    """
    num_seeds, num_problems = values_SP.shape
    if num_seeds == 1:
        parts = [Part(float(values_SP.var(ddof=1)) / num_problems, num_problems, "problems")]
    else:
        of_seeds, of_problems, rest = (square / values_SP.size for square in mean_squares(values_SP))
        parts = [Part(of_seeds, num_seeds, "seeds"), Part(max(of_problems - rest, 0.0), num_problems, "problems")]
    return Estimate(float(values_SP.mean()), tuple(parts))


def difference(a: pd.DataFrame, b: pd.DataFrame) -> tuple[Estimate, Floats, str]:
    """The difference of the means of two arms' scores, seeds × problems, its bootstrap draws, and what pairs the arms.

    They are paired over "seeds and problems"; with fewer than two shared seeds over "problems": seeds in their order,
    which are independent, or the single model of one arm with all of the other; arms of other problems by "nothing".
    """
    if set(a.columns) != set(b.columns):
        one, other = estimate(a.to_numpy()), estimate(b.to_numpy())
        draws_B = bootstrap(a.to_numpy()).mean(1) - bootstrap(b.to_numpy(), stream=1).mean(1)
        return Estimate(one.mean - other.mean, one.parts + other.parts), draws_B, "nothing"
    b, shared = b[a.columns], a.index.intersection(b.index)
    paired, fewest = "problems", min(len(a), len(b))
    if len(shared) > 1:
        a, b, paired = a.loc[shared], b.loc[shared], "seeds and problems"
    elif fewest > 1:
        a, b = a.iloc[:fewest], b.iloc[:fewest]
    differences_SP = a.to_numpy() - b.to_numpy()
    return estimate(differences_SP), bootstrap(differences_SP).mean(1), paired


def bootstrap(values_SP: Floats, *, stream: int = 0) -> Floats:
    """``BOOTSTRAP_DRAWS`` resamples of seeds and of problems: each draw's mean of each resampled seed, B × S.

    Tables of one ``stream`` of random numbers are resampled alike.
    """
    means_BS = _resampled_problems(values_SP.shape[1], stream) @ values_SP.T
    chosen_BS = np.random.default_rng(stream).integers(len(values_SP), size=means_BS.shape)
    return np.take_along_axis(means_BS, chosen_BS, axis=1)


@lru_cache(maxsize=4)
def _resampled_problems(count: int, stream: int) -> Floats:
    """Each draw's weights of ``count`` problems: how often each was drawn, over their number."""
    generator = np.random.default_rng([stream, count])
    return generator.multinomial(count, np.full(count, 1 / count), BOOTSTRAP_DRAWS) / count


def percentiles(draws_B: Floats, prefix: str = "") -> dict[str, float]:
    """The percentile interval of bootstrap draws: its ends ``low`` and ``high``, after a prefix."""
    return dict(zip((f"{prefix}low", f"{prefix}high"), np.quantile(draws_B, [LEVEL / 2, 1 - LEVEL / 2]), strict=True))


def interquartile_mean(values: Floats) -> Floats:
    """The mean of the middle half along the last axis (Agarwal et al. 2021, arXiv 2108.13264)."""
    return np.asarray(stats.trim_mean(values, TRIMMED_SHARE, axis=-1))


def probability_of_improvement(a_S: Floats, b_S: Floats) -> float:
    """P(A > B) + P(A = B) / 2 over all pairs of seeds: Mann and Whitney's statistic over the number of pairs."""
    return float(stats.mannwhitneyu(a_S, b_S).statistic) / (len(a_S) * len(b_S))


def mcnemar(a_P: Floats, b_P: Floats) -> float:
    """McNemar's exact p-value of two models that answered the same problems right (1) or wrong (0).

    Of the problems that only one of them has right, each has half: a two-sided binomial test.
    """
    only_a, only_b = int((a_P > b_P).sum()), int((a_P < b_P).sum())
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (1979, Scand. J. Stat. 6:65): max over j ≤ i of (m − j + 1) p_(j), at most 1."""
    ordered = pd.Series(p_values, dtype=float).sort_values(kind="stable")
    stepped = (ordered * np.arange(len(ordered), 0, -1)).cummax().clip(upper=1)
    return list(stepped.sort_index())
