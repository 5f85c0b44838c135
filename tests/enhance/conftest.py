"""Tiny towers of every kind, and a recipe of the method at their size."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llava_genhancer import recipes
from llava_genhancer.enhance.targets import VaeTarget, load_vae_target

RecipeOf = Callable[..., recipes.Recipe]


@pytest.fixture(scope="session")
def tiny_siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SiglipModel folder, 48 px, patches of 8."""
    from llava_genhancer.toyworld.models import save_siglip

    return save_siglip(tmp_path_factory.mktemp("models") / "siglip")


@pytest.fixture(scope="session")
def tiny_siglip2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Siglip2Model folder (NaFlex): 4 x 4 patches of 8, so 32 px."""
    from transformers import Siglip2Config, Siglip2ImageProcessor, Siglip2Model

    from llava_genhancer.toyworld.tokenizer import write_tokenizer

    folder = tmp_path_factory.mktemp("models") / "siglip2"
    words = len(write_tokenizer(folder))
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": words - 1}
    config = Siglip2Config(
        vision_config={**shared, "patch_size": 8, "num_patches": 16},
        text_config={**shared, **special, "vocab_size": words, "projection_size": 32},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Siglip2Model(config).save_pretrained(folder)
    Siglip2ImageProcessor(patch_size=8, max_num_patches=16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_target(tiny_vae: Path) -> VaeTarget:
    """The tiny VAE as target tokenizer."""
    return load_vae_target(str(tiny_vae))


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion folder that predicts noise: random UNet for the tiny VAE, the toy world's text encoder."""
    from llava_genhancer.toyworld.diffusion import build_unet, save_stable_diffusion

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return save_stable_diffusion(build_unet((16, 32)), tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="session")
def unet_recipe_of(tiny_fields: dict[str, object], tiny_sd: Path) -> RecipeOf:
    """The tiny run's recipe with that UNet as denoiser, frozen."""
    unread = {name for name, readers in recipes.READ_BY.items() if "unet" not in readers}
    fields = {name: value for name, value in tiny_fields.items() if name not in unread}
    fields |= {"denoiser": "unet", "denoiser_weights": str(tiny_sd), "condition_into": "txt", "txt_dim": 96}
    fields |= {"stage1.trains": "projector"}
    return lambda **changes: recipes.override(recipes.Recipe(), {**fields, **changes})


@pytest.fixture(scope="session")
def masked_recipe_of(masked_fields: dict[str, object]) -> RecipeOf:
    """The tiny run's recipe with the discrete denoiser."""
    return lambda **changes: recipes.override(recipes.Recipe(), {**masked_fields, **changes})


@pytest.fixture(scope="session")
def recipe_of(tiny_fields: dict[str, object]) -> RecipeOf:
    """The tiny run's recipe with fields changed by name."""
    return lambda **changes: recipes.override(recipes.Recipe(), {**tiny_fields, **changes})


FLUX_SIZE = {"vec_dim": 96, "txt_dim": 96, "denoiser_heads": 2, "denoiser_head_dim": 16}


@pytest.fixture(scope="session")
def flux_folder(recipe_of: RecipeOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX folder for the tiny VAE, random weights in fp32."""
    from llava_genhancer.enhance.denoisers.flow import new_transformer

    folder = tmp_path_factory.mktemp("models") / "flux"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        new_transformer(recipe_of(**FLUX_SIZE), 8).save_pretrained(folder / "transformer")
    return folder


@pytest.fixture(scope="session")
def flux_of(recipe_of: RecipeOf, flux_folder: Path) -> RecipeOf:
    """The tiny run's recipe with that FLUX, frozen in stage 1 too."""
    fields = {**FLUX_SIZE, "denoiser_weights": str(flux_folder), "stage1.trains": "projector"}
    return lambda **changes: recipe_of(**{**fields, **changes})
