"""A training step on transformers, peft, diffusers and torch alone, as a script would write it; nothing of ours runs.

It shares its weights with our enhancer, so that both can be compared on the same ones, and one optimizer serves both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llava_genhancer.enhance.backbones import linear_layers
from llava_genhancer.enhance.enhancer import Enhancer
from llava_genhancer.recipes import Recipe


class LibraryStep:
    """The loss of a stage of the paper's recipe: CLIP's CLS alone, the flow denoiser, VAE latents.

    Args:
        config: of the CLIPModel whose vision half is enhanced.
        vae: the frozen autoencoder.
    """

    def __init__(self, enhancer: Enhancer, config: Any, vae: Any, recipe: Recipe, device: torch.device):
        from transformers import CLIPVisionModelWithProjection

        self.recipe, self.vae, self.device = recipe, vae, device
        self.eye_learns = any(p.requires_grad for p in enhancer.backbone.parameters())
        config.vision_config.projection_dim = config.projection_dim
        with torch.device(device):
            eye: Any = CLIPVisionModelWithProjection(config.vision_config)
        prefix = ""
        if self.eye_learns:
            from peft import LoraConfig, get_peft_model

            lora = LoraConfig(
                r=recipe.lora_rank,
                lora_alpha=int(recipe.lora_alpha),
                lora_dropout=recipe.lora_dropout,
                bias=recipe.lora_bias,
                target_modules=[
                    n.replace(".base_layer", "") for n in linear_layers(enhancer.backbone) if "lora" not in n
                ],
            )
            eye, prefix = get_peft_model(eye, lora), "base_model.model."
        self.eye = _sharing(eye, enhancer.backbone, prefix)
        kept: Any = enhancer.denoiser.transformer
        with torch.device("meta"):
            bare = type(kept).from_config(kept.config)
        self.transformer = _sharing(bare, kept)
        self.to_vec, self.to_txt = enhancer.projector.to_vec, enhancer.projector.to_txt
        self.mean = torch.tensor(enhancer.backbone.image_mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(enhancer.backbone.image_std, device=device).view(3, 1, 1)

    def loss(self, images: Tensor, autocast: Any) -> Tensor:
        """Of uint8 images (B, 3, H, W); ``autocast`` makes a context."""
        recipe, vae = self.recipe, self.vae
        with torch.no_grad():
            pixels = self.images_to(images, vae.dtype)
            z = vae.encode(pixels).latent_dist.sample().float()
            clean = (z - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
        with torch.set_grad_enabled(self.eye_learns), autocast():
            token = self.eye(pixel_values=(images.float() / 255 - self.mean) / self.std).image_embeds
        b, c, h, w = clean.shape
        clean = clean.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)
        t = torch.sigmoid(recipe.t_scale * torch.randn(b, device=self.device))
        noise = torch.randn_like(clean)
        x_t = (1 - t[:, None, None]) * clean + t[:, None, None] * noise
        ids = torch.zeros(h // 2, w // 2, 3, device=self.device)
        ids[..., 1] += torch.arange(h // 2, device=self.device)[:, None]
        ids[..., 2] += torch.arange(w // 2, device=self.device)[None]
        with autocast():
            predicted = self.transformer(
                hidden_states=x_t,
                encoder_hidden_states=self.to_txt(token)[:, None],
                pooled_projections=self.to_vec(token),
                timestep=t,
                guidance=torch.full_like(t, recipe.guidance),
                img_ids=ids.view(-1, 3),
                txt_ids=torch.zeros(1, 3, device=self.device),
                return_dict=False,
            )[0]
        return nn.functional.mse_loss(predicted.float(), noise - clean)

    @staticmethod
    def images_to(images: Tensor, dtype: torch.dtype) -> Tensor:
        """uint8 images as the VAE's pixels in [-1, 1]."""
        return (images.float() / 127.5 - 1).to(dtype)


def _sharing(model: nn.Module, owner: nn.Module, prefix: str = "") -> nn.Module:
    """``model`` in training mode with the very parameters of ``owner``, whose names lack ``prefix``."""
    theirs = {f"{prefix}{name}": parameter for name, parameter in owner.named_parameters()}
    for name, parameter in model.named_parameters():  # loading gives the owner's parameters this one's flag
        parameter.requires_grad_(theirs[name].requires_grad)
    model.load_state_dict(theirs, assign=True)
    return model.train()
