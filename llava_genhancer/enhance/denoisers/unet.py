"""Stable Diffusion's UNet as denoiser (DIVA, arXiv 2407.20171; DCR, arXiv 2603.04803): an eye in a caption's place.

Legend: B batch, C latent channels, S latent side, L condition tokens, D width of the UNet's cross-attention.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_genhancer.enhance.conditions import Condition
from llava_genhancer.enhance.denoisers.continuous import ContinuousDenoiser
from llava_genhancer.enhance.objectives import diffusion_path
from llava_genhancer.enhance.pretrained import load_pretrained
from llava_genhancer.enhance.targets import VaeTarget
from llava_genhancer.errors import InputError, reason
from llava_genhancer.recipes import Recipe
from llava_genhancer.toyworld.paths import resolve


class UNetDenoiser(ContinuousDenoiser):
    """diffusers' ``UNet2DConditionModel`` under the condition "empty prompt + projected visual tokens".

    Args:
        unet: the pretrained UNet.
        scheduler: a ``DDIMScheduler`` with the folder's noise schedule and prediction type.
        empty_prompt: the text encoder's states of the empty prompt, (77, D).
        latent_side: S.
    """

    def __init__(self, recipe: Recipe, unet: Any, scheduler: Any, empty_prompt: Tensor, latent_side: int):
        super().__init__(recipe)
        self.unet, self.scheduler = unet, scheduler
        self.steps = recipe.sample_ode_steps
        self.width = int(unet.config.block_out_channels[-1])
        self.latent_shape = (int(unet.config.in_channels), latent_side, latent_side)
        self.prediction = scheduler.config.prediction_type
        # No buffer: an engine that casts the model would round it, and steps near the clean end with it.
        self.alphas_cumprod: Tensor = scheduler.alphas_cumprod.float()
        self.register_buffer("empty_prompt", empty_prompt, persistent=False)
        if recipe.gradient_checkpointing:
            unet.enable_gradient_checkpointing()

    @classmethod
    def from_recipe(cls, recipe: Recipe, target: VaeTarget, image_size: int) -> UNetDenoiser:
        """The recipe's pretrained UNet for the latents of an image of ``image_size`` pixels.

        Raises:
            InputError: the folder lacks a part, or recipe, VAE and UNet do not fit.
        """
        from diffusers import UNet2DConditionModel

        unet = load_pretrained(UNet2DConditionModel, recipe, "unet")
        name, config = recipe.denoiser_weights, unet.config
        if config.in_channels != target.channels:
            raise InputError(
                f"denoiser_weights {name} rebuilds latents of {config.in_channels} channels, and vae {recipe.vae} "
                f"gives {target.channels}: name the VAE of the same folder"
            )
        if recipe.txt_dim != config.cross_attention_dim:
            raise InputError(
                f"txt_dim={recipe.txt_dim} must be {config.cross_attention_dim}, the width that {name} attends to"
            )
        side = image_size // target.downscale
        factor = target.downscale * 2 ** (len(config.block_out_channels) - 1)
        if image_size % factor:
            raise InputError(f"target_size={image_size} is not a multiple of {factor}, which this VAE and UNet need")
        assert name is not None
        return cls(recipe, unet, load_scheduler(name), load_empty_prompt(name), side)

    def pack(self, latents: Tensor) -> Tensor:
        """Latents as they are."""
        return latents

    def sample_t(self, batch: int, device: torch.device) -> Tensor:
        """Steps (B,), uniform over all of the schedule's."""
        return torch.randint(len(self.alphas_cumprod), (batch,), device=device)

    def path(self, clean: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The schedule's path, and noise or v, whichever the UNet was trained to predict."""
        self.alphas_cumprod = self.alphas_cumprod.to(t.device)
        return diffusion_path(clean, noise, self.alphas_cumprod[t], self.prediction)

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Noise or v (B, C, S, S) at steps t (B,)."""
        dtype = self.unet.dtype
        return self.unet(x_t.to(dtype), t, self.context(condition).to(dtype), return_dict=False)[0]

    def context(self, condition: Condition) -> Tensor:
        """What the UNet attends to, in place of a prompt's states (B, 77 or L, D).

        One visual token moves every state of the empty prompt, 77 move one each. Any other number meets the mean of
        those states, as in DIVA's code for MetaCLIP, DFN and SigLIP.
        """
        assert condition.txt is not None
        empty: Tensor = self.empty_prompt  # type: ignore[assignment]
        if condition.txt.shape[1] not in (1, len(empty)):
            empty = empty.mean(0, keepdim=True)
        return empty + condition.txt

    @torch.no_grad()
    def sample(self, condition: Condition, generator: torch.Generator | None = None) -> Tensor:
        """Latents (B, C, S, S) rebuilt from the condition by DDIM (arXiv 2010.02502, eta = 0)."""
        assert condition.txt is not None
        device = condition.txt.device
        x = torch.randn(condition.batch, *self.latent_shape, generator=generator).to(device)
        self.scheduler.set_timesteps(self.steps)
        for t in self.scheduler.timesteps:
            predicted = self.predict(x, t.to(device).expand(len(x)), condition).float()
            x = self.scheduler.step(predicted, t, x).prev_sample
        return x


def load_scheduler(name: str) -> Any:
    """A ``DDIMScheduler`` by a Stable Diffusion folder's schedule, whichever sampler the folder itself names.

    Raises:
        InputError: no schedule there, or one whose network predicts neither noise nor v.
    """
    from diffusers import DDIMScheduler

    path = Path(resolve(name)).expanduser()
    try:
        scheduler = DDIMScheduler.from_pretrained(path if path.is_dir() else name, subfolder="scheduler")
    except (OSError, ValueError) as error:
        raise InputError(
            f"denoiser_weights {name}: its scheduler/ cannot be loaded ({reason(error)}); give a whole Stable Diffusion"
        ) from None
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise InputError(f"denoiser_weights {name} predicts '{scheduler.config.prediction_type}', not noise or v")
    return scheduler


@torch.no_grad()
def load_empty_prompt(name: str) -> Tensor:
    """The states of the empty prompt (77, D), fp32, from a Stable Diffusion folder's tokenizer and text encoder.

    Raises:
        InputError: the folder lacks one of them.
    """
    from transformers import CLIPTextModel, CLIPTokenizer

    path = Path(resolve(name)).expanduser()
    where = path if path.is_dir() else name
    try:
        tokenizer = CLIPTokenizer.from_pretrained(where, subfolder="tokenizer")
        encoder = CLIPTextModel.from_pretrained(where, subfolder="text_encoder", dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        raise InputError(
            f"denoiser_weights {name}: its tokenizer/ and text_encoder/ cannot be loaded ({reason(error)}); give a "
            "whole Stable Diffusion folder"
        ) from None
    if len(tokenizer) != encoder.config.vocab_size:  # transformers makes an empty tokenizer of a missing folder
        raise InputError(
            f"denoiser_weights {name}: its tokenizer/ has {len(tokenizer)} words where its text_encoder/ knows "
            f"{encoder.config.vocab_size}; give a whole Stable Diffusion folder"
        )
    length = encoder.config.max_position_embeddings
    tokens = tokenizer("", padding="max_length", max_length=length, return_tensors="pt")
    return encoder(tokens.input_ids).last_hidden_state[0]
