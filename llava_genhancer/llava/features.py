"""What the frozen tower says of each image, computed once and read in training instead of the image.

An image counts once, however many samples show it. A training on the cache takes the same samples in the same order,
and skips the same images, as one without. For the 558 000 images of LLaVA's pretraining and ViT-L/14 at 336 px in bf16
that is 659 GB, to spare the 1.6 % of the FLOPs that the tower takes beside a 7B: worth it beside small language models,
where images are slow to decode, for several epochs, and for trainings that share the cache, such as a sweep over the
projector's learning rate; a single pass only pays for it.

Legend: T tokens of the tower, C its width.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llava_genhancer.data.decode import BadImage, refuse_fault
from llava_genhancer.data.images import IndexedSource, RawSample
from llava_genhancer.data.records import CHUNK, Layer, open_layer, units_of, weights_hash
from llava_genhancer.data.records_fill import check_disk, fill
from llava_genhancer.llava.dataset import ImageView, LlavaDataset
from llava_genhancer.llava.model import Llava
from llava_genhancer.llava.recipes import LlavaRecipe
from llava_genhancer.llava.samples import Samples

log = logging.getLogger(__name__)
DIGEST_BYTES = 16


class Images:
    """The images of all samples, each once, numbered in the order of their names' digests.

    Names are not kept, as they would be copied for each worker: a digest says a name's number, and the place in the
    JSON a number's name.
    """

    def __init__(self, samples: Samples):
        self.samples = samples
        names = (
            (name, position, place)
            for position in np.flatnonzero(samples.lengths > 0).tolist()
            for place, name in enumerate(samples[position].images)
        )
        digests, places = bytearray(), array("q")
        for name, *place in names:
            digests += _digest(name)
            places.extend(place)
        self.digests, first = np.unique(np.frombuffer(digests, dtype=f"S{DIGEST_BYTES}"), return_index=True)
        self.places = np.frombuffer(places, dtype=np.int64).reshape(-1, 2)[first]

    def __len__(self) -> int:
        """How many."""
        return len(self.digests)

    def number(self, name: str) -> int:
        """An image's number."""
        return int(np.searchsorted(self.digests, np.bytes_(_digest(name))))

    def __call__(self, number: int) -> RawSample:
        """An image by number, undecoded."""
        position, place = self.places[number].tolist()
        name = self.samples[position].images[place]
        return RawSample(name, self.samples.image_path(name))


def _digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=DIGEST_BYTES).digest()


@dataclass(frozen=True)
class Features:
    """A whole cache: an image's name to the tower's features."""

    images: Images
    layer: Layer

    def __call__(self, name: str) -> Tensor:
        """The tower's hidden state (T, C) in the training's arithmetic.

        Its CLS comes along, which the model drops as it does without a cache: linear layers round by how their input
        lies in memory.

        Raises:
            BadImage: the image could not be used when the cache was written, or is not there any more.
            InputError: the record is damaged, or the image was replaced by another one.
        """
        path = self.images.samples.image_path(name)
        try:
            size = os.path.getsize(path)
        except OSError as error:
            refuse_fault(error, path)
            raise BadImage("file not found") from None
        unit, position = divmod(self.images.number(name), CHUNK)
        record = self.layer.read(unit, position, 0, size)
        return record.view(self.layer.dtype).view(self.layer.shape)


@dataclass(frozen=True)
class _OneView:
    """An image as the tower wants it, as the only one of its views (1, 3, H, W)."""

    view: ImageView

    def __call__(self, image: Image.Image, key: str) -> Tensor:
        return self.view(image)[None]


def open_features(
    recipe: LlavaRecipe,
    step: str,
    folder: Path,
    dataset: LlavaDataset,
    model: Llava,
    device: torch.device,
    *,
    autocast: bool,
) -> Features:
    """The cache that a step trains on, written as far as it is not there yet; every rank writes its share.

    Args:
        folder: ``recipe.cache_folder``, or the run's own.
        autocast: training runs the tower under autocast (bf16 without DeepSpeed).

    Raises:
        InputError: the disk is too small, too many images cannot be used, or another process is writing there.
    """
    table, config = recipe.step(step), model.config
    tower = model.vision_tower.to(device)

    def encode(pixels: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            return model.tower_features(pixels)

    images = Images(dataset.samples)
    facts = {
        "format": 1,
        "images": hashlib.sha256(images.digests.tobytes()).hexdigest()[:16],
        "weights": weights_hash(tower.state_dict()),
        "processor": json.loads(dataset.view.processor.to_json_string()),
        "image_mode": table.image_mode,
        "layer": config.vision_feature_layer,
        "arithmetic": f"{recipe.precision}{', autocast' * autocast}",
        "shape": model.features_shape,
    }
    source = IndexedSource(len(images), images)
    # The projector computes in bf16 in either case: rounding before it changes nothing.
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    layer = open_layer(folder, "features", facts, dtype, crops=1, image_sizes=True)
    fill(
        source,
        _OneView(dataset.view),
        {"features": layer},
        {"features": encode},
        device,
        announce=lambda missing: _check_disk(layer, len(images), len(missing["features"]) / units_of(source), step),
        batch_size=table.per_device_batch_size,
        num_workers=recipe.num_workers,
        max_bad_fraction=recipe.max_bad_fraction,
        timeout_minutes=recipe.timeout_minutes,
    )
    return Features(images, layer)


def _check_disk(layer: Layer, images: int, share: float, step: str) -> None:
    """Say what will be written, and refuse what cannot fit."""
    need = images * share * layer.stored_bytes
    log.info(
        "cache of the tower's features: %d images x %.1f KiB; %.2f GiB still to write in %s",
        images, layer.stored_bytes / 1024, need / 2.0**30, layer.folder,
    )  # fmt: skip
    check_disk(layer.folder, need, f"--{step}.cache_features false")
