"""The crop: torchvision's own, and a pure function of image and seed."""

import pytest
import torch
from packing import picture
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.functional import pil_to_tensor

from llava_genhancer.data.views import TrainView


@pytest.mark.parametrize(("scale", "ratio"), [((0.9, 1.0), (3 / 4, 4 / 3)), ((0.1, 0.5), (0.5, 2.0))])
@pytest.mark.parametrize("size", [(64, 48), (9, 200), (33, 33)])
def test_it_is_torchvisions_random_resized_crop(size, scale, ratio) -> None:
    view = TrainView(24, scale=scale, ratio=ratio)
    reference = RandomResizedCrop(24, scale=scale, ratio=ratio, interpolation=InterpolationMode.BICUBIC)
    image = picture(0, size)
    for seed in range(5):
        torch.manual_seed(seed)
        assert torch.equal(view(image, seed), pil_to_tensor(reference(image)))


def test_it_depends_on_image_and_seed_alone() -> None:
    view, image = TrainView(16, scale=(0.2, 0.8)), picture(1, (50, 40))
    torch.manual_seed(1)
    first = view(image, 7)
    torch.manual_seed(2)
    assert torch.equal(view(image, 7), first)
    assert not torch.equal(view(image, 8), first)
    assert first.dtype == torch.uint8
    assert first.shape == (3, 16, 16)


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    TrainView(16)(picture(2), 2**62)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_whole_area_at_its_own_ratio_is_a_resize() -> None:
    image = picture(3, (30, 30))
    expected = image.resize((16, 16), Image.Resampling.BICUBIC)
    assert torch.equal(TrainView(16, scale=(1.0, 1.0), ratio=(1.0, 1.0))(image, 0), pil_to_tensor(expected))
