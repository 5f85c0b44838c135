"""MMVP-VLM against zero-shot retention, at strengths between the original tower and the enhanced one.

A run's tower is ``original + s * (enhanced - original)``, exported with s = 1. Every other s is mixed here in memory
from those two, just as ``export --lora_scale s`` merges it, so that a user can choose s before anything is written. The
same holds for any two towers of one architecture (interpolated as in arXiv 2109.01903).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.figures import COLOURS, INK, Drawing, short
from llava_genhancer.evaluate.markdown import table
from llava_genhancer.evaluate.mmvp.measure import Benchmark, evaluate_tower, load_benchmark, output_path
from llava_genhancer.evaluate.mmvp.results import GUESS, MmvpResult
from llava_genhancer.evaluate.tower import Tower
from llava_genhancer.evaluate.towers import choose_device, load_tower
from llava_genhancer.evaluate.zero_shot.layouts import load_sets
from llava_genhancer.evaluate.zero_shot.measure import evaluate_tower as evaluate_zero_shot
from llava_genhancer.evaluate.zero_shot.results import Store, TowerAnswers
from llava_genhancer.files import expand
from llava_genhancer.run import MANIFEST, read_json, recipe_of, versions, write_json
from llava_genhancer.tower.export import is_tower, read_marker

RESULT, FIGURE = "eval/curve.json", "curve.png"


@dataclass(frozen=True)
class Point:
    """What a tower at one strength (0 original, 1 enhanced) reaches."""

    scale: float
    mmvp: MmvpResult
    retention: TowerAnswers

    def to_dict(self) -> dict[str, Any]:
        return {"lora_scale": self.scale, "mmvp": self.mmvp.to_dict(), "zero_shot": self.retention.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Point:
        """The inverse of :meth:`to_dict`.

        Raises:
            InputError: it is not that.
        """
        try:
            mmvp, zero_shot = MmvpResult.from_dict(values["mmvp"]), TowerAnswers.from_dict(values["zero_shot"])
            return cls(float(values["lora_scale"]), mmvp, zero_shot)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"not a point of a curve ({type(error).__name__}: {error}): run curve again") from None


def run(
    towers: Sequence[str],
    data: Sequence[str | Path],
    mmvp: str | Path,
    *,
    scales: str | Sequence[float] = (0, 0.25, 0.5, 0.75, 1),
    output: str | Path | None = None,
    batch_size: int = 64,
    device: str | None = None,
) -> list[Point]:
    """The command ``curve``: measure every strength, print the table, write JSON and a picture.

    Args:
        towers: a run's folder, or two towers: the original and the enhanced one.
        data: zero-shot data sets' folders, or folders of such.
        mmvp: MMVP-VLM's folder.
        scales: strengths in [0, 1]; a string has them separated by commas.
        output: JSON to write; default ``eval/curve.json`` of the run, needed for two towers. Strengths that it has of
            the same weights and data are not measured again.

    Returns:
        The points, by strength.

    Raises:
        InputError: anything wrong with what was given; before a weight is loaded where that can be known.
    """
    strengths = parse_scales(scales)
    first_name, other_name = _names(towers)
    if output is None and len(towers) != 1:
        raise InputError("two towers need --output JSON: only a run has a place for its curve")
    target = output_path(Path(expand(output or Path(towers[0]) / RESULT)), "curve.json")
    sets, benchmark, chosen = load_sets(data), load_benchmark(mmvp), choose_device(device)
    first, other = load_tower(first_name, chosen), load_tower(other_name, chosen)
    store = Store(target.with_name("zero_shot"))
    known = _measured(target, benchmark)
    points: list[Point] = []
    for scale in strengths:
        tower = mixed(first, other, scale)
        scored = next((m for m in known if m.weights == tower.weights), None)
        if scored is None:
            scored = evaluate_tower(tower, benchmark, batch_size=batch_size, progress=True)
        label = f"{scale:g}"
        retention = evaluate_zero_shot(tower, sets, label=label, store=store, batch_size=batch_size, progress=True)
        points.append(Point(scale, dataclasses.replace(scored, label=label), retention))
        facts = {"path": str(benchmark.path), "sha256": benchmark.sha256}
        ends = {"original": first_name, "enhanced": other_name}
        write_json(
            target,
            {"format": 1, **ends, "benchmark": facts, "versions": versions(), "points": [p.to_dict() for p in points]},
        )
    figure(points, target.with_suffix(".png"))
    print(f"{markdown(points)}\n\nresults: {target}\nfigure:  {target.with_suffix('.png')}")
    return points


def parse_scales(scales: str | Sequence[float]) -> list[float]:
    """Strengths, rising and each once.

    Raises:
        InputError: none, not numbers, or outside [0, 1].
    """
    words = scales.split(",") if isinstance(scales, str) else list(scales)
    try:
        found = sorted({float(word) for word in words})
    except ValueError:
        raise InputError(f"--lora_scale {scales}: give numbers from 0 to 1, separated by commas") from None
    if not found or not all(0 <= s <= 1 for s in found):
        raise InputError(f"--lora_scale {scales}: strengths lie between 0 (original) and 1 (enhanced)")
    return found


def load_points(path: str | Path) -> list[Point]:
    """The points of a file that the command wrote.

    Raises:
        InputError: missing, malformed, or without points.
    """
    values = read_json(path)
    if not isinstance(values, dict) or not isinstance(values.get("points"), list) or not values["points"]:
        raise InputError(f"{path} is not a curve: it lists no points")
    return [Point.from_dict(p) for p in values["points"]]


@torch.no_grad()
def mixed(first: Tower, other: Tower, scale: float) -> Tower:
    """``first + scale * (other - first)`` in fp32; at 0 and 1 the towers' own weights, bit by bit.

    Raises:
        InputError: their weights have other names or shapes.
    """
    if scale in (0, 1):
        return (first, other)[int(scale)]
    theirs, model = other.model.state_dict(), copy.deepcopy(first.model)
    ours = model.state_dict()
    odd = [n for n in ours.keys() | theirs.keys() if n not in ours or n not in theirs]
    odd += [n for n in ours if not odd and ours[n].shape != theirs[n].shape]
    if odd:
        raise InputError(
            f"{first.name} and {other.name} cannot be mixed: {sorted(odd)[0]} differs in name or shape; give an "
            "original and what was made of it"
        )
    for name, value in ours.items():
        if value.is_floating_point():
            value.copy_(torch.lerp(value, theirs[name], scale))
    pairs = [(f"{side}/{n}", sha) for side, t in (("0", first), ("1", other)) for n, sha in t.weights.items()]
    weights = {"lora_scale": f"{scale:g}", **dict(pairs)} if first.weights and other.weights else {}
    method = f"{other.method or 'mixed'} at lora_scale {scale:g}"  # no published row is of a mixture
    return dataclasses.replace(other, name=f"{other.name} at {scale:g}", model=model, weights=weights, method=method)


def _names(towers: Sequence[str]) -> tuple[str, str]:
    """The two ends of the curve."""
    if len(towers) == 2:
        return towers[0], towers[1]
    run_dir = Path(expand(towers[0]))
    if len(towers) != 1 or not (run_dir / MANIFEST).is_file():
        raise InputError(f"{' '.join(towers)}: give one run's folder, or two towers, the original and the enhanced one")
    tower = run_dir / "tower"
    if not is_tower(tower):
        raise InputError(f"{tower} is not there: `enhance` is not finished, run it again")
    if (scale := read_marker(tower).get("lora_scale", 1)) != 1:
        raise InputError(f"{tower} was exported with lora_scale {scale}, and the curve needs 1: export it again")
    return recipe_of(run_dir).backbone, str(tower)


def _measured(target: Path, benchmark: Benchmark) -> list[MmvpResult]:
    """MMVP-VLM results of an earlier command, if they are of the same set."""
    try:
        return (
            [p.mmvp for p in load_points(target)]
            if read_json(target)["benchmark"]["sha256"] == benchmark.sha256
            else []
        )
    except (InputError, KeyError, TypeError):
        return []


def markdown(points: Sequence[Point]) -> str:
    """A row per strength: MMVP-VLM, the mean of the zero-shot scores, and each of them with its interval."""
    header = ["lora_scale", "MMVP-VLM", "zero-shot mean", *(a.name for a in points[0].retention.answers)]
    rows = []
    for p in points:
        scores = [p.mmvp.average, *(a.score for a in p.retention.answers)]
        said = [f"{s.percent:.1f} [{s.low:.1f}, {s.high:.1f}]" for s in scores]
        rows.append([f"{p.scale:g}", said[0], f"{p.retention.mean:.1f}", *said[1:]])
    return table(header, rows)


def figure(points: Sequence[Point], path: str | Path) -> None:
    """MMVP-VLM upwards, zero-shot scores to the right: their mean, and each by itself with 95 % intervals."""
    height = np.array([p.mmvp.average.percent for p in points])
    spread = np.array(
        [[h - p.mmvp.average.low, p.mmvp.average.high - h] for h, p in zip(height, points, strict=True)]
    ).T
    names = [a.name for a in points[0].retention.answers]
    with Drawing(path, 10.5, 4.6) as drawn:
        left, right = drawn.subplots(1, 2, sharey=True)
        mean = [p.retention.mean for p in points]
        left.errorbar(
            mean, height, yerr=spread.clip(0), fmt="o-", color=COLOURS[1], markersize=6, capsize=3, elinewidth=1.0
        )
        for p, x, y in zip(points, mean, height, strict=True):
            left.annotate(f"{p.scale:g}", (x, y), (6, 5), textcoords="offset points", fontsize=9, color=INK)
        for i, name in enumerate(names):
            scores = [p.retention.answers[i].score for p in points]
            middle = np.array([s.percent for s in scores])
            reach = np.array([[s.percent - s.low, s.high - s.percent] for s in scores]).T
            right.errorbar(
                middle, height, xerr=reach.clip(0), fmt="o-", color=COLOURS[(i + 1) % 8], markersize=4, capsize=2,
                elinewidth=0.8, label=short(name),
            )  # fmt: skip
        for axes, what in ((left, f"mean of {len(names)} zero-shot scores, %"), (right, "each zero-shot score, %")):
            axes.axhline(GUESS, color=INK, linewidth=0.9, linestyle=(0, (1, 3)))
            axes.set_xlabel(what)
            axes.grid(color="#E5E5E5", linewidth=0.8)
            axes.set_axisbelow(True)
        left.set_ylabel("MMVP-VLM, %")
        left.set_title("Numbers at the points: lora_scale, 0 = original, 1 = enhanced", loc="left", fontsize=9)
        right.legend(fontsize=8)
