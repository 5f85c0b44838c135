"""Image processors as LLaVA's code wants them: with ``crop_size`` and ``size["shortest_edge"]``, square output."""

from __future__ import annotations

import os
from typing import Any


def build_processor(folder: str, model_type: str, side: int) -> Any:
    """The image processor of a tower folder, for square images of ``side`` pixels.

    CLIP's own resizes the short edge and crops the centre; SigLIP's resizes to a square, and crops nothing.
    """
    if model_type == "clip":
        from transformers import CLIPImageProcessor

        crop = {"height": side, "width": side}
        return CLIPImageProcessor.from_pretrained(folder, size={"shortest_edge": side}, crop_size=crop)
    return SquareProcessor(folder, side)


class SquareProcessor:
    """SigLIP's image processor with what LLaVA reads on CLIP's: text-only samples ask for ``crop_size``, anyres for
    ``size["shortest_edge"]``, which SigLIP's own class would refuse to hold."""

    def __init__(self, folder: str, side: int):
        from transformers import SiglipImageProcessor

        self._processor = SiglipImageProcessor.from_pretrained(folder, size={"height": side, "width": side})
        self.image_mean: list[float] = list(self._processor.image_mean)
        self.image_std: list[float] = list(self._processor.image_std)
        self.crop_size = {"height": side, "width": side}
        self.size = {"shortest_edge": side, "height": side, "width": side}

    def preprocess(self, images: Any, return_tensors: Any = None, **kwargs: Any) -> Any:
        """One image or several, to ``{"pixel_values": (B, 3, side, side)}``."""
        return self._processor.preprocess(images, return_tensors=return_tensors, **kwargs)

    __call__ = preprocess

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write the processor's JSON, as transformers' own would."""
        self._processor.save_pretrained(folder)
