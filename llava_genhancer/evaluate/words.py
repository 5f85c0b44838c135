"""How the report says things: scores, comparisons, numbers, recipe fields."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from llava_genhancer import units
from llava_genhancer.evaluate.markdown import code, table, text
from llava_genhancer.evaluate.mmvp.results import Comparison, MmvpResult, Score
from llava_genhancer.evaluate.paper import NAMES, PATTERNS


def percent(score: Score) -> str:
    """``31.9 % [24.1, 40.2]``."""
    return f"{score.percent:.1f} % [{score.low:.1f}, {score.high:.1f}]"


def p_value(p: float) -> str:
    """``= 0.042``, or ``< 0.001``: nobody reads more into a p."""
    return f"= {p:.3f}" if p >= 0.001 else "< 0.001"


def verdict(c: Comparison) -> str:
    """What a comparison does and does not show, in one or two sentences."""
    if c.gained == c.lost == 0:
        return "both answer every pair alike."
    change = f"{c.difference:+.1f} points [{c.low:+.1f}, {c.high:+.1f}], {c.gained} pairs gained and {c.lost} lost"
    p = f"exact McNemar p {p_value(c.p)}"
    if c.p < 0.05:
        return f"{change} ({p}): more than chance explains at the 5 % level, for this seed."
    return f"{change} ({p}): within noise, not evidence of a difference."


def paper_rows(results: Sequence[MmvpResult]) -> str:
    """Which published row stands beside which tower."""
    return "; ".join(
        f"{r.label}: {row.backbone.label}@{row.backbone.image_size}, {NAMES[row.method]}, {row.source}"
        for r in results
        if (row := r.paper)
    )


def mmvp_table(results: Sequence[MmvpResult]) -> str:
    """The per-pattern table in Markdown, with the published column after each tower that has one."""
    header = ["pattern"]
    for r in results:
        header += [text(r.label)] + ([f"published, {NAMES[r.paper.method]}"] if r.paper else [])
    rows = []
    for i, name in enumerate([*PATTERNS, "average"]):
        row = [f"**{name}**" if name == "average" else name]
        for r in results:
            score = r.average if name == "average" else r.patterns[i]
            row.append(f"{score.percent:.1f} [{score.low:.1f}, {score.high:.1f}]")
            if r.paper:
                printed = [*(r.paper.patterns or ["-"] * len(PATTERNS)), r.paper.average][i]
                row.append(printed if isinstance(printed, str) else f"{printed:.1f}")
        rows.append(row)
    return table(header, rows)


def shell_line(words: Sequence[Any], folder: Any = None, environment: Mapping[str, Any] | None = None) -> str:
    """Returns a shell's line that repeats a command in the folder and with the variables that the command was given."""
    start = [f"cd {shlex.quote(str(folder))} &&"] if folder else []
    variables = (f"{name}={shlex.quote(str(value))}" for name, value in (environment or {}).items())
    return " ".join([*start, *variables, shlex.join(map(str, words))])


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted names."""
    named: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            named |= flat(value, f"{prefix}{key}.")
        else:
            named[f"{prefix}{key}"] = value
    return named


def fields(values: Mapping[str, Any], names: Sequence[str]) -> str:
    """A table of recipe fields."""
    return table(["field", "value"], [[code(name), code(plain(values[name]))] for name in names])


def plain(value: Any) -> str:
    """A JSON value as the command line takes it."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return (
        {None: "none", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    )


def number(value: Any) -> str:
    """Thousands apart, floats to four digits, a dash for what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def duration(seconds: Any) -> str:
    """A result's time in words; ``-`` where it holds none."""
    known = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    return units.duration(seconds) if known else "-"
