"""The model a training engine holds: backbone -> condition -> denoiser -> loss.

Legend: B batch, H = W image side, N local tokens, D width of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from llava_genhancer.enhance.backbones import VisionBackbone, load_backbone
from llava_genhancer.enhance.conditions import Condition, Projector
from llava_genhancer.enhance.denoisers import DENOISERS
from llava_genhancer.enhance.tokenizer import Target
from llava_genhancer.recipes import Recipe


class Enhancer(nn.Module):
    """One call, ``forward(pixel_values, target) -> loss``; its three parts are what a stage table names."""

    def __init__(self, backbone: VisionBackbone, projector: Projector, denoiser: nn.Module, draws_per_image: int = 1):
        super().__init__()
        # A training engine sizes its "auto" buckets by the model's width.
        self.config = PretrainedConfig(hidden_size=denoiser.width)
        self.backbone = backbone
        self.projector = projector
        self.denoiser = denoiser
        self.draws_per_image = draws_per_image

    def forward(
        self,
        pixel_values: Tensor,
        target: Tensor,
        view_values: Tensor | None = None,
        draws: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The denoiser's loss, a scalar.

        Args:
            pixel_values: images normalised for the backbone (B, 3, H, W), or what :meth:`tokens` gave for them.
            target: what to rebuild, as the target tokenizer gives it (B, ...).
            view_values: a second view of the same images (B, 3, H, W), for objectives that compare conditions.
            draws: the denoiser's random draws by name; what is absent comes from the global RNG.
        """
        views = [pixel_values] if view_values is None else [pixel_values, view_values]
        # Every draw tells the denoiser local tokens of its own.
        told = [self.projector(self.tokens(seen).repeat(self.draws_per_image, 1, 1)) for seen in views]
        return self.denoiser(target, *told, **(draws or {}))

    def tokens(self, pixel_values: Tensor) -> Tensor:
        """What the projector reads: global tokens (B, 1, D), or all (B, 1 + N, D); no graph where nothing learns."""
        if pixel_values.ndim == 3:  # tokens already, from a cache
            return pixel_values
        learns = any(p.requires_grad for p in self.backbone.parameters())
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            if self.projector.needs_locals:
                return self.backbone.tokens(pixel_values)
            return self.backbone(pixel_values)[:, None]

    def condition(self, pixel_values: Tensor) -> Condition:
        """What the denoiser is told of each image."""
        return self.projector(self.tokens(pixel_values))

    @torch.no_grad()
    def rebuild(self, pixel_values: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Targets sampled from the condition of each image; training mode and global RNG are left as they were."""
        was_training = self.training
        self.eval()
        try:
            return self.denoiser.sample(self.condition(pixel_values), generator)  # type: ignore[operator]
        finally:
            self.train(was_training)


def build_enhancer(recipe: Recipe, target: Target) -> Enhancer:
    """A fresh enhancer in fp32 on the CPU, frozen: pre-trained backbone, projector and denoiser from ``recipe.seed``.

    Raises:
        InputError: the backbone cannot be loaded, or image size, patch and target tokenizer do not fit.
    """
    backbone = load_backbone(recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        projector = Projector(recipe, backbone.token_dim)
        denoiser = DENOISERS[recipe.denoiser].from_recipe(recipe, target, recipe.target_size or backbone.image_size)
    return Enhancer(backbone, projector, denoiser, recipe.draws_per_image).requires_grad_(False)
