"""Intervals and tests against values worked out by hand or by enumeration."""

import itertools
import math
import random

import pytest

from llava_genhancer.evaluate.statistics import (
    Z95,
    mcnemar_exact,
    paired_difference_interval,
    stratified_interval,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        # Newcombe (1998), tables of method 3: 81/263, 15/148, 0/20, 1/29.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (15, 15, 0.7961, 1.0),
    ],
)
def test_wilson_has_the_published_values(k, n, low, high):
    assert wilson_interval(k, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_bounds_solve_the_score_equation():
    for k, n in ((3, 15), (43, 135), (7, 8)):
        for bound in wilson_interval(k, n):
            assert abs(k / n - bound) == pytest.approx(Z95 * math.sqrt(bound * (1 - bound) / n))


@pytest.mark.parametrize(("k", "n"), [(-1, 10), (11, 10), (0, 0)])
def test_impossible_proportions_are_refused(k, n):
    with pytest.raises(ValueError, match="proportion"):
        wilson_interval(k, n)
    with pytest.raises(ValueError, match="proportion"):
        stratified_interval([(k, n)])


def test_mcnemar_by_hand_and_by_enumeration():
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(5, 5) == 1.0
    assert mcnemar_exact(0, 5) == pytest.approx(2 / 32)
    assert mcnemar_exact(1, 9) == pytest.approx(2 * (1 + 10) / 1024)
    for gained, lost in itertools.product(range(6), range(6)):
        n = gained + lost
        flips = list(itertools.product((0, 1), repeat=n))
        extreme = sum(abs(sum(f) - n / 2) >= abs(gained - n / 2) for f in flips)
        assert mcnemar_exact(gained, lost) == pytest.approx(extreme / len(flips))
        assert mcnemar_exact(gained, lost) == mcnemar_exact(lost, gained)


def test_paired_difference_by_hand():
    # (12 + 1 - 4 - 1) / 137 +- 1.96 sqrt((18/137 - (8/137)^2) / 137)
    low, high = paired_difference_interval(12, 4, 135)
    half = Z95 * math.sqrt((18 / 137 - (8 / 137) ** 2) / 137)
    assert (low, high) == pytest.approx((8 / 137 - half, 8 / 137 + half))
    assert paired_difference_interval(4, 12, 135) == pytest.approx((-high, -low))
    low, high = paired_difference_interval(0, 0, 135)
    assert low == -high
    assert 0.005 < high < 0.05  # two towers that agree everywhere may still differ a little
    with pytest.raises(ValueError, match="do not fit"):
        paired_difference_interval(5, 5, 9)


def test_stratified_is_wilson_for_alike_strata_and_narrower_for_unlike_ones():
    alike = stratified_interval([(5, 15)] * 9)
    pooled = wilson_interval(45, 135)
    assert alike[0] <= 1 / 3 <= alike[1]
    assert alike == pytest.approx(pooled, abs=0.005)
    low, high = stratified_interval([(0, 15), (15, 15)] * 4 + [(7, 15)])
    wide = wilson_interval(67, 135)
    assert high - low < 0.6 * (wide[1] - wide[0])
    assert stratified_interval([(0, 15)] * 9)[0] == pytest.approx(0, abs=1e-9)
    assert 0.01 < stratified_interval([(0, 15)] * 9)[1] < 0.05
    assert stratified_interval([(15, 15)] * 9)[1] == pytest.approx(1, abs=1e-9)


def test_stratified_covers_the_truth_as_often_as_it_says():
    truth = [0.133, 0.333, 0.333, 0.2, 0.067, 0.733, 0.467, 0.2, 0.4]  # Table 1, GenHancer on OpenAI@224
    mean = sum(truth) / 9
    rng = random.Random(0)
    covered = 0
    for _ in range(1000):
        low, high = stratified_interval([(sum(rng.random() < p for _ in range(15)), 15) for p in truth])
        covered += low <= mean <= high
    assert 0.925 <= covered / 1000 <= 0.975
