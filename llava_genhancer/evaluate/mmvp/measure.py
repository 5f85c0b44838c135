"""MMVP-VLM: does a model tell apart two images that CLIP finds alike? The official protocol, batched.

Legend: K pairs in a batch, so 2K images and 2K texts.

A statement is given to the image whose logit is higher (softmax over the pair's two images, image 0 if p > 0.5); a pair
counts only if both its statements go to the right image. The score is the mean of nine patterns' shares of 15 pairs.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.mmvp.data import PAIRS, Benchmark, Pair, load_benchmark, open_image
from llava_genhancer.evaluate.mmvp.local_scores import with_locals
from llava_genhancer.evaluate.mmvp.results import (
    GUESS,
    ONE_PAIR,
    Comparison,
    MmvpResult,
    PairResult,
    Score,
    compare,
    load_results,
    results_to_dict,
    save_results,
)
from llava_genhancer.evaluate.paper import PATTERNS
from llava_genhancer.evaluate.tower import Tower
from llava_genhancer.evaluate.towers import choose_device, load_tower
from llava_genhancer.evaluate.words import p_value, paper_rows
from llava_genhancer.files import expand

__all__ = [
    "GUESS", "Benchmark", "Comparison", "MmvpResult", "PairResult", "Score", "compare", "evaluate_tower",
    "load_benchmark", "load_results", "run", "save_results", "table",
]  # fmt: skip

PROMPT = "a photo of "


def pair_logits(tower: Tower, pairs: Sequence[Pair]) -> Tensor:
    """Logits (K, 2, 2) of each pair's statements (rows) against its own two images (columns), fp32 on the CPU."""
    images = [open_image(path) for pair in pairs for path in pair.images]
    texts = [PROMPT + statement for pair in pairs for statement in pair.statements]
    logits = tower.logits(images, texts)  # (2K texts, 2K images)
    blocks = logits.float().cpu().view(len(pairs), 2, len(pairs), 2)
    own = torch.arange(len(pairs))
    return blocks[own, :, own]


def evaluate_tower(
    tower: str | Tower,
    benchmark: Benchmark,
    *,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> MmvpResult:
    """Measure one tower.

    Args:
        tower: folder or hub id, or one already loaded (then ``device`` is its own).
        batch_size: images per forward, taken in whole pairs; it changes speed and memory only.
        device: default CUDA where there is one.

    Raises:
        InputError: as :func:`load_tower`; an image went bad meanwhile; logits are not finite.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} must be at least 1")
    if isinstance(tower, str):
        tower = load_tower(tower, device)
    from tqdm import tqdm

    step = max(1, batch_size // 2)
    results: list[PairResult] = []
    label = Path(tower.name).name or tower.name
    with tqdm(total=PAIRS, desc=label, unit="pair", disable=None if progress else True, leave=False) as bar:
        for start in range(0, len(benchmark.pairs), step):
            batch = benchmark.pairs[start : start + step]
            logits = pair_logits(tower, batch)
            if not torch.isfinite(logits).all():
                raise InputError(f"tower {tower.name}: its logits are not finite, so its weights are broken")
            first = logits.softmax(-1)[:, :, 0].tolist()  # (K, 2)
            for pair, p in zip(batch, first, strict=True):
                chosen = [0 if x > 0.5 else 1 for x in p]
                correct = (chosen[0] == pair.truth[0], chosen[1] == pair.truth[1])
                results.append(PairResult(pair.ids, (p[0], p[1]), correct))
            bar.update(len(batch))
    return MmvpResult(
        tower=tower.name,
        label=label,
        model_type=tower.model_type,
        pairs=tuple(results),
        recipe=tower.recipe,
        backbone=tower.backbone.recipe if tower.backbone else None,
        method=tower.method,
        source=tower.source,
        weights=tower.weights,
        device=str(tower.device),
    )


def table(results: Sequence[MmvpResult]) -> str:
    """The per-pattern table as aligned plain text: percent with 95 % intervals, the paper's figure in brackets."""
    rows = [["pattern", "n", *(r.label for r in results)]]
    for i, name in enumerate(PATTERNS):
        scores = [r.patterns[i] for r in results]
        printed = [r.paper.patterns[i] if r.paper and r.paper.patterns else None for r in results]
        cells = [_cell(s, p) for s, p in zip(scores, printed, strict=True)]
        rows.append([name, str(scores[0].n), *cells])
    averages = [_cell(r.average, r.paper.average if r.paper else None) for r in results]
    rows.append(["average", str(len(results[0].pairs)), *averages])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), row[1].rjust(widths[1])]
        cells += [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(cells))
    rule = "-" * len(lines[0])
    lines = [lines[0], rule, *lines[1:-1], rule, lines[-1], ""]
    for r in results[1:]:
        c = compare(results[0], r)
        lines.append(
            f"{r.label} against {results[0].label}: {c.difference:+.1f} points [{c.low:+.1f}, {c.high:+.1f}], "
            f"{c.gained} pairs gained, {c.lost} lost, McNemar's exact p {p_value(c.p)}"
        )
    if any(r.paper for r in results):
        lines.append(f"(in brackets, as published: {paper_rows(results)})")
    lines.append(f"Intervals are 95 %. Guessing gives {GUESS:.0f} %, one pair is {ONE_PAIR:.2f} points of the average.")
    return "\n".join(lines)


def _cell(score: Score, published: float | None) -> str:
    text = f"{score.percent:5.1f} [{score.low:4.1f}, {score.high:5.1f}]"
    return text if published is None else f"{text} ({published:4.1f})"


def run(
    towers: Sequence[str],
    data: str | Path,
    output: str | Path | None = None,
    batch_size: int = 64,
    device: str | None = None,
    labels: Sequence[str] | None = None,
    locals_too: bool = False,
) -> dict[str, Any]:
    """The command ``mmvp-vlm``: measure every tower, print the table, write JSON and a picture.

    Args:
        towers: folders or hub ids; the others are compared with the first.
        data: MMVP-VLM's folder.
        output: JSON to write, or a folder for ``mmvp_vlm.json``; the picture goes beside it as ``.png``.
        labels: names for table and figure, one per tower; default: as much of each path as tells them apart.
        locals_too: score by the global token plus the mean of the local ones, as DIVA does OpenAI's towers.

    Returns:
        What the JSON holds.

    Raises:
        InputError: anything wrong with what was given; before a weight is loaded where that can be known.
    """
    from llava_genhancer.evaluate.figures import mmvp_figure

    if not towers:
        raise InputError("no tower given: name at least one folder or hub id")
    if labels is not None and len(labels) != len(towers):
        raise InputError(f"{len(labels)} labels for {len(towers)} towers: give one each")
    chosen = choose_device(device)
    target = output_path(Path(expand(output)), "mmvp_vlm.json") if output is not None else None
    benchmark = load_benchmark(data)
    results = []
    for name, label in zip(towers, labels or short_labels(towers), strict=True):
        tower = load_tower(name, chosen)
        tower = with_locals(tower) if locals_too else tower
        label = f"{label} (with locals)" if locals_too else label
        result = evaluate_tower(tower, benchmark, batch_size=batch_size, device=chosen, progress=True)
        results.append(dataclasses.replace(result, label=label))
    print(f"MMVP-VLM, {benchmark.path}, percent of pairs\n\n{table(results)}")
    if target is None:
        return results_to_dict(results, benchmark)
    measured = save_results(target, results, benchmark)
    mmvp_figure(results, target.with_suffix(".png"))
    print(f"\nresults: {target}\nfigure:  {target.with_suffix('.png')}")
    return measured


def short_labels(names: Sequence[str]) -> list[str]:
    """The fewest last path components that tell the names apart; equal names are numbered."""
    parts = [[p for p in name.replace(os.sep, "/").split("/") if p] or [name] for name in names]
    labels = list(names)
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(p[-depth:]) for p in parts]
        if len(set(labels)) == len(set(names)):
            break
    return [f"{x} ({labels[:i].count(x) + 1})" if labels.count(x) > 1 else x for i, x in enumerate(labels)]


def output_path(path: Path, name: str) -> Path:
    """The JSON's path, ``name`` in a folder, which is made; bad ones are refused before the measurement, not after it.

    Raises:
        InputError: not a .json, or it cannot be written.
    """
    if path.is_dir() or not path.suffix:
        path = path / name
    if path.suffix != ".json":
        raise InputError(f"--output {path}: give a name that ends in .json, or a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path.parent} cannot be made: {error.strerror or error}") from None
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path.parent} is not writable: choose another --output")
    return path
