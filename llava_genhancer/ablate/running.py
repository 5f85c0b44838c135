"""An ablation's cells as ordinary runs: planned, trained where needed, measured; what is finished is left alone.

OUT/<cell>/seed-N/ holds what ``enhance`` and the measuring verbs write there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import shlex
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from llava_genhancer import run
from llava_genhancer.ablate.grids import Cell, Grid, cell_recipe
from llava_genhancer.chain.fork import options
from llava_genhancer.chain.running import run_step
from llava_genhancer.chain.steps import Choices, Step, pictured
from llava_genhancer.engine import stage_result
from llava_genhancer.enhance.stages import WEIGHTS
from llava_genhancer.errors import InputError
from llava_genhancer.files import staged_folder
from llava_genhancer.recipes import Recipe, get_recipe, to_dict
from llava_genhancer.toyworld.paths import cache_folder

# What stage 1 does not read unless it trains the backbone.
LORA_FIELDS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_bias")
SIGNALLED = 128  # exit statuses from here on: someone stopped the work


class Stopped(Exception):
    """A signal ended a step; ``status`` is the whole command's."""

    def __init__(self, status: int):
        super().__init__(f"stopped with status {status}")
        self.status = status


@dataclass(frozen=True)
class Job:
    """One cell with one seed.

    Attributes:
        twins: folders whose stage 1 is this one's, bit for bit.
    """

    cell: Cell
    seed: int
    recipe: Recipe
    folder: Path
    steps: tuple[Step, ...]
    twins: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.cell.label}, seed {self.seed}"

    def finished(self) -> bool:
        """Whether all its measurements are there, and so the training before them."""
        return all(step.done_before() for step in self.steps if step.result is not None)


def plan(
    grid: Grid,
    name: str,
    output_dir: Path,
    fields: Mapping[str, Any],
    *,
    seeds: int = 1,
    mmvp: str | None = None,
    zero_shot: str | None = None,
) -> list[Job]:
    """The jobs of an ablation, all cells of a seed before the next seed; nothing is read or written.

    Args:
        name: the recipe that cells start from.
        fields: the user's changes.
        seeds: how many, counted from the recipe's.
        mmvp: MMVP-VLM's folder; the toy world has its own.
        zero_shot: folder of zero-shot data sets; likewise.

    Raises:
        InputError: no such recipe or field, or no images or pairs.
    """
    if seeds < 1:
        raise InputError(f"--seeds {seeds}: one at least")
    jobs: list[Job] = []
    first = int(fields.get("seed", get_recipe(name).seed))
    for seed in range(first, first + seeds):
        for cell in grid.cells:
            recipe = _with_data(cell_recipe(grid, cell, name, {**fields, "seed": seed}))
            if mmvp is None and not _toy(recipe):
                raise InputError("add --mmvp DIR (MMVP-VLM's folder): it is what cells are compared by")
            folder = output_dir / cell.folder / f"seed-{seed}"
            twins = tuple(job.folder for job in jobs if _same_stage1(job.recipe, recipe))
            steps = _training(recipe, cell.start(name), folder), *_measuring(grid, recipe, folder, mmvp, zero_shot)
            jobs.append(Job(cell, seed, recipe, folder, steps, twins))
    return jobs


def _with_data(recipe: Recipe) -> Recipe:
    if recipe.data is None and _toy(recipe):
        return dataclasses.replace(recipe, data=str(cache_folder() / "shards"))
    if recipe.data is None:
        raise InputError("no images given: add --data PATH (tar shards, image folder, HF dataset or LLaVA JSON)")
    return recipe


def _toy(recipe: Recipe) -> bool:
    return recipe.backbone.startswith("toyworld:")


def _training(recipe: Recipe, started: str, folder: Path) -> Step:
    """A run as a command; ``started`` names the recipe that it departs from."""
    named = to_dict(get_recipe(started))
    changed = {name: _word(value) for name, value in to_dict(recipe).items() if value != named[name]}
    return Step("enhance", ("enhance", started, "--output_dir", str(folder), *options(changed)), zero="zero2")


def _measuring(grid: Grid, recipe: Recipe, folder: Path, mmvp: str | None, zero_shot: str | None) -> Iterator[Step]:
    """What is measured of a finished run; the toy world brings its own test sets."""
    toy, own = cache_folder(), _toy(recipe)
    pairs = mmvp or (str(toy / "mmvp_test") if own else None)
    sets = zero_shot or (str(toy / "zero_shot_test") if own else None)
    towers = (recipe.backbone, str(folder / "tower"))

    def measure(verb: str, file: str, *words: str) -> Step:
        result = folder / "eval" / f"{file}.json"
        output = () if verb == "generation" else ("--output", str(result))
        return Step(verb, (verb, *words, *output), result=result, sources=(folder / "tower" / "config.json",))

    if pairs:
        yield measure("mmvp-vlm", "mmvp_vlm", *towers, "--data", pairs)
    if sets:
        yield measure("zero-shot", "zero_shot", *towers, "--data", sets)
    if own:
        yield measure("probes", "probes", *towers)
    if pictured(recipe):
        curve = ("--data", pairs) if pairs and grid.over_training else ()
        yield measure("generation", "generation", str(folder), *curve)


def _word(value: Any) -> str:
    """A field's value as the command line takes it."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)


def _same_stage1(a: Recipe, b: Recipe) -> bool:
    return a.stage1.max_steps > 0 and _stage1(a) == _stage1(b)


def _stage1(recipe: Recipe) -> dict[str, Any]:
    """All that stage 1 depends on."""
    unread = {*run.HARMLESS_FIELDS, *run.EXPORT_FIELDS} - {"data", "image_folder"}
    if "backbone" not in recipe.stage1.trains:
        unread |= set(LORA_FIELDS)
    # What pictures show and what is kept of a stage is no part of its weights, but a copy has only the twin's.
    kept = {"sample_images", "sample_ode_steps", "stage1.sample_steps"}
    return {k: v for k, v in to_dict(recipe).items() if k not in unread - kept and not k.startswith("stage2.")}


# --- doing it -----------------------------------------------------------------------------------------------------


def carry_out(jobs: Sequence[Job], choices: Choices) -> tuple[int, dict[Path, str]]:
    """Run the jobs in order; one that fails is noted and the others go on, until a signal stops all.

    Returns:
        The exit status, and what jobs that failed or were not finished said, by folder.
    """
    if any(_toy(job.recipe) for job in jobs):
        from llava_genhancer.toyworld.writers import prepare

        prepare()
    failed: dict[Path, str] = {}
    for number, job in enumerate(jobs, 1):
        print(f"== {number}/{len(jobs)} {job.name}", flush=True)
        began = time.monotonic()
        try:
            line = _carry_out(job, choices)
        except Stopped as stopped:
            unfinished = [other for other in jobs[number - 1 :] if not other.finished()]
            return stopped.status, failed | {other.folder: "stopped before it was finished" for other in unfinished}
        if line is None:
            print(f"== {job.name}: {time.monotonic() - began:.0f} s", flush=True)
        else:
            failed[job.folder] = line
            print(f"== {job.name}: failed ({line})", flush=True)
    return (1 if failed else 0), failed


def _carry_out(job: Job, choices: Choices) -> str | None:
    """The line of what failed, or None.

    Raises:
        Stopped: a signal.
    """
    try:
        share_stage1(job)
    except (InputError, OSError) as error:
        return str(error)
    for step in job.steps:
        if step.done_before():
            continue
        said = _Echo(sys.stderr)
        try:
            with contextlib.redirect_stderr(said):
                status = run_step(step, choices)
        except Exception as error:  # a bug in one method must not cost the others' training; its traceback is shown
            traceback.print_exc()
            return f"{step.name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if status >= SIGNALLED:
            raise Stopped(status)
        if status:
            line = said.last.removeprefix("llava-genhancer: ")
            return f"{step.name}: {line or f'ended with status {status}; the lines above say why'}"
    return None


class _Echo(io.TextIOBase):
    """Passes on what is written, and remembers the last line of it."""

    def __init__(self, stream: TextIO):
        self.stream, self.last = stream, ""

    def write(self, text: str) -> int:
        if lines := text.strip().splitlines():
            self.last = lines[-1]
        return self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()


def share_stage1(job: Job) -> Path | None:
    """Give a job its twin's finished stage 1, unless it has begun its own.

    Both stages start from seeds of their own and nothing but the weights goes from one to the next, so that the run is
    the one it would have been.

    Returns:
        The twin's folder, or None where there was nothing to share.

    Raises:
        InputError: the job's folder belongs to something else.
    """
    own = job.folder / "stage1"
    twin = next((folder for folder in job.twins if stage_result(folder / "stage1") is not None), None)
    if twin is None or own.exists():
        return None
    with run.exclusive(job.folder):
        run.open_run(job.folder, job.recipe)
        source = twin / "stage1"
        with staged_folder(own) as staging:
            for path in _results(source):
                target = staging / path.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(path, target)
                except OSError:  # no hard links here
                    target.write_bytes(path.read_bytes())
            facts = run.read_json(source / "result.json")
            run.write_json(staging / "result.json", {**facts, "shared_with": os.path.relpath(source, job.folder)})
    return twin


def _results(stage_dir: Path) -> Iterator[Path]:
    """A finished stage's files without its checkpoints; ``result.json`` is written anew."""
    yield from (path for name in (WEIGHTS, "log_history.json") if (path := stage_dir / name).is_file())
    for folder in ("samples", "snapshots"):
        yield from (path for path in sorted((stage_dir / folder).glob("*")) if path.is_file())


def show(jobs: Sequence[Job], flops: Sequence[float | None]) -> str:
    """The plan in words: what all of it costs, and each job's folder, cost, shared stage 1 and commands.

    Args:
        flops: each job's, None where they cannot be counted.
    """
    known = [cost for cost in flops if cost is not None]
    unknown = f", and {len(jobs) - len(known)} runs that cannot be counted" if len(known) < len(jobs) else ""
    lines = [f"{len(jobs)} runs: {sum(known):.2g} FLOP counted{unknown}"]
    for job, cost in zip(jobs, flops, strict=True):
        twin = f"; stage 1 is {job.twins[0]}'s" if job.twins else ""
        counted = f"{cost:.2g} FLOP" if cost is not None else "not counted"
        lines.append(f"\n{job.name} -> {job.folder}  ({counted}{twin})")
        for step in job.steps:
            done = "  (done before)" if step.done_before() else ""
            lines.append(f"  $ {shlex.join(['llava-genhancer', *step.command])}{done}")
    return "\n".join(lines)
