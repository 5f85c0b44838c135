"""An ablation's page: the table beside the paper's, its figure, details, pictures, failures, and how to repeat it."""

from __future__ import annotations

import csv
import io
import os
import shlex
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from llava_genhancer.ablate.figure import ablation_figure
from llava_genhancer.ablate.results import QUANTITIES, Estimate, Row, Table
from llava_genhancer.evaluate import figures, generation, paper
from llava_genhancer.evaluate.markdown import block, table, text
from llava_genhancer.evaluate.mmvp.results import GUESS, ONE_PAIR
from llava_genhancer.evaluate.report.generation_section import DEFINITIONS, FIGURE
from llava_genhancer.evaluate.report.html import page
from llava_genhancer.run import versions, write_json, write_text

PICTURES_SHOWN = 10
IN_TERMINAL = ("mmvp", "change", "zero_shot", "seconds", "memory")  # the page has the rest


def write_page(results: Table, output_dir: Path, command: Sequence[str]) -> Path:
    """Write ``report.md``, ``report.html``, ``results.json``, ``table.csv`` and ``figures/`` of an ablation.

    Args:
        command: the words that made it, to be repeated.

    Returns:
        The path of ``report.md``.
    """
    ablation_figure(results, output_dir / "figures" / f"{results.name}.png")
    head = f"{results.name}: {results.grid.title}"
    parts = [
        f"# {text(head)}",
        _summary(results),
        f"![{text(head)}](figures/{results.name}.png)",
        "## Table",
        table(_header(results, results.quantities), _body(results, results.quantities, text)),
        _notes(results, results.quantities),
        *_published_cost(results),
        *_failed(results),
        *_details(results),
        *_curves(results, output_dir),
        *_pictures(results, output_dir),
        "## Again",
        block([shlex.join(command)]),
    ]
    body = "\n\n".join(parts) + "\n"
    write_text(output_dir / "report.md", body)
    write_text(output_dir / "report.html", page(head, body, output_dir))
    write_text(output_dir / "table.csv", _csv(results))
    write_json(output_dir / "results.json", _facts(results))
    return output_dir / "report.md"


def plain(results: Table) -> str:
    """The table as aligned plain text, for a terminal."""
    chosen = [q for q in results.quantities if q in IN_TERMINAL]
    rows = [_header(results, chosen), *_body(results, chosen, str)]
    wrapped = [textwrap.wrap(cell, 20) for cell in rows[0]]
    height = max(map(len, wrapped))
    lines = [[cell[i - height] if i >= height - len(cell) else "" for cell in wrapped] for i in range(height)]
    widths = [max(len(row[i]) for row in [*lines, *rows[1:]]) for i in range(len(rows[0]))]
    shown = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(r, widths, strict=True)))
        for r in [*lines, *rows[1:]]
    ]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    failed = [f"{cell}, seed {seed} failed: {line}" for cell, seed, line in results.failed]
    notes = textwrap.wrap(_notes(results, chosen), 120, break_long_words=False, break_on_hyphens=False)
    head = f"{results.name}: {results.grid.title} ({results.recipe})"
    return "\n".join([head, "", *shown[:height], rule, *shown[height:], "", *failed, *notes])


# --- the table ----------------------------------------------------------------------------------------------------


def _header(results: Table, quantities: Sequence[str]) -> list[str]:
    ours = [QUANTITIES[q][0] for q in quantities]
    return [results.name, *ours, *(f"paper: {backbone}" for backbone in results.backbones)]


def _body(results: Table, quantities: Sequence[str], say: Callable[[str], str]) -> list[list[str]]:
    rows = []
    if results.original is not None:
        score = results.original.average
        first = _cell("mmvp", Estimate(score.percent, score.low, score.high, "pairs"))
        published = [f"{_original(b):.1f}" for b in results.backbones]
        rows.append(["original", first, *["-"] * (len(quantities) - 1), *published])
    for row in results.rows:
        ours = [_cell(q, row.estimates.get(q)) for q in quantities]
        if not row.estimates:
            ours[0] = "failed"
        theirs = [f"{row.published[b]:.1f}" if b in row.published else "-" for b in results.backbones]
        rows.append([say(row.label), *ours, *theirs])
    return rows


def _cell(quantity: str, estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    form = QUANTITIES[quantity][1]
    mean = form.format(estimate.mean)
    if estimate.low is None or estimate.high is None or estimate.low == estimate.high:
        return mean
    return f"{mean} [{form.format(estimate.low)}, {form.format(estimate.high)}]"


def _original(backbone: str) -> float:
    return paper.table1(backbone, "original").average


def _summary(results: Table) -> str:
    seeds = len(results.seeds)
    lines = [
        f"Recipe {text(results.recipe)}, {seeds} seed{'s' if seeds > 1 else ''} ({', '.join(map(str, results.seeds))})."
    ]
    if results.grid.equal_images:
        seen = sorted({round(row.estimates["images"].mean) for row in results.rows if "images" in row.estimates})
        lines.append(f"Images seen by every cell: {', '.join(f'{n:,}' for n in seen)}.")
    lines += [_judged(row) for row in results.rows if "change" in row.estimates]
    if results.failed:
        lines.append(f"{len(results.failed)} of {sum(len(r.folders) for r in results.rows)} runs failed (below).")
    return "\n".join(f"* {line}" for line in lines)


def _judged(row: Row) -> str:
    change = row.estimates["change"]
    said = f"{text(row.label)}: MMVP-VLM {_cell('change', change)} points against the original"
    if change.low is None or change.high is None:
        return f"{said}."
    over = "seeds" if change.over == "seeds" else "pairs of one seed"
    if change.low > 0 or change.high < 0:
        return f"{said}; the interval over {over} excludes zero."
    return f"{said}; the interval over {over} holds zero, no evidence of a difference."


def _notes(results: Table, quantities: Sequence[str]) -> str:
    seeds = len(results.seeds)
    if seeds > 1:
        interval = f"Intervals are Student's 95 % over {seeds} seeds, which all answer the same pairs."
    else:
        interval = "Intervals are 95 % over the pairs of one seed: they say nothing about the next seed."
    said = [interval, f"One pair is {ONE_PAIR:.2f} points of MMVP-VLM, guessing gives {GUESS:.0f} %."]
    if "clip_score" in quantities:
        said.append(DEFINITIONS)
    if results.backbones:
        sources = "arXiv 2503.19480" + ("; DCR's own, arXiv 2603.04803" if results.name == "modes" else "")
        said.append(
            f"The paper's columns are of the backbones that they name, trained by the paper's recipes on the paper's "
            f"data ({sources}); a cell whose method was changed has none."
        )
    if len(results.rows) > 2:
        said.append(f"{len(results.rows)} cells are {len(results.rows)} chances for an interval to miss by luck.")
    return " ".join(said)


# --- what stands below it -----------------------------------------------------------------------------------------


def _published_cost(results: Table) -> list[str]:
    if results.name != "table7":
        return []
    rows = [
        [label, f"{cost.parameters / 1e9:.2f} B", f"{cost.memory_gb:.2f}", f"{cost.seconds:.2f}"]
        for label, cost in paper.TABLE7.items()
    ]
    header = ["the paper's Table 7", "parameters", "peak memory, GB", "s per 100 iterations"]
    return [
        table(header, rows),
        "The paper measured with 2 images per device and does not name the GPU, their number or the stage; ours are "
        "optimizer steps of the global batch in the first stage.",
    ]


def _failed(results: Table) -> list[str]:
    if not results.failed:
        return []
    rows = [[text(cell), str(seed), text(line)] for cell, seed, line in results.failed]
    return ["## Failed", table(["cell", "seed", "what it said"], rows)]


def _details(results: Table) -> list[str]:
    """Per probed detail the change of every cell."""
    rows = [row for row in results.rows if row.details]
    if not rows:
        return []
    names = list(rows[0].details)
    body = [[text(name), *(_cell("change", row.details.get(name)) for row in rows)] for name in names]
    return [
        "## What the global token says of each detail",
        table(["linear probes, enhanced minus original, points", *(text(row.label) for row in rows)], body),
    ]


def _curves(results: Table, output_dir: Path) -> list[str]:
    """Fig. 1: generation quality and MMVP-VLM over the training, of each cell's first seed."""
    if not results.grid.over_training:
        return []
    parts = ["## Over training"]
    for row in results.rows:
        path = row.folders[0] / "figures" / FIGURE
        if path.is_file():
            parts += [f"### {text(row.label)}", f"![{text(row.label)}]({os.path.relpath(path, output_dir)})"]
    return parts


def _pictures(results: Table, output_dir: Path) -> list[str]:
    """The same images as every cell rebuilds them."""
    if results.originals_picture is None:
        return []
    rows = [("original", _strip(results.originals_picture))]
    rows += [(figures.short(row.label, 18), _strip(row.picture)) for row in results.rows if row.picture is not None]
    figures.reconstructions_figure(rows, output_dir / "figures" / "reconstructions.png")
    return [
        "## Rebuilt images",
        "Each row is rebuilt from the enhanced tower's condition alone, from the same noise.",
        "![Images rebuilt by every cell](figures/reconstructions.png)",
    ]


def _strip(path: Path) -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in generation.read_strip(path)[:PICTURES_SHOWN]]


# --- for programs -------------------------------------------------------------------------------------------------


def _csv(results: Table) -> str:
    """One row per cell: means and interval ends, then the paper's columns; empty where there is nothing."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    ours = [f"{q}{end}" for q in results.quantities for end in ("", "_low", "_high")]
    writer.writerow(["cell", *ours, *(f"paper_{b}" for b in results.backbones), "failed"])
    for row in results.rows:
        values: list[Any] = []
        for quantity in results.quantities:
            e = row.estimates.get(quantity)
            values += (
                ["", "", ""] if e is None else [f"{v:.6g}" if v is not None else "" for v in (e.mean, e.low, e.high)]
            )
        theirs = [row.published.get(b, "") for b in results.backbones]
        writer.writerow([row.label, *values, *theirs, "; ".join(row.failed.values())])
    return out.getvalue()


def _facts(results: Table) -> dict[str, Any]:
    original = results.original
    return {
        "format": 1,
        "ablation": results.name,
        "title": results.grid.title,
        "recipe": results.recipe,
        "seeds": results.seeds,
        "versions": versions(),
        "original": None if original is None else {"tower": original.tower, "percent": original.average.percent},
        "cells": [row.to_dict() for row in results.rows],
    }
