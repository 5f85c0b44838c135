"""Zero-shot data sets: their images, and the class names and prompts or captions with them.

What is expected of a folder is in ``layouts.py``. Names are clip_benchmark's, so that its prompts are found:
imagenet1k, cifar100, sun397, cars, flickr30k, mscoco_captions are those of the paper's Table 3.
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from llava_genhancer.data.decode import FORMATS, MAX_PIXELS
from llava_genhancer.errors import InputError, reason

PLACE = "{c}"  # of the class's name in a prompt


@dataclass(frozen=True)
class Images:
    """Images by number: what each is called, its size in bytes, and its file's bytes."""

    keys: tuple[str, ...]
    sizes: tuple[int, ...]
    get: Callable[[int], bytes]

    def __len__(self) -> int:
        return len(self.keys)

    def open(self, index: int) -> Image.Image:
        """One image in RGB, as clip_benchmark reads it: no rotation by EXIF.

        Raises:
            InputError: it cannot be decoded; a measurement without it would not be comparable.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # palette transparency and size warnings: the pixels decide
                with Image.open(io.BytesIO(self.get(index)), formats=FORMATS) as image:
                    if image.width * image.height > MAX_PIXELS:
                        raise ValueError("larger than 64 megapixels")
                    return image.convert("RGB")
        except Exception as error:  # decoders raise anything
            raise InputError(f"image {self.keys[index]} cannot be decoded ({reason(error)}): replace it") from None


@dataclass(frozen=True)
class Classification:
    """Images of known classes.

    Attributes:
        labels: per image, a number of ``classes``.
        templates: prompts with ``{c}`` where the class's name goes.
        named: where the class names came from, for the results.
    """

    name: str
    path: Path
    images: Images
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    named: str

    def prompts(self, index: int) -> list[str]:
        """A class's name in every template."""
        return [template.replace(PLACE, self.classes[index]) for template in self.templates]

    @cached_property
    def sha256(self) -> str:
        """Of the images' names and sizes, their labels, the class names and the templates; not of the pixels."""
        return _digest(self.images, self.labels, self.classes, self.templates)


@dataclass(frozen=True)
class Retrieval:
    """Images with captions, at least one each."""

    name: str
    path: Path
    images: Images
    captions: tuple[tuple[str, ...], ...]

    @cached_property
    def sha256(self) -> str:
        """Of the images' names and sizes and their captions; not of the pixels."""
        return _digest(self.images, self.captions)


ZeroShotSet = Classification | Retrieval


def _digest(images: Images, *facts: Any) -> str:
    return hashlib.sha256(json.dumps([images.keys, images.sizes, facts]).encode()).hexdigest()
