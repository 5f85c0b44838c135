"""What the loader's batch becomes on the device: what the model sees, and what it must rebuild.

Legend: B batch, H = W image side.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llava_genhancer.data.views import shrink
from llava_genhancer.enhance.backbones import VisionBackbone
from llava_genhancer.enhance.cache import Cache
from llava_genhancer.enhance.tokenizer import Target


@dataclass(frozen=True)
class FreshInputs:
    """Both computed from the images of the step.

    Attributes:
        target_size: side of what the target tokenizer sees, in pixels.
    """

    backbone: VisionBackbone
    target: Target
    target_size: int

    def see(self, images: Tensor) -> Tensor:
        """uint8 images (B, 3, H, W) of any side as the backbone's ``pixel_values``."""
        return self.backbone.normalise(shrink(images, self.backbone.image_size))

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """``pixel_values`` and targets of uint8 images (B, 3, H, W)."""
        target = self.target.encode(shrink(images, self.target_size))
        return self.see(images), target


@dataclass(frozen=True)
class CachedInputs:
    """Targets, and while the backbone is frozen its tokens, from the cache; chance is drawn afresh."""

    backbone: VisionBackbone
    target: Target
    cache: Cache

    def __call__(self, records: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Tokens (or ``pixel_values``) and targets of what :class:`CachedView` made of a batch."""
        target = self.target.draw(self.cache.numbers(records, "targets"))
        if "tokens" in records:
            return self.cache.numbers(records, "tokens"), target
        return self.backbone.normalise(records["images"]), target
