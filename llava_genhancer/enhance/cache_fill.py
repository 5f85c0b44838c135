"""Which cache a training of the method reads (see cache.py): keys, encoders, the disk it takes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_genhancer.costs import GIB, Records
from llava_genhancer.data.images import IndexedSource, ShardSource, Source, fingerprint
from llava_genhancer.data.records import Layer, count_images, open_layer, units_of, weights_hash
from llava_genhancer.data.records_fill import check_disk, fill
from llava_genhancer.data.views import TrainView
from llava_genhancer.enhance.cache import Cache, CachedItems, CachedShards, CachedView, Crop
from llava_genhancer.enhance.enhancer import Enhancer
from llava_genhancer.enhance.tokenizer import Target
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

    common = {"format": 2, "data": fingerprint(source), "seed": recipe.seed, "crops": recipe.cache_crops}
    common |= {"crop_scale": recipe.crop_scale, "crop_ratio": recipe.crop_ratio, "dtype": recipe.cache_dtype}
    common |= {"image_size": backbone.image_size, "units": units_of(source)}
    targets = {"weights": encoder_hash(target), "posterior": recipe.vae_posterior, "target_size": recipe.target_size}
    encoders: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, Any]]] = {"targets": (target.moments, targets)}
    if recipe.frozen_backbone(stage):
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
        layers[name] = open_layer(folder, name, stated, dtype, crop.count)
        encode[name] = encoder
    fill(
        source,
        crop.all,
        layers,
        encode,
        device,
        announce=lambda missing: _check_disk(source, layers, missing),
        # Images, not crops, per batch: one encoder call takes about a training batch.
        batch_size=max(1, recipe.per_device_batch_size // crop.count),
        num_workers=recipe.num_workers,
        max_bad_fraction=recipe.max_bad_fraction,
        timeout_minutes=recipe.timeout_minutes,
    )
    backbone.train()
    pixels = "tokens" not in layers
    cached: Source = (
        CachedShards(source, layers["targets"], pixels)
        if isinstance(source, ShardSource)
        else IndexedSource(len(source), CachedItems(source))
    )
    return Cache(cached, CachedView(layers, crop, pixels))


def encoder_hash(target: Any) -> str:
    """Of the weights that :meth:`Target.moments` reads."""
    state = target.module.state_dict()
    return weights_hash({n: v for n, v in state.items() if not n.startswith(DECODER_PARTS)})


def _check_disk(source: Source, layers: dict[str, Layer], missing: dict[str, list[int]]) -> None:
    """Say what will be written, and refuse what cannot fit."""
    images, units = count_images(source), units_of(source)
    need = 0.0
    for name, layer in layers.items():
        records = Records(layer.crops, layer.record_bytes)
        size = records.size(images) * len(missing[name]) / units
        need += size
        still = f"{size / GIB:.2f} GiB still to write in {layer.folder}"
        log.info("cache of %s: %s; %s", name, records.told(images), still)
    check_disk(layers["targets"].folder, need, "fewer --cache_crops, --cache_crops 0 for none")
