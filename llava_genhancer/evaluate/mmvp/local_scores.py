"""Scores that count the local tokens too: the global token plus their mean, as DIVA measures OpenAI's towers.

Legend: B images, N local tokens, D width of the shared space.

DIVA (arXiv 2407.20171, released code) adds the mean of 76 local tokens that are drawn anew for every image at every
call, so that its own scores differ from run to run. Here it is the mean of all of them, which those draws estimate.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.tower import Tower, exact_fp32
from llava_genhancer.evaluate.towers import MODEL_CLASSES


class LocalsTower(Tower):
    """A tower whose image embedding is the global token plus the mean of the local ones."""

    @torch.no_grad()
    def image_features(self, images: list[Image.Image]) -> Tensor:
        """Global token plus the mean of the N local ones, not normalised: fp32 (B, D)."""
        from llava_genhancer.enhance.backbones import VisionBackbone

        statistics = list(self.image_processor.image_mean), list(self.image_processor.image_std)
        with exact_fp32():
            tokens = VisionBackbone(self.model, *statistics).tokens(self.images(images)["pixel_values"])
        return tokens[:, 0] + tokens[:, 1:].mean(1)

    @torch.no_grad()
    def logits(self, images: list[Image.Image], texts: list[str]) -> Tensor:
        """Every text against every image (texts, images), fp32, by the model's own scale and bias."""
        model: Any = self.model
        with exact_fp32():
            cosines = normalize(self.text_features(texts), dim=-1) @ normalize(self.image_features(images), dim=-1).T
            return model.logit_scale.exp() * cosines + getattr(model, "logit_bias", 0)


def with_locals(tower: Tower) -> LocalsTower:
    """``tower``, scored by its local tokens too.

    Raises:
        InputError: a tower in open_clip's format, or one whose patches come in no fixed grid.
    """
    if tower.model_type not in MODEL_CLASSES or tower.model_type == "siglip2":
        raise InputError(f"tower {tower.name}: scores with local tokens need a CLIPModel or SiglipModel")
    facts = {f.name: getattr(tower, f.name) for f in dataclasses.fields(tower)}
    backbone = tower.backbone
    if tower.method != "diva" or backbone is None or not backbone.recipe.startswith("openai"):
        facts["backbone"] = None  # published figures of all others are of the global token alone
    return LocalsTower(**facts)
