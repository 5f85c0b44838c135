"""Zero-shot data sets: which folder is which set, its images, and the class names and prompts or captions with them.

What is expected of a folder is in ``zero_shot_layouts.py``. Names are clip_benchmark's, so that its prompts are found:
imagenet1k, cifar100, sun397, cars, flickr30k, mscoco_captions are those of the paper's Table 3.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from llava_genhancer.data.decode import FORMATS, MAX_PIXELS
from llava_genhancer.errors import InputError, reason
from llava_genhancer.run import read_json

ALIASES = {
    "imagenet": "imagenet1k",
    "imagenetval": "imagenet1k",
    "stanfordcars": "cars",
    "coco": "mscoco_captions",
    "mscoco": "mscoco_captions",
    "cococaptions": "mscoco_captions",
    "mscococaptions": "mscoco_captions",
}
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


def load_sets(paths: Sequence[str | Path]) -> list[ZeroShotSet]:
    """Every set in ``paths``: each one a set's folder, or a folder of such folders.

    Raises:
        InputError: no set there, two of one name, or a set that cannot be used.
    """
    from llava_genhancer.evaluate.zero_shot.layouts import find_folders, read_set

    sets: dict[str, ZeroShotSet] = {}
    for path in paths:
        for folder in find_folders(Path(path).expanduser()):
            found = read_set(folder)
            if found.name in sets:
                raise InputError(
                    f"{folder} and {sets[found.name].path} are both the data set {found.name}: give one of them"
                )
            sets[found.name] = found
    return list(sets.values())


def set_name(folder: Path) -> str:
    """clip_benchmark's name of the data set that a folder is called after, else the folder's own."""
    plain = re.sub(r"^(wds[_-])?(vtab[_-])?", "", folder.resolve().name.lower())
    key = re.sub(r"[^a-z0-9]", "", plain)
    return ALIASES.get(key, key if key in _packaged("templates") else plain)


def templates_of(name: str, folder: Path) -> tuple[str, ...]:
    """The set's own prompts, clip_benchmark's for a set of its name, else those of ImageNet as clip_benchmark does.

    Raises:
        InputError: a prompt without ``{c}``, or clip_benchmark is needed and not installed.
    """
    own = folder / "zeroshot_classification_templates.txt"
    if own.is_file():
        found = lines_of(own)
    else:
        packaged = _packaged("templates")
        if not packaged:
            raise InputError(
                f"{folder} brings no {own.name}, and clip_benchmark, which has prompts for the usual sets, is not "
                "installed: pip install 'llava-genhancer[eval]'"
            )
        found = packaged.get(name) or packaged["imagenet1k"]
    without = [t for t in found if PLACE not in t]
    if without or not found:
        what = f"'{without[0]}' has no {PLACE}" if without else "it is empty"
        raise InputError(f"{own}: {what}; every line is a prompt with {PLACE} where the class's name goes")
    return tuple(found)


def packaged_classes(name: str) -> list[str] | None:
    """Class names that clip_benchmark has for a set of that name (OpenAI's for ImageNet, in the order of wnids)."""
    return _packaged("classnames").get(name)


def lines_of(path: Path) -> list[str]:
    """The lines of a small text file that are not blank.

    Raises:
        InputError: it cannot be read as UTF-8.
    """
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}") from None


@cache
def _packaged(what: str) -> dict[str, Any]:
    """clip_benchmark's English ``templates`` or ``classnames`` by data set; empty where it is not installed."""
    name = {"templates": "en_zeroshot_classification_templates.json", "classnames": "en_classnames.json"}[what]
    try:
        file = resources.files("clip_benchmark") / "datasets" / name
    except ModuleNotFoundError:
        return {}
    values: dict[str, Any] = read_json(str(file))
    return values


def _digest(images: Images, *facts: Any) -> str:
    return hashlib.sha256(json.dumps([images.keys, images.sizes, facts]).encode()).hexdigest()
