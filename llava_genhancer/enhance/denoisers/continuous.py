"""What all denoisers of continuous latents share: noise them, predict noise or velocity, compare.

Legend: B batch, k draws per image, ... the shape that the network takes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from llava_genhancer.enhance.conditions import Condition
from llava_genhancer.enhance.objectives import contrast_loss, velocity_loss
from llava_genhancer.recipes import Recipe


class ContinuousDenoiser(nn.Module, ABC):
    """A path from data to noise, a network that predicts what lies on it, and a recipe's objective on both.

    * rebuild: mean squared error of the prediction.
    * contrast (DCR): every noisy image is denoised under every image's condition. The prediction under its own must be
      like the one under a second view's condition, and like the truth, and unlike those under the other images'.
    """

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.objective, self.temperature = recipe.objective, recipe.contrast_temperature

    @abstractmethod
    def pack(self, latents: Tensor) -> Tensor:
        """Latents (B, C, S, S) as the network takes them (B, ...)."""

    @abstractmethod
    def sample_t(self, batch: int, device: torch.device) -> Tensor:
        """Times (B,) of a training step, from the global RNG."""

    @abstractmethod
    def path(self, clean: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The noisy data at times t (B,), and what the network should say of it, both (B, ...) in fp32."""

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """What the network says of noisy data x_t (B, ...)."""

    def forward(
        self,
        target: Tensor,
        condition: Condition,
        view: Condition | None = None,
        noise: Tensor | None = None,
        t: Tensor | None = None,
    ) -> Tensor:
        """Training loss, a scalar in fp32.

        Args:
            target: clean latents (B, C, S, S).
            condition: what the backbone saw, of all images once per draw (k B of them).
            view: what it saw of a second view of each image, for the contrast.
            noise: standard normal (k B, ...), packed; drawn from the global RNG if absent.
            t: times (k B,); drawn likewise.
        """
        clean = self.pack(target)
        clean = clean.repeat(condition.batch // len(clean), *[1] * (clean.ndim - 1))
        if t is None:
            t = self.sample_t(len(clean), clean.device)
        if noise is None:
            noise = torch.randn_like(clean, dtype=torch.float32)
        x_t, truth = self.path(clean, noise, t)
        predicted = self.predict(x_t, t, condition)
        if self.objective == "rebuild":
            return velocity_loss(predicted, truth)
        assert view is not None
        positives = [self.predict(x_t, t, view), truth]
        negatives = [self.predict(x_t, t, condition.roll(i)) for i in range(1, len(clean))]
        return contrast_loss(predicted, positives, torch.stack(negatives), self.temperature)
