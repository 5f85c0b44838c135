"""What the denoiser must rebuild: latents of a frozen VAE, or whatever another frozen tokenizer gives.

Legend: B batch, H = W image side, C latent channels, f the VAE's downscale factor.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from llava_genhancer.architectures import FLUX_VAE_CONFIG
from llava_genhancer.convert.hf import check_finite
from llava_genhancer.enhance.pretrained import load_whole
from llava_genhancer.enhance.tokenizer import Target
from llava_genhancer.enhance.vq import check_vq, load_vq_target
from llava_genhancer.errors import InputError, reason
from llava_genhancer.recipes import Recipe
from llava_genhancer.toyworld.paths import resolve


class VaeTarget(Target):
    """A frozen ``AutoencoderKL`` as target tokenizer: ``latents = scaling_factor * (z - shift_factor)``.

    Args:
        vae: the autoencoder, already on its device and in its dtype.
        posterior: "sample" draws z from the posterior as the reference does (global RNG), "mean" takes its mean.
    """

    def __init__(self, vae: Any, posterior: Literal["sample", "mean"] = "sample"):
        super().__init__(vae)
        self.posterior = posterior
        self.scale = float(vae.config.scaling_factor or 1.0)
        self.shift = float(vae.config.shift_factor or 0.0)
        self.channels = int(vae.config.latent_channels)

    def latent_side(self, image_size: int) -> int:
        """Latent side for an image side; it must be even (2x2 patches)."""
        if image_size % (2 * self.downscale):
            raise InputError(
                f"image_size={image_size} is not a multiple of {2 * self.downscale}, which this VAE and the denoiser's "
                "2x2 patches need"
            )
        return image_size // self.downscale

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """uint8 images (B, 3, H, W) to the posterior's mean and log-variance, fp32 (B, 2 C, H/f, W/f), or its mean."""
        pixels = images.float().div_(127.5).sub_(1).to(self.module.dtype)
        moments = self.module.encode(pixels).latent_dist.parameters.float()
        return moments if self.posterior == "sample" else moments[:, : self.channels]

    def draw(self, moments: Tensor) -> Tensor:
        """Moments to fp32 latents (B, C, H/f, W/f)."""
        z = moments
        if self.posterior == "sample":
            mean, log_variance = moments.chunk(2, 1)
            z = mean + (0.5 * log_variance.clamp(-30, 20)).exp() * torch.randn(mean.shape, device=mean.device)
        return (z - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H/f, W/f) to uint8 images (B, 3, H, W)."""
        z = (latents / self.scale + self.shift).to(self.module.dtype)
        pixels = self.module.decode(z).sample.float()
        return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def check_target(recipe: Recipe) -> None:
    """Refuse a target tokenizer that cannot be used, before anything is loaded.

    Raises:
        InputError: as the check of the denoiser's own kind of target.
    """
    TARGETS[recipe.denoiser][0](recipe)


def load_target(recipe: Recipe) -> Target:
    """The frozen tokenizer whose output the recipe's denoiser rebuilds, on the CPU.

    Raises:
        InputError: nothing loadable there, or weights that are not finite.
    """
    return TARGETS[recipe.denoiser][1](recipe)


def check_vae(name: str) -> None:
    """Refuse a path that cannot be a VAE before anything is loaded.

    Raises:
        InputError: a local path that is neither a diffusers folder nor a safetensors file.
    """
    path = Path(resolve(name)).expanduser()
    if path.is_dir() and not any((path / sub / "config.json").is_file() for sub in ("", "vae")):
        raise InputError(f"vae {name}: no config.json there; give a diffusers AutoencoderKL folder or ae.safetensors")
    if name.startswith((".", "/", "~")) and not path.exists():
        raise InputError(f"vae {name} does not exist; give a diffusers folder, a hub id or ae.safetensors")
    if path.is_file() and path.suffix != ".safetensors":
        raise InputError(f"vae {name}: only .safetensors single files are read (a pickle could run code)")


def load_vae_target(
    name: str, *, dtype: torch.dtype = torch.float32, posterior: Literal["sample", "mean"] = "sample"
) -> VaeTarget:
    """Load a VAE from a diffusers folder (or its ``vae/`` subfolder), a hub id, or BFL's single ``ae.safetensors``.

    Raises:
        InputError: nothing loadable there.
    """
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    check_vae(name)
    path = Path(resolve(name)).expanduser()
    try:
        if path.is_file():
            # The config is given, never asked of the hub; it states FLUX.1's VAE (16 channels, .3611, .1159).
            vae = AutoencoderKL.from_single_file(str(path), config=str(FLUX_VAE_CONFIG), torch_dtype=dtype)
        else:
            vae = load_whole(AutoencoderKL, name, "vae", torch_dtype=dtype)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, SingleFileComponentError) as error:
        raise InputError(
            f"vae {name} cannot be loaded ({reason(error)}): give a diffusers folder, "
            "ae.safetensors, or a hub id this machine can reach (FLUX.1-dev is gated: set HF_TOKEN)"
        ) from None
    check_finite(vae, f"vae {name}")
    return VaeTarget(vae, posterior)


def _load_vae(recipe: Recipe) -> Target:
    return load_vae_target(recipe.vae, dtype=getattr(torch, recipe.vae_dtype), posterior=recipe.vae_posterior)


def _load_vq(recipe: Recipe) -> Target:
    return load_vq_target(recipe.vq, dtype=getattr(torch, recipe.vae_dtype))


# By a recipe's denoiser: how its target tokenizer is checked, and how it is loaded.
TARGETS: dict[str, tuple[Callable[[Recipe], None], Callable[[Recipe], Target]]] = {
    "flow": (lambda recipe: check_vae(recipe.vae), _load_vae),
    "unet": (lambda recipe: check_vae(recipe.vae), _load_vae),
    "masked": (lambda recipe: check_vq(recipe.vq), _load_vq),
}
