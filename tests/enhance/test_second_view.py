"""Variations of a crop: a second view drawn from the global RNG, and the smaller image that the backbone sees."""

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import ColorJitter, InterpolationMode, RandomHorizontalFlip, RandomResizedCrop
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from llava_genhancer.data.views import SecondView, shrink


def pictures(count: int, size: int) -> Tensor:
    """Smooth uint8 pictures (B, 3, H, W)."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return (torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear") * 255).to(torch.uint8)


def test_a_view_is_torchvisions_crop_flip_and_jitter() -> None:
    images = pictures(3, 40)
    torch.manual_seed(4)
    views = SecondView()(images)
    torch.manual_seed(4)
    crop = RandomResizedCrop(40, (0.9, 1.0), interpolation=InterpolationMode.BICUBIC)
    flip, jitter = RandomHorizontalFlip(), ColorJitter(0.1, 0.1, 0.1, 0.1)
    assert torch.equal(views, torch.stack([jitter(flip(crop(image))) for image in images]))
    assert views.dtype == torch.uint8


def test_every_image_has_a_draw_of_its_own_from_the_global_rng() -> None:
    same = pictures(1, 40).repeat(6, 1, 1, 1)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = SecondView()(same)
    after = torch.get_rng_state()
    assert len({view.numpy().tobytes() for view in first}) == 6
    assert not torch.equal(SecondView()(same), first)
    torch.set_rng_state(state)
    assert torch.equal(SecondView()(same), first)
    assert torch.equal(torch.get_rng_state(), after)


def test_a_view_is_still_the_picture() -> None:
    images = pictures(16, 40)
    torch.manual_seed(0)
    views = SecondView()(images).float()
    for view, image in zip(views, images.float(), strict=True):
        apart = min(float((view - x).abs().mean()) for x in (image, image.flip(-1)))
        assert 0 < apart < 40


@pytest.mark.parametrize(("large", "small"), [(64, 28), (48, 32)])
def test_shrinking_is_pils_antialiased_resize(large: int, small: int) -> None:
    images = pictures(3, large)
    images[0, :, ::2] = 255  # stripes that a resize without antialiasing would turn into others
    expected = [to_pil_image(i).resize((small, small), Image.Resampling.BICUBIC) for i in images]
    difference = shrink(images, small).int() - torch.stack([pil_to_tensor(i) for i in expected]).int()
    assert int(difference.abs().max()) <= 2
    assert shrink(images, small).dtype == torch.uint8


def test_an_image_of_the_right_size_is_left_alone() -> None:
    images = pictures(2, 32)
    assert shrink(images, 32) is images
