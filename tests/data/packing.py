"""Small pictures and tar shards for the tests of the data."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    """A small picture of its own for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A tar with exactly these members, in img2dataset's flat layout."""
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, counts: Iterable[int]) -> list[Path]:
    """Shards ``00000.tar``, ... of PNGs with captions and metadata beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, number = [], 0
    for shard, count in enumerate(counts):
        members = []
        for _ in range(count):
            key = f"{number:06}"
            members += [(f"{key}.txt", b"a caption"), (f"{key}.json", b"{}"), (f"{key}.png", encoded(picture(number)))]
            number += 1
        shards.append(write_tar(folder / f"{shard:05}.tar", members))
    return shards
