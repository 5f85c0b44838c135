"""Pre-trained diffusers models, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from llava_genhancer.errors import InputError, reason
from llava_genhancer.recipes import Recipe
from llava_genhancer.toyworld.paths import resolve


def load_whole(cls: Any, name: str, subfolder: str, **options: Any) -> Any:
    """A diffusers model from a folder or hub id, where it lies at the root or in a pipeline's ``subfolder``.

    Raises:
        OSError, ValueError, ...: as diffusers; ValueError too if a weight would be left random (it only warns).
    """
    path = Path(resolve(name)).expanduser()
    options["output_loading_info"] = True
    if path.is_dir():
        inside = None if (path / "config.json").is_file() else subfolder
        model, info = cls.from_pretrained(path, subfolder=inside, **options)
    else:
        try:
            model, info = cls.from_pretrained(name, subfolder=subfolder, **options)
        except (OSError, ValueError):
            model, info = cls.from_pretrained(name, **options)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{len(missing)} weights are not in its files, first: {missing[0]}")
    return model


def check_denoiser(recipe: Recipe) -> None:
    """Refuse a pretrained denoiser that cannot be there, before anything is loaded.

    Raises:
        InputError: a local path without a model, or a file that could run code.
    """
    name = recipe.denoiser_weights
    if name is None:
        return
    path = Path(resolve(name)).expanduser()
    subfolder = "unet" if recipe.denoiser == "unet" else "transformer"
    if name.startswith((".", "/", "~")) and not path.exists():
        raise InputError(f"denoiser_weights {name} does not exist; give a diffusers folder or a hub id")
    if path.is_dir() and not any((path / sub / "config.json").is_file() for sub in ("", subfolder)):
        raise InputError(f"denoiser_weights {name}: no {subfolder}/config.json there; give a diffusers folder")
    if path.is_file() and (path.suffix != ".safetensors" or recipe.denoiser == "unet"):
        raise InputError(
            f"denoiser_weights {name}: of single files only FLUX.1's .safetensors are read; give a diffusers folder"
        )


def load_pretrained(cls: Any, recipe: Recipe, subfolder: str, single_file_config: Path | None = None) -> Any:
    """The recipe's pretrained denoiser, on the CPU in ``denoiser_dtype``.

    Raises:
        InputError: nothing loadable there.
    """
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    check_denoiser(recipe)
    name = recipe.denoiser_weights
    assert name is not None
    path, dtype = Path(resolve(name)).expanduser(), getattr(torch, recipe.denoiser_dtype)
    try:
        if path.is_file():
            return cls.from_single_file(str(path), config=str(single_file_config), torch_dtype=dtype)
        return load_whole(cls, name, subfolder, torch_dtype=dtype)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, SingleFileComponentError) as error:
        raise InputError(
            f"denoiser_weights {name} cannot be loaded ({reason(error)}): give a diffusers folder, or a hub id this "
            "machine can reach (HF_TOKEN for gated ones)"
        ) from None
