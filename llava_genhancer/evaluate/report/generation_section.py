"""What :mod:`llava_genhancer.evaluate.generation` measured, as a figure and as a report's section. No torch in here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from llava_genhancer.evaluate import figures
from llava_genhancer.evaluate.markdown import table
from llava_genhancer.evaluate.report.gathered import Report
from llava_genhancer.run import read_json

RESULT = "eval/generation.json"
FIGURE = "generation.png"
DEFINITIONS = (
    "CLIP score is the cosine of the original model's global tokens of an image and of its reconstruction (of its "
    "caption, where there is one: CLIPScore, arXiv 2104.08718, is 2.5 times that), PSNR is over pixels in [0, 1]."
)


def final(run_dir: Path) -> dict[str, Any] | None:
    """The last point of a measured run; None where it has none."""
    if not (run_dir / RESULT).is_file():
        return None
    stages = read_json(run_dir / RESULT)["stages"]
    return dict(stages[max(stages)][-1])


def section(report: Report) -> str:
    """The picture and the words, where the verb `generation` was run."""
    if not (report.run_dir / RESULT).is_file():
        return ""
    measured = read_json(report.run_dir / RESULT)
    report.facts["generation"] = measured
    generation_figure(measured, report.path(FIGURE))
    picture = report.figure(FIGURE, "Generation quality and MMVP-VLM over the training")
    return f"{_words(measured)}\n\n{picture}"


def _words(measured: dict[str, Any]) -> str:
    """Words and table: each stage's first and last pictures, and MMVP-VLM at both ends."""
    rows = []
    for stage, points in measured["stages"].items():
        for point in (points[0], points[-1]):
            told, psnr = point["caption_score"], point["psnr"]
            cells = [
                _with_interval(point["clip_score"], point["clip_interval"]),
                "-" if told is None else f"{told:.3f}",
            ]
            rows.append([f"stage {stage}, step {point['step']:,}", *cells, "-" if psnr is None else f"{psnr:.2f}"])
    header = [f"{measured['images']} rebuilt images", "CLIP score", "with the caption", "PSNR, dB"]
    parts = ["## Generation quality", table(header, rows)]
    if measured["mmvp_vlm"]:
        ends = [measured["mmvp_vlm"][0], measured["mmvp_vlm"][-1]]
        said = " and ".join(f"{p['percent']:.1f} % at step {p['step']:,}" for p in ends)
        parts.append(
            f"MMVP-VLM meanwhile: {said}. Better rebuilt images do not imply a higher MMVP-VLM (Fig. 1 of "
            "GenHancer, arXiv 2503.19480)."
        )
    return "\n\n".join([*parts, DEFINITIONS])


def _with_interval(mean: float, interval: list[float] | None) -> str:
    return f"{mean:.3f}" if interval is None else f"{mean:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def generation_figure(measured: dict[str, Any], path: Path) -> None:
    """CLIP score and reconstruction error over each stage's steps, and MMVP-VLM over those of the last."""
    stages, mmvp = measured["stages"], measured["mmvp_vlm"]
    rows = 3 if mmvp else 2
    with figures.Drawing(path, 4.6 * len(stages) + 1.0, 2.1 * rows + 0.6) as figure:
        panels = figure.subplots(rows, len(stages), squeeze=False, sharex="col", sharey="row")
        for column, (stage, points) in enumerate(stages.items()):
            steps = [p["step"] for p in points]
            style = {"marker": "o", "markersize": 3.5, "linewidth": 1.6}
            top, below, *rest = panels[:, column]
            top.plot(steps, [p["clip_score"] for p in points], color=figures.COLOURS[1], label="to the image", **style)
            if all(p["clip_interval"] for p in points):
                low, high = zip(*(p["clip_interval"] for p in points), strict=True)
                top.fill_between(steps, low, high, color=figures.COLOURS[1], alpha=0.15, linewidth=0)
            if all(p["caption_score"] is not None for p in points):
                told = [p["caption_score"] for p in points]
                top.plot(steps, told, color=figures.COLOURS[2], label="to the caption", **style)
            below.plot(steps, [p["psnr"] for p in points], color=figures.COLOURS[3], **style)
            top.set_title(f"Stage {stage}")
            if rest and column == len(stages) - 1:
                percent = np.array([p["percent"] for p in mmvp])
                errors = np.abs(np.array([p["interval"] for p in mmvp]).T - percent)
                rest[0].errorbar(
                    [p["step"] for p in mmvp], percent, yerr=errors, color=figures.COLOURS[6], capsize=2.0,
                    elinewidth=0.9, **style,
                )  # fmt: skip
            elif rest:
                rest[0].axhline(mmvp[0]["percent"], color=figures.COLOURS[6], linewidth=1.6)
                rest[0].annotate("frozen: as before", (0.03, 0.9), xycoords="axes fraction", va="top", fontsize=9)
            panels[-1, column].set_xlabel("optimizer step")
            panels[-1, column].xaxis.get_major_locator().set_params(integer=True)
        for axes, name in zip(panels[:, 0], ("CLIP score", "PSNR, dB", "MMVP-VLM, %"), strict=False):
            axes.set_ylabel(name)
        for axes in panels.flat:
            axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
            axes.set_axisbelow(True)
        handles, labels = panels[0, 0].get_legend_handles_labels()
        if len(handles) > 1:
            figure.legend(handles, labels, loc="outside upper right", ncols=2)
