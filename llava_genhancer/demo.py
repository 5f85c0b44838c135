"""The whole chain in the toy world: enhance, MMVP-VLM before and after, probes, report; one seed or several."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from llava_genhancer import run
from llava_genhancer.errors import InputError
from llava_genhancer.recipes import Recipe


def demo(recipe: Recipe, output_dir: Path, *, seeds: int = 1) -> Path:
    """Run the toy chain; finished steps are skipped, so that the same command goes on.

    Args:
        recipe: the ``tiny`` recipe, possibly changed.
        output_dir: run folder; with several seeds one sub-folder ``seed-N`` each and a report over them.
        seeds: how many, counted from ``recipe.seed``.

    Returns:
        The report.
    """
    if seeds < 1:
        raise InputError(f"--seeds {seeds}: one at least")
    if seeds == 1:
        report = _one(recipe, output_dir)
        figures = output_dir / "figures"
    else:
        from llava_genhancer.evaluate.seeds import write_seeds_report

        runs = []
        for seed in range(recipe.seed, recipe.seed + seeds):
            runs.append(output_dir / f"seed-{seed}")
            _one(dataclasses.replace(recipe, seed=seed), runs[-1])
        report = write_seeds_report(runs, output_dir)
        figures = output_dir / "figures"
    print(f"report:   {report}\npictures: {figures}")
    return report


def _one(recipe: Recipe, run_dir: Path) -> Path:
    from llava_genhancer.enhance.export import write_card
    from llava_genhancer.enhance.train import enhance
    from llava_genhancer.evaluate.mmvp_vlm import run as mmvp_vlm
    from llava_genhancer.evaluate.report import write_report
    from llava_genhancer.toyworld.paths import resolve
    from llava_genhancer.toyworld.probes import run_probes
    from llava_genhancer.toyworld.writers import prepare

    tower = enhance(recipe, run_dir)
    original = resolve(recipe.backbone)
    world = prepare()
    measured = run_dir / "eval" / "mmvp_vlm.json"
    if not _newer(measured, tower):
        mmvp_vlm([original, str(tower)], str(world.mmvp_test), output=str(measured))
    probes = run_dir / "eval" / "probes.json"
    if not _newer(probes, tower):
        run.write_json(probes, run_probes([original, str(tower)]))
    write_card(tower, run_dir)
    return write_report(run_dir)


def _newer(result: Path, tower: Path) -> bool:
    return result.exists() and result.stat().st_mtime >= (tower / "config.json").stat().st_mtime
