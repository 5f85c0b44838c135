"""Table 3 of the paper and what was measured beside it, as plain text and Markdown.

The published figures are disputed: users could not reproduce them, and a later paper measured 40.2 on ImageNet-1K from
the released weights where the table says 75.6.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llava_genhancer.evaluate.markdown import table, text
from llava_genhancer.evaluate.paper import NAMES, made_by
from llava_genhancer.evaluate.words import p_value
from llava_genhancer.evaluate.zero_shot.results import (
    IMAGE_RECALL,
    TEXT_RECALL,
    TOP1,
    Answers,
    Change,
    TowerAnswers,
    change,
)

BACKBONE = "openai-l14-224"
COLUMNS = (
    ("imagenet1k", TOP1),
    ("cifar100", TOP1),
    ("sun397", TOP1),
    ("cars", TOP1),
    ("flickr30k", IMAGE_RECALL),
    ("mscoco_captions", IMAGE_RECALL),
    ("flickr30k", TEXT_RECALL),
    ("mscoco_captions", TEXT_RECALL),
)
TABLE3 = {
    "original": (75.5, 76.1, 67.5, 77.7, 87.2, 61.1, 97.4, 79.2),
    "genhancer": (75.6, 76.1, 67.5, 77.6, 87.3, 61.2, 97.2, 79.4),
}
DISPUTED = (
    "Table 3 of arXiv 2503.19480 is disputed: users could not reproduce its second row, and a later paper measured "
    "40.2 on ImageNet-1K from the released weights where it says 75.6."
)


def published(tower: TowerAnswers, answers: Answers) -> float | None:
    """Table 3's figure for a tower of its backbone and of one of its two methods, or None."""
    column = (answers.data, answers.metric)
    method = made_by(tower.method, tower.recipe)
    if tower.backbone != BACKBONE or column not in COLUMNS or method not in TABLE3:
        return None
    return TABLE3[method][COLUMNS.index(column)]


def cells(tower: TowerAnswers, answers: Answers) -> str:
    """``75.5 [75.1, 75.9]``, with Table 3's figure in brackets where there is one."""
    s, said = answers.score, published(tower, answers)
    return f"{s.percent:.1f} [{s.low:.1f}, {s.high:.1f}]" + ("" if said is None else f" ({said:.1f})")


def plain_table(towers: Sequence[TowerAnswers]) -> str:
    """Aligned text: a row per data set and metric, a column per tower, then the changes against the first."""
    rows = [["data set", "metric", "n", *(t.label for t in towers)]]
    for i, a in enumerate(towers[0].answers):
        rows.append([a.data, a.metric, str(a.score.n), *(cells(t, t.answers[i]) for t in towers)])
    rows.append(["mean", "", "", *(f"{t.mean:.1f}" for t in towers)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        padded = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(padded).rstrip())
    rule = "-" * max(map(len, lines))
    lines = [lines[0], rule, *lines[1:-1], rule, lines[-1], ""]
    for tower in towers[1:]:
        for a, b in zip(towers[0].answers, tower.answers, strict=True):
            lines.append(f"{tower.label} against {towers[0].label}, {a.name}: {_said(change(a, b))}")
    if any(published(t, a) is not None for t in towers for a in t.answers):
        lines.append(f"(in brackets: the paper's) {DISPUTED}")
    lines.append("Intervals are 95 %, over images.")
    return "\n".join(lines)


def _said(c: Change) -> str:
    return f"{c.difference:+.1f} points [{c.low:+.1f}, {c.high:+.1f}], {c.test} p {p_value(c.p)}"


def markdown(towers: Sequence[TowerAnswers]) -> str:
    """The report's table: scores of each tower, and their change against the first with interval and p."""
    first, *others = towers
    header = ["data set", "metric", "n", "guessing", *(text(t.label) for t in towers), *(["change", "p"] * len(others))]
    rows = []
    for i, a in enumerate(first.answers):
        row = [text(a.data), a.metric, f"{a.score.n:,}", f"{a.guess:.1f}", *(cells(t, t.answers[i]) for t in towers)]
        for other in others:
            c = change(a, other.answers[i])
            row += [f"{c.difference:+.1f} [{c.low:+.1f}, {c.high:+.1f}]", p_value(c.p).removeprefix("= ")]
        rows.append(row)
    means = [f"**{t.mean:.1f}**" for t in towers]
    changes = [cell for other in others for cell in (f"{other.mean - first.mean:+.1f}", "")]
    rows.append(["**mean**", "", "", "", *means, *changes])
    return table(header, rows)


def beside_table3(towers: Sequence[TowerAnswers]) -> str:
    """Table 3 with the measured towers in bold beneath; empty where no set of its columns was measured."""
    measured: list[dict[Any, float]] = [{(a.data, a.metric): a.score.percent for a in t.answers} for t in towers]
    if not any(column in known for known in measured for column in COLUMNS):
        return ""
    header = ["tower", *(f"{name} {metric}" for name, metric in COLUMNS)]
    rows = [[f"{NAMES[name]}, as published", *(f"{v:.1f}" for v in values)] for name, values in TABLE3.items()]
    for t, known in zip(towers, measured, strict=True):
        rows.append([f"**{text(t.label)}**", *(f"{known[c]:.1f}" if c in known else "-" for c in COLUMNS)])
    return "\n\n".join(["### Beside Table 3", table(header, rows), DISPUTED])
