"""Zero-shot sets of the toy world, in the layouts of real ones: critters by kind and place, and captioned scenes.

Both ask for the coarse facts that every caption of the CLIP's training named: what vision-only tuning may forget.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from random import Random

from PIL import Image

from llava_genhancer.toyworld import scenes
from llava_genhancer.toyworld.scenes import COARSE, Scene

TEMPLATES = ("a photo of a {c}", "a {c}")
CAPTIONS = 5  # per image, as in Flickr30k and COCO
Encode = Callable[[Image.Image], bytes]


def write_critters(folder: Path, split: str, rng: Random, seen: set[str], encode: Encode, per_class: int) -> None:
    """Write a folder of images per kind of critter and place, with class names and templates.

    Args:
        split: which scenes.
        seen: keys of scenes that were drawn before, and are from here on.
        encode: an image as a JPEG's bytes.
    """
    names = {}
    for shape, place in sorted(product(COARSE["shape"], COARSE["place"])):
        images = folder / "test" / f"{shape}_{place}"
        images.mkdir(parents=True)
        for index in range(per_class):
            scene = _fresh(rng, split, seen, shape=shape, place=place)
            names[images.name] = scenes.caption(scene, rng, detail_probability=0).removeprefix("a ")
            (images / f"{index:03d}.jpg").write_bytes(encode(scenes.render(scene)))
    (folder / "classnames.json").write_text(json.dumps(names, indent=1))
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")


def write_captions(
    folder: Path, split: str, rng: Random, seen: set[str], encode: Encode, count: int, detail_probability: float
) -> None:
    """Write ``captions.jsonl`` and ``images/``; a caption names a detail with ``detail_probability``."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for index in range(count):
        scene = _fresh(rng, split, seen)
        name = f"images/{index:06d}.jpg"
        (folder / name).write_bytes(encode(scenes.render(scene)))
        captions = [scenes.caption(scene, rng, detail_probability) for _ in range(CAPTIONS)]
        lines.append(json.dumps({"image": name, "captions": captions}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")


def _fresh(rng: Random, split: str, seen: set[str], **coarse: str) -> Scene:
    """A scene of ``split`` that was not drawn before, with these coarse facts."""
    while True:
        scene = replace(scenes.sample_scene(rng, split), **coarse)  # type: ignore[arg-type]
        if scene.split() == split and scene.key() not in seen:
            seen.add(scene.key())
            return scene
