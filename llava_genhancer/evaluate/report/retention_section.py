"""The report's section on what was kept: zero-shot scores, Table 3 beside them, and the curve over strengths."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from llava_genhancer.evaluate import curve
from llava_genhancer.evaluate.markdown import text
from llava_genhancer.evaluate.report.gathered import Report, before_and_after
from llava_genhancer.evaluate.words import p_value
from llava_genhancer.evaluate.zero_shot import table3
from llava_genhancer.evaluate.zero_shot.results import TowerAnswers, change, load_results

RESULT = "eval/zero_shot.json"
FIGURE = curve.FIGURE
NOTE = (
    "Top-1 accuracy and recall@5 in percent with 95 % intervals over images, measured as clip_benchmark does but in "
    "fp32; changes are paired image by image. The mean weighs every row alike."
)
CURVE = (
    "The tower at strengths between the original (0) and the enhanced one (1): `llava-genhancer export RUN "
    "--lora_scale S --output_dir TOWER` writes the one that is chosen."
)


def measured(run_dir: Path) -> bool:
    """Whether there is anything to report."""
    return (run_dir / RESULT).is_file() or (run_dir / curve.RESULT).is_file()


def section(report: Report) -> str:
    """Scores, Table 3 and the curve, whose picture is drawn.

    Raises:
        InputError: a file of the run is not what the commands write.
    """
    run_dir = report.run_dir
    parts: list[str] = []
    facts: dict[str, Any] = {}
    if (run_dir / RESULT).is_file():
        towers = load_results(run_dir / RESULT)
        if before_and_after(towers):  # whatever their folders are called
            names = ("original", "enhanced")
            towers = [dataclasses.replace(t, label=name) for t, name in zip(towers, names, strict=True)]
        parts += [table3.markdown(towers), NOTE]
        parts += [beside] if (beside := table3.beside_table3(towers)) else []
        report.headlines += _headlines(towers)
        facts["towers"] = [
            {"label": t.label, "mean": round(t.mean, 2), "scores": [a.summary() for a in t.answers]} for t in towers
        ]
    if (run_dir / curve.RESULT).is_file():
        points = curve.load_points(run_dir / curve.RESULT)
        curve.figure(points, report.path(FIGURE))
        picture = report.figure(FIGURE, "MMVP-VLM against zero-shot scores by strength")
        parts += ["### Strength", picture, curve.markdown(points), CURVE]
        facts["curve"] = [
            {"lora_scale": p.scale, "mmvp_vlm": round(p.mmvp.average.percent, 2), "mean": round(p.retention.mean, 2)}
            for p in points
        ]
    if facts:
        report.facts["zero_shot"] = facts
    return "\n\n".join(["## Retention", *parts]) if parts else ""


def _headlines(towers: list[TowerAnswers]) -> list[str]:
    """The means, and which scores changed beyond chance."""
    first, *others = towers
    means = ", ".join(f"{text(t.label)} {t.mean:.1f} %" for t in towers)
    lines = [f"Zero-shot retention, mean of {len(first.answers)} scores: {means}."]
    for other in others:
        changes = [(a, change(a, b)) for a, b in zip(first.answers, other.answers, strict=True)]
        moved = [f"{a.name} {c.difference:+.1f} points (p {p_value(c.p)})" for a, c in changes if c.p < 0.05]
        said = text(f"{other.label} against {first.label}")
        lines.append(
            f"{said}: {text('; '.join(moved))}."
            if moved
            else f"{said}: no zero-shot score changed beyond what chance explains at the 5 % level."
        )
    return lines
