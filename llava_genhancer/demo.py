"""The whole chain in the toy world, for one seed or several."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llava_genhancer.chain.needs import check_lmms_eval
from llava_genhancer.chain.running import run
from llava_genhancer.chain.steps import Choices, plan
from llava_genhancer.errors import InputError
from llava_genhancer.files import expand
from llava_genhancer.recipes import get_recipe


def demo(fields: Mapping[str, str], output_dir: Path, *, seeds: int = 1) -> int:
    """Run the toy chain; finished steps are skipped, so that the same command goes on.

    Args:
        fields: changes to the recipes ``tiny``, as :func:`llava_genhancer.chain.steps.split_fields` reads them.
        output_dir: run folder; with several seeds one sub-folder ``seed-N`` each and a report over them.
        seeds: how many, counted from the recipe's.

    Returns:
        The exit status of the step that failed, or 0.
    """
    output_dir = Path(expand(output_dir))
    if seeds < 1:
        raise InputError(f"--seeds {seeds}: one at least")
    check_lmms_eval()
    if seeds == 1:
        return _one(fields, output_dir)
    first = int(fields.get("seed", get_recipe("tiny").seed))
    runs = {seed: output_dir / f"seed-{seed}" for seed in range(first, first + seeds)}
    for seed, folder in runs.items():
        if status := _one({**fields, "seed": str(seed)}, folder):
            return status
    from llava_genhancer.evaluate.report.seeds import write_seeds_report

    print(f"report: {write_seeds_report(list(runs.values()), output_dir)}")
    return 0


def _one(fields: Mapping[str, str], run_dir: Path) -> int:
    choices = Choices(preset="tiny", run_dir=run_dir, fields=fields)
    return run(plan(choices), choices)
