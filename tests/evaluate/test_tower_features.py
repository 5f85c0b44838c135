"""A tower's embeddings are those that its own logits are made of."""

import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.mmvp.local_scores import with_locals
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


@pytest.mark.parametrize("kind", ["clip_dir", "siglip_dir"])
@torch.no_grad()
def test_scores_with_local_tokens(kind, request):
    """Global token plus the mean of the locals, written out on the full model; the text side is the tower's own."""
    tower = load_tower(str(request.getfixturevalue(kind)), "cpu")
    images, model = pictures(4), tower.model
    summed = with_locals(tower)
    output = model.vision_model(**tower.images(images))
    token, hidden = output.pooler_output, output.last_hidden_state
    if kind == "clip_dir":
        token = model.visual_projection(token)
        hidden = model.visual_projection(model.vision_model.post_layernorm(hidden[:, 1:]))
    expected = token + hidden.sum(1) / hidden.shape[1]
    torch.testing.assert_close(summed.image_features(images), expected, atol=1e-5, rtol=1e-5)
    cosine = normalize(summed.text_features(TEXTS), dim=-1) @ normalize(expected, dim=-1).T
    logits = model.logit_scale.exp() * cosine + getattr(model, "logit_bias", 0)
    torch.testing.assert_close(summed.logits(images, TEXTS), logits, atol=1e-4, rtol=1e-5)
    assert not torch.allclose(logits, tower.logits(images, TEXTS), atol=1e-2)
    assert torch.equal(summed.logits(images, TEXTS), summed.logits(images, TEXTS)), "nothing is drawn"


def test_patches_without_a_grid_have_no_such_scores(siglip2_dir):
    with pytest.raises(InputError, match="scores with local tokens need a CLIPModel or SiglipModel"):
        with_locals(load_tower(str(siglip2_dir), "cpu"))
