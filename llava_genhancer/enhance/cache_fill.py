"""Writing a cache of frozen targets and tokens (see cache.py): keys, disk, workers, whole units only."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from llava_genhancer import machine, run
from llava_genhancer.costs import GIB, Records, frozen_backbone
from llava_genhancer.data.decode import BadImage
from llava_genhancer.data.images import IndexedSource, RawSample, ShardSource, Source, fingerprint
from llava_genhancer.data.loader import MIN_READ, start_worker
from llava_genhancer.data.views import TrainView
from llava_genhancer.enhance.cache import (
    BAD,
    CHUNK,
    Cache,
    CachedItems,
    CachedShards,
    CachedView,
    Crop,
    Layer,
    count_images,
)
from llava_genhancer.enhance.enhancer import Enhancer
from llava_genhancer.enhance.targets import Target
from llava_genhancer.errors import InputError
from llava_genhancer.recipes import Recipe

log = logging.getLogger(__name__)
DECODER_PARTS = ("decoder.", "post_quant_conv.")  # encoding never asks them


def open_cache(
    recipe: Recipe, stage: int, folder: Path, source: Source, target: Target, enhancer: Enhancer, device: torch.device
) -> Cache:
    """The cache that a stage trains on, written as far as it is not there yet; every rank writes its share.

    Args:
        folder: ``recipe.cache_folder``, or the run's own.
        enhancer: at the stage's beginning; its backbone goes to ``device``, where ``target`` is already.

    Raises:
        InputError: the disk is too small, too many images cannot be used, or another process is writing there.
    """
    backbone = enhancer.backbone.to(device).eval()
    crop = Crop(TrainView(backbone.image_size, recipe.crop_scale, recipe.crop_ratio), recipe.seed, recipe.cache_crops)
    half = recipe.precision == "bf16"

    def tokens(images: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
            return enhancer.tokens(backbone.normalise(images)).float()

    common = {"format": 1, "data": fingerprint(source), "seed": recipe.seed, "crops": recipe.cache_crops}
    common |= {"crop_scale": recipe.crop_scale, "crop_ratio": recipe.crop_ratio, "dtype": recipe.cache_dtype}
    common |= {"image_size": backbone.image_size, "units": _units(source)}
    targets = {"weights": encoder_hash(target), "posterior": recipe.vae_posterior, "target_size": recipe.target_size}
    encoders: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, Any]]] = {"targets": (target.moments, targets)}
    if frozen_backbone(recipe, stage):
        statistics = (*backbone.image_mean, *backbone.image_std)
        facts = {"weights": weights_hash(backbone.state_dict()), "statistics": statistics}
        encoders["tokens"] = (tokens, {**facts, "precision": recipe.precision, "condition": recipe.condition})
    key, image = source.first(1)[0]
    example = crop(image, key, 0)[None].to(device)
    layers, encode = {}, {}
    for name, (encoder, own) in encoders.items():
        record = encoder(example)[0]
        dtype = getattr(torch, recipe.cache_dtype) if record.is_floating_point() else torch.int32
        stated = {**common, **own, "shape": tuple(record.shape)}
        digest = hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()[:16]
        layers[name] = Layer(folder / f"{name}-{digest}", tuple(record.shape), dtype, crop.count)
        encode[name] = encoder
        layers[name].folder.mkdir(parents=True, exist_ok=True)
        if int(os.environ.get("RANK", "0")) == 0:
            run.write_json(layers[name].folder / "facts.json", stated)
    _fill(recipe, source, crop, layers, encode, device)
    backbone.train()
    pixels = "tokens" not in layers
    cached: Source = (
        CachedShards(source, layers["targets"], pixels)
        if isinstance(source, ShardSource)
        else IndexedSource(len(source), CachedItems(source))
    )
    return Cache(cached, CachedView(layers, crop, pixels))


def weights_hash(state: dict[str, Tensor]) -> str:
    """A hash of names, dtypes and bits."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def encoder_hash(target: Any) -> str:
    """Of the weights that :meth:`Target.moments` reads."""
    state = target.module.state_dict()
    return weights_hash({n: v for n, v in state.items() if not n.startswith(DECODER_PARTS)})


def _units(source: Source) -> int:
    return len(source) if isinstance(source, ShardSource) else -(-len(source) // CHUNK)


def _read_unit(source: Source, unit: int) -> Iterator[RawSample]:
    if isinstance(source, ShardSource):
        return source.read(unit)
    return map(source.get, range(unit * CHUNK, min((unit + 1) * CHUNK, len(source))))


@dataclass
class _Rows:
    """Some samples of a unit in order: keys, reasons of the bad, and the K crops of the good (n, K, 3, H, W)."""

    unit: int
    keys: list[str]
    bad: dict[int, str]
    crops: list[Tensor]
    last: bool


class _Crops(IterableDataset):
    """All crops of all images of some units; with several workers each takes whole units."""

    def __init__(self, source: Source, units: list[int], crop: Crop, size: int):
        self.source, self.units, self.crop, self.size = source, units, crop, size

    def __iter__(self) -> Iterator[_Rows]:
        worker = get_worker_info()
        for unit in self.units[worker.id :: worker.num_workers] if worker else self.units:
            rows = _Rows(unit, [], {}, [], last=False)
            for sample in _read_unit(self.source, unit):
                try:
                    image = sample.image()
                    rows.crops.append(torch.stack([self.crop(image, sample.key, k) for k in range(self.crop.count)]))
                except BadImage as error:
                    rows.bad[len(rows.keys)] = str(error)
                rows.keys.append(sample.key)
                if len(rows.keys) == self.size:
                    yield rows
                    rows = _Rows(unit, [], {}, [], last=False)
            rows.last = True
            yield rows


def _fill(
    recipe: Recipe,
    source: Source,
    crop: Crop,
    layers: dict[str, Layer],
    encode: dict[str, Callable[[Tensor], Tensor]],
    device: torch.device,
) -> None:
    """Write the units that are missing: this rank's share, then wait for the others'."""
    from tqdm import tqdm

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    missing = {name: [u for u in range(_units(source)) if not layer.whole(u)] for name, layer in layers.items()}
    wanted = sorted(set().union(*missing.values()))
    if not wanted:
        return
    with contextlib.ExitStack() as stack:
        if rank == 0:
            for layer in layers.values():
                stack.enter_context(run.exclusive(layer.folder))
            _check_disk(source, layers, missing)
        units = [u for u in wanted if u % world == rank]  # whatever the others have written meanwhile
        # Images, not crops, per batch: one encoder call takes about a training batch.
        size = max(1, recipe.per_device_batch_size // crop.count)
        loader = DataLoader(
            _Crops(source, units, crop, size),
            batch_size=None,
            num_workers=min(recipe.num_workers, len(units)),
            worker_init_fn=start_worker if recipe.num_workers and units else None,
            generator=torch.Generator(),  # not the global RNG, which training draws from
        )
        writers: dict[tuple[str, int], _Writer] = {}
        bar = stack.enter_context(tqdm(total=len(units), desc="cache", unit="unit", disable=True if rank else None))
        read = bad = 0
        for rows in loader:
            read, bad = read + len(rows.keys), bad + len(rows.bad)
            if read >= MIN_READ and bad > recipe.max_bad_fraction * read:
                raise InputError(
                    f"data: {bad} of the first {read} images cannot be used ({next(iter(rows.bad.values()), '...')}): "
                    "fix the data, or raise --max_bad_fraction"
                )
            images = torch.cat(rows.crops).to(device) if rows.crops else None
            for name, layer in layers.items():
                if rows.unit in missing[name]:
                    if (name, rows.unit) not in writers:
                        writers[name, rows.unit] = _Writer(layer, rows.unit)
                    writers[name, rows.unit].add(rows, None if images is None else encode[name](images))
                    if rows.last:
                        writers.pop((name, rows.unit)).finish()
            bar.update(rows.last)
        # Files, not a collective: a share may take longer than a collective may wait.
        others = [(layer, u) for name, layer in layers.items() for u in missing[name] if u % world != rank]
        while not all(layer.whole(u) for layer, u in others):
            time.sleep(1)


class _Writer:
    """One unit of one layer on its way to the disk."""

    def __init__(self, layer: Layer, unit: int):
        self.layer, self.unit = layer, unit
        self.keys: list[str] = []
        self.bad: dict[int, str] = {}
        self.file: BinaryIO = open(layer.file(unit, ".partial"), "wb")  # noqa: SIM115 - held open between batches

    def add(self, rows: _Rows, numbers: Tensor | None) -> None:
        """Append samples; ``numbers`` (n K, *shape) are the good ones'."""
        size = self.layer.crops * self.layer.record_bytes
        good = b"" if numbers is None else self.layer.bytes_of(numbers)
        for i in range(len(rows.keys)):
            record = bytes([BAD]) * size if i in rows.bad else good[:size]
            good = good if i in rows.bad else good[size:]
            self.file.write(record)
        self.bad |= {len(self.keys) + i: why for i, why in rows.bad.items()}
        self.keys += rows.keys

    def finish(self) -> None:
        """Let the unit count."""
        with self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
        os.replace(self.layer.file(self.unit, ".partial"), self.layer.file(self.unit, ".bin"))
        run.write_json(self.layer.file(self.unit, ".json"), {"keys": self.keys, "bad": self.bad})


def _check_disk(source: Source, layers: dict[str, Layer], missing: dict[str, list[int]]) -> None:
    """Say what will be written, and refuse what cannot fit."""
    images, units = count_images(source), _units(source)
    need = 0.0
    for name, layer in layers.items():
        records = Records(layer.crops, layer.record_bytes)
        size = records.size(images) * len(missing[name]) / units
        need += size
        still = f"{size / GIB:.2f} GiB still to write in {layer.folder}"
        log.info("cache of %s: %s; %s", name, records.told(images), still)
    folder = layers["targets"].folder
    free = machine.free_bytes(folder)
    if need > free:
        raise InputError(
            f"the cache needs {need / GIB:.1f} GiB and {folder.parent} has {free / GIB:.1f} GiB free: choose "
            "--cache_folder on another disk, fewer --cache_crops, or --cache_crops 0"
        )
