"""Endless, resumable batches: which reader gets which sample, in which order, and what was skipped.

Readers are all data workers of all ranks. In an epoch every sample goes to exactly one reader: whole shards where there
are at least as many shards as readers, every n-th sample otherwise. Each reader goes through its epochs on its own, so
no rank ever waits or runs dry. The state is a handful of integers per reader; going on costs reading at most the shard
that was open, plus the block that was being filled.
"""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from llava_genhancer.data.decode import BadImage
from llava_genhancer.data.images import ParquetSource, RawSample, ShardSource, Source
from llava_genhancer.data.order import TABLE, Computed, sample_seed, shuffled
from llava_genhancer.errors import InputError

MIN_READ = 50  # images read by one reader before the share of bad ones is judged
KEPT_KEYS = 100
MAX_DAMAGED = 3  # shards of a reader that may be damaged, where nobody counted what they held; or max_bad_fraction


@dataclass
class SkipReport:
    """What was read and what was skipped.

    Attributes:
        read: images looked at. skipped: of them, not usable.
        by_reason: counts. keys: (key, reason) of the first hundred, each once.
    """

    read: int = 0
    skipped: int = 0
    by_reason: dict[str, int] = field(default_factory=dict)
    keys: list[tuple[str, str]] = field(default_factory=list)

    def add(self, key: str, reason: str) -> None:
        """Count one skipped image."""
        self.skipped += 1
        self.by_reason[reason] = self.by_reason.get(reason, 0) + 1
        if len(self.keys) < KEPT_KEYS and (key, reason) not in self.keys:
            self.keys.append((key, reason))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "keys": [list(k) for k in self.keys]}


class ImageStream(IterableDataset):
    """One reader's endless stream of ``{"image", "key", "read", "skipped"}``; use :func:`build_loader`."""

    def __init__(
        self,
        source: Source,
        view: Callable[[Image.Image, int], Tensor],
        *,
        seed: int,
        rank: int,
        world_size: int,
        num_workers: int,
        shuffle_block: int,
        max_bad_fraction: float,
    ):
        self.source, self.view, self.seed = source, view, seed
        self.rank, self.world_size, self.num_workers = rank, world_size, max(num_workers, 1)
        self.shuffle_block, self.max_bad_fraction = shuffle_block, max_bad_fraction
        self.epoch = 0  # passes over this reader's share
        self.unit = 0  # shards finished before the current block, or items taken, this epoch
        self.offset = 0  # samples of the open shard that belong to earlier blocks
        self.block = 0  # blocks finished this epoch
        self.position = 0  # samples of the current block already given
        self.read = self.bad = 0
        self.damaged = 0  # shards of this epoch that are damaged and have no statistics
        # Whether the order of items is computed; part of the state, as it was a table for any number of them once.
        self.computed = int(not isinstance(source, ShardSource) and len(source) > TABLE)

    def state_dict(self) -> dict[str, int]:
        """Where this reader stands."""
        names = ("epoch", "unit", "offset", "block", "position", "read", "bad", "computed", "damaged")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        for name, value in {"computed": 0, "damaged": 0, **state}.items():
            setattr(self, name, value)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        reader = self.rank * self.num_workers + (worker.id if worker else 0)
        readers = self.world_size * self.num_workers
        share = self._shards if isinstance(self.source, ShardSource) else self._items
        skipped: list[tuple[str, str]] = []
        read = 0
        while True:
            given = self.position > 0 or self.unit > 0 or self.offset > 0  # resumed mid-epoch: cannot be empty
            epoch = self.epoch
            for sample in share(reader, readers):
                self.read += 1
                read += 1
                try:
                    image = self.view(sample.image(), sample_seed(self.seed, epoch, sample.key))
                except BadImage as error:
                    self.bad += 1
                    skipped.append((sample.key, str(error)))
                    if self.read >= MIN_READ and self.bad > self.max_bad_fraction * self.read:
                        yield self._problem(f"{self.bad} of the first {self.read} images cannot be used", skipped)
                        return
                    if isinstance(self.source, ShardSource) and sample.is_damaged_shard:
                        self.damaged += 1
                        shards = len(self._mine(reader, readers))
                        if self.damaged > max(MAX_DAMAGED, self.max_bad_fraction * shards):
                            what = f"{self.damaged} of {shards} shards are damaged, with an unknown number of images"
                            yield self._problem(what, skipped)
                            return
                    continue
                given = True
                yield {"image": image, "key": sample.key, "read": read, "skipped": skipped}
                skipped, read = [], 0
            if not given:
                share_text = f"reader {reader + 1} of {readers}" if readers > 1 else "the data"
                yield self._problem(f"{share_text} found no usable image in a whole pass", skipped)
                return
            self.epoch, self.unit, self.offset, self.block, self.position = epoch + 1, 0, 0, 0, 0
            self.damaged = 0

    def _problem(self, what: str, skipped: list[tuple[str, str]]) -> dict[str, Any]:
        """Return an error as a sample, with which the loader's iteration ends in an InputError."""
        last = "; ".join(f"{key}: {reason}" for key, reason in skipped[-3:])
        advice = "fix the data, use fewer --num_workers, or raise --max_bad_fraction"
        return {"problem": f"{what} ({last or 'nothing read'}): {advice}"}

    def _items(self, reader: int, readers: int) -> Iterator[RawSample]:
        """This reader's items of the epoch, by number."""
        assert not isinstance(self.source, ShardSource)
        count = len(self.source)
        order = (Computed if self.computed else shuffled)(count, self.seed, self.epoch)
        places = range(reader, count, readers)
        while self.unit < len(places):
            self.unit += 1
            yield self.source.get(int(order[places[self.unit - 1]]))

    def _shards(self, reader: int, readers: int) -> Iterator[RawSample]:
        """This reader's samples of the epoch, in shuffled blocks of sequentially read shards."""
        while True:
            block, unit, offset = self._next_block(reader, readers)
            if not block:
                return
            order = shuffled(len(block), self.seed, self.epoch, reader, self.block).tolist()
            for i in range(self.position, len(order)):
                self.position = i + 1
                yield block[order[i]]
            self.unit, self.offset, self.block, self.position = unit, offset, self.block + 1, 0

    def _mine(self, reader: int, readers: int) -> range:
        """The places in the epoch's order whose shards this reader opens: all where there are fewer than readers."""
        count = len(self.source)
        return range(count) if count < readers else range(reader, count, readers)

    def _next_block(self, reader: int, readers: int) -> tuple[list[RawSample], int, int]:
        """The samples after ``unit``/``offset``, and the ``unit``/``offset`` after them."""
        assert isinstance(self.source, ShardSource)
        order = shuffled(len(self.source), self.seed, self.epoch).tolist()
        strided = len(order) < readers
        shards = [order[place] for place in self._mine(reader, readers)]
        block: list[RawSample] = []
        unit, offset = self.unit, self.offset
        while unit < len(shards):
            taken = 0
            for number, sample in enumerate(self.source.read(shards[unit])):
                if strided and (number + unit) % readers != reader:  # + unit: shards of one sample reach everyone
                    continue
                taken += 1
                if taken <= offset:
                    continue
                block.append(sample)
                if len(block) == self.shuffle_block:
                    return block, unit, taken
            unit, offset = unit + 1, 0
        return block, unit, 0


def _collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    for sample in samples:
        if "problem" in sample:
            return sample
    return {
        "images": default_collate([s["image"] for s in samples]),
        "keys": [s["key"] for s in samples],
        "read": sum(s["read"] for s in samples),
        "skipped": [pair for s in samples for pair in s["skipped"]],
    }


def start_worker(worker: int) -> None:
    """Prepare a data worker: one thread, and deaf to all but the process that started it.

    Stops are the trainer's business: a worker that dies of Ctrl-C, or of the SIGTERM that a launcher sends to every
    process of a job, would take its rank down before it can save. The SIGTERM with which the interpreter of its own
    process ends it is another matter, as that one waits for its end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # which says who sent it; without it SIGTERM ends a worker
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)


def _end_when_told(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)  # any other status would be an accident to torch


def end_workers(batches: Any) -> None:
    """End the workers behind a DataLoader's iterator now."""
    if hasattr(batches, "_shutdown_workers"):  # only the iterators with workers have it
        batches._shutdown_workers()


def batches_of(iterator: Any) -> Iterator[dict[str, Any]]:
    """The batches of a DataLoader's iterator.

    A worker that is killed while it hands a batch over shows as whatever the broken connection says; it is told as
    torch tells it elsewhere.
    """
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except (ConnectionError, EOFError, FileNotFoundError) as error:
            raise RuntimeError(f"DataLoader worker is gone: {type(error).__name__}") from error
        yield batch


class ImageLoader:
    """Endless batches ``{"images": uint8 (B, 3, H, W), "keys": list[str]}`` with an exact state."""

    def __init__(self, stream: ImageStream, batch_size: int, num_workers: int, seed: int):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchdata calls a function that torch is about to drop
            self._loader = StatefulDataLoader(
                stream,
                batch_size=batch_size,
                num_workers=num_workers,
                collate_fn=_collate,
                worker_init_fn=start_worker if num_workers else None,
                generator=torch.Generator().manual_seed(seed),  # not the global RNG: noise is drawn from that
                pin_memory=torch.cuda.is_available(),
            )
        self._batches: Any = None
        self._report = SkipReport()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Batches for ever.

        Raises:
            InputError: too many bad images, or a reader's share holds none at all.
        """
        self._batches = iter(self._loader)
        for batch in batches_of(self._batches):
            if "problem" in batch:
                raise InputError(f"data: {batch['problem']}")
            self._report.read += int(batch.pop("read"))
            for key, reason in batch.pop("skipped"):
                self._report.add(key, reason)
            yield batch

    def close(self) -> None:
        """End the workers."""
        end_workers(self._batches)

    def report(self) -> SkipReport:
        """What the batches given so far took, over all starts of the run."""
        return self._report

    def state_dict(self) -> dict[str, Any]:
        """The state after the last batch given; batches that workers prepared ahead do not count."""
        return {"loader": self._loader.state_dict(), "report": self._report.to_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batch at which ``state`` was taken."""
        self._loader.load_state_dict(state["loader"])
        report = state["report"]
        self._report = SkipReport(**{**report, "keys": [(k, r) for k, r in report["keys"]]})


def check_readers(source: Source, *, num_workers: int, world_size: int, sharding: str) -> None:
    """Refuse a set so small that some reader would go without; tar shards show their number of images on reading only.

    Raises:
        InputError: fewer images than readers.
    """
    readers = max(num_workers, 1) * (1 if sharding == "replicated" else world_size)
    images = source.estimate() if not isinstance(source, ShardSource) or isinstance(source, ParquetSource) else readers
    if images < readers:
        raise InputError(
            f"data: {images} images cannot be shared among {readers} readers (ranks x num_workers): "
            "lower --num_workers or add images"
        )


def build_loader(
    source: Source,
    view: Callable[[Image.Image, int], Tensor],
    *,
    batch_size: int,
    num_workers: int = 0,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    sharding: Literal["disjoint", "replicated"] = "disjoint",
    shuffle_block: int = 1000,
    max_bad_fraction: float = 0.1,
) -> ImageLoader:
    """Batches of augmented images for one rank.

    Args:
        source: from :func:`llava_genhancer.data.images.open_source`.
        view: image and seed to a uint8 tensor; the seed depends on ``seed``, epoch and key alone.
        sharding: "disjoint" gives each rank its own part; "replicated" gives every rank the same samples in the same
            order, as the reference does.
        shuffle_block: samples shuffled together when reading shards; their undecoded bytes are held in memory.
        max_bad_fraction: share of unusable images above which iteration ends with an InputError.
    """
    if sharding == "replicated":
        rank, world_size = 0, 1
    stream = ImageStream(
        source,
        view,
        seed=seed,
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
        shuffle_block=shuffle_block,
        max_bad_fraction=max_bad_fraction,
    )
    return ImageLoader(stream, batch_size, num_workers, seed)
