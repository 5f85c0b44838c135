"""Towers in open_clip's own format (EVA-CLIP), measured as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llava_genhancer.convert.open_clip import OpenClipSource, load_model, read_folder
from llava_genhancer.data.decode import bounded
from llava_genhancer.errors import InputError, reason
from llava_genhancer.evaluate.tower import Tower, exact_fp32, marker_facts
from llava_genhancer.run import sha256


class OpenClipTower(Tower):
    """open_clip's model with its own tokenizer and image transform."""

    model: Any

    def images(self, images: list[Image.Image]) -> dict[str, Tensor]:
        return {"image": torch.stack([self.image_processor(image) for image in images]).to(self.device)}

    def texts(self, texts: list[str]) -> Tensor:
        return self.tokenizer(texts).to(self.device)

    @torch.no_grad()
    def logits(self, images: list[Image.Image], texts: list[str]) -> Tensor:
        with exact_fp32():
            return self.model.get_logits(text=self.texts(texts), **self.images(images))[1]

    @torch.no_grad()
    def image_features(self, images: list[Image.Image]) -> Tensor:
        with exact_fp32():
            return self.model.encode_image(**self.images(images))

    @torch.no_grad()
    def text_features(self, texts: list[str]) -> Tensor:
        with exact_fp32():
            return self.model.encode_text(self.texts(texts))


def load_open_clip_tower(name: str, path: str, device: torch.device) -> OpenClipTower:
    """Load a folder or hub id in open_clip's format.

    Raises:
        InputError: its configuration, weights or tokenizer cannot be used.
    """
    source = read_folder(path)
    model = load_model(source).requires_grad_(False).to(device)
    return OpenClipTower(
        name=name,
        model_type="open_clip",
        model=model,
        tokenizer=_tokenizer(name, path),
        image_processor=_transform(source),
        max_length=model.context_length,
        device=device,
        weights={source.weights.name: sha256(source.weights)},
        **marker_facts(source.weights.parent, [name, path], source.image_size),
    )


def _tokenizer(name: str, path: str) -> Any:
    import open_clip

    schema = "local-dir" if Path(path).is_dir() else "hf-hub"
    try:
        return open_clip.get_tokenizer(f"{schema}:{path}")
    except Exception as error:  # tokenizers raise bare Exceptions for broken files
        raise InputError(f"tower {name}: its tokenizer cannot be loaded ({reason(error)})") from None


def _transform(source: OpenClipSource) -> Any:
    from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

    preprocess = merge_preprocess_dict(PreprocessCfg(), {**source.preprocess_cfg, "size": source.image_size})
    transform = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)
    if preprocess["resize_mode"] != "shortest":
        return transform
    return lambda image: transform(bounded(image, pad=False, crop=True))
