"""The paper's ablations as data: each table's cells, and how a cell's recipe differs from the one it starts from.

The paper's own figures are :data:`llava_genhancer.evaluate.paper.ABLATIONS`, by the same labels. Nothing here imports
torch.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llava_genhancer.errors import InputError
from llava_genhancer.fields import override
from llava_genhancer.method import READ_BY
from llava_genhancer.recipe import PARTS, Recipe, StageRecipe
from llava_genhancer.recipes import PARADIGMS, get_recipe

PICTURES = 32  # images that are rebuilt and scored in every cell, unless the user says otherwise
CURVE_POINTS = 10  # of a training that is followed (Fig. 1)


@dataclass(frozen=True)
class Cell:
    """One row of a table.

    Attributes:
        label: as the paper says it.
        changes: recipe fields by name.
        paradigm: start from this method's recipe instead of the one asked for.
        end_to_end: one stage that trains everything, over the images of both. Its learning rate is stage 1's (ours): a
            random denoiser would hardly move at the backbone's.
    """

    label: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    paradigm: str | None = None
    end_to_end: bool = False

    @property
    def folder(self) -> str:
        """The label as a folder's name."""
        return re.sub(r"[^a-z0-9.]+", "-", self.label.lower()).strip("-")

    def start(self, name: str) -> str:
        """The named recipe that the cell departs from, where the ablation was asked for ``name``."""
        return name if self.paradigm is None else f"{base_name(name)}-{self.paradigm}"


@dataclass(frozen=True)
class Grid:
    """A table or figure of the paper.

    Attributes:
        equal_images: every cell sees as many images as the recipe asked for, whatever its own method's recipe says.
        over_training: stage 2 is followed: pictures and snapshots at the same ten steps.
        cost: print parameters, time and memory too.
        ordered: the cells are values of one quantity, whose trend a line may show.
    """

    title: str
    cells: tuple[Cell, ...]
    equal_images: bool = False
    over_training: bool = False
    cost: bool = False
    ordered: bool = False


def _t(scale: float) -> Cell:
    return Cell(f"s = {scale:g}", {"t_sampling": "logit_normal", "t_scale": scale}, "flow")


def _continuous(double: int) -> Cell:
    changes = {"denoiser_layers": double, "denoiser_single_layers": 2 * double}
    return Cell(f"continuous {double} + {2 * double}", changes, "flow")


def _masked(low: int, high: int) -> Cell:
    label = f"{low} %" if low == high else f"{low}-{high} %"
    return Cell(label, {"mask_ratio": (low / 100, high / 100)}, "masked")


def _locals(percent: int) -> Cell:
    changes = {"condition": "locals", "local_ratio": percent / 100} if percent else {"condition": "cls"}
    return Cell(f"{percent} %", changes)


GRIDS: dict[str, Grid] = {
    "table4": Grid(
        "Density of the training times t, continuous denoiser",
        (Cell("uniform", {"t_sampling": "uniform"}, "flow"), *map(_t, (0.1, 0.5, 1.0, 5.0, 10.0))),
        ordered=True,
    ),
    "table5": Grid(
        "Size of the denoiser: double + single blocks, or layers",
        (
            *map(_continuous, (1, 2, 3, 4)),
            *(Cell(f"discrete {n}", {"denoiser_layers": n}, "masked") for n in (2, 4, 6, 8)),
        ),
        cost=True,
    ),
    "table6": Grid(
        "Paradigm of the denoiser",
        (Cell("DIVA", {}, "diva"), Cell("continuous", {}, "flow"), Cell("discrete", {}, "masked")),
    ),
    "table7": Grid(
        "Pretrained against lightweight denoiser",
        (Cell("pretrained", {}, "flux"), Cell("lightweight", {}, "flow")),
        cost=True,
    ),
    "table8": Grid(
        "Mask ratio, discrete denoiser",
        (*(_masked(percent, percent) for percent in (50, 60, 70, 75, 80, 85, 90)), _masked(50, 90)),
        ordered=True,
    ),
    "fig1": Grid(
        "Generation quality and MMVP-VLM over the training of the backbone",
        (Cell("continuous", {}, "flow"), Cell("discrete", {}, "masked")),
        over_training=True,
    ),
    "fig5": Grid(
        "Share of local tokens in the condition, beside the global one",
        tuple(map(_locals, (0, 10, 20, 50, 80, 100))),
        ordered=True,
    ),
    "fig6": Grid(
        "One stage for everything, or two, at equal images seen",
        tuple(
            Cell(f"{name}, {how}", {}, paradigm, end_to_end=how == "end to end")
            for name, paradigm in (("continuous", "flow"), ("discrete", "masked"))
            for how in ("end to end", "two stages")
        ),
    ),
    "fig8": Grid(
        "LoRA on the backbone, or every weight of it", (Cell("LoRA"), Cell("full fine-tuning", {"lora_rank": 0}))
    ),
    "fig9": Grid(
        "Denoiser and projector in stage 2",
        (Cell("frozen", {"stage2.trains": ("backbone",)}), Cell("updated", {"stage2.trains": PARTS})),
    ),
    "modes": Grid(
        "All methods side by side, at equal images seen",
        tuple(Cell(name, {}, name) for name in ("flow", "masked", "diva", "dcr", "flux")),
        equal_images=True,
    ),
}
DENSITIES = "fig7"  # drawn from the sampler itself; trains nothing
NAMES = (*GRIDS, DENSITIES)


def base_name(recipe: str) -> str:
    """The name of a recipe without its method's suffix."""
    base, dash, paradigm = recipe.rpartition("-")
    return base if dash and paradigm in PARADIGMS else recipe


def cell_recipe(grid: Grid, cell: Cell, name: str, fields: Mapping[str, Any]) -> Recipe:
    """The whole recipe of a cell.

    Args:
        name: the recipe that the ablation was asked for.
        fields: the user's own changes. They go to every cell, but for those that its denoiser does not read or that
            belong to a stage which its method has not.

    Raises:
        InputError: no such recipe, a method without one, or a field that does not fit; the cell is named.
    """
    if cell.paradigm is not None and cell.paradigm not in PARADIGMS:
        raise InputError(f"{cell.label}: there is no recipe -{cell.paradigm}; known are {', '.join(PARADIGMS)}")
    own = get_recipe(cell.start(name))
    absent = tuple(f"stage{n}." for n, stage in ((1, own.stage1), (2, own.stage2)) if not stage.max_steps)
    denoiser = fields.get("denoiser", own.denoiser)
    given = {
        field_name: value
        for field_name, value in fields.items()
        if not field_name.startswith(absent or " ") and denoiser in READ_BY.get(field_name, (denoiser,))
    }
    try:
        recipe = override(own, {"sample_images": PICTURES, **given, **cell.changes})
        if cell.end_to_end:
            recipe = _end_to_end(recipe)
        if grid.equal_images:
            recipe = _equal_images(recipe, override(get_recipe(name), fields))
        if grid.over_training:
            recipe = _followed(recipe)
    except InputError as error:
        raise InputError(f"{cell.label}: {error}") from None
    return recipe


def images_seen(recipe: Recipe) -> int:
    """Images over both stages."""
    return recipe.global_batch_size * (recipe.stage1.max_steps + recipe.stage2.max_steps)


def _steps(stage: StageRecipe, steps: int) -> StageRecipe:
    """The stage with another length; a warm-up that would not fit is cut."""
    return dataclasses.replace(stage, max_steps=steps, warmup_steps=min(stage.warmup_steps, steps))


def _end_to_end(recipe: Recipe) -> Recipe:
    first, second = recipe.stage1, recipe.stage2
    joined = dataclasses.replace(
        second,
        trains=PARTS,
        learning_rate=first.learning_rate,
        warmup_steps=first.warmup_steps,
        max_steps=first.max_steps + second.max_steps,
    )
    return dataclasses.replace(recipe, stage1=_steps(first, 0), stage2=joined)


def _equal_images(recipe: Recipe, asked: Recipe) -> Recipe:
    """As many images as ``asked`` sees, stage by stage; a method with one stage sees them all in it."""
    images = [asked.global_batch_size * stage.max_steps for stage in (asked.stage1, asked.stage2)]
    first, second = recipe.stage1, recipe.stage2
    if not first.max_steps:
        images = [0, sum(images)]
    elif not second.max_steps:
        images = [sum(images), 0]
    uneven = [count for count in images if count % recipe.global_batch_size]
    if uneven:
        raise InputError(
            f"{uneven[0]} images are no whole number of steps of {recipe.global_batch_size}: set --global_batch_size"
        )
    steps = [count // recipe.global_batch_size for count in images]
    return dataclasses.replace(recipe, stage1=_steps(first, steps[0]), stage2=_steps(second, steps[1]))


def _followed(recipe: Recipe) -> Recipe:
    """Pictures and snapshots of stage 2 at the same steps."""
    every = max(1, recipe.stage2.max_steps // CURVE_POINTS)
    points = tuple(range(every, recipe.stage2.max_steps + 1, every))
    return dataclasses.replace(
        recipe, stage2=dataclasses.replace(recipe.stage2, sample_steps=every, snapshot_steps=points)
    )
