"""What every frozen target tokenizer does.

Legend: B batch, H = W image side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from torch import Tensor


class Target(ABC):
    """A frozen autoencoder whose codes are what the denoiser rebuilds.

    It stays outside the trained module: it is never sharded, checkpointed or cast by a training engine.
    """

    def __init__(self, module: Any):
        self.module = module.eval().requires_grad_(False)
        self.downscale = 2 ** (len(module.config.block_out_channels) - 1)

    def to(self, device: torch.device) -> Self:
        """Move the frozen weights."""
        self.module.to(device)
        return self

    def drop_decoder(self) -> None:
        """Free the half that only pictures need."""
        self.module.decoder = None

    @abstractmethod
    def moments(self, images: Tensor) -> Tensor:
        """All that the frozen encoder says of uint8 images (B, 3, H, W), before any chance (B, ...)."""

    def draw(self, moments: Tensor) -> Tensor:
        """What is rebuilt (B, ...), chance included, if there is any."""
        return moments

    def encode(self, images: Tensor) -> Tensor:
        """uint8 images (B, 3, H, W) to what is rebuilt (B, ...)."""
        return self.draw(self.moments(images))

    @abstractmethod
    def decode(self, target: Tensor) -> Tensor:
        """The inverse: uint8 images (B, 3, H, W)."""
