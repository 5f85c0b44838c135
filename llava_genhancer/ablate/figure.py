"""An ablation's picture: our cells with their intervals beside the paper's points; and Fig. 7's densities."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llava_genhancer.ablate.results import Estimate, Table
from llava_genhancer.evaluate.figures import COLOURS, INK, Drawing, short
from llava_genhancer.evaluate.mmvp.results import GUESS

SCALES = (0.1, 0.5, 1.0, 5.0, 10.0)  # of Table 4 and Fig. 7
PANELS = {"zero_shot": "zero-shot, points", "probes": "probes, points", "clip_score": "CLIP score"}


def ablation_figure(table: Table, path: str | Path) -> None:
    """MMVP-VLM per cell with 95 % intervals, seeds as small dots, the paper's numbers as lines; what else was measured
    in panels below."""
    panels = [q for q in PANELS if q in table.quantities]
    width = max(7.0, 1.9 + 1.0 * len(table.rows))
    with Drawing(path, width, 3.9 + 1.5 * len(panels)) as figure:
        ratios = [2.4] + [1.0] * len(panels)
        axes = figure.subplots(1 + len(panels), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
        places = np.arange(len(table.rows))
        _cells(axes[0], table, "mmvp", f"ours, {table.recipe}", 1)
        for i, backbone in enumerate(table.backbones):
            known = [(x, row.published[backbone]) for x, row in enumerate(table.rows) if backbone in row.published]
            axes[0].plot(
                [x for x, _ in known], [y for _, y in known], color=COLOURS[(i + 2) % 8], marker="D", markersize=5,
                markerfacecolor="white", linewidth=1.2, linestyle=(0, (4, 2)) if table.grid.ordered else "none",
                label=f"paper, {backbone}", zorder=2,
            )  # fmt: skip
        if table.original is not None:
            score = table.original.average.percent
            axes[0].axhline(score, color=COLOURS[0], linewidth=1.4, label=f"original ({score:.1f} %)", zorder=1)
        axes[0].axhline(GUESS, color=INK, linewidth=0.9, linestyle=(0, (1, 3)), label=f"guessing ({GUESS:.0f} %)")
        axes[0].set_ylabel("MMVP-VLM, %")
        axes[0].set_title(f"{table.name}: {table.grid.title}", loc="left")
        for panel, quantity in zip(axes[1:], panels, strict=True):
            _cells(panel, table, quantity, None, 3)
            panel.set_ylabel(PANELS[quantity])
            if quantity != "clip_score":
                panel.axhline(0, color=COLOURS[0], linewidth=1.4, zorder=1)
        for place, row in enumerate(table.rows):
            if not row.estimates:
                middle = ("data", "axes fraction")
                axes[0].annotate("failed", (place, 0.03), xycoords=middle, ha="center", color=COLOURS[6])
        axes[-1].set_xticks(places, [short(row.label, 22) for row in table.rows])
        if max(len(row.label) for row in table.rows) > 9 and len(table.rows) > 4:
            axes[-1].tick_params(axis="x", rotation=25)
            for tick in axes[-1].get_xticklabels():
                tick.set(ha="right", rotation_mode="anchor")
        axes[-1].set_xlim(-0.5, len(table.rows) - 0.5)
        for panel in axes:
            panel.grid(axis="y", color="#E5E5E5", linewidth=0.8)
            panel.set_axisbelow(True)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


def _cells(axes, table: Table, quantity: str, label: str | None, colour: int) -> None:  # type: ignore[no-untyped-def]
    """One dot per cell, its interval, and its seeds."""
    known = [(x, row.estimates[quantity]) for x, row in enumerate(table.rows) if quantity in row.estimates]
    if not known:
        return
    x = [place for place, _ in known]
    errors = np.array([_reach(e) for _, e in known]).T
    style = {"color": COLOURS[colour], "markersize": 7, "elinewidth": 1.4, "capsize": 3.0, "zorder": 4}
    axes.errorbar(x, [e.mean for _, e in known], yerr=errors, fmt="o", label=label, **style)
    for place, estimate in known:
        if len(estimate.values) > 1:
            dots = [place + 0.13] * len(estimate.values)
            axes.scatter(dots, estimate.values, s=14, color=COLOURS[colour], alpha=0.55, linewidth=0, zorder=3)


def _reach(estimate: Estimate) -> tuple[float, float]:
    if estimate.low is None or estimate.high is None:
        return 0.0, 0.0
    return max(0.0, estimate.mean - estimate.low), max(0.0, estimate.high - estimate.mean)


def densities_figure(path: str | Path) -> None:
    """Fig. 7: the densities of uniform and scaled logit-normal t, as the sampler of training has them."""
    import torch

    from llava_genhancer.enhance.objectives import t_density

    grid = torch.linspace(1e-4, 1 - 1e-4, 2001, dtype=torch.float64)
    with Drawing(path, 6.4, 4.0) as figure:
        axes = figure.add_subplot()
        axes.plot(grid, t_density(grid, "uniform"), color=COLOURS[0], linewidth=2.0, label="uniform")
        for i, scale in enumerate(SCALES, 1):
            density = t_density(grid, "logit_normal", scale)
            axes.plot(grid, density, color=COLOURS[i], linewidth=2.0, label=f"s = {scale:g}")
        axes.set(xlim=(0, 1), ylim=(0, 6), ylabel="density", title="Training times t = sigmoid(s · eps), eps ~ N(0, 1)")
        axes.set_xlabel("t   (0 = clean, 1 = noise)")
        peak = float(t_density(torch.tensor(0.5), "logit_normal", SCALES[0]))
        axes.annotate(f"s = 0.1 peaks at {peak:.0f}", (0.5, 5.9), (0.56, 5.5), fontsize=9)
        axes.legend(loc="upper right")
