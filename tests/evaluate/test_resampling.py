"""Bootstrap and permutation over units: against resampling one by one, and every exchange counted out."""

import itertools

import numpy as np
import pytest

from llava_genhancer.evaluate.resampling import difference_interval, interval, paired_p, value
from llava_genhancer.evaluate.statistics import mcnemar_exact, wilson_interval


def units(rows) -> np.ndarray:
    return np.array(rows, dtype=np.int64).reshape(len(rows), -1, 2)


def random_units(rng: np.random.Generator, n: int, ratios: int = 1) -> np.ndarray:
    of = rng.integers(1, 4, (n, ratios))
    return np.stack([rng.integers(0, of + 1), of], axis=-1)


def naive(first: np.ndarray, other: np.ndarray | None = None, draws: int = 20_000) -> np.ndarray:
    """Units drawn one by one."""
    rng = np.random.default_rng(99)
    drawn = rng.integers(0, len(first), (draws, len(first)))

    def values(counts: np.ndarray) -> np.ndarray:
        sums = counts[drawn].sum(axis=1)
        return (sums[..., 0] / sums[..., 1]).mean(axis=-1)

    found = values(first) if other is None else values(other) - values(first)
    return np.percentile(found, [2.5, 97.5])


@pytest.mark.parametrize("ratios", [1, 3])
def test_intervals_are_those_of_resampling_units_one_by_one(ratios: int) -> None:
    rng = np.random.default_rng(1)
    first, other = random_units(rng, 60, ratios), random_units(rng, 60, ratios)
    assert interval(first) == pytest.approx(naive(first), abs=0.01)
    assert difference_interval(first, other) == pytest.approx(naive(first, other), abs=0.01)


def test_the_unit_is_resampled_not_the_answer() -> None:
    """Twenty groups of four answers that are alike know as much as twenty answers."""
    whole = units([(4 * (i % 2), 4) for i in range(20)])
    single = units([(i % 2, 1) for i in range(20)])
    assert interval(whole) == interval(single)
    spread = units([(i % 2, 1) for i in range(80)])
    low, high = interval(spread)
    assert interval(whole)[1] - interval(whole)[0] > 1.7 * (high - low)


def test_where_resampling_sees_no_spread() -> None:
    assert interval(units([(0, 1)] * 15)) == wilson_interval(0, 15)
    assert interval(units([(1, 1)] * 15)) == wilson_interval(15, 15)
    alike = units([(i % 2, 1) for i in range(45)])
    low, high = difference_interval(alike, alike)
    assert -0.1 < low < 0 < high < 0.1
    assert low == -high


def test_nothing_is_no_number() -> None:
    assert value(units([(0, 0)] * 3)) is None
    assert interval(units([(0, 0)] * 3)) is None
    assert value(np.zeros((0, 1, 2), dtype=np.int64)) is None
    mixed = units([(0, 0)] * 3 + [(1, 2)])
    assert value(mixed) == 0.5
    assert interval(mixed) is not None, "a resample without any denominator does not count"


def test_a_binary_unit_is_mcnemars() -> None:
    first = units([(1, 1)] * 3 + [(0, 1)] * 9)
    other = units([(0, 1)] * 1 + [(1, 1)] * 10 + [(0, 1)])
    assert paired_p(first, other) == (mcnemar_exact(8, 1), "exact McNemar")


def test_the_permutation_test_against_all_exchanges() -> None:
    rng = np.random.default_rng(3)
    first, other = random_units(rng, 10, 2), random_units(rng, 10, 2)

    def gap(swapped: tuple[bool, ...]) -> float:
        swap = np.array(swapped)[:, None, None]
        return abs(value(np.where(swap, first, other)) - value(np.where(swap, other, first)))

    gaps = [gap(swapped) for swapped in itertools.product([False, True], repeat=10)]
    exact = np.mean([g >= gaps[0] - 1e-12 for g in gaps])
    p, test = paired_p(first, other)
    assert test == "permutation"
    assert p == pytest.approx(exact, abs=0.02)
    assert paired_p(first, first)[0] == 1.0


def test_the_same_units_give_the_same_interval() -> None:
    first = random_units(np.random.default_rng(5), 40)
    assert interval(first) == interval(first[::-1])
