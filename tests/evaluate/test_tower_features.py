"""A tower's embeddings are those that its own logits are made of."""

import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from llava_genhancer.evaluate.towers import load_tower

TEXTS = ["a photo of the red dog", "two blue cats", "left"]


def pictures(count):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 16, 16, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(p.numpy()) for p in pixels]


@pytest.mark.parametrize("kind", ["clip_dir", "siglip_dir", "siglip2_dir"])
def test_features_make_the_logits(kind, request):
    tower = load_tower(str(request.getfixturevalue(kind)), "cpu")
    images = pictures(4)
    image, text = tower.image_features(images), tower.text_features(TEXTS)
    assert [image.shape, text.shape] == [(4, 16), (3, 16)]
    assert image.dtype == text.dtype == torch.float32
    assert not image.requires_grad
    assert (image.norm(dim=-1) - 1).abs().min() > 1e-2  # not normalised
    logits = tower.model.logit_scale.exp() * normalize(text, dim=-1) @ normalize(image, dim=-1).T
    logits = logits + getattr(tower.model, "logit_bias", 0)
    torch.testing.assert_close(logits, tower.logits(images, TEXTS), atol=1e-4, rtol=1e-5)
    assert logits.std() > 0.05
