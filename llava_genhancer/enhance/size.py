"""Sizes that cannot work, refused from counts and configs alone, before anything is loaded or the memory is full."""

from __future__ import annotations

from llava_genhancer import costs
from llava_genhancer.errors import InputError
from llava_genhancer.machine import host_memory
from llava_genhancer.recipes import Recipe

WIDE = "denoiser_layers, denoiser_heads x denoiser_head_dim, vec_dim, txt_dim and lora_rank decide it"


def check_size(recipe: Recipe) -> None:
    """Refuse a model or batch larger than the main memory, and an image side that does not fit backbone and VAE.

    The model is built on the CPU, in fp32 but for a frozen denoiser's ``denoiser_dtype``, whatever trains it later. A
    backbone that is not known before it is loaded passes.

    Raises:
        InputError: with the size that does not fit.
    """
    facts = costs.facts_of(recipe)
    if facts is None:
        return
    backbone, vae = facts
    size = recipe.image_size or backbone.image_size
    if recipe.image_size not in (None, backbone.image_size) and size % backbone.patch:
        raise InputError(f"image_size={size} is not a multiple of the backbone's patch, {backbone.patch}")
    target, factor = recipe.target_size or size, 2 * vae.downscale
    if recipe.denoiser == "flow" and target % factor:
        name = "image_size" if recipe.target_size is None else "target_size"
        raise InputError(
            f"{name}={target} is not a multiple of {factor}, which this VAE and the denoiser's 2x2 patches need"
        )
    room = host_memory()
    parameters = max(costs.engine_parameters(recipe, stage, backbone, vae) for stage in (1, 2))
    needed = max(costs.built_bytes(recipe, stage, backbone, vae) for stage in (1, 2))
    if needed > room:
        raise InputError(
            f"the model has {parameters:.3g} parameters, {_gib(needed)} GiB, and {_gib(room)} GiB of main "
            f"memory are free: {WIDE}"
        )
    for name in ("per_device_batch_size", "sample_images"):
        images = 3 * size**2 * getattr(recipe, name)
        if images > room:
            raise InputError(
                f"{name}={getattr(recipe, name)} at {size} px are {_gib(images)} GiB of pixels, and {_gib(room)} GiB "
                "of main memory are free: lower it"
            )


def _gib(count: float) -> str:
    return f"{count / costs.GIB:.3g}"
