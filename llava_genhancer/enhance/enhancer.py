"""The model a training engine holds: backbone -> condition -> denoiser -> loss.

Legend: B batch, H = W image side, C latent channels, S latent side, N = (S/2)^2 tokens, E = 4 C token width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from llava_genhancer.enhance.backbones import VisionBackbone, load_backbone
from llava_genhancer.enhance.conditions import PROJECTORS
from llava_genhancer.enhance.denoisers.flow import FlowDenoiser
from llava_genhancer.enhance.targets import VaeTarget
from llava_genhancer.recipes import Recipe


class Enhancer(nn.Module):
    """One call, ``forward(pixel_values, target) -> loss``; its three parts are what a stage table names."""

    def __init__(self, backbone: VisionBackbone, projector: nn.Module, denoiser: FlowDenoiser):
        super().__init__()
        # A training engine sizes its "auto" buckets by the model's width.
        self.config = PretrainedConfig(hidden_size=denoiser.width)
        self.backbone = backbone
        self.projector = projector
        self.denoiser = denoiser

    def forward(
        self, pixel_values: Tensor, target: Tensor, noise: Tensor | None = None, t: Tensor | None = None
    ) -> Tensor:
        """The denoiser's loss, a scalar.

        Args:
            pixel_values: images normalised for the backbone (B, 3, H, W).
            target: what to rebuild, latents (B, C, S, S).
            noise: noise tokens (B, N, E), drawn from the global RNG if absent.
            t: times (B,) in [0, 1], drawn likewise.
        """
        return self.denoiser(target, self.projector(self.token(pixel_values)), noise, t)

    def token(self, pixel_values: Tensor) -> Tensor:
        """Global tokens (B, D); no graph is kept where nothing in the backbone learns."""
        learns = any(p.requires_grad for p in self.backbone.parameters())
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            return self.backbone(pixel_values)

    @torch.no_grad()
    def rebuild(self, pixel_values: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Targets sampled from the condition of each image; training mode and global RNG are left as they were."""
        was_training = self.training
        self.eval()
        try:
            return self.denoiser.sample(self.projector(self.backbone(pixel_values)), generator)
        finally:
            self.train(was_training)


def build_enhancer(recipe: Recipe, target: VaeTarget) -> Enhancer:
    """A fresh enhancer in fp32 on the CPU, frozen: pre-trained backbone, projector and denoiser from ``recipe.seed``.

    Raises:
        InputError: the backbone cannot be loaded, or image size, patch and VAE do not fit.
    """
    backbone = load_backbone(recipe)
    side = target.latent_side(backbone.image_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        projector = PROJECTORS[recipe.condition](backbone.token_dim, recipe.vec_dim, recipe.txt_dim)
        denoiser = FlowDenoiser(recipe, target.channels, side)
    return Enhancer(backbone, projector, denoiser).requires_grad_(False)
