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
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"
