"""Frozen work done once: what the target tokenizer, and a backbone that stays frozen, say of K crops of each image.

    CACHE/targets-HASH/facts.json  what the hash is made of: data, crops, weights, arithmetic
    CACHE/targets-HASH/00012.bin   records of unit 12 in reading order, the K crops of an image side by side
    CACHE/targets-HASH/00012.json  written last: the unit counts from then on
    CACHE/tokens-HASH/...

A unit is a tar shard, or ``CHUNK`` items of a source that is read by number. Runs that agree in what a hash is made of
share its folder: six backbones at one image size need the targets once. A training on a cache reads the same samples
in the same order as one without; only its crops come from a fixed set of K instead of afresh in each epoch, and the
posterior's noise, t and the flow's noise are drawn anew in each step all the same.

This file is what training reads; cache_fill.py writes it.

Legend: B batch, K crops of an image.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_genhancer import run
from llava_genhancer.data.decode import BadImage
from llava_genhancer.data.images import IndexedSource, RawSample, ShardSource, Source
from llava_genhancer.data.loader import sample_seed
from llava_genhancer.data.views import TrainView
from llava_genhancer.errors import InputError

CHUNK = 1024  # items of an indexed source in one unit
BAD = 0xFF  # every byte of a record whose image cannot be used: NaN, or the id -1


def count_images(source: Source) -> int:
    """Images of a source; of tar shards an estimate from the first one and the sizes of all."""
    if not isinstance(source, ShardSource):
        return len(source)
    sizes = [os.path.getsize(path) for path in source.shards]
    return round(sum(1 for _ in source.read(0)) * sum(sizes) / sizes[0])


# --- records --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """Records of one kind, one per sample and crop, in a file per unit.

    Attributes:
        folder: where; its name ends in the hash of what the records depend on.
        shape: of one crop's record.
        dtype: of its numbers on disk.
        crops: K.
    """

    folder: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    crops: int

    @property
    def record_bytes(self) -> int:
        """Bytes of one crop's record."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize

    def file(self, unit: int, suffix: str) -> Path:
        """``.bin``: the records; ``.json``: keys and bad samples."""
        return self.folder / f"{unit:05}{suffix}"

    def whole(self, unit: int) -> bool:
        """Whether a unit's records are all there."""
        try:
            samples = len(run.read_json(self.file(unit, ".json"))["keys"])
            return self.file(unit, ".bin").stat().st_size == samples * self.crops * self.record_bytes
        except (InputError, OSError, KeyError, TypeError):
            return False

    def read(self, unit: int, position: int, crop: int) -> Tensor:
        """The bytes of a record, uint8 (record_bytes,).

        Raises:
            BadImage: the sample could not be used when the cache was written.
        """
        with open(self.file(unit, ".bin"), "rb") as file:
            file.seek((position * self.crops + crop) * self.record_bytes)
            data = bytearray(file.read(self.record_bytes))
        if data.count(BAD) == len(data):
            raise BadImage(run.read_json(self.file(unit, ".json"))["bad"].get(str(position), "damaged cache"))
        return torch.frombuffer(data, dtype=torch.uint8)

    def numbers(self, records: Tensor) -> Tensor:
        """Records' bytes (B, record_bytes) as numbers (B, *shape): fp32, or long ids."""
        numbers = records.contiguous().view(self.dtype).view(-1, *self.shape)
        return numbers.float() if self.dtype.is_floating_point else numbers.long()

    def bytes_of(self, numbers: Tensor) -> bytes:
        """The inverse for (n, *shape)."""
        return numbers.to("cpu", self.dtype).contiguous().view(-1).view(torch.uint8).numpy().tobytes()


# --- reading in training ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CachedSample(RawSample):
    """A sample and the place of its records; the view decides what of it is read."""

    unit: int = 0
    position: int = 0

    def image(self) -> Any:
        """Itself: decoding waits until the view wants pixels."""
        return self

    def pixels(self) -> Any:
        """The decoded image."""
        return super().image()


class CachedShards(ShardSource):
    """Tar shards beside their records."""

    def __init__(self, source: ShardSource, layer: Layer, pixels: bool):
        super().__init__(source.shards)
        self.layer, self.pixels = layer, pixels

    def read(self, shard: int) -> Iterator[RawSample]:
        """The shard's samples; the tar itself is opened only where pixels are needed."""
        keys = run.read_json(self.layer.file(shard, ".json"))["keys"]
        samples: Iterable[RawSample] = super().read(shard) if self.pixels else (RawSample(key, None) for key in keys)
        for position, (key, sample) in enumerate(zip(keys, samples, strict=False)):
            same = sample.key == key
            yield CachedSample(
                key, sample.data if same else None, sample.problem if same else "not the cache's", shard, position
            )


@dataclass(frozen=True)
class CachedItems:
    """Items of an indexed source beside their records."""

    source: IndexedSource

    def __call__(self, index: int) -> RawSample:
        sample = self.source.get(index)
        return CachedSample(sample.key, sample.data, sample.problem, index // CHUNK, index % CHUNK)


@dataclass(frozen=True)
class Crop:
    """The K crops of an image, each a function of the run's seed, the image's key and the crop's number alone."""

    view: TrainView
    seed: int
    count: int

    def __call__(self, image: Any, key: str, number: int) -> Tensor:
        """uint8 (3, H, W)."""
        return self.view(image, sample_seed(self.seed, "crop", number, key))


@dataclass(frozen=True)
class CachedView:
    """A sample and a seed to ``{layer: record's bytes}``, with ``images``, the crop's pixels, where they are needed."""

    layers: dict[str, Layer]
    crop: Crop
    pixels: bool

    def __call__(self, sample: Any, seed: int) -> Any:
        """One of the K crops, chosen by the seed."""
        number = seed % self.crop.count
        seen = {name: layer.read(sample.unit, sample.position, number) for name, layer in self.layers.items()}
        return {**seen, "images": self.crop(sample.pixels(), sample.key, number)} if self.pixels else seen


@dataclass(frozen=True)
class Cache:
    """What a training reads instead of images: ``source`` and ``view`` for the loader."""

    source: Source
    view: CachedView

    def numbers(self, batch: dict[str, Tensor], name: str) -> Tensor:
        """A layer's part of a batch (B, *shape)."""
        return self.view.layers[name].numbers(batch[name])
