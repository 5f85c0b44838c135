"""The report's sections on the enhancement's own training: its stages, its pictures, the images it left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from llava_genhancer.errors import InputError
from llava_genhancer.evaluate import figures
from llava_genhancer.evaluate.markdown import code, table, text
from llava_genhancer.evaluate.report.gathered import STAGES, Report
from llava_genhancer.evaluate.words import duration, number
from llava_genhancer.method import method_name, read_fields
from llava_genhancer.run import read_json

FIGURES = ("loss.png", "t_density.png", "reconstructions.png")
GRID_ROWS, GRID_COLUMNS, KEYS_SHOWN = 6, 8, 20


def training(report: Report) -> str:
    """What each stage learned and how long it took; the loss over its steps, the density of t."""
    rows, histories = [], {}
    report.facts["stages"] = {}
    for stage in STAGES:
        result = report.read(f"stage{stage}/result.json", dict)
        history = figures.finite_history(report.read(f"stage{stage}/log_history.json", list) or [])
        learns = report.values.get(f"stage{stage}.trains")
        learns = ", ".join(map(str, learns)) if isinstance(learns, list) else learns or "?"
        if history:
            histories[f"Stage {stage}: {learns}"] = history
        if result is None:
            continue
        report.facts["stages"][str(stage)] = {k: v for k, v in result.items() if k != "skipped"}
        cells = [number(result.get(k)) for k in ("steps", "images_seen", "final_loss", "trainable_parameters")]
        rate = report.values.get(f"stage{stage}.learning_rate")
        rows.append([str(stage), text(learns), number(rate), *cells, duration(result.get("seconds"))])
    method = method_name(report.values)
    report.facts["method"] = {"key": method.key, "title": method.title}
    parts = [f"Method: {text(method.title)}. The loss is {text(method.loss)}."] if report.values else []
    if rows:
        header = ["stage", "learns", "learning rate", "steps", "images", "last loss", "trained parameters", "time"]
        parts.append(table(header, rows))
        entries = {n: s["data"] for n, s in report.facts["stages"].items() if isinstance(s.get("data"), dict)}
        if entries:
            told = (
                f"stage {n}: {code(str(e.get('path')))} ({code(str(e.get('fingerprint')))})" for n, e in entries.items()
            )
            parts.append(f"Data and their fingerprints: {'; '.join(told)}.")
    if histories:
        figures.loss_figure(histories, report.path("loss.png"), method.loss)
        parts.append(report.figure("loss.png", "Loss of each stage over its steps, as logged and smoothed"))
    sampling = read_fields(report.values).get("t_sampling")
    if sampling in ("logit_normal", "uniform"):
        scale, shift = float(report.values.get("t_scale", 1)), float(report.values.get("t_shift", 0))
        figures.t_density_figure(
            sampling, scale, shift, int(report.values.get("seed", 0)), report.path("t_density.png")
        )
        parts.append(report.figure("t_density.png", "Density of the training times t, and draws from it"))
    return "\n\n".join(["## Training", *parts]) if rows or histories or sampling else ""


def reconstructions(report: Report) -> str:
    """What is rebuilt from the condition, over the steps."""
    rows: list[tuple[str, list[Image.Image]]] = []
    for stage in STAGES:
        folder = report.run_dir / f"stage{stage}" / "samples"
        steps = sorted((int(p.stem.split("-")[1]), p) for p in folder.glob("step-*.png") if p.stem[5:].isdigit())
        if not steps:
            report.missing.append(f"stage{stage}/samples: no pictures")
            continue
        if not rows and (folder / "originals.png").is_file():
            rows.append(("original", _strip(folder / "originals.png")))
        if stage == 2 and len(steps) > 1 and len(rows) > 1:
            steps = [s for s in steps if s[0] > 0]  # its step 0 is stage 1's end
        chosen = _spread(steps, 3 if stage == 1 else GRID_ROWS - len(rows))
        rows += [(f"stage {stage}\nstep {step:,}", _strip(path)) for step, path in chosen]
    if not rows:
        return ""
    figures.reconstructions_figure(rows[:GRID_ROWS], report.path("reconstructions.png"))
    picture = report.figure("reconstructions.png", "Original images, and what is rebuilt from the condition")
    return (
        f"## Reconstructions\n\nEach row is rebuilt from the backbone's condition alone by "
        f"{method_name(report.values).sampler}, with the same random draws every time. The rows show what the "
        f"condition contains of an image, and depend on the denoiser too.\n\n{picture}"
    )


def skipped(report: Report) -> str:
    """Which images could not be read, and why."""
    parts = []
    for stage in STAGES:
        path = report.run_dir / f"stage{stage}" / "result.json"
        found = read_json(path).get("skipped") if path.is_file() else None
        if not isinstance(found, dict):
            continue
        report.facts["stages"][str(stage)]["skipped"] = found
        read, lost = int(found["read"]), int(found["skipped"])
        share = f" ({100 * lost / read:.2f} %)" if read else ""
        line = f"Stage {stage}: {read:,} images read, {lost:,} skipped{share}."
        if lost:
            line += " Reasons: " + ", ".join(f"{text(r)} {n:,}" for r, n in found["by_reason"].items()) + "."
        parts.append(line)
        keys = [f"* {code(key)}: {text(reason)}" for key, reason in found["keys"][:KEYS_SHOWN]]
        if len(found["keys"]) > KEYS_SHOWN:
            keys.append(f"* … the others are in {code(f'stage{stage}/result.json')}")
        if keys:
            parts.append("\n".join(keys))
    return "\n\n".join(["## Skipped images", *parts]) if parts else ""


def _strip(path: Path) -> list[Image.Image]:
    """The first square images of a horizontal strip."""
    with Image.open(path) as picture:
        strip = picture.convert("RGB")
    side = strip.height
    if strip.width % side:
        raise InputError(f"{path} is {strip.width} x {side} pixels, no row of squares")
    return [strip.crop((i * side, 0, (i + 1) * side, side)) for i in range(min(strip.width // side, GRID_COLUMNS))]


def _spread(items: list[Any], count: int) -> list[Any]:
    """At most ``count`` items, evenly spread, the last one always among them."""
    if len(items) <= count:
        return items
    if count <= 1:
        return items[-1:]
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
