"""The verb ``ablate``: one of the paper's ablations from plan to page."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_genhancer import run
from llava_genhancer.ablate.grids import DENSITIES, GRIDS, NAMES, base_name
from llava_genhancer.ablate.running import SIGNALLED, Job, carry_out, plan, show
from llava_genhancer.chain.steps import Choices
from llava_genhancer.errors import InputError
from llava_genhancer.fields import suggest
from llava_genhancer.files import expand


def ablate(
    name: str,
    output_dir: str | Path | None = None,
    fields: Mapping[str, Any] | None = None,
    *,
    recipe: str = "tiny",
    seeds: int = 1,
    mmvp: str | None = None,
    zero_shot: str | None = None,
    deepspeed: str | None = None,
    hostfile: str | None = None,
    dry_run: bool = False,
) -> int:
    """Plan an ablation, run what is missing, print its table and write its page; the same command goes on.

    A signal ends it with the table so far.

    Args:
        name: a table or figure of the paper, of :data:`NAMES`.
        output_dir: where its runs and its page go; default ``runs/NAME-RECIPE``.
        fields: recipe fields for every cell.
        recipe: what cells start from.
        mmvp, zero_shot: folders of MMVP-VLM and of zero-shot data sets; the toy world has its own.
        deepspeed, hostfile: for trainings on GPUs, as in the chain.
        dry_run: print the plan and do nothing.

    Returns:
        Exit status: 1 if a cell failed, 128 and more if a signal stopped it.

    Raises:
        InputError: no such ablation, recipe or field, no images, or the folder is in use.
    """
    if name not in NAMES:
        raise InputError(f"no ablation '{name}'{suggest(name, NAMES)}; there are {', '.join(NAMES)}")
    out = Path(expand(output_dir)) if output_dir else Path("runs") / f"{name}-{recipe}"
    if name == DENSITIES:
        return _densities(out, dry_run)
    grid = GRIDS[name]
    if base_name(recipe) != recipe and all(cell.paradigm is not None for cell in grid.cells):
        raise InputError(
            f"--recipe {recipe}: {name} chooses the methods itself, so name the backbone: {base_name(recipe)}"
        )
    jobs = plan(grid, recipe, out, fields or {}, seeds=seeds, mmvp=mmvp, zero_shot=zero_shot)
    if dry_run:
        print(f"{name}: {grid.title} -> {out}\n{show(jobs, counted(jobs))}")
        return 0
    choices = Choices(preset=base_name(recipe), run_dir=out, deepspeed=deepspeed, hostfile=hostfile)
    command = list(sys.argv)
    with run.exclusive(out):
        status, failed = carry_out(jobs, choices)
        from llava_genhancer.ablate.page import plain, write_page
        from llava_genhancer.ablate.results import gather

        results = gather(name, recipe, grid, jobs, failed)
        page = write_page(results, out, ["llava-genhancer", *command[1:]])
    print(f"\n{plain(results)}\n\npage:   {page.with_suffix('.html')}\nfigure: {out / 'figures' / f'{name}.png'}")
    if status >= SIGNALLED:
        print("llava-genhancer: stopped; the same command goes on", file=sys.stderr)
    return status


def _densities(out: Path, dry_run: bool) -> int:
    path = out / "figures" / f"{DENSITIES}.png"
    if dry_run:
        print(f"{DENSITIES}: the densities of t, nothing to train -> {path}")
        return 0
    from llava_genhancer.ablate.figure import densities_figure

    densities_figure(path)
    print(f"figure: {path}")
    return 0


def counted(jobs: Sequence[Job]) -> list[float | None]:
    """FLOPs of each job, a shared stage 1 left out; None where they are not known before something is loaded."""
    from llava_genhancer import costs

    flops: list[float | None] = []
    for job in jobs:
        facts = costs.facts_of(job.recipe)
        stages = (2,) if job.twins else (1, 2)
        flops.append(None if facts is None else sum(costs.total_flops(job.recipe, stage, *facts) for stage in stages))
    return flops
