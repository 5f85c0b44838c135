"""Table 1 of the paper with measured towers beside the published ones, as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from llava_genhancer.evaluate.figures import PATTERN_NAMES
from llava_genhancer.evaluate.markdown import table, text
from llava_genhancer.evaluate.mmvp.results import MmvpResult
from llava_genhancer.evaluate.paper import NAMES, PATTERNS, TABLE1, Table1Row

CSV = "tables/table1.csv"


def markdown(results: Sequence[MmvpResult]) -> str:
    """The published rows of the measured towers' backbones, or all where it is none of those, and the towers' own."""
    known = {r.backbone for r in results} & {row.backbone.recipe for row in TABLE1}
    rows = []
    for row in TABLE1:
        if row.backbone.recipe in known or not known:
            rows.append([_name(row), *(f"{v:.1f}" for v in (*row.patterns, row.average))])
    for row in _elsewhere(results):
        rows.append([f"{_name(row)} ({row.source})", *["-"] * len(PATTERNS), f"{row.average:.1f}"])
    for r in results:
        cells = [f"{s.percent:.1f}" for s in r.patterns]
        rows.append([f"**{text(r.label)}**", *cells, f"**{r.average.percent:.1f}**"])
    other = "" if known else " No measured tower is known to have a backbone of theirs: do not compare."
    note = (
        "Pairs right in percent; published rows are Table 1 of arXiv 2503.19480 where no other source is named, "
        f"measured ones in bold.{other}"
    )
    return "\n\n".join(["### Beside Table 1", table(["tower", *PATTERN_NAMES], rows), note])


def _name(row: Table1Row) -> str:
    return f"{row.backbone.label}@{row.backbone.image_size}, {NAMES[row.method]}"


def _elsewhere(results: Sequence[MmvpResult]) -> list[Table1Row]:
    """The measured towers' published rows that are not in Table 1."""
    return list(dict.fromkeys(r.paper for r in results if r.paper and r.paper not in TABLE1))


def as_csv(results: Sequence[MmvpResult]) -> str:
    """One line per tower and pattern, the published ones first."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["source", "tower", "method", "pattern", "percent", "low", "high", "right", "n"])
    for row in TABLE1:
        name = f"{row.backbone.label}@{row.backbone.image_size}"
        for pattern, value in zip((*PATTERNS, "average"), (*row.patterns, row.average), strict=True):
            writer.writerow(["arXiv 2503.19480", name, NAMES[row.method], pattern, value, "", "", "", ""])
    for row in _elsewhere(results):
        name = f"{row.backbone.label}@{row.backbone.image_size}"
        writer.writerow([row.source, name, NAMES[row.method], "average", row.average, "", "", "", ""])
    for r in results:
        for pattern, s in zip((*PATTERNS, "average"), (*r.patterns, r.average), strict=True):
            numbers = [round(v, 4) for v in (s.percent, s.low, s.high)]
            writer.writerow(
                [
                    "run",
                    r.label,
                    r.method or r.recipe or ("original" if r.backbone else ""),
                    pattern,
                    *numbers,
                    s.right,
                    s.n,
                ]
            )
    return out.getvalue()
