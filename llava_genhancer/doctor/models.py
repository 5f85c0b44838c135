"""Backbone, target tokenizer and denoiser: here, to be downloaded, or not to be had."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from llava_genhancer import costs, machine
from llava_genhancer.costs import Backbone, Vae, folders
from llava_genhancer.doctor.findings import INSTALL, NOTE, OK, PROBLEM, Finding, gib
from llava_genhancer.errors import InputError
from llava_genhancer.recipes import Recipe
from llava_genhancer.toyworld.paths import resolve

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
VAE_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
GATED = "black-forest-labs/"


def backbone(recipe: Recipe, facts: Backbone | None) -> Finding:
    """The two-tower model; without ``facts`` its cost is not known yet."""
    from llava_genhancer.convert.checkpoints import SUFFIXES
    from llava_genhancer.convert.open_clip import is_open_clip
    from llava_genhancer.convert.released import RELEASED

    def says(status: str, found: str, todo: str = "") -> Finding:
        return Finding(status, "backbone", found, todo)

    name = recipe.backbone
    path = Path(resolve(name)).expanduser()
    convert = f"`llava-genhancer convert {name} --output_dir DIR`"
    todo = "give the folder or hub id of a CLIPModel, SiglipModel or Siglip2Model"
    if is_open_clip(str(path)):
        what = "in open_clip's format, and so will its tower be, which LLaVA cannot use; its cost is unknown"
        return says(NOTE, f"{name}: {what}", f"{convert}, if it can")
    if name in RELEASED or path.suffix in SUFFIXES:
        what = "is converted when it is first used, so its cost is unknown"
        return says(NOTE, f"{name} {what}", f"{convert} to know it now")
    local, config = folders.is_local(name), folders.config_file(name)
    if config is not None:
        try:
            facts = folders.read_backbone(config)
        except folders.Unreadable as error:
            return says(PROBLEM, f"{name} cannot be used: {error}", todo)
    elif local:
        return says(PROBLEM, f"{name}: no config.json there", todo)
    if facts is None:
        return says(NOTE, f"{name} is not here, so its cost is unknown", f"download it, or {todo}")
    size = costs.full_model_parameters(facts)
    if not local and (config is None or folders.cached(name, *WEIGHTS) is None):
        return _download("backbone", name, 4.0 * size)
    found = f"{name}: {facts.kind}, {size / 1e6:.0f} M parameters, {facts.image_size} px"
    if local and not any((path / file).is_file() for file in WEIGHTS):
        return says(PROBLEM, f"{found}, but no weights", "fetch model.safetensors into that folder")
    return says(OK, found)


def export(recipe: Recipe, run_dir: Path) -> Iterator[Finding]:
    """What would stop the tower's export, by the check that a run begins with. The hub is not asked."""
    folder = Path(resolve(recipe.backbone))
    if not any((folder / name).is_file() for name in ("config.json", "open_clip_config.json")):
        return
    try:
        from llava_genhancer.enhance.export import check_run_export

        check_run_export(recipe, run_dir)
    except ImportError:  # the lines on versions say what is missing
        return
    except InputError as error:
        yield Finding(PROBLEM, "export", str(error), "the run would refuse to start")


def target(recipe: Recipe, facts: Vae) -> Finding:
    """What makes the denoiser's targets."""
    return _vq(recipe, facts) if recipe.denoiser == "masked" else _vae(recipe, facts)


def _vq(recipe: Recipe, facts: Vae) -> Finding:
    name = recipe.vq
    path = Path(resolve(name)).expanduser()
    try:
        from llava_genhancer.enhance.vq import check_vq

        check_vq(name)
        config = folders.config_file(name, "vqvae")
        if config is not None:
            folders.read_vae(config)
    except ImportError as error:
        return Finding(PROBLEM, "VQ-GAN", f"{name} could not be looked at: {error}", INSTALL)
    except InputError as error:
        return Finding(PROBLEM, "VQ-GAN", str(error), "--vq PATH")
    except folders.Unreadable as error:
        return Finding(PROBLEM, "VQ-GAN", f"{name}: its config.json cannot be used ({error})")
    if not path.is_dir():
        what = "a checkpoint file" if path.is_file() else "on the hub"
        return Finding(OK, "VQ-GAN", f"{name}: {what}, counted as f16 with 16 384 codes")
    return Finding(OK, "VQ-GAN", f"{name}: {costs.vae_parameters(facts) / 1e6:.1f} M parameters, {facts.codes} codes")


def _vae(recipe: Recipe, facts: Vae) -> Finding:
    name = recipe.vae
    path = Path(resolve(name)).expanduser()
    todo = "give a diffusers AutoencoderKL folder, a hub id, or FLUX's ae.safetensors"
    config = folders.config_file(name, "vae")
    if not folders.is_local(name):
        weights = folders.cached(name, *(f"{sub}{file}" for sub in ("", "vae/") for file in VAE_WEIGHTS))
        if config is None or weights is None:
            return _download("VAE", name, 2.0 * costs.vae_parameters(facts), name.startswith(GATED))
    elif path.is_file():
        if path.suffix != ".safetensors":
            return Finding(PROBLEM, "VAE", f"{name}: only .safetensors single files are read", todo)
        return Finding(OK, "VAE", f"{name}: single file, read as FLUX's VAE")
    elif config is None or not any((config.parent / file).is_file() for file in VAE_WEIGHTS):
        return Finding(PROBLEM, "VAE", f"{name}: no weights there", todo)
    try:
        folders.read_vae(config)
    except folders.Unreadable as error:
        return Finding(PROBLEM, "VAE", f"{name}: its config.json cannot be used ({error})", todo)
    return Finding(OK, "VAE", f"{name}: {costs.vae_parameters(facts) / 1e6:.1f} M parameters")


def denoiser(recipe: Recipe) -> Finding:
    """A pretrained denoiser: there, to be downloaded, or not to be had."""
    name = str(recipe.denoiser_weights)
    try:
        from llava_genhancer.enhance.pretrained import check_denoiser

        check_denoiser(recipe)
    except ImportError as error:
        return Finding(PROBLEM, "denoiser", f"{name} could not be looked at: {error}", INSTALL)
    except InputError as error:
        return Finding(PROBLEM, "denoiser", str(error), "--denoiser_weights PATH")
    size = costs.denoiser_parameters(recipe)
    part = "unet" if recipe.denoiser == "unet" else "transformer"
    if not folders.is_local(name) and folders.cached(name, f"{part}/config.json") is None:
        bytes_each = 2.0 if recipe.denoiser_dtype == "bfloat16" else 4.0
        return _download("denoiser", name, bytes_each * size, name.startswith(GATED))
    return Finding(OK, "denoiser", f"{name}: {size / 1e6:.1f} M parameters")


def _download(what: str, name: str, size: float, gated: bool = False) -> Finding:
    """What happens to a hub id that is not in the cache."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        todo = "unset HF_HUB_OFFLINE, or give the path of a local copy"
        return Finding(PROBLEM, what, f"{name} is not in the cache and HF_HUB_OFFLINE is set", todo)
    if gated and not has_token():
        todo = f"accept its licence at https://huggingface.co/{name} and set HF_TOKEN, or give a local copy by path"
        todo += " (--vae ae.safetensors)" if what == "VAE" else ""
        return Finding(PROBLEM, what, f"{name} is gated and there is no HF_TOKEN", todo)
    cache = os.environ.get("HF_HUB_CACHE") or os.path.join(os.environ.get("HF_HOME", "~/.cache/huggingface"), "hub")
    there = machine.existing(cache)
    free = machine.free_bytes(there)
    if free < size:
        return Finding(PROBLEM, what, f"{name}: {gib(size)} to download, {gib(free)} free at {there}", "set HF_HOME")
    return Finding(NOTE, what, f"{name} will be downloaded (about {gib(size)}); the hub was not asked")


def has_token() -> bool:
    """Whether the hub would know who asks."""
    if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return True
    try:
        from huggingface_hub import get_token

        return get_token() is not None
    except ImportError:
        return False
