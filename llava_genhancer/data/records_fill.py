"""Writing records of frozen work (see records.py): each rank its share of the units, data workers, whole units only.

Rank 0 takes the locks of all layers before any rank opens a file. Afterwards the ranks leave notes in the first layer's
folder, which all of them can read: a collective may not wait as long as a rank may need for its share.

    FOLDER/.start.json    rank 0 holds the locks; the other ranks may write
    FOLDER/.rank-3.json   what rank 3 is doing, while it writes
    FOLDER/.failed.json   why a rank of this fill gave up: all others then end with the same error
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from llava_genhancer import files, machine, run
from llava_genhancer.data.decode import BadImage
from llava_genhancer.data.images import Source
from llava_genhancer.data.loader import MIN_READ, start_worker
from llava_genhancer.data.records import BAD, Layer, read_unit, units_of
from llava_genhancer.errors import InputError, reason


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
    timeout_minutes: float = 30.0,
) -> None:
    """Write the units that are missing: this rank's share, then wait for the others'.

    Args:
        view: an image and its key to its K views (K, ...).
        encode: by the layer's name, views (n K, ...) on ``device`` to records (n K, *shape).
        announce: called on rank 0 with the numbers of missing units by layer, if there are any; may refuse.
        batch_size: images, not views, per batch.
        timeout_minutes: how long a rank waits for others that make no progress.

    Raises:
        InputError: on all ranks, if on one of them: too many images cannot be used, another run is writing there, or a
            rank has ended or makes no progress.
    """
    from tqdm import tqdm

    ranks = _Ranks(next(iter(layers.values())).folder, 60 * timeout_minutes)
    rank, world = ranks.rank, ranks.world
    with contextlib.ExitStack() as stack:
        missing = _begin(source, layers, announce, ranks, stack)
        wanted = sorted(set().union(*missing.values()))
        if not wanted:
            return
        stack.enter_context(ranks.sharing())
        units = [u for u in wanted if u % world == rank]
        loader = DataLoader(
            _Views(source, units, view, batch_size),
            batch_size=None,
            num_workers=min(num_workers, len(units)),
            worker_init_fn=start_worker if num_workers and units else None,
            generator=torch.Generator(),  # not the global RNG, which training draws from
        )
        writers: dict[tuple[str, int], _Writer] = {}
        stack.callback(_drop, writers)  # those that an error leaves behind
        bar = stack.enter_context(tqdm(total=len(units), desc="cache", unit="unit", disable=True if rank else None))
        read = bad = 0
        for rows in loader:
            ranks.note(f"writing unit {rows.unit}, image {len(rows.keys) + read}")
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
        others = [(layer, u) for name, layer in layers.items() for u in missing[name] if u % world != rank]
        while others := [(layer, u) for layer, u in others if not layer.whole(u)]:
            ranks.wait({u % world for _, u in others}, len(others))


def _begin(
    source: Source,
    layers: Mapping[str, Layer],
    announce: Callable[[dict[str, list[int]]], None],
    ranks: _Ranks,
    stack: contextlib.ExitStack,
) -> dict[str, list[int]]:
    """The missing units by layer, the same on all ranks; if there are any, rank 0 then holds the layers' locks."""
    error: Exception | None = None
    missing: dict[str, list[int]] = {}
    if ranks.rank == 0:
        try:
            missing = _missing(source, layers)
            if any(missing.values()):
                for layer in layers.values():
                    stack.enter_context(run.exclusive(layer.folder))
                missing = _missing(source, layers)  # another run may have written some before it gave the lock back
            if any(missing.values()):
                announce(missing)
                for layer in layers.values():
                    _remove_leftovers(layer)
                stack.enter_context(ranks.started())
        except Exception as caught:
            error = caught
    if ranks.grouped:
        shared: list[Any] = [missing, None if error is None else str(error) or repr(error)]
        dist.broadcast_object_list(shared, src=0)
        missing, refusal = shared
        if error is None and refusal is not None:
            error = InputError(refusal)
    if error is not None:
        raise error
    if ranks.rank > 0 and not ranks.grouped:
        while any((missing := _missing(source, layers)).values()) and not ranks.may_start():
            ranks.pause()
        if any(missing.values()):  # nothing tells this run from another one with as many ranks, but their locks
            stack.enter_context(run.exclusive(ranks.folder, f"{run.LOCK}-{ranks.rank}"))
    return missing


def _remove_leftovers(layer: Layer) -> None:
    """Remove what fills that were killed have left in a folder whose lock is held."""
    files.remove_leftovers(layer.folder)
    for path in (*layer.folder.glob("*.partial"), *layer.folder.glob(".rank-*.json"), layer.folder / ".failed.json"):
        path.unlink(missing_ok=True)


class _Ranks:
    """The ranks of a fill, and what they leave for each other in ``folder``.

    Args:
        folder: which all ranks can read and write.
        seconds: how long to wait for ranks that make no progress.
    """

    PAUSE = 1.0  # seconds between two looks at the folder

    def __init__(self, folder: Path, seconds: float):
        self.folder, self.seconds = folder, seconds
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.grouped = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._looked = 0.0
        self._progress: tuple[float, Any] = (time.monotonic(), None)

    @contextlib.contextmanager
    def started(self) -> Iterator[None]:
        """Let the other ranks write, on rank 0 while it holds the locks."""
        start = self.folder / ".start.json"
        self._write(start, world=self.world)
        try:
            yield
        finally:
            start.unlink(missing_ok=True)

    def may_start(self) -> bool:
        """Whether rank 0 holds the locks."""
        start = self._read(self.folder / ".start.json")
        if start is None or _ended(start):
            return False
        if start.get("world") != self.world:
            raise InputError(f"{self.folder} is in use by another process: wait for it, or choose another folder")
        return True

    @contextlib.contextmanager
    def sharing(self) -> Iterator[None]:
        """Around a rank's share: an error ends the other ranks too."""
        try:
            self.note("starting")
            yield
        except Exception as error:  # this rank's note stays: should the next line fail too, the others find no process
            why = str(error)
            if not isinstance(error, InputError):
                why = f"rank {self.rank} could not write its share of the cache: {reason(error)}"
            failed = self.folder / ".failed.json"
            if self.world > 1 and not failed.exists():  # else this rank only repeats another rank's error
                with contextlib.suppress(OSError):
                    self._write(failed, why=why)
            raise
        with contextlib.suppress(OSError):
            (self.folder / f".rank-{self.rank}.json").unlink(missing_ok=True)

    def note(self, doing: str) -> None:
        """Write down what this rank does now, once in a while.

        Raises:
            InputError: another rank has failed, with its error.
        """
        if self.world == 1 or time.monotonic() - self._looked < self.PAUSE:
            return
        self._looked = time.monotonic()
        self._write(self.folder / f".rank-{self.rank}.json", doing=doing)
        self._check()

    def _check(self) -> None:
        if (failed := self._read(self.folder / ".failed.json")) is not None:
            raise InputError(failed.get("why", "another rank has failed"))

    def pause(self) -> None:
        """Wait a moment for rank 0's leave to write.

        Raises:
            InputError: it has not come for too long.
        """
        time.sleep(self.PAUSE)
        if time.monotonic() - self._progress[0] > self.seconds:
            raise InputError(
                f"{self.folder}: rank 0 has not begun to write for {self.seconds / 60:g} minutes (--timeout_minutes): "
                "see its output, then repeat the command"
            )

    def wait(self, others: set[int], units: int) -> None:
        """Wait a moment for ``units`` units of some other ranks.

        Raises:
            InputError: one of them has failed or ended, or none has made progress for too long.
        """
        time.sleep(self.PAUSE)
        self.note(f"waiting for {units} units of other ranks")
        notes = {rank: self._read(self.folder / f".rank-{rank}.json") for rank in sorted(others)}
        for rank, note in notes.items():
            if note is not None and _ended(note):
                self._check()
                raise InputError(
                    f"rank {rank} (process {note.get('pid')} on {note.get('host')}) has ended and left {self.folder} "
                    "incomplete: see its output, then repeat the command, which goes on with the units that are missing"
                )
        now, state = time.monotonic(), (units, notes)
        if state != self._progress[1]:
            self._progress = (now, state)
        elif now - self._progress[0] > self.seconds:
            doing = "; ".join(
                f"rank {rank}: {note.get('doing') if note else 'has left no note'}" for rank, note in notes.items()
            )
            raise InputError(
                f"{self.folder}: no progress for {self.seconds / 60:g} minutes (--timeout_minutes) while rank "
                f"{self.rank} waited for {units} units of other ranks ({doing}): see their output, then repeat the "
                "command, which goes on with the units that are missing"
            )

    def _write(self, path: Path, **facts: Any) -> None:
        run.write_json(
            path,
            {"process": str(files.Process.current()), "host": socket.gethostname(), "pid": os.getpid(), **facts},
        )

    def _read(self, path: Path) -> dict[str, Any] | None:
        try:
            note = run.read_json(path)
        except InputError:
            return None
        return note if isinstance(note, dict) else None


def _ended(note: dict[str, Any]) -> bool:
    process = files.Process.parse(str(note.get("process")))
    return bool(process is not None and process.ended())


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


def _drop(writers: dict[tuple[str, int], _Writer]) -> None:
    for writer in writers.values():
        writer.drop()


class _Writer:
    """One unit of one layer on its way to the disk."""

    def __init__(self, layer: Layer, unit: int):
        self.layer, self.unit = layer, unit
        self.keys: list[str] = []
        self.bad: dict[int, str] = {}
        self._staged = contextlib.ExitStack()
        path = self._staged.enter_context(files.staged_file(layer.file(unit, ".bin")))
        self.file: BinaryIO = self._staged.enter_context(open(path, "wb"))  # noqa: SIM115 - the stack closes it

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
        self._staged.close()  # closes, syncs and renames
        run.write_json(self.layer.file(self.unit, ".json"), {"keys": self.keys, "bad": self.bad})

    def drop(self) -> None:
        """Remove what was written."""

        class Dropped(Exception):
            pass

        with contextlib.suppress(Dropped), self._staged:
            raise Dropped
