"""What the branches of the method see of an image: one random crop, as uint8, and variations of it.

Legend: B batch, H = W image side.
"""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import ColorJitter, Compose, RandomHorizontalFlip, RandomResizedCrop
from torchvision.transforms.functional import InterpolationMode, pil_to_tensor, resized_crop


class TrainView:
    """RandomResizedCrop (reference: area .9 to 1, ratio 3/4 to 4/3, bicubic), a pure function of image and seed.

    Normalisation differs between the backbone and the target tokenizer and happens on the device; hence uint8.

    Args:
        image_size: side of the square result in pixels.
        scale: range of the crop's share of the area, in (0, 1].
        ratio: range of the crop's width over height.
    """

    def __init__(
        self, image_size: int, scale: tuple[float, float] = (0.9, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)
    ):
        self.image_size, self.scale, self.ratio = image_size, scale, ratio

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """An RGB image to uint8 (3, image_size, image_size); the global RNG is left as it was."""
        with torch.random.fork_rng(devices=[]):  # torchvision draws the crop from the global RNG
            # Not torch.manual_seed: without a device it keeps a formatted stack for CUDA's sake, each time.
            torch.default_generator.manual_seed(seed)
            top, left, height, width = RandomResizedCrop.get_params(image, list(self.scale), list(self.ratio))
        size = [self.image_size, self.image_size]
        crop = resized_crop(image, top, left, height, width, size, interpolation=InterpolationMode.BICUBIC)
        return pil_to_tensor(crop)


class SecondView:
    """Another view of each image of a batch, for objectives that compare conditions (DCR): crop, flip, colours.

    DCR crops .9 to 1 of the area, flips, and jitters colours by .1. Every draw comes from the CPU's global RNG, whose
    state a checkpoint holds, so that a resumed training sees the same views.
    """

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 images (B, 3, H, W) to uint8 views of the same size, on the same device."""
        augment = Compose(
            [
                RandomResizedCrop(images.shape[-1], (0.9, 1.0), interpolation=InterpolationMode.BICUBIC),
                RandomHorizontalFlip(),
                ColorJitter(brightness=0.1, contrast=0.1, saturation=0.1, hue=0.1),
            ]
        )
        return torch.stack([augment(image) for image in images])


def shrink(images: Tensor, size: int) -> Tensor:
    """uint8 images (B, 3, H, W) at side ``size``, antialiased; those of that size are given back as they are."""
    if images.shape[-1] == size:
        return images
    smaller = interpolate(images.float(), (size, size), mode="bicubic", antialias=True)
    return smaller.round().clamp(0, 255).to(torch.uint8)
