"""Figures in words. Imports nothing."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """``12 days``, ``2 h 05 min``, ``3 min 07 s`` or ``4.2 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 72:
        return f"{hours / 24:.0f} days"
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2g} s"


def significant(value: float, digits: int = 5) -> float:
    """``value`` rounded to significant digits, so that a small rate does not become 0."""
    return float(f"{value:.{digits}g}")


def rate_in_words(per_second: float, unit: str) -> str:
    """``123 images/s``, ``4.2 images/s``, and below one a second ``12 s/image``."""
    if per_second >= 1:
        return f"{per_second:.0f} {unit}s/s" if per_second >= 99.5 else f"{per_second:.2g} {unit}s/s"
    return f"{significant(1 / per_second, 2):.12g} s/{unit}" if per_second > 0 else f"no {unit} yet"
