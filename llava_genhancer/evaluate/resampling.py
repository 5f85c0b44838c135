"""Bootstrap intervals and permutation tests for measures that are means of ratios of sums over units.

A unit is what was drawn as a whole: a question, a pair of images, a group. It brings counts of shape (ratios, 2), what
it adds to each numerator and denominator. Units with equal counts are interchangeable, so a resample of all units is
one multinomial draw over the kinds of unit: the same distribution, thousands of times quicker. Values are fractions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llava_genhancer.evaluate.statistics import Interval, mcnemar_exact, paired_difference_interval, wilson_interval

DRAWS = 10_000
Counts = NDArray[np.int64]  # (units, ratios, 2)


def value(counts: Counts) -> float | None:
    """The mean of the ratios of sums; None where one has nothing to divide by."""
    if not len(counts):
        return None
    found = float(_values(counts.sum(axis=0)[None])[0])
    return None if np.isnan(found) else found


def interval(counts: Counts, seed: int = 0) -> Interval | None:
    """95 % percentile bootstrap over units; Wilson's where all units agree on 0 or 1 and resampling sees no spread."""
    found = value(counts)
    if found is None:
        return None
    if found in (0.0, 1.0):
        return wilson_interval(found * len(counts), len(counts))
    kinds, numbers = np.unique(counts, axis=0, return_counts=True)
    return _percentiles(_values(_resampled(kinds, numbers, seed)))


def difference_interval(first: Counts, other: Counts, seed: int = 0) -> Interval | None:
    """95 % percentile bootstrap of ``other`` minus ``first``, both on the same units in the same order.

    Where both have the same counts everywhere, resampling sees no spread: then the adjusted Wald interval.
    """
    if value(first) is not None and (first == other).all():
        return paired_difference_interval(0, 0, len(first))
    kinds, numbers = np.unique(np.stack([first, other], axis=1), axis=0, return_counts=True)
    drawn = _resampled(kinds, numbers, seed)
    return _percentiles(_values(drawn[:, 1]) - _values(drawn[:, 0]))


def paired_p(first: Counts, other: Counts, seed: int = 0) -> tuple[float, str]:
    """Two-sided p of no difference, and the test's name.

    McNemar's exact test where a unit is simply right or wrong. Else the permutation test that exchanges the two
    models' counts unit by unit, with drawn permutations; the observed one counts as drawn, so that p is never 0.
    """
    if first.shape[1] == 1 and (first[..., 1] == 1).all() and (other[..., 1] == 1).all():
        a, b = first[:, 0, 0], other[:, 0, 0]
        return mcnemar_exact(int((b > a).sum()), int((a > b).sum())), "exact McNemar"
    kinds, numbers = np.unique(np.stack([first, other], axis=1), axis=0, return_counts=True)
    exchanged = np.random.default_rng(seed).binomial(numbers, 0.5, (DRAWS, len(numbers)))
    kept = numbers - exchanged
    sums = [np.tensordot(kept, kinds[:, i], 1) + np.tensordot(exchanged, kinds[:, 1 - i], 1) for i in (0, 1)]
    spread = np.abs(_values(sums[1]) - _values(sums[0]))
    observed = abs(float(_values(other.sum(axis=0)[None])[0] - _values(first.sum(axis=0)[None])[0]))
    return (1 + int((spread >= observed - 1e-12).sum())) / (1 + DRAWS), "permutation"


def _values(sums: NDArray) -> NDArray[np.float64]:
    """(..., ratios, 2) to (...); not a number where a denominator is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = np.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], np.nan)
    return np.asarray(ratios.mean(axis=-1))


def _resampled(kinds: NDArray, numbers: NDArray, seed: int) -> NDArray:
    """Sums over units of ``DRAWS`` resamples."""
    n = int(numbers.sum())
    drawn = np.random.default_rng(seed).multinomial(n, numbers / n, DRAWS)
    return np.tensordot(drawn, kinds, 1)


def _percentiles(values: NDArray[np.float64]) -> Interval | None:
    known = values[~np.isnan(values)]
    if not len(known):
        return None
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)
