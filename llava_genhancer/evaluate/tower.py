"""A two-tower model as evaluation sees it, always in fp32.

Legend: B images or texts in a batch, L tokens of a text.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from llava_genhancer.data.decode import bounded_for
from llava_genhancer.evaluate.paper import BACKBONES, SUFFIXES, Backbone, find_backbone
from llava_genhancer.method import method_name, read_fields
from llava_genhancer.recipes import get_recipe, to_dict
from llava_genhancer.tower.export import is_tower, read_marker

# What makes a run the published method and no variant of it: fields that the papers vary with figures of their own.
DEFINING = (
    "condition", "local_ratio", "local_count", "local_replacement", "condition_into", "projector", "objective",
    "draws_per_image", "vae_posterior", "t_sampling", "t_scale", "t_shift", "mask_ratio", "denoiser_layers",
    "denoiser_single_layers", "denoiser_heads", "denoiser_head_dim", "stage2.trains",
)  # fmt: skip


@dataclass(frozen=True)
class Tower:
    """A loaded model with its own tokenizer and image processor.

    Attributes:
        name: what the user gave: folder or hub id.
        model: in eval mode, fp32, on its device.
        recipe: the recipe that made it, from our marker file; None for any other model.
        method: the published method that made it (a key of ``paper.NAMES``), or words for what has no published row;
            None for a model without a recipe or a released name.
        source: what it was made from, by its marker file; None without one.
        backbone: its backbone in the paper's Table 1, if it is one of the six or made from one.
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
    method: str | None = None
    source: str | None = None
    backbone: Backbone | None = None
    weights: dict[str, str] = field(default_factory=dict)

    def images(self, images: list[Image.Image]) -> dict[str, Tensor]:
        """RGB images as the model's inputs: pixel_values, and NaFlex's patch mask and shapes where it has them."""
        images = [bounded_for(image, self.image_processor) for image in images]
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
    """Returns what made a tower, as :class:`Tower` keeps it.

    A tower with a marker file is what the marker states. A tower without one counts as an original of Table 1 only
    by the whole hub id (``is_hub_id``): GenHancer's authors give their enhanced folders the originals' names.

    Args:
        folder: the tower's files.
        names: what the tower is called: the name that the user gave, and its local path.
        image_size: pixels of the tower's input.
    """
    marker = read_marker(folder) if is_tower(folder) else {}
    recipe, method, source = marker.get("recipe"), marker.get("method"), marker.get("source")
    if not marker:
        known = [n for n in names if is_hub_id(n)]
    elif method:
        known = [str(marker.get("backbone"))]
    else:  # the recipe's backbone counts, not the recipe's name; a backbone that was itself enhanced does not
        known = [source] if isinstance(source, str) and is_hub_id(source) and not is_tower(source) else []
    backbone = find_backbone(known)
    if backbone is not None and image_size != backbone.image_size:
        backbone = None  # called like one of Table 1's, but it is another model
    if isinstance(recipe, dict):
        method = made_by(marker, backbone)
    name = recipe.get("name") if isinstance(recipe, dict) else recipe
    return {
        "recipe": name if isinstance(name, str) else None,
        "method": method if isinstance(method, str) else None,
        "source": source if isinstance(source, str) else None,
        "backbone": backbone,
    }


def is_hub_id(name: str) -> bool:
    """Returns whether a name is one of Table 1's hub ids, or a path that ends in one or lies in the hub's cache."""
    ids = [b.hub_id.split("/") for b in BACKBONES]
    parts = [part for part in re.split(r"[/\\]", name) if part]
    return parts[-2:] in ids or any(f"models--{owner}--{model}" in parts for owner, model in ids)


def made_by(marker: Mapping[str, Any], backbone: Backbone | None) -> str:
    """Returns the published method (a key of ``paper.NAMES``) that made a tower, or words for what no paper published.

    Args:
        marker: ``recipe``, a recipe's fields by dotted name; ``lora_scale`` and ``step``, where the export chose them.
        backbone: the tower's backbone, if it is one of Table 1's.
    """
    recipe = marker["recipe"]
    key = method_name(recipe).key
    if key is None:
        return "no published method"
    if marker.get("step") is not None:
        return f"{key} at step {marker['step']}"
    if marker.get("lora_scale", 1) != 1:
        return f"{key} at lora_scale {marker['lora_scale']:g}"
    changed = [] if backbone is None else _changed(recipe, f"{backbone.recipe}-{SUFFIXES[key]}", backbone)
    return f"{key} with another {', '.join(changed)}" if changed else key


def _changed(recipe: dict[str, Any], reference: str, backbone: Backbone) -> list[str]:
    """The defining fields in which a recipe differs from the method's recipe for its backbone."""
    theirs = to_dict(get_recipe(reference))
    ours = theirs | recipe
    changed = [name for name in DEFINING if name in read_fields(theirs) and ours[name] != theirs[name]]
    if (ours["image_size"] or backbone.image_size) != backbone.image_size:
        changed.append("image_size")
    if (ours["lora_rank"] > 0) != (theirs["lora_rank"] > 0):
        changed.append("lora_rank")
    for stage in ("stage1", "stage2"):
        if (ours[f"{stage}.max_steps"] > 0) != (theirs[f"{stage}.max_steps"] > 0):
            changed.append(f"{stage}.max_steps")
    # Whether FLUX learns in stage 1 is not stated in the paper.
    if (
        theirs["stage1.max_steps"]
        and not reference.endswith("-flux")
        and ours["stage1.trains"] != theirs["stage1.trains"]
    ):
        changed.append("stage1.trains")
    return changed
