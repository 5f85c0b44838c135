"""Writing records of frozen work (see records.py): each rank its share of the units, data workers, whole units only."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from llava_genhancer import machine, run
from llava_genhancer.data.decode import BadImage
from llava_genhancer.data.images import Source
from llava_genhancer.data.loader import MIN_READ, start_worker
from llava_genhancer.data.records import BAD, Layer, read_unit, units_of
from llava_genhancer.errors import InputError


@dataclass
class _Rows:
    """Some samples of a unit in order: keys, bytes of the images, reasons of the bad, views of the good (K, ...)."""

    unit: int
    keys: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    bad: dict[int, str] = field(default_factory=dict)
    views: list[Tensor] = field(default_factory=list)
    last: bool = False


class _Views(IterableDataset):
    """All views of all images of some units; with several workers each takes whole units."""

    def __init__(self, source: Source, units: list[int], view: Callable[[Image.Image, str], Tensor], size: int):
        self.source, self.units, self.view, self.size = source, units, view, size

    def __iter__(self) -> Iterator[_Rows]:
        worker = get_worker_info()
        for unit in self.units[worker.id :: worker.num_workers] if worker else self.units:
            rows = _Rows(unit)
            for sample in read_unit(self.source, unit):
                try:
                    rows.views.append(self.view(sample.image(), sample.key))
                except BadImage as error:
                    rows.bad[len(rows.keys)] = str(error)
                rows.keys.append(sample.key)
                rows.sizes.append(0 if len(rows.keys) - 1 in rows.bad else _size(sample.data))
                if len(rows.keys) == self.size:
                    yield rows
                    rows = _Rows(unit)
            rows.last = True
            yield rows


def _size(data: bytes | str | None) -> int:
    return os.path.getsize(data) if isinstance(data, str) else len(data or b"")


def _missing(source: Source, layers: Mapping[str, Layer]) -> dict[str, list[int]]:
    """The units that each layer lacks."""
    return {name: [u for u in range(units_of(source)) if not layer.whole(u)] for name, layer in layers.items()}


def fill(
    source: Source,
    view: Callable[[Image.Image, str], Tensor],
    layers: Mapping[str, Layer],
    encode: Mapping[str, Callable[[Tensor], Tensor]],
    device: torch.device,
    *,
    announce: Callable[[dict[str, list[int]]], None],
    batch_size: int,
    num_workers: int,
    max_bad_fraction: float,
) -> None:
    """Write the units that are missing: this rank's share, then wait for the others'.

    Args:
        view: an image and its key to its K views (K, ...).
        encode: by the layer's name, views (n K, ...) on ``device`` to records (n K, *shape).
        announce: called on rank 0 with the numbers of missing units by layer, if there are any; may refuse.
        batch_size: images, not views, per batch.

    Raises:
        InputError: too many images cannot be used, or another process is writing there.
    """
    from tqdm import tqdm

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    missing = _missing(source, layers)
    wanted = sorted(set().union(*missing.values()))
    if not wanted:
        return
    with contextlib.ExitStack() as stack:
        if rank == 0:
            for layer in layers.values():
                stack.enter_context(run.exclusive(layer.folder))
            announce(missing)
        units = [u for u in wanted if u % world == rank]  # whatever the others have written meanwhile
        loader = DataLoader(
            _Views(source, units, view, batch_size),
            batch_size=None,
            num_workers=min(num_workers, len(units)),
            worker_init_fn=start_worker if num_workers and units else None,
            generator=torch.Generator(),  # not the global RNG, which training draws from
        )
        writers: dict[tuple[str, int], _Writer] = {}
        bar = stack.enter_context(tqdm(total=len(units), desc="cache", unit="unit", disable=True if rank else None))
        read = bad = 0
        for rows in loader:
            read, bad = read + len(rows.keys), bad + len(rows.bad)
            if read >= MIN_READ and bad > max_bad_fraction * read:
                raise InputError(
                    f"data: {bad} of the first {read} images cannot be used ({next(iter(rows.bad.values()), '...')}): "
                    "fix the data, or raise --max_bad_fraction"
                )
            views = torch.cat(rows.views).to(device) if rows.views else None
            for name, layer in layers.items():
                if rows.unit in missing[name]:
                    if (name, rows.unit) not in writers:
                        writers[name, rows.unit] = _Writer(layer, rows.unit)
                    writers[name, rows.unit].add(rows, None if views is None else encode[name](views))
                    if rows.last:
                        writers.pop((name, rows.unit)).finish()
            bar.update(rows.last)
        # Files, not a collective: a share may take longer than a collective may wait.
        others = [(layer, u) for name, layer in layers.items() for u in missing[name] if u % world != rank]
        while not all(layer.whole(u) for layer, u in others):
            time.sleep(1)


def check_disk(folder: Path, need: float, otherwise: str) -> None:
    """Refuse a cache that cannot fit.

    Args:
        need: bytes still to write.
        otherwise: the option that does without.

    Raises:
        InputError: with what is needed and what is free.
    """
    free, gib = machine.free_bytes(folder), 2.0**30
    if need > free:
        raise InputError(
            f"the cache needs {need / gib:.1f} GiB and {folder.parent} has {free / gib:.1f} GiB free: choose "
            f"--cache_folder on another disk, or {otherwise}"
        )


class _Writer:
    """One unit of one layer on its way to the disk."""

    def __init__(self, layer: Layer, unit: int):
        self.layer, self.unit = layer, unit
        self.keys: list[str] = []
        self.bad: dict[int, str] = {}
        self.file: BinaryIO = open(layer.file(unit, ".partial"), "wb")  # noqa: SIM115 - held open between batches

    def add(self, rows: _Rows, numbers: Tensor | None) -> None:
        """Append samples; ``numbers`` (n K, *shape) are the good ones'."""
        crops, size = self.layer.crops, self.layer.record_bytes
        good = memoryview(b"" if numbers is None else self.layer.bytes_of(numbers))
        for i, image_bytes in enumerate(rows.sizes):
            for _ in range(crops):
                record = bytes([BAD]) * size if i in rows.bad else good[:size]
                good = good if i in rows.bad else good[size:]
                self.file.write(record)
                self.file.write(self.layer.check(record, image_bytes))
        self.bad |= {len(self.keys) + i: why for i, why in rows.bad.items()}
        self.keys += rows.keys

    def finish(self) -> None:
        """Let the unit count."""
        with self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
        os.replace(self.layer.file(self.unit, ".partial"), self.layer.file(self.unit, ".bin"))
        run.write_json(self.layer.file(self.unit, ".json"), {"keys": self.keys, "bad": self.bad})
