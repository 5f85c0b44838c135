"""What an ablation's finished runs measured, cell by cell: means over seeds with their intervals."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_genhancer.ablate.grids import Cell, Grid
from llava_genhancer.ablate.running import Job
from llava_genhancer.engine import stage_result
from llava_genhancer.enhance.stages import STAGES
from llava_genhancer.evaluate import paper
from llava_genhancer.evaluate.mmvp.results import MmvpResult, compare, load_results
from llava_genhancer.evaluate.report import generation_section
from llava_genhancer.evaluate.report.seeds import spread
from llava_genhancer.evaluate.zero_shot import results as zero_shot_results
from llava_genhancer.method import method_name
from llava_genhancer.recipes import get_recipe, to_dict
from llava_genhancer.run import read_json

# What is printed of a cell: column title, and format of its mean.
QUANTITIES = {
    "mmvp": ("MMVP-VLM, %", "{:.1f}"),
    "change": ("minus original, points", "{:+.1f}"),
    "zero_shot": ("zero-shot minus original, points", "{:+.1f}"),
    "probes": ("probes minus original, points", "{:+.1f}"),
    "clip_score": ("CLIP score of rebuilt images", "{:.3f}"),
    "psnr": ("their PSNR, dB", "{:.2f}"),
    "images": ("images seen", "{:,.0f}"),
    "denoiser": ("denoiser, parameters", "{:,.0f}"),
    "seconds": ("s per 100 steps", "{:.1f}"),
    "memory": ("peak GPU memory, GB", "{:.2f}"),
}


@dataclass(frozen=True)
class Estimate:
    """A mean and where its 95 % interval comes from: ``seeds`` (Student's t), ``pairs`` (of one seed), or nowhere."""

    mean: float
    low: float | None = None
    high: float | None = None
    over: str | None = None
    values: tuple[float, ...] = ()


@dataclass
class Row:
    """A cell: what its runs gave, by quantity, and the lines of those that failed.

    Attributes:
        details: per probed detail, change against the original in points, one value per seed.
        published: the paper's MMVP-VLM by backbone.
        picture: the newest rebuilt images of the first seed.
    """

    label: str
    folders: list[Path]
    estimates: dict[str, Estimate]
    details: dict[str, Estimate]
    failed: dict[int, str]
    published: dict[str, float]
    picture: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "label": self.label,
            "runs": [str(folder) for folder in self.folders],
            "failed": {str(seed): line for seed, line in self.failed.items()},
            "measured": {name: dataclasses.asdict(e) for name, e in self.estimates.items()},
            "details": {name: dataclasses.asdict(e) for name, e in self.details.items()},
            "paper": self.published,
        }


@dataclass
class Table:
    """A whole ablation. ``original`` is the tower before any training; None until a run was measured."""

    name: str
    recipe: str
    grid: Grid
    seeds: list[int]
    rows: list[Row]
    original: MmvpResult | None = None
    originals_picture: Path | None = None
    quantities: list[str] = field(default_factory=list)

    @property
    def backbones(self) -> list[str]:
        """The paper's columns, by our recipes' names."""
        return list(dict.fromkeys(b for row in self.rows for b in row.published))

    @property
    def failed(self) -> list[tuple[str, int, str]]:
        """Cell, seed and line of every run that failed."""
        return [(row.label, seed, line) for row in self.rows for seed, line in row.failed.items()]


def gather(name: str, recipe: str, grid: Grid, jobs: Sequence[Job], failed: Mapping[Path, str]) -> Table:
    """The ablation's table, from the run folders and what failed.

    Raises:
        InputError: a result cannot be read, or cells were measured on different pairs.
    """
    table = Table(name, recipe, grid, sorted({job.seed for job in jobs}), [])
    published = paper.ABLATIONS.get(name, {})
    for cell in grid.cells:
        own = [job for job in jobs if job.cell == cell]
        done = [job for job in own if job.folder not in failed]
        measured = [_towers(job.folder) for job in done]
        if table.original is None and measured and measured[0] is not None:
            table.original = measured[0][0]
        pairs = [m for m in measured if m is not None]
        table.rows.append(
            Row(
                label=cell.label,
                folders=[job.folder for job in own],
                estimates=_mmvp(pairs) | _others([_quantities(job, grid.cost) for job in done]),
                details=_others([_details(job.folder) for job in done]),
                failed={job.seed: failed[job.folder] for job in own if job.folder in failed},
                published=published.get(cell.label, {}) if _as_published(cell, recipe, own) else {},
                picture=_last_picture(done[0].folder) if done else None,
            )
        )
    table.quantities = [q for q in QUANTITIES if q == "mmvp" or any(q in row.estimates for row in table.rows)]
    drawn = [row.picture for row in table.rows if row.picture is not None]
    table.originals_picture = drawn[0].parent / "originals.png" if drawn else None
    return table


def _as_published(cell: Cell, recipe: str, jobs: Sequence[Job]) -> bool:
    """Returns whether a cell's runs are of the method that the paper's cell is of, whatever else was changed."""
    key = method_name(to_dict(get_recipe(cell.start(recipe)))).key
    return all(method_name(to_dict(job.recipe)).key == key for job in jobs)


def _towers(folder: Path) -> tuple[MmvpResult, MmvpResult] | None:
    path = folder / "eval" / "mmvp_vlm.json"
    if not path.is_file():
        return None
    original, enhanced = load_results(path)
    return original, enhanced


def _mmvp(pairs: Sequence[tuple[MmvpResult, MmvpResult]]) -> dict[str, Estimate]:
    """Score and change; of one seed the interval is that of its pairs, which says nothing about another seed."""
    if not pairs:
        return {}
    scores = [enhanced.average for _, enhanced in pairs]
    changes = [compare(original, enhanced) for original, enhanced in pairs]
    if len(pairs) > 1:
        return {"mmvp": _mean([s.percent for s in scores]), "change": _mean([c.difference for c in changes])}
    (score,), (change,) = scores, changes
    return {
        "mmvp": Estimate(score.percent, score.low, score.high, "pairs", (score.percent,)),
        "change": Estimate(change.difference, change.low, change.high, "pairs", (change.difference,)),
    }


def _others(runs: Sequence[Mapping[str, float]]) -> dict[str, Estimate]:
    """Means over the runs that have a quantity."""
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: _mean([run[name] for run in runs if name in run]) for name in names}


def _mean(values: Sequence[float]) -> Estimate:
    summary = spread(values)
    low, high = summary["interval"] or (None, None)
    return Estimate(summary["mean"], low, high, "seeds" if low is not None else None, tuple(values))


def _quantities(job: Job, cost: bool) -> dict[str, float]:
    """What one run measured beside MMVP-VLM."""
    found: dict[str, float] = {}
    details = _details(job.folder)
    if details:
        found["probes"] = statistics.fmean(details.values())
    if (answers := job.folder / "eval" / "zero_shot.json").is_file():
        original, enhanced = zero_shot_results.load_results(answers)
        found["zero_shot"] = enhanced.mean - original.mean
    quality = generation_section.final(job.folder)
    if quality is not None:
        found["clip_score"] = quality["clip_score"]
        if quality["psnr"] is not None:
            found["psnr"] = quality["psnr"]
    results = {s: r for s in STAGES if (r := stage_result(job.folder / f"stage{s}")) is not None}
    found["images"] = sum(r["images_seen"] for r in results.values())
    return found | (_cost(job, results) if cost and results else {})


def _details(folder: Path) -> dict[str, float]:
    """Change of each probed detail, in points."""
    path = folder / "eval" / "probes.json"
    if not path.is_file():
        return {}
    probes = read_json(path)
    return {
        str(d): 100 * (probes["enhanced"][d]["accuracy"] - probes["original"][d]["accuracy"]) for d in probes["details"]
    }


def _cost(job: Job, results: Mapping[int, Mapping[str, Any]]) -> dict[str, float]:
    """Table 7's columns, of the first stage that ran."""
    stage, result = min(results.items())
    found = {"denoiser": float(result["parameters"]["denoiser"])}
    history = read_json(job.folder / f"stage{stage}" / "log_history.json")
    if rates := [entry["images_per_second"] for entry in history if "images_per_second" in entry]:
        found["seconds"] = 100 * job.recipe.global_batch_size / statistics.median(rates)
    if result["peak_memory_bytes"] is not None:
        found["memory"] = result["peak_memory_bytes"] / 1e9
    return found


def _last_picture(folder: Path) -> Path | None:
    pictures = [p for stage in STAGES for p in sorted((folder / f"stage{stage}" / "samples").glob("step-*.png"))]
    return pictures[-1] if pictures else None
