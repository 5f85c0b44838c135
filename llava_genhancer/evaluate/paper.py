"""The paper's published figures (arXiv 2503.19480 v3), as data to print beside our own. Percent throughout."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Method = Literal["original", "diva", "genhancer"]
METHODS: tuple[Method, ...] = ("original", "diva", "genhancer")
# Every method with a published row; the keys are those of llava_genhancer.method.METHOD_NAMES.
NAMES = {
    "original": "original",
    "diva": "DIVA",
    "genhancer": "GenHancer continuous",
    "genhancer-discrete": "GenHancer discrete",
    "genhancer-flux": "GenHancer with pretrained FLUX",
    "dcr": "DCR",
}
# Each method's recipes by their suffix.
SUFFIXES = {
    "genhancer": "flow", "genhancer-discrete": "masked", "genhancer-flux": "flux", "diva": "diva", "dcr": "dcr",
}  # fmt: skip
# Methods of which Table 1 has no row: their line of ABLATIONS["modes"], and where it is from.
AVERAGES = {
    "genhancer-discrete": ("masked", "Table 6 of arXiv 2503.19480"),
    "genhancer-flux": ("flux", "Table 7 of arXiv 2503.19480"),
    "dcr": ("dcr", "arXiv 2603.04803"),
}

# MMVP's nine visual patterns in Table 1's order, which is also the order of MMVP-VLM's rows.
PATTERNS = (
    "Orientation and Direction",
    "Presence of Specific Features",
    "State and Condition",
    "Quantity and Count",
    "Positional and Relational Context",
    "Color and Appearance",
    "Structural and Physical Characteristics",
    "Texts",
    "Viewpoint and Perspective",
)


@dataclass(frozen=True)
class Backbone:
    """One of Table 1's six: our recipe's name, the label of the table, its hub id, millions of parameters, pixels."""

    recipe: str
    label: str
    hub_id: str
    parameters: float
    image_size: int


@dataclass(frozen=True)
class Table1Row:
    """MMVP-VLM of one backbone under one method: the nine patterns in order, and the average.

    Attributes:
        patterns: empty where only the average was published (``source`` is then another table or paper).
    """

    backbone: Backbone
    method: str
    patterns: tuple[float, ...]
    average: float
    source: str = "Table 1 of arXiv 2503.19480"


BACKBONES = (
    Backbone("openai-l14-224", "OpenAI ViT-L-14", "openai/clip-vit-large-patch14", 427.6, 224),
    Backbone("openai-l14-336", "OpenAI ViT-L-14", "openai/clip-vit-large-patch14-336", 427.9, 336),
    Backbone("metaclip-l14-224", "MetaCLIP ViT-L-14", "facebook/metaclip-l14-fullcc2.5b", 427.6, 224),
    Backbone("metaclip-h14-224", "MetaCLIP ViT-H-14", "facebook/metaclip-h14-fullcc2.5b", 986.1, 224),
    Backbone("siglip-so400m-224", "SigLIP ViT-SO-14", "google/siglip-so400m-patch14-224", 877.4, 224),
    Backbone("siglip-so400m-384", "SigLIP ViT-SO-14", "google/siglip-so400m-patch14-384", 878.0, 384),
)

# Per backbone and in METHODS' order: nine patterns, then the printed average. The table prints one cell as 13.0 where
# 2 of 15 pairs is 13.3 (SigLIP@224, GenHancer, Texts); it is kept as 13.3, which the printed average agrees with.
_TABLE1: dict[str, tuple[tuple[float, ...], ...]] = {
    "openai-l14-224": (
        (13.3, 13.3, 20.0, 20.0, 13.3, 53.3, 20.0, 6.7, 13.3, 19.3),
        (13.3, 20.0, 40.0, 6.7, 20.0, 53.3, 46.7, 20.0, 13.3, 25.9),
        (13.3, 33.3, 33.3, 20.0, 6.7, 73.3, 46.7, 20.0, 40.0, 31.9),
    ),
    "openai-l14-336": (
        (0.0, 20.0, 40.0, 20.0, 6.7, 20.0, 33.3, 6.7, 33.3, 20.0),
        (26.7, 20.0, 33.3, 13.3, 13.3, 46.7, 26.7, 6.7, 40.0, 25.2),
        (6.7, 20.0, 33.3, 20.0, 6.7, 73.3, 53.3, 26.7, 26.7, 29.6),
    ),
    "metaclip-l14-224": (
        (13.3, 6.7, 66.7, 6.7, 33.3, 46.7, 20.0, 6.7, 13.3, 23.7),
        (6.7, 6.7, 60.0, 0.0, 26.7, 66.7, 20.0, 20.0, 40.0, 27.4),
        (13.3, 20.0, 53.3, 13.3, 26.7, 80.0, 33.3, 13.3, 33.3, 31.9),
    ),
    "metaclip-h14-224": (
        (6.7, 13.3, 60.0, 13.3, 6.7, 53.3, 26.7, 13.3, 33.3, 25.2),
        (13.3, 20.0, 53.3, 33.3, 13.3, 66.7, 33.3, 13.3, 40.0, 31.9),
        (20.0, 20.0, 66.7, 26.7, 26.7, 66.7, 33.3, 20.0, 53.3, 37.0),
    ),
    "siglip-so400m-224": (
        (26.7, 20.0, 53.3, 40.0, 20.0, 66.7, 40.0, 20.0, 53.3, 37.8),
        (13.3, 26.7, 60.0, 46.7, 13.3, 73.3, 53.3, 26.7, 53.3, 40.7),
        (20.0, 20.0, 66.7, 60.0, 20.0, 86.7, 40.0, 13.3, 53.3, 42.2),
    ),
    "siglip-so400m-384": (
        (20.0, 26.7, 60.0, 33.3, 13.3, 66.7, 33.3, 26.7, 53.3, 37.0),
        (26.7, 33.3, 53.3, 26.7, 13.3, 80.0, 40.0, 26.7, 46.7, 38.5),
        (26.7, 20.0, 66.7, 33.3, 13.3, 86.7, 40.0, 26.7, 46.7, 40.0),
    ),
}

TABLE1: tuple[Table1Row, ...] = tuple(
    Table1Row(backbone, method, _TABLE1[backbone.recipe][i][:9], _TABLE1[backbone.recipe][i][9])
    for backbone in BACKBONES
    for i, method in enumerate(METHODS)
)


def table1(recipe: str, method: Method) -> Table1Row:
    """One row of Table 1.

    Args:
        recipe: a recipe of one of the six backbones, with or without its paradigm suffix (``openai-l14-224-flow``).

    Raises:
        KeyError: not one of Table 1's backbones or methods.
    """
    for row in TABLE1:
        if re.fullmatch(f"{row.backbone.recipe}(-flow)?", recipe) and row.method == method:
            return row
    raise KeyError(f"{recipe}, {method}: Table 1 has {', '.join(_TABLE1)} with {', '.join(METHODS)}")


def made_by(method: str | None, recipe: str | None) -> str | None:
    """Returns a measured tower's method: what was recorded, "original" without a recipe, else the recipe's suffix.

    A result that records a recipe's name alone is an old one; newer ones record the method of the recipe's fields.
    """
    if method or recipe is None:
        return method or "original"
    known = {f"{b.recipe}-{suffix}": key for b in BACKBONES for key, suffix in SUFFIXES.items()}
    return known.get(recipe) or known.get(f"{recipe}-flow")


def published(recipe: str | None, method: str | None) -> Table1Row | None:
    """The row of a backbone under a method, from whichever table or paper has it; None where nothing was published.

    Args:
        recipe: the backbone, as in ``Backbone.recipe``.
        method: a key of ``NAMES``.
    """
    backbone = next((b for b in BACKBONES if b.recipe == recipe), None)
    if backbone is None or method is None:
        return None
    if method in METHODS:
        return next(row for row in TABLE1 if row.backbone == backbone and row.method == method)
    cell, source = AVERAGES.get(method, ("", ""))
    average = ABLATIONS["modes"].get(cell, {}).get(backbone.recipe)
    return None if average is None else Table1Row(backbone, method, (), average, source)


def find_backbone(names: Iterable[str]) -> Backbone | None:
    """The backbone of Table 1 that one of ``names`` says: a hub id, a folder called like it, or a recipe.

    Matched is the whole last path component, so that ``clip-vit-large-patch14-336`` is never taken for the 224 px
    model, or a folder of the hub's cache (``models--openai--clip-vit-large-patch14``). A model of the same shape but
    another name is not matched: OpenAI's and MetaCLIP's ViT-L/14 differ in nothing but their weights.
    """
    for name in names:
        parts = [p for p in re.split(r"[/\\]", name) if p]
        known = {*parts[-1:], *(p.split("--")[-1] for p in parts if p.startswith("models--"))}
        for backbone in BACKBONES:
            if re.fullmatch(f"{backbone.recipe}(-flow)?", name) or backbone.hub_id.split("/")[1] in known:
                return backbone
    return None


# --- ablations: MMVP-VLM by cell and backbone ---------------------------------------------------------------------

_OPENAI, _OPENAI_336, _META, _META_H = "openai-l14-224", "openai-l14-336", "metaclip-l14-224", "metaclip-h14-224"
_SIGLIP, _SIGLIP_384 = "siglip-so400m-224", "siglip-so400m-384"


def _columns(backbones: tuple[str, ...], cells: Mapping[str, tuple[float, ...]]) -> dict[str, dict[str, float]]:
    return {label: dict(zip(backbones, values, strict=True)) for label, values in cells.items()}


# Table or figure to cell to backbone's recipe. Figures 5, 6, 8 and 9 are drawn in the paper without their numbers.
ABLATIONS: dict[str, dict[str, dict[str, float]]] = {
    "table4": _columns(
        (_OPENAI, _OPENAI_336, _META),
        {
            "uniform": (21.5, 22.2, 23.7),
            "s = 0.1": (27.4, 25.9, 26.7),
            "s = 0.5": (28.2, 28.9, 29.6),
            "s = 1": (31.9, 29.6, 31.9),
            "s = 5": (24.5, 25.9, 25.9),
            "s = 10": (20.7, 20.0, 21.5),
        },
    ),
    "table5": _columns(
        (_SIGLIP,),
        {
            "continuous 1 + 2": (41.5,),
            "continuous 2 + 4": (42.2,),
            "continuous 3 + 6": (42.2,),
            "continuous 4 + 8": (41.5,),
            "discrete 2": (41.5,),
            "discrete 4": (43.7,),
            "discrete 6": (45.2,),
            "discrete 8": (43.7,),
        },
    ),
    "table6": _columns(
        (_OPENAI, _SIGLIP, _SIGLIP_384),
        {"DIVA": (25.9, 40.7, 38.5), "continuous": (31.9, 42.2, 40.0), "discrete": (28.9, 45.2, 40.7)},
    ),
    "table7": _columns((_OPENAI, _META_H), {"pretrained": (32.6, 37.1), "lightweight": (31.9, 37.1)}),
    "table8": _columns(
        (_OPENAI,),
        {
            "50 %": (28.1,),
            "60 %": (27.4,),
            "70 %": (28.9,),
            "75 %": (27.4,),
            "80 %": (26.7,),
            "85 %": (25.9,),
            "90 %": (25.9,),
            "50-90 %": (28.9,),
        },
    ),
    # Gathered from Tables 1, 6 and 7, and for DCR from its own paper (arXiv 2603.04803).
    "modes": {
        "flow": {b.recipe: row[2][9] for b, row in zip(BACKBONES, _TABLE1.values(), strict=True)},
        "masked": {_OPENAI: 28.9, _SIGLIP: 45.2, _SIGLIP_384: 40.7},
        "diva": {b.recipe: row[1][9] for b, row in zip(BACKBONES, _TABLE1.values(), strict=True)},
        "dcr": {_OPENAI: 33.3, _OPENAI_336: 31.1, _META: 32.6, _META_H: 37.8, _SIGLIP: 43.0, _SIGLIP_384: 42.2},
        "flux": {_OPENAI: 32.6, _META_H: 37.1},
    },
}


@dataclass(frozen=True)
class Cost:
    """A row of Table 7: parameters of the denoiser, peak memory in GB, seconds per 100 iterations of 2 images a device.

    The paper does not say on which GPUs, how many of them, or in which stage.
    """

    parameters: float
    memory_gb: float
    seconds: float


TABLE7 = {"pretrained": Cost(11.90e9, 37.33, 198.57), "lightweight": Cost(1.31e9, 13.07, 20.55)}
