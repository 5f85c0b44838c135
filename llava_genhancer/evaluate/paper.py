"""The paper's published figures (arXiv 2503.19480 v3), as data to print beside our own. Percent throughout."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Method = Literal["original", "diva", "genhancer"]
METHODS: tuple[Method, ...] = ("original", "diva", "genhancer")

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
    """MMVP-VLM of one backbone under one method: the nine patterns in order, and the average."""

    backbone: Backbone
    method: Method
    patterns: tuple[float, ...]
    average: float


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
