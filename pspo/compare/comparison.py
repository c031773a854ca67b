"""The tables of a comparison: each arm's score, its difference from a reference arm, pass@k, and a verdict in words."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd

from pspo.base.schema import ConfigError, unknown
from pspo.base.statistics import pass_at_k, wilson_interval
from pspo.compare import statistics
from pspo.compare.arms import ComparedRuns, Selection, samples, selections
from pspo.compare.statistics import Floats

BOOTSTRAP_COVERAGE = {3: (85, 99), 5: (90, 99), 10: (94, 99)}
"""Measured coverage in per cent of the bootstrap's 95 % interval, by seeds, with large and with small seed variance."""
DEFAULT_REFERENCE = "noclip"
DEFAULTS = {"when": "after", "evaluation": "greedy"}
COLUMNS = {
    "arms": {"arm": "{arm}", "seeds": "{seeds}", "mean": "{mean:.1f}", "95 %": "[{low:.1f}, {high:.1f}]",
             "bootstrap": "[{bootstrap_low:.1f}, {bootstrap_high:.1f}]", "IQM": "{iqm:.1f}"},
    "differences": {"arm": "{arm}", "points": "{difference:+.1f}", "95 %": "[{low:+.1f}, {high:+.1f}]",
                    "bootstrap": "[{bootstrap_low:+.1f}, {bootstrap_high:+.1f}]", "p": "{p:.3f}",
                    "Holm": "{p_holm:.3f}", "sees": "±{detectable:.1f}", "verdict": "{verdict}"},
    "pass_at_k": {"arm": "{arm}", "k": "{k}", "pass@k": "{pass_at_k:.1f}", "bootstrap": "[{low:.1f}, {high:.1f}]"},
}  # fmt: skip
"""The columns of each table, and how a row of a comparison's frame, shares in per cent, is written in them."""
SHARES = ["mean", "low", "high", "bootstrap_low", "bootstrap_high", "iqm", "difference", "detectable", "pass_at_k"]


@dataclass(frozen=True)
class Table:
    """A table: ``shown`` has it as text, for people, ``numbers`` with all digits, for programs."""

    title: str
    shown: pd.DataFrame
    numbers: pd.DataFrame

    @property
    def files(self) -> dict[str, str]:
        """The numbers as CSV and the text as LaTeX with booktabs: name of each file -> an address that holds it."""
        name, latex = re.sub(r"[^\w.@]+", "_", self.title).strip("_"), self.shown.to_latex(index=False, escape=True)
        csv = "data:text/csv;charset=utf-8," + quote(self.numbers.to_csv(index=False))
        return {f"{name}.csv": csv, f"{name}.tex": "data:text/x-tex;charset=utf-8," + quote(latex)}


@dataclass(frozen=True)
class Comparison:
    """What a group's answers say; one row for each selection and arm, scores and differences as shares of one.

    Attributes:
        group: the runs.
        against: the reference arm's label.
        arms: ``mean`` with its 95 % interval ``low``, ``high``; ``seed_std``; the bootstrap's interval of the mean;
            from four seeds on ``iqm`` with the bootstrap's interval.
        differences: arm − reference: ``difference`` with ``low``, ``high``, the bootstrap's interval, the kind of
            ``test``, ``p``, ``p_holm`` over all differences with that kind of test, the smallest ``detectable``
            difference, ``seeds_needed``, ``paired`` and ``verdict``; of several seeds ``improvement``, the probability
            of improvement.
        pass_at_k: ``k``, ``pass_at_k``, ``low``, ``high`` of arms with several samples a problem.
        notes: what the numbers cannot say.
    """

    group: ComparedRuns
    against: str
    arms: pd.DataFrame
    differences: pd.DataFrame
    pass_at_k: pd.DataFrame
    notes: list[str]


def compare(group: ComparedRuns, chosen: Sequence[Selection], against: str | None = None) -> Comparison:
    """Compare all arms with the arm ``against``: by default noclip, else the first. Raises ConfigError."""
    reference = group.arm(against or (DEFAULT_REFERENCE if DEFAULT_REFERENCE in group.arms else next(iter(group.arms))))
    arms, differences, passes = [], [], []
    for selection in chosen:
        about = {"selection": str(selection)} | dataclasses.asdict(selection)
        totals_of = {label: table for label, table in samples(group, selection).items() if table[0].shape[1] > 1}
        scores = {label: totals / counts for label, (totals, counts) in totals_of.items()}
        arms += [about | _arm(label, table) for label, table in scores.items()]
        if (b := scores.get(reference)) is not None:
            differences += [about | _difference(a, scores[a], reference, b) for a in scores if a != reference]
        for label, (totals, counts) in totals_of.items():
            passes += [about | row for row in _passes(label, totals.to_numpy(), counts.to_numpy())]
    if not arms:
        missing = ", ".join(map(str, chosen)) or "any test set"
        raise ConfigError(f"no arm has two answers to {missing}; python -m pspo.evaluate makes them")
    for test in dict.fromkeys(row["test"] for row in differences):
        family = [row for row in differences if row["test"] == test]
        for row, p_holm in zip(family, statistics.holm([row["p"] for row in family]), strict=True):
            row["p_holm"] = p_holm
            row["verdict"] = _verdict(row)
    rows_of = {"arms": arms, "differences": differences, "pass_at_k": passes}
    frames = {name: pd.DataFrame(rows or {column: [] for column in about}) for name, rows in rows_of.items()}
    return Comparison(group, reference, **frames, notes=_notes(arms, differences))


def choose(group: ComparedRuns, wanted: Mapping[str, Sequence[Any]], score: str = "correct") -> list[Selection]:
    """The selections with the ``wanted`` values of the answers' columns ``WHERE``.

    By default greedy answers to all sets after training; another evaluation's answers at their lowest temperature.
    Raises ConfigError for a value that no arm's answers have, with the values that they have.
    """
    known = selections(group)
    for name in ("when", "evaluation", "set", "temperature"):
        answered = sorted({getattr(s, name) for s in known})
        values = wanted.get(name) or answered
        if name in DEFAULTS and not wanted.get(name):
            values = [DEFAULTS[name]] if DEFAULTS[name] in answered else answered[:1]
        for value in values:
            if value not in answered:
                raise unknown(str(value), map(str, answered), name)
        known = [s for s in known if getattr(s, name) in values]
    lowest = {s.set: s.temperature for s in sorted(known, key=lambda s: -s.temperature)}
    chosen = [s for s in known if wanted.get("temperature") or s.temperature == lowest[s.set]]
    return [dataclasses.replace(s, score=score) for s in chosen]


def tables(comparison: Comparison) -> Iterator[Table]:
    """Every table, selection by selection."""
    units = {"arms": "arms, %", "differences": f"minus {comparison.against}, points", "pass_at_k": "pass@k, %"}
    for selection in comparison.arms["selection"].unique():
        for name, columns in COLUMNS.items():
            frame: pd.DataFrame = getattr(comparison, name)
            if len(rows := frame[frame["selection"] == selection]):
                percent = rows.reindex(columns=rows.columns.union(SHARES))
                percent[SHARES] *= 100
                cells = [[text.format(**row) for text in columns.values()] for row in percent.to_dict("records")]
                texts = pd.DataFrame(cells, columns=list(columns)).replace(
                    {r"^\[?[+-]?nan(, [+-]?nan\])?$": "", r"^0\.000$": "<.001"}, regex=True
                )
                yield Table(f"{selection}: {units[name]}", texts.loc[:, (texts != "").any()], rows)


def _arm(label: str, table: pd.DataFrame) -> dict[str, Any]:
    """An arm's row. Scores of 0 and 1 of a single model get Wilson's interval, all others the calibrated t."""
    values_SP = table.to_numpy()
    of_mean, seed_S, draws_BS = statistics.estimate(values_SP), values_SP.mean(1), statistics.bootstrap(values_SP)
    low, high = max(of_mean.mean - of_mean.half_width, 0.0), min(of_mean.mean + of_mean.half_width, 1.0)
    if (len(seed_S) == 1 and _is_binary(values_SP)) or of_mean.se == 0:
        low, high = wilson_interval(of_mean.mean * values_SP.shape[1], values_SP.shape[1])
    row = {"arm": label, "seeds": len(seed_S), "problems": values_SP.shape[1], "mean": of_mean.mean}
    row |= {"low": low, "high": high, "seed_std": float(seed_S.std(ddof=1)) if len(seed_S) > 1 else np.nan}
    row |= statistics.percentiles(draws_BS.mean(1), "bootstrap_")
    if len(seed_S) >= statistics.MIN_TRIMMED_SEEDS:
        row["iqm"] = float(statistics.interquartile_mean(seed_S))
        row |= statistics.percentiles(statistics.interquartile_mean(draws_BS), "iqm_")
    return row


def _difference(label: str, table: pd.DataFrame, against: str, reference: pd.DataFrame) -> dict[str, Any]:
    """An arm's difference from the reference arm; the test of two single models is McNemar's."""
    of_mean, draws_B, paired = statistics.difference(table, reference)
    a_SP, b_SP = table.to_numpy(), reference.to_numpy()
    row: dict[str, Any] = {"arm": label, "against": against, "paired": paired, "seeds": min(len(a_SP), len(b_SP))}
    row |= {"problems": a_SP.shape[1], "difference": of_mean.mean, "test": "t over problems", "p": of_mean.p}
    row |= {"low": of_mean.mean - of_mean.half_width, "high": of_mean.mean + of_mean.half_width}
    row |= statistics.percentiles(draws_B, "bootstrap_")
    row |= {"detectable": of_mean.detectable, "seeds_needed": of_mean.seeds_needed}
    if row["seeds"] > 1:
        improvement = statistics.probability_of_improvement(a_SP.mean(1), b_SP.mean(1))
        row |= {"test": "t over seeds and problems", "improvement": improvement}
    elif len(a_SP) == len(b_SP) and paired == "problems" and _is_binary(np.concatenate([a_SP, b_SP])):
        row |= {"test": "McNemar", "p": statistics.mcnemar(a_SP[0], reference[table.columns].to_numpy()[0])}
    return row


def _passes(label: str, totals_SP: Floats, counts_SP: Floats) -> Iterator[dict[str, Any]]:
    """pass@k of an arm for k = 1, 2, 4, … samples, with the bootstrap's interval over problems and seeds."""
    most = int(counts_SP.min())
    if most < 2 or not _is_binary(totals_SP % 1):
        return
    pairs = np.stack([counts_SP, totals_SP], -1).astype(int).reshape(-1, 2)
    for k in (2**power for power in range(most.bit_length())):
        value_of = {(n, c): pass_at_k(n, c, k) for n, c in np.unique(pairs, axis=0).tolist()}
        values_SP = np.array([value_of[n, c] for n, c in pairs.tolist()]).reshape(totals_SP.shape)
        interval = statistics.percentiles(statistics.bootstrap(values_SP).mean(1))
        yield {"arm": label, "k": k, "pass_at_k": float(values_SP.mean())} | interval


def _is_binary(values: Floats) -> bool:
    return bool(np.isin(values, (0, 1)).all())


def _verdict(row: Mapping[str, Any]) -> str:
    """What the test decides, or else what the design could have seen, and what would see the difference."""
    size, is_one_seed = f"{100 * row['difference']:+.1f}", row["seeds"] == 1
    if row["low"] == row["high"] == 0:
        return "equal: the same score on every problem"
    if row["p_holm"] < statistics.LEVEL:
        verdict = f"{'better' if row['difference'] > 0 else 'worse'}: {size} points"
        return f"{verdict} between two single models; one seed decides nothing about arms" if is_one_seed else verdict
    if row["p"] < statistics.LEVEL:
        return f"undecided: {size} points, p {row['p']:.3f} alone, {row['p_holm']:.3f} among all comparisons (Holm)"
    equal = f"equal as far as this design can see: ±{100 * row['detectable']:.1f} points"
    if row["paired"] == "nothing" or is_one_seed:
        return equal
    if row["seeds_needed"] is None:
        return f"{equal}; {statistics.MAX_SEEDS} seeds an arm would not see {size}"
    return f"{equal}; {row['seeds_needed']} seeds an arm would see {size}"


def _notes(arms: Sequence[Mapping[str, Any]], differences: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences about the intervals and tests of the tables, and about what their number of seeds cannot decide."""
    sentences = []
    if single := dict.fromkeys(row["arm"] for row in arms if row["seeds"] == 1):
        sentences.append(f"one seed: the interval tells of one trained model, not of its arm ({', '.join(single)})")
    for paired in ("problems", "nothing"):
        if labels := dict.fromkeys(row["arm"] for row in differences if row["paired"] == paired):
            sentences.append(f"paired over {paired}, not over seeds: {', '.join(labels)}")
    if several := [row["seeds"] for row in arms if row["seeds"] > 1]:
        nearest = min(BOOTSTRAP_COVERAGE, key=lambda seeds: abs(seeds - min(several)))
        sentences.append(
            "intervals and tests are t over seeds and problems, and hold their 95 and 5 % in simulation; bootstrap "
            "intervals cover {} to {} % at {} seeds".format(*BOOTSTRAP_COVERAGE[nearest], nearest)
        )
    for test, count in Counter(row["test"] for row in differences).items():
        if count > 1:
            sentences.append(f"Holm's correction is over the {count} differences shown that have one test, {test}")
    return sentences
