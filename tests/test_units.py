"""Figures in words keep digits that say something, however slow the machine."""

import pytest

from llava_genhancer.units import duration, rate_in_words, significant


@pytest.mark.parametrize(
    ("rate", "words"),
    [(1234.4, "1234 images/s"), (99.4, "99 images/s"), (99.7, "100 images/s"),
     (4.23, "4.2 images/s"), (1.0, "1 images/s"),
     (0.31, "3.2 s/image"), (0.004, "250 s/image"), (0.0, "no image yet")],
)  # fmt: skip
def test_a_rate_has_two_digits_at_any_speed(rate: float, words: str) -> None:
    assert rate_in_words(rate, "image") == words


def test_a_small_figure_does_not_become_zero() -> None:
    assert significant(0.00012345678) == 0.00012346
    assert significant(0.0) == 0.0
    assert duration(0.0123) == "0.012 s"
