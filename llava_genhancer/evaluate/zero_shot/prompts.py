"""What clip_benchmark knows of a data set by its name, or a folder says instead: class names and prompts."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.zero_shot.data import PLACE
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
                "installed: pip install -e '.[eval]' in a clone of llava_genhancer"
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
