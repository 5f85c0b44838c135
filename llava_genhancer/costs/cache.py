"""A cache of frozen work (``cache_crops``): its bytes on disk, and the work of filling it.

Counted from a recipe before anything is there; ``enhance/cache_fill.py`` tells the same of what it writes.
"""

from __future__ import annotations

from dataclasses import dataclass

from llava_genhancer.costs.facts import FLUX_VAE, Backbone, Vae
from llava_genhancer.costs.work import backbone_flops, target_size, vae_encoder_flops
from llava_genhancer.recipes import Recipe

ID_BYTES = 4  # int32
CHECK_BYTES = 4  # the CRC-32 after each record


@dataclass(frozen=True)
class Records:
    """Records of one kind, one per image and crop.

    Attributes:
        crops: K, of each image.
        record_bytes: of one crop's record.
    """

    crops: int
    record_bytes: int

    def size(self, images: int) -> float:
        """Bytes on disk of so many images' records, with the checksum after each."""
        return float(images) * self.crops * (self.record_bytes + CHECK_BYTES)

    def told(self, images: int | None) -> str:
        """Where the size comes from; None: the number of images is not known."""
        each = f"{self.crops} crops x {self.record_bytes / 1024:.1f} KiB"
        return f"{each} an image" if images is None else f"about {images} images x {each}"


def cache_records(recipe: Recipe, backbone: Backbone, vae: Vae = FLUX_VAE) -> dict[str, Records]:
    """What a recipe's stages read from the cache, by name: targets, and tokens where a stage's backbone is frozen."""
    width = 2 if recipe.cache_dtype == "float16" else 4
    area = (target_size(recipe, backbone) // vae.downscale) ** 2
    moments = 2 if recipe.vae_posterior == "sample" else 1  # mean and log-variance, or the mean alone
    sizes = {"targets": area * ID_BYTES if vae.codes else area * vae.latent_channels * moments * width}
    if _tokens(recipe):
        # CLIP's CLS is among its tokens; SigLIP's global token comes on top of them.
        size = recipe.image_size or backbone.image_size
        local = backbone.tokens(size) - (backbone.kind == "clip")
        tokens = 1 if recipe.condition == "cls" else 1 + local
        sizes["tokens"] = tokens * backbone.token_dim * width
    return {name: Records(recipe.cache_crops, size) for name, size in sizes.items()}


def fill_flops(recipe: Recipe, backbone: Backbone, vae: Vae = FLUX_VAE, images: int = 1) -> float:
    """FLOPs of filling the cache, over all devices."""
    each = vae_encoder_flops(target_size(recipe, backbone), vae)
    each += backbone_flops(recipe, backbone) if _tokens(recipe) else 0
    return images * recipe.cache_crops * each


def _tokens(recipe: Recipe) -> bool:
    """Whether a stage that trains reads tokens."""
    stages = {1: recipe.stage1, 2: recipe.stage2}
    return any(table.max_steps > 0 and recipe.frozen_backbone(stage) for stage, table in stages.items())
