"""Means over seeds, their intervals, and tests of differences.

The standard error of a mean over n seeds is s / sqrt(n) with s^2 = sum (x - mean)^2 / (n - 1), its
95 % interval mean +- t(0.975, n - 1) s / sqrt(n).
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student
from scipy.stats import ttest_rel

# A test needs at least this many pairs of seeds.
FEWEST = 3


class Estimate(NamedTuple):
    """A mean over seeds with its standard error, nan for fewer than two; `midway`: of runs still in
    the middle of their schedule."""

    mean: float
    error: float
    seeds: int
    midway: bool = False

    @property
    def margin(self) -> float:
        """Returns half the 95 % interval of Student's t, nan for fewer than two seeds."""
        if self.seeds < 2:
            return math.nan
        return float(student.ppf(0.975, self.seeds - 1)) * self.error


class PairedTest(NamedTuple):
    """Differences to the baseline by seed, their estimate, Student's t with its two-sided p, and p
    by Holm over the methods tested; nan for fewer than three pairs, where all differences are the
    same, and for times."""

    by_seed: dict[int, float]
    difference: Estimate
    t: float = math.nan
    p: float = math.nan
    holm: float = math.nan


def estimate(values: Iterable[float], midway: bool = False) -> Estimate:
    """Returns the estimate from the values that are known."""
    known = np.array([value for value in values if math.isfinite(value)])
    if not len(known):
        return Estimate(math.nan, math.nan, 0)
    error = known.std(ddof=1) / math.sqrt(len(known)) if len(known) > 1 else math.nan
    return Estimate(known.mean(), error, len(known), midway)


def paired_test(
    ours: dict[int, float], theirs: dict[int, float], midway: bool = False
) -> PairedTest:
    """Returns Student's paired t-test of equal means of two sets of losses by seed."""
    by_seed = {
        seed: ours[seed] - theirs[seed]
        for seed in sorted(ours.keys() & theirs.keys())
        if math.isfinite(ours[seed] - theirs[seed])
    }
    found = estimate(by_seed.values(), midway)
    # Differences that are equal but for rounding have no spread to test by: t would be any number.
    if found.seeds < FEWEST or found.error < 1e-12 * max(abs(ours[seed]) for seed in by_seed):
        return PairedTest(by_seed, found)
    pairs = [(ours[seed], theirs[seed]) for seed in by_seed]
    result = ttest_rel(*zip(*pairs, strict=True))
    return PairedTest(by_seed, found, float(result.statistic), float(result.pvalue))


def holm(values: dict[str, float]) -> dict[str, float]:
    """Returns p values adjusted for their number (Holm 1979): the k-th smallest of m times m - k +
    1, at most 1 and in the same order."""
    # From the smallest p on: none is adjusted to less than the one before.
    adjusted: dict[str, float] = {}
    largest = 0.0
    known = sorted((p, name) for name, p in values.items() if math.isfinite(p))
    for place, (p, name) in enumerate(known):
        largest = min(1.0, max(largest, p * (len(known) - place)))
        adjusted[name] = largest
    return adjusted
