"""The facts of a recipe's models, from their own configs where they lie here. The hub is not asked."""

from __future__ import annotations

import json
from pathlib import Path

from llava_genhancer.costs.facts import FLUX_VAE, KNOWN_BACKBONES, VQ_F16, Backbone, Vae, backbone_facts, vae_facts
from llava_genhancer.recipes import Recipe
from llava_genhancer.toyworld.paths import resolve


class Unreadable(ValueError):
    """A config that says nothing usable; the message is the reason alone."""


def is_local(name: str) -> bool:
    """Whether a model's name is a path."""
    return name.startswith((".", "/", "~")) or Path(resolve(name)).expanduser().exists()


def cached(name: str, *files: str) -> str | None:
    """The path of the first of a hub id's files that the local cache holds."""
    try:
        from huggingface_hub import try_to_load_from_cache

        for file in files:
            path = try_to_load_from_cache(name, file)
            if isinstance(path, str):
                return path
    except (ImportError, ValueError, OSError):
        pass
    return None


def config_file(name: str, *subfolders: str) -> Path | None:
    """A model's ``config.json``: at the root of its folder or cached repository, or in the first subfolder with one."""
    places = ["config.json", *(f"{sub}/config.json" for sub in subfolders)]
    if is_local(name):
        folder = Path(resolve(name)).expanduser()
        return next((folder / place for place in places if (folder / place).is_file()), None)
    found = cached(name, *places)
    return Path(found) if found else None


def read_backbone(config: Path) -> Backbone:
    """The facts in a two-tower model's ``config.json``.

    Raises:
        Unreadable: it is another model's, or damaged, or transformers is not there.
    """
    try:
        from transformers import AutoConfig

        return backbone_facts(AutoConfig.from_pretrained(config.parent, local_files_only=True))
    except (ImportError, OSError, ValueError, AttributeError, KeyError) as error:
        raise Unreadable((str(error).splitlines() or ["?"])[0]) from None


def read_vae(config: Path) -> Vae:
    """The facts in an autoencoder's ``config.json``.

    Raises:
        Unreadable: it is another model's, or damaged.
    """
    try:
        return vae_facts(json.loads(config.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Unreadable(str(error)) from None


def backbone_of(recipe: Recipe) -> Backbone | None:
    """The backbone's facts; None where they are not known before it is loaded or converted."""
    config = config_file(recipe.backbone)
    try:
        return KNOWN_BACKBONES.get(recipe.backbone) if config is None else read_backbone(config)
    except Unreadable:
        return KNOWN_BACKBONES.get(recipe.backbone)


def tokenizer_of(recipe: Recipe) -> Vae:
    """The target tokenizer's facts; where its config is not here, FLUX's VAE or a VQ-GAN f16 with 16 384 codes."""
    masked = recipe.denoiser == "masked"
    config = config_file(recipe.vq, "vqvae") if masked else config_file(recipe.vae, "vae")
    usual = VQ_F16 if masked else FLUX_VAE
    try:
        return usual if config is None else read_vae(config)
    except Unreadable:
        return usual


def facts_of(recipe: Recipe) -> tuple[Backbone, Vae] | None:
    """What a recipe's cost is counted from; None where that is not known before something is loaded."""
    backbone = backbone_of(recipe)
    return None if backbone is None else (backbone, tokenizer_of(recipe))
