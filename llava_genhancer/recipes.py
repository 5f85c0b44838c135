"""Recipes: everything an enhancement depends on, named, typed and printable.

``get_recipe("openai-l14-224")`` returns the paper's numbers, with a suffix (``-masked``, ``-diva``, ...) those of
another method. Their fields are in ``recipe.py`` and ``method.py``, what all recipes share (``Guards``, ``override``,
``to_dict``, ...) in ``fields.py``. Nothing in this file imports torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from llava_genhancer.errors import InputError
from llava_genhancer.fields import (
    R,
    differences,
    field_help,
    field_types,
    from_dict,
    option,
    override,
    suggest,
    to_dict,
)
from llava_genhancer.method import READ_BY
from llava_genhancer.recipe import Recipe, StageRecipe

__all__ = [
    "PARADIGMS", "READ_BY", "RECIPES", "R", "Recipe", "StageRecipe", "differences", "field_help", "field_types",
    "from_dict", "get_recipe", "option", "override", "suggest", "to_dict",
]  # fmt: skip


def _paper(name: str, backbone: str, **fields: Any) -> Callable[[], Recipe]:
    return lambda: Recipe(name=name, backbone=backbone, **fields)


def tiny() -> Recipe:
    """The embedded default: toy world, CLIP and VAE; minutes on two CPU cores, through the code of the big ones."""
    return Recipe(
        name="tiny",
        backbone="toyworld:clip",
        vae="toyworld:vae",
        denoiser_layers=1,
        denoiser_single_layers=2,
        denoiser_heads=4,
        denoiser_head_dim=32,
        denoiser_rope_axes=(8, 12, 12),
        vec_dim=64,
        txt_dim=128,
        global_batch_size=32,
        per_device_batch_size=32,
        num_workers=1,
        precision="fp32",
        lora_rank=16,
        stage1=StageRecipe(learning_rate=1e-3, max_steps=1_000, warmup_steps=20, save_steps=250, sample_steps=250),
        stage2=StageRecipe(
            trains=("backbone",),
            learning_rate=1e-3,
            max_steps=400,
            save_steps=100,
            sample_steps=100,
            snapshot_steps=(50, 100, 200, 400),
        ),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "tiny": tiny,
    # Table 1, continuous denoiser: MMVP-VLM 31.9, 29.6, 31.9, 37.0, 42.2, 40.0. Not yet run by us.
    "openai-l14-224": _paper("openai-l14-224", "openai/clip-vit-large-patch14"),
    "openai-l14-336": _paper("openai-l14-336", "openai/clip-vit-large-patch14-336"),
    "metaclip-l14-224": _paper("metaclip-l14-224", "facebook/metaclip-l14-fullcc2.5b"),
    "metaclip-h14-224": _paper("metaclip-h14-224", "facebook/metaclip-h14-fullcc2.5b"),
    "siglip-so400m-224": _paper("siglip-so400m-224", "google/siglip-so400m-patch14-224"),
    "siglip-so400m-384": _paper("siglip-so400m-384", "google/siglip-so400m-patch14-384"),
}


def _under(recipe: Recipe, denoiser: str, **fields: Any) -> Recipe:
    """``recipe`` with another denoiser; what that one does not read goes back to its default."""
    unread = {name: getattr(Recipe, name) for name, readers in READ_BY.items() if denoiser not in readers}
    changed: dict[str, Any] = {**unread, "condition_into": "txt" if denoiser != "flow" else "both", **fields}
    return dataclasses.replace(recipe, denoiser=denoiser, **changed)  # type: ignore[arg-type]


def masked(recipe: Recipe) -> Recipe:
    """GenHancer's discrete denoiser: a 6-layer Perceiver fills in masked VQ tokens (section 3.2, Tables 5, 6, 8).

    MMVP-VLM in the paper: OpenAI@224 28.9, SigLIP@224 45.2, SigLIP@384 40.7. Not yet run by us at full size. The paper
    names neither the VQ-GAN nor the width. Ours: taming's f16 with 16 384 codes, the finer of its two, and 1024 as in
    ViT-L, which makes 109 million parameters at 224 pixels.
    """
    if recipe.name == "tiny":
        size = {"vq": "toyworld:vq", "denoiser_layers": 3, "txt_dim": 128}
    else:
        size = {"denoiser_layers": 6, "denoiser_heads": 16, "denoiser_head_dim": 64, "txt_dim": 1024}
    return _under(recipe, "masked", **size)


SD21_BASE, SD21 = "stabilityai/stable-diffusion-2-1-base", "stabilityai/stable-diffusion-2-1"


def _stable_diffusion(recipe: Recipe, weights: str, side: int, **fields: Any) -> Recipe:
    """``recipe`` with a frozen Stable Diffusion as denoiser, its VAE and its conditions' width."""
    if recipe.name == "tiny":
        size: dict[str, Any] = {"denoiser_weights": "toyworld:sd", "txt_dim": 96}
    else:
        size = {"denoiser_weights": weights, "vae": weights, "target_size": side, "txt_dim": 1024}
    return _under(recipe, "unet", **size, **fields)


def diva(recipe: Recipe) -> Recipe:
    """DIVA (arXiv 2407.20171): a frozen Stable Diffusion 2.1 (base) judges what the whole eye, fine-tuned, tells it.

    One stage, by the released code: 4 600 steps of SGD at 1e-4, batch 640 (8 x 16 x 5), the projector learning along
    from random weights. OpenAI's towers tell the CLS and 76 locals drawn with replacement, MetaCLIP's the CLS and all
    locals, SigLIP's the pooled token and the mean of the locals.

    Its paper's MMVP-VLM: 25.9, 25.2, 27.4, 31.9, 40.7, 38.5 in the order of Table 1. Not yet run by us at full size.
    Departures: images reach the VAE in [-1, 1] and the tower by its own statistics; where a paper's batch is the sum of
    two backward passes, ours is their mean.
    """
    tiny = recipe.name == "tiny"
    if "siglip" in recipe.name:
        told: dict[str, Any] = {"condition": "pooled"}
    elif "metaclip" in recipe.name:
        told = {"condition": "locals"}
    else:
        told = {"condition": "locals", "local_count": 76, "local_replacement": True}
    steps = 400 if tiny else 4_600
    return _stable_diffusion(
        recipe,
        SD21_BASE,
        512,
        **told,
        projector="linear",
        vae_posterior="mean",
        draws_per_image=2,
        lora_rank=0,
        optimizer="sgd",
        momentum=0.9,
        weight_decay=0.0,
        global_batch_size=32 if tiny else 640,
        stage1=dataclasses.replace(recipe.stage1, max_steps=0, warmup_steps=0),
        stage2=dataclasses.replace(
            recipe.stage2,
            trains=("backbone", "projector"),
            learning_rate=1e-2 if tiny else 1e-4,
            max_steps=steps,
            lr_scheduler="cosine",
            warmup_steps=steps // 200,
            snapshot_steps=tuple(s for s in recipe.stage2.snapshot_steps if s <= steps),
        ),
    )


def dcr(recipe: Recipe) -> Recipe:
    """DCR (arXiv 2603.04803): a contrast between what a frozen Stable Diffusion 2.1 predicts under each image's CLS.

    Stage 1 trains the projector for 100 000 steps, stage 2 the tower's LoRA for 4 600. A micro-batch of B images costs
    B + 1 passes of the UNet over all of it, so B is small here and its activations are recomputed; 512 px like DIVA
    (ours).

    Its paper's MMVP-VLM: 33.3, 31.1, 32.6, 37.8, 43.0, 42.2 in the order of Table 1. Not yet run by us at full size.
    """
    size: dict[str, Any] = {"per_device_batch_size": 8, "gradient_checkpointing": True}
    steps, snapshots = 4_600, tuple(s for s in recipe.stage2.snapshot_steps if s <= 4_600)
    if recipe.name == "tiny":
        size, steps, snapshots = {"per_device_batch_size": 8, "global_batch_size": 16}, 200, (50, 100, 200)
    return _stable_diffusion(
        recipe,
        SD21,
        512,
        **size,
        objective="contrast",
        stage1=dataclasses.replace(
            recipe.stage1, trains=("projector",), max_steps=200 if recipe.name == "tiny" else recipe.stage1.max_steps
        ),
        stage2=dataclasses.replace(recipe.stage2, max_steps=steps, snapshot_steps=snapshots),
    )


def flux(recipe: Recipe) -> Recipe:
    """Table 7: the pretrained FLUX.1-dev (11.9 B parameters) in the light denoiser's place, frozen.

    The paper does not say whether the denoiser learns in stage 1; frozen in bfloat16 (ours) it fits one GPU.
    ``--stage1.trains projector,denoiser --denoiser_dtype float32`` and a DeepSpeed JSON train it.

    MMVP-VLM in the paper: 32.6 (OpenAI@224) and 37.1 (MetaCLIP-H). Not yet run by us at full size.
    """
    size: dict[str, Any]
    if recipe.name == "tiny":
        size = {"denoiser_weights": "toyworld:flux", "vec_dim": 96, "txt_dim": 96}
    else:
        size = {
            "denoiser_weights": "black-forest-labs/FLUX.1-dev",
            "denoiser_dtype": "bfloat16",
            "denoiser_layers": 19,
            "denoiser_single_layers": 38,
            "gradient_checkpointing": True,
        }
    return _under(recipe, "flow", **size, stage1=dataclasses.replace(recipe.stage1, trains=("projector",)))


PARADIGMS: dict[str, Callable[[Recipe], Recipe]] = {
    "flow": lambda recipe: recipe,
    "masked": masked,
    "diva": diva,
    "dcr": dcr,
    "flux": flux,
}


def get_recipe(name: str) -> Recipe:
    """The named recipe; a suffix chooses the method, ``-flow`` (continuous denoiser) being the default.

    Raises:
        InputError: unknown name, with the nearest known one.
    """
    base, dash, paradigm = name.rpartition("-")
    if name in RECIPES or not dash or paradigm not in PARADIGMS:
        base, paradigm = name, "flow"
    if base not in RECIPES:
        suffixes = ", ".join(f"-{p}" for p in PARADIGMS)
        names = [*RECIPES, *(f"{r}-{p}" for r in RECIPES for p in PARADIGMS)]
        raise InputError(f"unknown recipe '{name}'{suggest(name, names)}; known: {', '.join(RECIPES)}, with {suffixes}")
    recipe = PARADIGMS[paradigm](RECIPES[base]())
    return recipe if paradigm == "flow" else dataclasses.replace(recipe, name=name)
