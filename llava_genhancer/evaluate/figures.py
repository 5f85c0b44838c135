"""The report's pictures. Each function draws one PNG off screen: no pyplot state, the same bytes each time.

Colours are Okabe and Ito's, which colour-blind readers tell apart; towers differ in hatching too.
"""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from llava_genhancer.evaluate.mmvp.results import GUESS, Comparison, MmvpResult
from llava_genhancer.files import expand
from llava_genhancer.run import write_bytes

COLOURS = ("#8C8C8C", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
HATCHES = ("", "", "///", "...", "xxx", "\\\\\\", "+++", "ooo")
INK = "#222222"
PATTERN_NAMES = (
    "Orientation", "Presence", "State", "Quantity", "Position", "Color", "Structure", "Text", "Viewpoint", "Average",
)  # fmt: skip
STYLE = {
    "font.size": 10.0,
    "font.family": ["DejaVu Sans"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 11.0,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "text.parse_math": False,  # a "$" in a file's name is a dollar sign
}


class Drawing:
    """A figure under our style alone, written whole when the block ends without an error."""

    def __init__(self, path: str | Path, width: float, height: float):
        self._path, self._size = Path(expand(path)), (width, height)
        settings: dict[Any, Any] = {**_defaults(), **STYLE}
        self._context = matplotlib.rc_context(settings)

    def __enter__(self) -> Figure:
        self._context.__enter__()
        self._figure = Figure(figsize=self._size, dpi=120, layout="constrained", facecolor="white")
        return self._figure

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        try:
            if kind is None:
                data = io.BytesIO()
                FigureCanvasAgg(self._figure).print_png(data, metadata={"Software": None})
                write_bytes(self._path, data.getvalue())
        finally:
            self._context.__exit__(kind, value, trace)


def _defaults() -> dict[str, Any]:
    """matplotlib's own settings, so that a user's matplotlibrc does not change the report; never the backend."""
    return {k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith("backend")}


def short(label: str, limit: int = 34) -> str:
    """One line; of a long one the middle goes, since paths and model names differ at both ends."""
    label = " ".join(label.split())
    return label if len(label) <= limit else label[: limit // 2 - 1] + "…" + label[-(limit // 2) :]


def mmvp_figure(results: Sequence[MmvpResult], path: str | Path) -> None:
    """Bars per pattern and the average, with 95 % intervals; published figures as diamonds where a tower has a row."""
    with Drawing(path, 12.5, 5.0) as figure:
        axes = figure.add_subplot()
        places = np.array([*range(9), 9.5])  # the average stands apart
        width = 0.84 / len(results)
        handles: list[Any] = []
        for i, result in enumerate(results):
            scores = [*result.patterns, result.average]
            x = places + (i - (len(results) - 1) / 2) * width
            heights = np.array([s.percent for s in scores])
            errors = np.array([[s.percent - s.low for s in scores], [s.high - s.percent for s in scores]])
            bars = axes.bar(
                x, heights, 0.92 * width, color=COLOURS[i % 8], hatch=HATCHES[i % 8], edgecolor="white", linewidth=0.4,
                label=short(result.label),
            )  # fmt: skip
            handles.append(bars)
            axes.errorbar(x, heights, errors.clip(0), fmt="none", ecolor=INK, elinewidth=0.9, capsize=2.0)
            if result.paper:
                published = [*result.paper.patterns, result.paper.average]
                axes.scatter(
                    x[-len(published) :], published, marker="D", s=26, facecolor="white", edgecolor=INK,
                    linewidth=1.1, zorder=4,
                )  # fmt: skip
            score, many = result.average, len(results) > 3
            note = axes.annotate(
                f"{score.percent:.1f}", (x[-1], score.high), (0, 3), textcoords="offset points", ha="center",
                fontsize=8 if many else 9, rotation=90 if many else 0, color=INK, zorder=5,
            )  # fmt: skip
            if many:  # the neighbours' whiskers pass behind it
                note.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6})
        if sources := list(dict.fromkeys(r.paper.source for r in results if r.paper)):
            label = f"published ({'; '.join(sources)})"
            handles.append(axes.scatter([], [], marker="D", s=26, facecolor="white", edgecolor=INK, label=label))
        guess = f"guessing ({GUESS:.0f} %)"
        handles.append(axes.axhline(GUESS, color=INK, linewidth=0.9, linestyle=(0, (5, 4)), zorder=0.5, label=guess))
        axes.axvline(8.75, color="#BBBBBB", linewidth=0.8)
        axes.set_xticks(places, PATTERN_NAMES)
        axes.get_xticklabels()[-1].set_fontweight("bold")
        axes.tick_params(axis="x", length=0)
        axes.set(ylim=(0, 104), xlim=(-0.6, 10.1), ylabel="pairs right, %")
        n = results[0].patterns[0].n
        axes.set_title(f"MMVP-VLM, {n} pairs per pattern, with 95 % intervals", loc="left")
        figure.legend(handles=handles, loc="outside upper right", ncols=min(4, len(handles)))


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Centred running median of ``window`` values (odd), narrower at both ends; spikes do not leak into it."""
    half = window // 2
    out = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        out.append(statistics.median(values[i - reach : i + reach + 1]))
    return out


def loss_figure(
    histories: Mapping[str, Sequence[tuple[int, float]]], path: str | Path, measure: str | None = None
) -> None:
    """Loss over steps, one panel per stage: as logged (thin) and its running median (thick).

    Args:
        histories: title to (step, loss) pairs, in order of steps; none empty.
        measure: what the loss measures, for the axis.
    """
    label = "loss" if measure is None else f"loss ({measure})"
    with Drawing(path, 5.6 * max(len(histories), 1), 3.8) as figure:
        panels = figure.subplots(1, len(histories), squeeze=False)[0]
        for axes, (title, history) in zip(panels, histories.items(), strict=True):
            steps, losses = [s for s, _ in history], [x for _, x in history]
            window = max(5, len(losses) // 8 | 1)
            marker = "o" if len(losses) < 12 else None
            axes.plot(steps, losses, color="#9CC3DE", linewidth=1.0, marker=marker, markersize=3, label="as logged")
            if len(losses) >= 5:
                median = f"median of {window}"
                axes.plot(steps, smoothed(losses, window), color=COLOURS[1], linewidth=2.0, label=median)
            low, high = _range(losses)
            axes.set(title=title, xlabel="optimizer step", ylabel=label, ylim=(low, high))
            if cut := [x for x in losses if x > high]:
                told = f"↑ {len(cut)} early entries above, up to {max(cut):.3g}"
                axes.text(0.14, 0.97, told, transform=axes.transAxes, va="top", fontsize=9)
            axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.legend(loc="upper right")


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Limits that hold all values; the first few, often far above the rest, may be cut off at the top."""
    rest = sorted(values[len(values) // 20 :])
    low, high = rest[0], rest[-1]
    if max(values) < high + 3 * (high - low):
        high = max(values)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return min(low, *values) - margin, high + 2.5 * margin


def t_density_figure(sampling: str, scale: float, shift: float, seed: int, path: str | Path) -> None:
    """The density of training times with a histogram of draws from the sampler itself (the paper's Fig. 7)."""
    import torch

    from llava_genhancer.enhance.objectives import sample_t, t_density

    draws = 20_000
    with Drawing(path, 5.6, 3.6) as figure:
        axes = figure.add_subplot()
        generator = torch.Generator().manual_seed(seed)
        t = sample_t(draws, sampling, scale, shift, generator=generator)  # type: ignore[arg-type]
        axes.hist(
            t.numpy(), bins=50, range=(0, 1), density=True, color="#9CC3DE", edgecolor="white", linewidth=0.4,
            label=f"{draws:,} draws, seed {seed}",
        )  # fmt: skip
        grid = torch.linspace(1e-4, 1 - 1e-4, 2001, dtype=torch.float64)
        density = t_density(grid, sampling, scale, shift).numpy()  # type: ignore[arg-type]
        axes.plot(grid.numpy(), density, color=COLOURS[1], linewidth=2.0, label="density")
        name = (
            "uniform"
            if sampling == "uniform"
            else f"logit-normal, s = {scale:g}" + (f", m = {shift:g}" if shift else "")
        )
        # A large s piles up at both ends; the plot shows the shape, not the height of the spikes.
        piled = float(density.max()) > 20
        top = 8.0 if piled else 1.35 * float(density.max())
        axes.set(xlim=(0, 1), ylim=(0, top), title=f"Training times: {name}", ylabel="density")
        axes.set_xlabel("t   (0 = clean, 1 = noise)")
        axes.legend(loc="upper center" if piled else "upper right")


def reconstructions_figure(rows: Sequence[tuple[str, Sequence[Image.Image]]], path: str | Path) -> None:
    """A grid of square images: one labelled row each, the originals first; small ones enlarged without smoothing."""
    columns = max(len(images) for _, images in rows)
    side, gap, margin = 1.2, 0.06, 1.15  # inches
    width, height = margin + columns * (side + gap), gap + len(rows) * (side + gap)
    with Drawing(path, width, height) as figure:
        figure.set_layout_engine("none")
        for i, (label, images) in enumerate(rows):
            bottom = height - (i + 1) * (side + gap)
            figure.text(
                (margin - 0.12) / width, (bottom + side / 2) / height, label, ha="right", va="center", fontsize=9.5
            )
            for j, image in enumerate(images):
                left = margin + j * (side + gap)
                axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
                axes.set_axis_off()
                small = max(image.size) < 1.5 * side * 120
                axes.imshow(np.asarray(image.convert("RGB")), interpolation="nearest" if small else "antialiased")


def probes_figure(
    details: Sequence[str],
    towers: Mapping[str, Mapping[str, Mapping[str, Any]]],
    path: str | Path,
    measure: str = "linear-probe accuracy, %",
) -> None:
    """Accuracy per detail, one dot per tower, with intervals; chance as a tick where it is known.

    Args:
        details: names, top to bottom.
        towers: label to detail to ``{"accuracy", "interval": [low, high], "chance"?}``, fractions in [0, 1].
    """
    with Drawing(path, 7.6, 1.3 + (0.22 + 0.16 * len(towers)) * len(details)) as figure:
        axes = figure.add_subplot()
        places = np.arange(len(details))[::-1]
        step = 0.5 / max(len(towers), 2)
        for i, (label, scores) in enumerate(towers.items()):
            known = [(y, scores[d]) for y, d in zip(places, details, strict=True) if d in scores]
            x = np.array([100 * s["accuracy"] for _, s in known])
            y = np.array([y for y, _ in known]) + ((len(towers) - 1) / 2 - i) * step
            ends = np.array([[100 * s["interval"][0], 100 * s["interval"][1]] for _, s in known]).reshape(-1, 2)
            errors = np.stack([x - ends[:, 0], ends[:, 1] - x]).clip(0)
            axes.errorbar(
                x, y, xerr=errors, fmt="os^Dv"[i % 5], color=COLOURS[i % 8], markersize=6, elinewidth=1.4, capsize=2.5,
                label=short(label),
            )  # fmt: skip
        first: Mapping[str, Mapping[str, Any]] = next(iter(towers.values()), {})
        chances = [
            (100 * first[d]["chance"], y) for y, d in zip(places, details, strict=True) if "chance" in first.get(d, {})
        ]
        if chances:
            axes.scatter([x for x, _ in chances], [y for _, y in chances], marker="|", s=220, color=INK, label="chance")
        for y in places[:-1]:
            axes.axhline(y - 0.5, color="#EEEEEE", linewidth=0.8, zorder=0)
        axes.set_yticks(places, [short(d, 28) for d in details])
        axes.tick_params(axis="y", length=0)
        axes.set(xlim=(0, 101), ylim=(-0.6, len(details) - 0.4), xlabel=measure)
        axes.grid(axis="x", color="#E5E5E5", linewidth=0.8)
        axes.set_axisbelow(True)
        figure.legend(loc="outside upper right", ncols=min(3, len(towers) + 1))


def changes_figure(
    names: Sequence[str],
    changes: Mapping[str, Mapping[str, tuple[float, float, float]]],
    path: str | Path,
    measure: str,
) -> None:
    """Change per name, one dot per label, with intervals around it and a line at zero.

    Args:
        names: top to bottom.
        changes: label to name to (points, low, high).
    """
    with Drawing(path, 7.6, 1.3 + (0.24 + 0.14 * len(changes)) * len(names)) as figure:
        axes = figure.add_subplot()
        places = np.arange(len(names))[::-1]
        step = 0.5 / max(len(changes), 2)
        for i, (label, own) in enumerate(changes.items()):
            known = [(y, own[n]) for y, n in zip(places, names, strict=True) if n in own]
            x = np.array([points for _, (points, _, _) in known])
            y = np.array([y for y, _ in known]) + ((len(changes) - 1) / 2 - i) * step
            errors = np.array([[points - low, high - points] for _, (points, low, high) in known]).reshape(-1, 2).T
            axes.errorbar(
                x, y, xerr=errors.clip(0), fmt="os^Dv"[i % 5], color=COLOURS[(i + 1) % 8], markersize=6, elinewidth=1.4,
                capsize=2.5, label=short(label),
            )  # fmt: skip
        axes.axvline(0, color=INK, linewidth=0.9, linestyle=(0, (5, 4)), zorder=0.5)
        axes.set_yticks(places, [short(n, 28) for n in names])
        axes.tick_params(axis="y", length=0)
        axes.set(ylim=(-0.6, len(names) - 0.4), xlabel=short(measure, 60))
        axes.grid(axis="x", color="#E5E5E5", linewidth=0.8)
        axes.set_axisbelow(True)
        figure.legend(loc="outside upper right", ncols=len(changes))


def finite_history(entries: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """(step, loss) of the entries that have a finite loss."""
    points = []
    for entry in entries:
        step, loss = entry.get("step"), entry.get("loss")
        if isinstance(step, int) and isinstance(loss, int | float) and math.isfinite(loss):
            points.append((step, float(loss)))
    return points


def seeds_figure(
    seeds: Sequence[Any],
    comparisons: Sequence[Comparison],
    probes: Mapping[str, Sequence[float]],
    path: str | Path,
) -> None:
    """Change per seed: MMVP-VLM with 95 % intervals on the left, each probed detail's change on the right."""
    rows = max(len(seeds), len(probes))
    with Drawing(path, 11.0 if probes else 6.0, 1.6 + 0.34 * rows) as figure:
        panels = figure.subplots(1, 2 if probes else 1, squeeze=False)[0]
        low, high = [c.difference - c.low for c in comparisons], [c.high - c.difference for c in comparisons]
        panels[0].errorbar(
            [c.difference for c in comparisons], np.arange(len(seeds))[::-1], xerr=np.array([low, high]).clip(0),
            fmt="o", color=COLOURS[1], markersize=6, elinewidth=1.4, capsize=2.5,
        )  # fmt: skip
        panels[0].set_yticks(np.arange(len(seeds))[::-1], [f"seed {short(str(s), 20)}" for s in seeds])
        panels[0].set(title="MMVP-VLM, 95 % intervals", ylim=(-0.6, len(seeds) - 0.4))
        names = list(probes)[::-1]
        for row, values in enumerate(probes[name] for name in names):
            dots, mean = [row] * len(values), statistics.fmean(values)
            panels[1].scatter(values, dots, s=26, color=COLOURS[2], edgecolor=INK, linewidth=0.6, zorder=3)
            panels[1].scatter([mean], [row], marker="|", s=260, color=INK, linewidth=2.0, zorder=4)
        if probes:
            panels[1].set_yticks(range(len(names)), [short(name, 28) for name in names])
            panels[1].set(title="Linear probes: dots are seeds, bars their mean", ylim=(-0.6, len(names) - 0.4))
        for axes in panels:
            axes.axvline(0, color=INK, linewidth=0.9, linestyle=(0, (5, 4)), zorder=0.5)
            axes.set_xlabel("enhanced minus original, points")
            axes.grid(axis="x", color="#E5E5E5", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.tick_params(axis="y", length=0)
