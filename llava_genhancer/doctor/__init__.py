"""Can this machine run a recipe? Versions, devices, memory, disk and paths, each with what to do about it.

Runs on the base install (torch, transformers 4.37+, Python 3.10): what is missing is reported and never imported.
Nothing is downloaded and the hub is not asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from llava_genhancer import costs
from llava_genhancer.doctor import devices, environment, models, paths
from llava_genhancer.doctor.findings import OK, PROBLEM, Finding, show
from llava_genhancer.doctor.plan import Plan
from llava_genhancer.errors import InputError
from llava_genhancer.files import expand
from llava_genhancer.recipes import Recipe


def examine(recipe: Recipe, *, deepspeed: str | None = None, gpus: int | None = None, run_dir: str = ".") -> int:
    """Print what this machine has and lacks for a recipe.

    Args:
        recipe: what would be run.
        deepspeed: path of the DeepSpeed JSON it would be run with.
        gpus: predict for this many GPUs instead of those found here.
        run_dir: where the run would go.

    Returns:
        0 if the recipe can run here, 1 if something must be done first.
    """
    problems = show(inspect(recipe, deepspeed=deepspeed, gpus=gpus, run_dir=run_dir))
    count = f"{problems} problem{'s' if problems > 1 else ''} above"
    print(f"\n{recipe.name} {f'cannot run here yet: {count}' if problems else 'can run here'}")
    return 1 if problems else 0


def examine_fork(fork: str, tower: str) -> int:
    """Print which class a LLaVA fork would build for a tower folder, what to do about it, and the commands.

    Args:
        fork: the fork's checkout; its source is read as text, and nothing of it is imported or run.
        tower: one of our tower folders.

    Returns:
        0 if the folder's path is all that the fork needs, 1 if something must be done first.

    Raises:
        InputError: no builder found there, or not a tower as it was exported.
    """
    from llava_genhancer.tower.choice import IMPOSSIBLE, WORKS, fork_choice

    choice = fork_choice(fork, tower)
    works = choice.verdict == WORKS
    chosen = f"{choice.chosen} for {tower}" if choice.chosen else f"no class for {tower}"
    findings = [
        Finding(OK, "tower", f"{tower}: a {choice.model_type} folder, every weight file as exported"),
        Finding(OK, "fork", f"{choice.rule.function} in {choice.rule.path}"),
        Finding(OK if works else PROBLEM, "chooses", f"{chosen}: {choice.reason}", choice.todo),
    ]
    show(findings)
    if choice.commands:
        print()
    for title, command in choice.commands:
        print(f"  {title:13} {command}")
    last = "something must be done first"
    if works:
        last = "this path as the tower's argument is enough"
    elif choice.verdict == IMPOSSIBLE:
        last = "the fork cannot take this tower as it is"
    print(f"\n{last}")
    return 0 if works else 1


def inspect(
    recipe: Recipe, *, deepspeed: str | None = None, gpus: int | None = None, run_dir: str = "."
) -> Iterator[Finding]:
    """The findings behind :func:`examine`, in its order."""
    if gpus is not None and gpus < 1:
        raise InputError(f"--gpus {gpus}: one at least")
    yield from environment.versions(recipe, deepspeed)
    deepspeed = None if deepspeed is None else expand(deepspeed)
    zero, findings = environment.deepspeed_json(deepspeed)
    yield from findings
    torch = devices.find_torch()
    here = devices.find_gpus(torch)
    backbone, vae = costs.backbone_of(recipe), costs.tokenizer_of(recipe)
    yield models.backbone(recipe, backbone)
    yield models.target(recipe, vae)
    if recipe.denoiser_weights is not None:
        yield models.denoiser(recipe)
    yield from models.export(recipe, Path(expand(run_dir)))
    finding, images = paths.data(recipe)
    yield finding
    yield from devices.gpu_lines(recipe, torch, here, gpus)
    folder = Path(expand(run_dir))
    if backbone is not None:
        plan = Plan(recipe, backbone, vae, zero, gpus or len(here) or 1, here, folder, images)
        yield from plan.work(torch)
        yield from plan.shapes()
        yield from plan.memory()
        yield from plan.disk()
    yield paths.run_folder(recipe, folder)
    yield from environment.optional(deepspeed)
