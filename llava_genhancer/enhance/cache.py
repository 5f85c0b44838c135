"""Frozen work done once: what the target tokenizer, and a backbone that stays frozen, say of K crops of each image.

    CACHE/targets-HASH/...  the hash of data, crops, weights, arithmetic
    CACHE/tokens-HASH/...

Files are those of data/records.py. Runs that agree in what a hash is made of share its folder: six backbones at one
image size need the targets once. A training on a cache reads the same samples
in the same order as one without; only its crops come from a fixed set of K instead of afresh in each epoch, and the
posterior's noise, t and the flow's noise are drawn anew in each step all the same.

This file is what training reads; cache_fill.py writes it.

Legend: B batch, K crops of an image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_genhancer import run
from llava_genhancer.data.images import IndexedSource, RawSample, ShardSource, Source
from llava_genhancer.data.order import sample_seed
from llava_genhancer.data.records import CHUNK, Layer
from llava_genhancer.data.views import TrainView


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
    """Shards beside their records."""

    def __init__(self, source: ShardSource, layer: Layer, pixels: bool):
        super().__init__(source.shards)
        self.source, self.layer, self.pixels = source, layer, pixels

    def __len__(self) -> int:
        """Number of shards."""
        return len(self.source)

    def read(self, shard: int) -> Iterator[RawSample]:
        """The shard's samples; the tar itself is opened only where pixels are needed."""
        keys = run.read_json(self.layer.file(shard, ".json"))["keys"]
        samples: Iterable[RawSample] = (
            self.source.read(shard) if self.pixels else (RawSample(key, None) for key in keys)
        )
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

    def all(self, image: Any, key: str) -> Tensor:
        """uint8 (K, 3, H, W)."""
        return torch.stack([self(image, key, number) for number in range(self.count)])


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
