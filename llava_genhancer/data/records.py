"""Records of frozen work on disk: one per sample and view, in files that count only when whole.

    FOLDER/facts.json  what the folder's name is the hash of
    FOLDER/00012.bin   records of unit 12 in reading order, the K views of a sample side by side, a CRC-32 after each
    FOLDER/00012.json  written last: the unit counts from then on

A unit is a tar shard, or ``CHUNK`` items of a source that is read by number. This file reads; records_fill.py writes.
Records are read, not mapped into memory: a file that shrinks under a mapping ends the process without a word.

Legend: B batch, K views (crops) of an image.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_genhancer import run
from llava_genhancer.data.decode import BadImage
from llava_genhancer.data.images import RawSample, ShardSource, Source
from llava_genhancer.errors import InputError

CHUNK = 1024  # items of an indexed source in one unit
BAD = 0xFF  # every byte of a record whose image cannot be used: NaN, or the id -1
CHECK_BYTES = 4  # of a CRC-32


@dataclass(frozen=True)
class Layer:
    """Records of one kind, one per sample and crop, in a file per unit.

    Attributes:
        folder: where; its name ends in the hash of what the records depend on.
        shape: of one crop's record.
        dtype: of its numbers on disk.
        crops: K.
        image_sizes: the CRC-32 after each record is of the record and of its image's size in bytes too.
    """

    folder: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    crops: int
    image_sizes: bool = False

    @property
    def record_bytes(self) -> int:
        """Bytes of one crop's record."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize

    @property
    def stored_bytes(self) -> int:
        """Bytes of one crop's record and its CRC-32 on disk."""
        return self.record_bytes + CHECK_BYTES

    def file(self, unit: int, suffix: str) -> Path:
        """``.bin``: the records; ``.json``: keys and bad samples."""
        return self.folder / f"{unit:05}{suffix}"

    def whole(self, unit: int) -> bool:
        """Whether a unit's records are all there."""
        try:
            samples = len(run.read_json(self.file(unit, ".json"))["keys"])
            return self.file(unit, ".bin").stat().st_size == samples * self.crops * self.stored_bytes
        except (InputError, OSError, KeyError, TypeError):
            return False

    def read(self, unit: int, position: int, crop: int, image_bytes: int = 0) -> Tensor:
        """The bytes of a record, uint8 (record_bytes,).

        Args:
            image_bytes: the size of the image now, which counts where the layer has ``image_sizes``.

        Raises:
            BadImage: the sample could not be used when the cache was written.
            InputError: the record is damaged, or its image has another size than when the record was written.
        """
        path = self.file(unit, ".bin")
        with open(path, "rb", buffering=0) as file:
            file.seek((position * self.crops + crop) * self.stored_bytes)
            stored = bytearray(file.read(self.stored_bytes))
        data = stored[: self.record_bytes]
        bad = data.count(BAD) == len(data)
        if stored != data + self.check(data, 0 if bad else image_bytes):
            replaced = ", or its image was replaced" * self.image_sizes
            raise InputError(
                f"{path}: record {position} is damaged{replaced}: remove the file, then repeat the command"
            )
        if bad:
            raise BadImage(run.read_json(self.file(unit, ".json"))["bad"].get(str(position), "damaged cache"))
        return torch.frombuffer(data, dtype=torch.uint8)

    def check(self, record: bytes | bytearray | memoryview, image_bytes: int) -> bytes:
        """The CRC-32 that follows a record on disk."""
        start = image_bytes & 0xFFFFFFFF if self.image_sizes else 0
        return zlib.crc32(record, start).to_bytes(CHECK_BYTES, "little")

    def numbers(self, records: Tensor) -> Tensor:
        """Records' bytes (B, record_bytes) as numbers (B, *shape): fp32, or long ids."""
        numbers = records.contiguous().view(self.dtype).view(-1, *self.shape)
        return numbers.float() if self.dtype.is_floating_point else numbers.long()

    def bytes_of(self, numbers: Tensor) -> bytes:
        """The inverse for (n, *shape)."""
        return numbers.to("cpu", self.dtype).contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def count_images(source: Source) -> int:
    """Images of a source; of tar shards without statistics an estimate from the first one and the sizes of all."""
    return source.estimate()


def units_of(source: Source) -> int:
    """In how many units a source is read."""
    return len(source) if isinstance(source, ShardSource) else -(-len(source) // CHUNK)


def read_unit(source: Source, unit: int) -> Iterator[RawSample]:
    """The samples of a unit in order."""
    if isinstance(source, ShardSource):
        return source.read(unit)
    return map(source.get, range(unit * CHUNK, min((unit + 1) * CHUNK, len(source))))


def open_layer(folder: Path, name: str, facts: dict[str, Any], dtype: torch.dtype, crops: int, **options: Any) -> Layer:
    """Open the layer of ``folder`` with these ``facts``, one of them the ``shape``; rank 0 writes ``facts.json``."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    layer = Layer(folder / f"{name}-{digest}", tuple(facts["shape"]), dtype, crops, **options)
    layer.folder.mkdir(parents=True, exist_ok=True)
    if int(os.environ.get("RANK", "0")) == 0 and not (layer.folder / "facts.json").exists():
        run.write_json(layer.folder / "facts.json", facts)
    return layer


def weights_hash(state: dict[str, Tensor]) -> str:
    """A hash of names, dtypes and bits."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
