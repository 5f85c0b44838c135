"""A two-tower model as evaluation sees it, always in fp32.

Legend: B images or texts in a batch, L tokens of a text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from llava_genhancer.evaluate.paper import Backbone, Method, find_backbone
from llava_genhancer.tower.export import is_tower, read_marker


@dataclass(frozen=True)
class Tower:
    """A loaded model with its own tokenizer and image processor.

    Attributes:
        name: what the user gave: folder or hub id.
        model: in eval mode, fp32, on its device.
        recipe: the recipe that made it, from our marker file; None for any other model.
        method: whose released weights these are ("genhancer", "diva"); None for all others.
        backbone: its row in the paper's Table 1, if it is one of the six or made from one.
        weights: SHA-256 by file name.
    """

    name: str
    model_type: str
    model: nn.Module
    tokenizer: Any
    image_processor: Any
    max_length: int
    device: torch.device
    recipe: str | None = None
    method: Method | None = None
    backbone: Backbone | None = None
    weights: dict[str, str] = field(default_factory=dict)

    def images(self, images: list[Image.Image]) -> dict[str, Tensor]:
        """RGB images as the model's inputs: pixel_values, and NaFlex's patch mask and shapes where it has them."""
        return {k: v.to(self.device) for k, v in self.image_processor(images=images, return_tensors="pt").items()}

    def texts(self, texts: list[str]) -> Tensor:
        """Token ids (B, L), padded to the model's full length and truncated.

        No attention mask goes with them: CLIP reads its end token causally, SigLIP was trained on the padding.
        """
        if self.model_type != "clip" and getattr(self.tokenizer, "do_lower_case", True):
            # SigLIP's tokenizer does it itself; SigLIP2's Gemma tokenizer needs it done (idempotent where it does not).
            texts = [t.lower() for t in texts]
        options: dict[str, Any] = {"truncation": True, "padding": "max_length", "max_length": self.max_length}
        return self.tokenizer(texts, return_tensors="pt", **options)["input_ids"].to(self.device)

    @torch.no_grad()
    def logits(self, images: list[Image.Image], texts: list[str]) -> Tensor:
        """Every text against every image (texts, images), fp32; scale, bias and normalisation are the model's own."""
        with exact_fp32():
            return self.model(input_ids=self.texts(texts), **self.images(images)).logits_per_text

    @torch.no_grad()
    def image_features(self, images: list[Image.Image]) -> Tensor:
        """Embeddings of RGB images, not normalised: fp32 (B, D) on the tower's device, D the shared space's width."""
        model: Any = self.model
        with exact_fp32():
            return model.get_image_features(**self.images(images)).pooler_output

    @torch.no_grad()
    def text_features(self, texts: list[str]) -> Tensor:
        """Embeddings of texts, not normalised: fp32 (B, D) on the tower's device, D the shared space's width."""
        model: Any = self.model
        with exact_fp32():
            return model.get_text_features(input_ids=self.texts(texts)).pooler_output


@contextlib.contextmanager
def exact_fp32() -> Iterator[None]:
    """fp32 that is fp32: no TF32 in matmuls or convolutions, and the same kernels every time."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def marker_facts(folder: Path, names: list[str], image_size: int | None) -> dict[str, Any]:
    """What made a tower, as :class:`Tower` keeps it, from its marker file and what it is called."""
    marker = read_marker(folder) if is_tower(folder) else {}
    recipe = _recipe(marker)
    named = [*names, marker.get("source"), marker.get("backbone"), recipe]
    backbone = find_backbone(n for n in named if isinstance(n, str))
    if backbone is not None and image_size != backbone.image_size:
        backbone = None  # called like one of Table 1's, but it is another model
    return {"recipe": recipe, "method": marker.get("method"), "backbone": backbone}


def _recipe(marker: dict[str, Any]) -> str | None:
    """The recipe's name; an original tower has no marker and so none."""
    recipe = marker.get("recipe")
    recipe = recipe.get("name") if isinstance(recipe, dict) else recipe
    return recipe if isinstance(recipe, str) else None
