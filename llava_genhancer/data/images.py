"""Where images come from: tar shards, a folder, parquet, a HF dataset, or LLaVA's JSON with its image folder.

A source is either *sharded* (read front to back, one shard at a time) or *indexed* (any item at any time). It yields
raw samples and never decodes; :mod:`llava_genhancer.data.loader` orders, decodes and counts. Bad data are samples
without an image; a fault of the disk or the network raises InputError.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import itertools
import json
import logging
import os
import re
import statistics
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from llava_genhancer.data.decode import IMAGE_SUFFIXES, MAX_BYTES, BadImage, decode, refuse_fault
from llava_genhancer.data.entries import image_names, read_entries
from llava_genhancer.errors import InputError, reason
from llava_genhancer.files import expand

log = logging.getLogger(__name__)
MAX_HEADER = 1 << 13  # bytes of an extended tar header
MAX_PADDING = 1 << 20  # zeros behind a tar's end; archivers pad to 10 KiB, or to the block size of a tape
MIN_IMAGES = 10  # of a shard, from which the size of the others is guessed
MAX_COUNT = 1_000_000  # images that a shard's statistics may state
GROUP_ROWS = 1000  # row groups of parquet are joined until they have as many rows: each opens the file anew
BATCH_ROWS = 16  # rows of parquet in memory at once
SAMPLED_FILES, SAMPLED_BYTES, SAMPLED_BLOCK = 1024, 16 << 20, 16 << 10  # of the contents, for a fingerprint
DAMAGED = "unreadable shard, or the rest of one"
OUTSIDE = "path leaves the image folder"
PATH_ONLY = "a path and no bytes"
HINT = "give tar shards, an image folder, a HF dataset (parquet folder, or hf:ORG/NAME) or a LLaVA JSON"
# What lies beside images and surprises nobody: captions, metadata, what systems and tools leave behind.
COMPANIONS = frozenset(
    (
        ".txt", ".json", ".jsonl", ".csv", ".tsv", ".md", ".xml", ".html", ".npy", ".npz", ".parquet", ".pdf", ".ini",
        ".db", ".yaml", ".yml", ".py", ".log", ".lock", ".metadata", ".gitattributes", ".gitignore", ".ds_store", "._*",
    )
)  # fmt: skip


@dataclass(frozen=True)
class RawSample:
    """An undecoded image: its key, and bytes, a path, or the reason why there is neither."""

    key: str
    data: bytes | str | None
    problem: str = ""

    @property
    def is_damaged_shard(self) -> bool:
        """Whether the sample stands for the part of a tar shard that cannot be read, in which nobody counted."""
        return self.key.endswith(":")

    def image(self) -> Image.Image:
        """Decode it.

        Raises:
            BadImage: it cannot be.
            InputError: its file cannot be read, for a reason that is not the image's.
        """
        if self.data is None:
            raise BadImage(self.problem)
        return decode(self.data)


class _Member(tarfile.TarInfo):
    """A header that does not lead backwards and holds no more text than names take.

    tarfile would go round in circles, or sit for hours over a long extended header.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Any:
        """Parse a block, and refuse what no archiver writes."""
        member = super().frombuf(buf, encoding, errors)
        if member.size < 0 or (member.size > MAX_HEADER and not member.isreg() and member.type != tarfile.DIRTYPE):
            raise tarfile.HeaderError("no archiver wrote this size")
        return member


class ShardSource:
    """Tar files in webdataset's layout, read sequentially; nothing is unpacked and no listing is kept.

    Every image member is a sample; its key is ``shard:member`` without the suffix.

    Attributes:
        names: the shards' names below their common folder.
        identity: the fingerprint once it is known.
    """

    def __init__(self, shards: list[str]):
        self.shards, self.names, self.identity = shards, _short(shards), ""

    def __len__(self) -> int:
        """Number of shards."""
        return len(self.shards)

    def expected(self, shard: int) -> int | None:
        """The images that img2dataset counted when it wrote the shard (``NNNNN_stats.json`` beside it), or None."""
        try:
            with open(f"{os.path.splitext(self.shards[shard])[0]}_stats.json", "rb") as file:
                count = json.loads(file.read(1 << 16))["successes"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return count if type(count) is int and 0 <= count <= MAX_COUNT else None

    def estimate(self) -> int:
        """The number of images: as counted when the shards were written, or from a shard's number and all sizes."""
        counts = [self.expected(shard) for shard in range(len(self))]
        if all(count is not None for count in counts):
            return sum(count or 0 for count in counts)
        sizes = [max(size, 0) for size in _sizes(self.shards)]
        for shard, size in enumerate(sizes):
            if size and (found := sum(sample.data is not None for sample in self.read(shard))):
                return round(found * sum(sizes) / size)
        return 0

    def read(self, shard: int) -> Iterator[RawSample]:
        """The samples of one shard in its own order, and a bad one for each image that cannot be read any more.

        How many a damaged shard has lost is taken from img2dataset's statistics, if they count at least the images that
        were found, or else guessed from its size and the other shards' if enough of it can be read; it counts as one
        where neither is possible.

        Raises:
            InputError: the shard's file cannot be read, for a reason that is not its content.
        """
        path, name = self.shards[shard], self.names[shard]
        images, end, whole = 0, 0, False
        try:
            with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:", tarinfo=_Member) as archive:
                last = -1
                while (member := archive.next()) is not None:
                    if archive.offset <= last:  # sizes in an extended header can lead backwards too
                        raise tarfile.ReadError("a header that leads backwards")
                    last = archive.offset
                    key = f"{name}:{os.path.splitext(member.name)[0]}"
                    if member.isreg() and _is_image(member.name):
                        if member.size > MAX_BYTES:  # sparse, maybe
                            yield RawSample(key, None, "larger than 256 MB")
                        else:
                            content = archive.extractfile(member)
                            assert content is not None
                            yield RawSample(key, content.read())
                        images, end = images + 1, archive.offset
                    archive.members = []  # type: ignore[attr-defined]  # tarfile would keep a listing
                whole = _ends(file, archive.offset)
        except Exception as error:  # damaged headers raise anything: ReadError, ValueError, OverflowError, OSError, ...
            refuse_fault(error, path)
        expected = self.expected(shard)
        if expected is not None and expected >= images:
            why = f"fewer images than {os.path.splitext(name)[0]}_stats.json counts" if whole else DAMAGED
            for _ in range(expected - images):
                yield RawSample(f"{name}:lost", None, why)
        elif not whole:
            yield RawSample(f"{name}:", None, DAMAGED)
            size = max(self._typical_size, *_sizes([path]))
            for _ in range(round(images * (size / end - 1)) - 1 if images >= MIN_IMAGES else 0):
                yield RawSample(f"{name}:lost", None, DAMAGED)

    @functools.cached_property
    def _typical_size(self) -> float:
        return statistics.median(_sizes(self.shards))

    def first(self, count: int) -> list[tuple[str, Image.Image]]:
        """The first decodable images."""
        return _first((s for i in range(len(self)) for s in self.read(i)), count)

    def listed(self) -> tuple[Sequence[str], Callable[[int], str | None]]:
        """The names of the files that a fingerprint covers, and the path of each by its number."""
        return self.names, self.shards.__getitem__

    def also(self) -> Iterator[bytes]:
        """What else a fingerprint covers."""
        yield b"shards"


def _ends(file: BinaryIO, offset: int) -> bool:
    """Whether a tar is over at ``offset``.

    A damaged header looks like the end to tarfile (and to webdataset, which reads through it), as do the zeros of a
    file that was never filled, and the rest of the shard would be missed in silence. The true end is a block of zeros
    with only a little padding behind: up to 10 KiB, or up to a multiple of a tape's block size, a power of two.
    """
    file.seek(offset)
    rest = file.read(MAX_PADDING + 1)
    if not tarfile.BLOCKSIZE <= len(rest) <= MAX_PADDING or rest.strip(b"\0"):
        return False
    block = 1 << (len(rest) - 1).bit_length()
    return len(rest) <= tarfile.RECORDSIZE + 2 * tarfile.BLOCKSIZE or (offset + len(rest)) % block == 0


class ParquetSource(ShardSource):
    """Parquet files read in place; what stands for a shard is a run of row groups, read front to back.

    A reader holds one page of the column, compressed and not, whatever the size of a row group. A page is what the
    writer made it: Arrow puts up to 1024 rows into one.

    Args:
        files: paths.
        units: (number of the file, its row groups, number of the first row, rows).
        column: holds the images: bytes, or Hugging Face's ``{"bytes", "path"}``.
        image_folder: root of the paths, where a row has a path and no bytes.
    """

    def __init__(
        self, files: list[str], units: list[tuple[int, list[int], int, int]], column: str, image_folder: str | None
    ):
        super().__init__(files)
        self.units, self.column = units, column
        self.image_folder = None if image_folder is None else _Files(_root(image_folder), [])

    def __len__(self) -> int:
        """Number of runs of row groups."""
        return len(self.units)

    def expected(self, shard: int) -> int:
        """The rows, as the file's footer counts them."""
        return self.units[shard][3]

    def read(self, shard: int) -> Iterator[RawSample]:
        """The rows of a run of row groups; those that cannot be read are bad samples.

        Raises:
            InputError: the file cannot be read, for a reason that is not its content.
        """
        from pyarrow.parquet import ParquetFile

        number, groups, first, rows = self.units[shard]
        path, given, why = self.shards[number], 0, "unreadable row"
        try:
            # Buffered: else a whole row group, which may be the whole file, would be in memory. No threads: a data
            # worker is forked.
            with ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
                batches = file.iter_batches(BATCH_ROWS, row_groups=groups, columns=[self.column], use_threads=False)
                for value in (value for batch in batches for value in batch.column(0)):
                    yield self._sample(f"{self.names[number]}:{first + given}", value.as_py())
                    given += 1
        except Exception as error:  # Arrow's own, and whatever damaged pages raise
            refuse_fault(error, path)
            why = f"unreadable row ({type(error).__name__})"
        for row in range(first + given, first + rows):
            yield RawSample(f"{self.names[number]}:{row}", None, why)

    def _sample(self, key: str, value: Any) -> RawSample:
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not isinstance(value, str) or not value:
            return RawSample(key, value or None, "" if value else "empty")
        if self.image_folder is not None:
            path = self.image_folder.path(value)
            return RawSample(key, path, "" if path else OUTSIDE)
        return RawSample(key, value) if os.path.isabs(value) else RawSample(key, None, PATH_ONLY)

    def listed(self) -> tuple[Sequence[str], Callable[[int], str | None]]:
        """The parquet files and, where rows are paths, the images, whose names are below the image folder."""
        names, paths = list(self.names), [*self.shards]  # type: list[str], list[str | None]
        if any(isinstance(sample.data, str) for sample in itertools.islice(self.read(0), BATCH_ROWS)):
            root = "" if self.image_folder is None else self.image_folder.root
            for sample in (sample for unit in range(len(self)) for sample in self.read(unit)):
                path = sample.data if isinstance(sample.data, str) else None
                names.append(sample.problem if path is None else path.removeprefix(root))
                paths.append(path)
        return names, paths.__getitem__

    def also(self) -> Iterator[bytes]:
        """The column, and the footers: the size and the statistics of every column of every row group."""
        yield f"parquet {self.column}".encode()
        for path in self.shards:
            with _faults(path), open(path, "rb") as file:
                file.seek(-8, os.SEEK_END)
                length = int.from_bytes(file.read(4), "little")
                file.seek(-8 - length, os.SEEK_END)
                yield file.read(length)


class IndexedSource:
    """Items that can be reached by number.

    Args:
        count: how many.
        get: item number to raw sample; must be picklable where data workers are spawned.
        passed_over: files beside the images that are taken for none, by suffix.

    Attributes:
        identity: the fingerprint once it is known.
    """

    def __init__(self, count: int, get: Callable[[int], RawSample], passed_over: dict[str, int] | None = None):
        self.count, self.get, self.passed_over, self.identity = count, get, passed_over or {}, ""

    def __len__(self) -> int:
        """Number of items."""
        return self.count

    def estimate(self) -> int:
        """The number of images."""
        return self.count

    def first(self, count: int) -> list[tuple[str, Image.Image]]:
        """The first decodable images."""
        return _first((self.get(i) for i in range(self.count)), count)

    def listed(self) -> tuple[Sequence[str], Callable[[int], str | None]]:
        """The names of the files that a fingerprint covers, and the path of each by its number."""
        return self.get.listed() if isinstance(self.get, _Files | _Rows) else ([], lambda number: None)

    def also(self) -> Iterator[bytes]:
        """What else a fingerprint covers: where items are no files, some of them."""
        yield f"items {len(self)}".encode()
        if not isinstance(self.get, _Files):
            for i in _spread(len(self), SAMPLED_FILES // 8):
                sample = self.get(i)
                yield f"{sample.key}\0{sample.problem}".encode(errors="surrogatepass")
                if isinstance(sample.data, bytes):
                    yield sample.data[:SAMPLED_BLOCK]
                elif sample.data is not None:
                    yield from _contents([sample.data], _sizes([sample.data]), SAMPLED_BLOCK)


Source = ShardSource | IndexedSource


# --- which data it is ---------------------------------------------------------------------------------------------


def fingerprint(source: Source) -> str:
    """Return a hash by which a source is known wherever it lies: 16 hex digits.

    It covers the names below the source's root and the sizes of all files (for a LLaVA JSON of the images in it), the
    footers of parquet, and some contents: of up to 1024 files, evenly spread, 16 MiB in all, which is everything where
    the data are small. Modification times and folders above the root do not matter, so a copy is the same data.

    Of a saved dataset and of one from the hub it covers the Arrow files in the same way, and some rows.

    Not detected: a change that keeps a file's size, outside of the contents that are read. Of a shard or a parquet file
    these are blocks; of a folder of more than 1024 files, most files are known by name and size alone.
    """
    if not source.identity:
        source.identity = _digest(source, sizes=True)
    return source.identity


def description(source: Source) -> dict[str, Any]:
    """Return what a manifest records of a source: its fingerprint, how much it is, and what was passed over."""
    known: dict[str, Any] = {"fingerprint": fingerprint(source)}
    if isinstance(source, ShardSource) and not isinstance(source, ParquetSource):
        return {**known, "shards": len(source)}
    return {
        **known,
        "images": source.estimate(),
        **({"passed_over": passed} if (passed := _passed_over(source)) else {}),
    }


def _passed_over(source: Source) -> dict[str, int]:
    return source.passed_over if isinstance(source, IndexedSource) else {}


def listing(source: Source) -> str:
    """Return a hash of what is known of many files without a look at each: names, folders' times, some contents.

    While it stays the same on a machine, a fingerprint need not be computed anew. A file that was overwritten in its
    place, which changes no folder, then shows only where its content is among those that are read.

    Returns:
        "" for shards, parquet and up to 1024 files, whose fingerprint costs little.
    """
    if not isinstance(source, IndexedSource) or not isinstance(source.get, _Files) or len(source) <= SAMPLED_FILES:
        return ""
    return _digest(source, sizes=False)


def _digest(source: Source, sizes: bool) -> str:
    digest = hashlib.blake2b(digest_size=8)

    def add(part: bytes) -> None:
        digest.update(len(part).to_bytes(8, "little") + part)

    names, path_of = source.listed()
    # Names need not be text: what is no UTF-8 in one comes as surrogates.
    add("\0".join(names).encode(errors="surrogatepass"))
    if sizes:
        found = _sizes([path_of(number) for number in range(len(names))])
        add(np.array(found, dtype="<i8").tobytes())
    elif isinstance(source, IndexedSource) and isinstance(source.get, _Files):
        for part in source.get.folders():
            add(part)
    chosen = [path_of(number) for number in _spread(len(names), SAMPLED_FILES)]
    share = SAMPLED_BYTES // max(1, len(chosen))
    for part in _contents(chosen, _sizes(chosen), share):
        add(part)
    for part in source.also():
        add(part)
    return digest.hexdigest()


def _spread(count: int, chosen: int) -> list[int]:
    """Up to ``chosen`` numbers below ``count``, evenly spread, the first and the last among them."""
    return list(range(count)) if count <= chosen else [i * (count - 1) // (chosen - 1) for i in range(chosen)]


def _sizes(paths: Sequence[str | None]) -> list[int]:
    """The files' sizes in bytes; -1 where there is no file.

    Raises:
        InputError: one cannot be looked at, for a reason that is not its own.
    """

    def some(start: int) -> list[int]:
        sizes = []
        for path in paths[start : start + 4096]:
            try:
                sizes.append(-1 if path is None else os.stat(path).st_size)
            except (OSError, ValueError) as error:  # ValueError: a NUL in the name
                refuse_fault(error, path)
                sizes.append(-1)
        return sizes

    started = time.perf_counter()
    sizes = some(0)
    rest = range(4096, len(paths), 4096)
    if time.perf_counter() - started < 0.2:
        return sizes + [size for start in rest for size in some(start)]
    with ThreadPoolExecutor(16) as threads:  # a network file system answers each after a while; a disk needs no waiting
        return sizes + [size for part in threads.map(some, rest) for size in part]


def _contents(paths: Sequence[str | None], sizes: Sequence[int], share: int) -> Iterator[bytes]:
    """Up to ``share`` bytes of each file: all of it, or blocks evenly spread from its begin to its end."""
    for path, size in zip(paths, sizes, strict=True):
        if path is None or size < 0:
            continue
        starts, length = [0], size
        if size > share:
            length = SAMPLED_BLOCK
            starts = [i * (size - length) // max(1, share // length - 1) for i in range(max(1, share // length))]
        with _faults(path):
            if os.path.isfile(path):
                with open(path, "rb") as file:
                    for start in starts:
                        file.seek(start)
                        yield file.read(length)


@contextlib.contextmanager
def _faults(path: str) -> Iterator[None]:
    """Let errors that concern one file pass, and raise InputError for the others."""
    try:
        yield
    except OSError as error:
        refuse_fault(error, path)


# --- opening ------------------------------------------------------------------------------------------------------


def _first(
    samples: Iterable[RawSample], count: int, failed: list[tuple[str, str]] | None = None
) -> list[tuple[str, Image.Image]]:
    """The first decodable images; ``failed`` gets the keys and reasons of what is in front of them."""
    found: list[tuple[str, Image.Image]] = []
    tried = 0
    for sample in samples:
        try:
            found.append((sample.key, sample.image()))
        except BadImage as error:
            if failed is not None:
                failed.append((sample.key, str(error)))
        tried += sample.data is not None  # what cannot be tried costs nothing
        if len(found) >= count or tried >= 100 * count:  # here, so that no further shard is opened
            break
    return found


def open_source(path: str, image_folder: str | None = None) -> Source:
    """Recognise what ``path`` is, and make sure that at least one image can be read.

    Of a folder, tar shards are taken before parquet and parquet before images, and files named after a test or
    validation split are left out if there are others; what was chosen is logged.

    Args:
        path: a ``.tar`` or ``.parquet`` file, or a glob or brace pattern of them; a folder with ``.tar`` files; a
            folder with parquet files or one written by ``Dataset.save_to_disk``; ``hf:ORG/NAME[:SPLIT]``; LLaVA's
            ``.json``; or a folder of images.
        image_folder: root of the image paths in a LLaVA JSON, or in parquet that holds paths and no bytes.

    Raises:
        InputError: nothing there, not readable, or no image in it.
    """
    source = _recognise(path, image_folder)
    passed = _passed_over(source)
    told = ", ".join(f"{number} {suffix or 'without suffix'}" for suffix, number in passed.items())
    if len(source) == 0:
        raise InputError(f"data {path} holds no images{f' (passed over: {told})' if told else ''}; {HINT}")
    if told:
        odd = logging.WARNING if passed.keys() - COMPANIONS else logging.INFO
        log.log(
            odd, "data %s: %d images; files passed over, as their names are no images': %s", path, len(source), told
        )
    failed: list[tuple[str, str]] = []
    samples = (
        (s for i in range(len(source)) for s in source.read(i))
        if isinstance(source, ShardSource)
        else map(source.get, range(len(source)))
    )
    if not _first(samples, 1, failed):
        raise InputError(f"data {path}: {_why_none(source, failed, image_folder)}")
    return source


def _why_none(source: Source, failed: list[tuple[str, str]], image_folder: str | None) -> str:
    """Which image cannot be decoded, for which reason, and what to do."""
    if not failed:
        return f"none of the first images can be decoded (its shards hold none); {HINT}"
    key, why = failed[0]
    if why == DAMAGED and isinstance(source, ShardSource):
        shard = source.shards[source.names.index(key.rpartition(":")[0])]
        return f"shard {shard} is no readable (uncompressed) tar: fetch or pack it again"
    advice = "check the files, or " + HINT
    if why == "file not found" and image_folder is not None:
        advice = f"is image_folder {image_folder} the folder that the paths start from?"
    elif why == OUTSIDE and os.path.isabs(key):
        advice = f"absolute paths must lie below image_folder {image_folder}: give that folder, or relative paths"
    elif why == PATH_ONLY:
        advice = "add --image_folder DIR, the folder that the paths start from, or store the images' bytes"
    elif "git-lfs" in why:
        advice = "run `git lfs pull` where the data were cloned"
    return f"none of the first images can be decoded (the first of {len(failed)}, {key}: {why}); {advice}"


def _recognise(path: str, image_folder: str | None) -> Source:
    if path.startswith("hf:"):
        return _hub_dataset(path)
    expanded = expand(path)
    if any(c in expanded for c in "*?[") or ("{" in expanded and not os.path.exists(expanded)):
        files = _expand(path, expanded)
        return _parquet(files, path, image_folder) if files[0].lower().endswith(".parquet") else _shards(files, path)
    if os.path.isfile(expanded):
        if expanded.lower().endswith(".tar"):
            return _shards([expanded], path)
        if expanded.lower().endswith((".json", ".jsonl")):
            return _llava_json(expanded, image_folder)
        if expanded.lower().endswith(".parquet"):
            return _parquet([expanded], path, image_folder)
        raise InputError(f"data {path} is a file of no known kind; {HINT}")
    if not os.path.isdir(expanded):
        raise InputError(f"data {path} does not exist; {HINT}")
    return _in_folder(os.path.abspath(expanded), path, image_folder)


def _in_folder(root: str, path: str, image_folder: str | None) -> Source:
    """What a folder holds: tar shards, a saved dataset, or whatever else lies below it."""
    below = _walk(root, path)
    own_tars = any("/" not in name for name in below.tars)
    saved = any(os.path.exists(os.path.join(root, name)) for name in ("dataset_info.json", "dataset_dict.json"))
    if saved and not own_tars:
        return _saved_dataset(root)
    if below.tars and below.images and not own_tars:
        raise InputError(
            f"data {path} holds {len(below.tars)} tar shards (first {below.tars[0]}) and {len(below.images)} images "
            f"(first {below.images[0]}): give a glob of the shards ('{path}/**/*.tar'), or the images' own folder"
        )
    if below.tars:
        if below.images:
            log.warning(
                "data %s: the tar shards are read; %d images beside them are not (first %s)",
                path, len(below.images), below.images[0],
            )  # fmt: skip
        return _shards(_of_training(root, below.tars, path), path)
    if below.parquet:
        source = _parquet(_of_training(root, below.parquet, path), path, image_folder, required=not below.images)
        if source is not None:  # else it is the metadata of the images
            return source
    return IndexedSource(len(below.images), _Files(root, below.images), below.passed_over)


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    """Turn an error of a listing into one line."""
    try:
        yield
    except OSError as error:
        refuse_fault(error, error.filename or path)
        raise InputError(f"data {path} cannot be listed: {reason(error)}") from None


@dataclass(frozen=True)
class _Found:
    """Names below a root, sorted, and the numbers of files of no kind by suffix."""

    tars: list[str]
    parquet: list[str]
    images: list[str]
    passed_over: dict[str, int]


def _walk(root: str, path: str) -> _Found:
    tars, parquet, images, passed = [], [], [], Counter[str]()

    def fault(error: OSError) -> None:  # os.walk would leave the folder out in silence
        if not isinstance(error, FileNotFoundError):
            raise error

    with _readable(path):
        for folder, folders, files in os.walk(root, onerror=fault):
            below = "" if folder == root else f"{os.path.relpath(folder, root)}/"  # per file it would take longest
            for name in files:
                lower = name.lower()
                if lower.startswith("._"):  # what macOS leaves beside a file on other systems' disks
                    passed["._*"] += 1
                elif lower.endswith(IMAGE_SUFFIXES):
                    images.append(below + name)
                elif lower.endswith(".tar"):
                    tars.append(below + name)
                elif lower.endswith(".parquet"):
                    parquet.append(below + name)
                else:
                    passed[os.path.splitext(lower)[1] or (lower if lower.startswith(".") else "")] += 1
            links = sum(os.path.islink(os.path.join(folder, name)) for name in folders)
            if links:
                passed["links to folders"] += links
    return _Found(sorted(tars), sorted(parquet), sorted(images), dict(passed.most_common()))


_SPLIT = re.compile(r"(?<![a-z])(?:(train|training)|test|testing|validation|valid|val|dev|eval|evaluation)(?![a-z])")


def _of_training(root: str, names: list[str], path: str) -> list[str]:
    """The paths of the files that are not named after a test or validation split, unless all are."""

    def held_out(name: str) -> bool:
        for part in reversed(name.lower().split("/")):  # the file's own name counts first
            if marks := list(_SPLIT.finditer(part)):
                return not any(mark[1] for mark in marks)
        return False

    taken = [name for name in names if not held_out(name)] or names
    if left := sorted(set(names) - set(taken)):
        log.warning(
            "data %s: %d of %d files are taken (first %s); %d are left out, as they are named after a test or "
            "validation split (first %s): give a glob to choose otherwise",
            path, len(taken), len(names), taken[0], len(left), left[0],
        )  # fmt: skip
    return [os.path.join(root, name) for name in taken]


def _short(files: list[str]) -> list[str]:
    """The files' names below their common folder."""
    folders = {os.path.dirname(file) for file in files}
    if len(folders) == 1:
        return [os.path.basename(file) for file in files]
    absolute = [os.path.abspath(file) for file in files]
    root = os.path.commonpath([os.path.dirname(file) for file in absolute]) if absolute else ""
    return [os.path.relpath(file, root) for file in absolute]


# --- tar shards ---------------------------------------------------------------------------------------------------


def _expand(path: str, expanded: str) -> list[str]:
    if "{" in expanded:
        from braceexpand import braceexpand

        try:
            patterns = [expand(p) for p in braceexpand(expanded)]
        except ValueError as error:
            raise InputError(f"data {path}: {error}") from None
        missing = [p for p in patterns if "*" not in p and not os.path.exists(p)]
        if missing:
            raise InputError(f"data {path}: {len(missing)} of {len(patterns)} shards are missing, first {missing[0]}")
    else:
        patterns = [expanded]
    found = [f for p in patterns for f in (sorted(glob.glob(p, recursive=True)) if any(c in p for c in "*?[") else [p])]
    if not found:
        raise InputError(f"data {path} matches no file")
    return found


def _shards(files: list[str], path: str) -> ShardSource:
    for file in files:
        if not os.access(file, os.R_OK):
            raise InputError(f"data {path}: shard {file} may not be read: check its permissions")
    return ShardSource(files)


def _is_image(name: str) -> bool:
    """By its name; ``._a.jpg`` is what macOS keeps about ``a.jpg``."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not os.path.basename(name).startswith("._")


# --- folders and JSON ---------------------------------------------------------------------------------------------


class _Files:
    """Files below a root, by number."""

    def __init__(self, root: str, names: list[str]):
        self.root, self.names = root, names

    def __call__(self, index: int) -> RawSample:
        name = self.names[index]
        path = self.path(name)
        return RawSample(name, path, "" if path else OUTSIDE)

    def path(self, name: str) -> str | None:
        """Where a file lies; None if that is outside of the root."""
        if ".." not in name and name[:1] not in ("", ".", "/"):  # nearly all, and a million paths take seconds else
            return f"{self.root}/{name}"
        path = os.path.normpath(os.path.join(self.root, name))
        return path if path.startswith(self.root.rstrip("/") + "/") else None

    def listed(self) -> tuple[Sequence[str], Callable[[int], str | None]]:
        """All names, and the path of each by its number."""
        return self.names, lambda number: self.path(self.names[number])

    def folders(self) -> Iterator[bytes]:
        """The folders of all names, and when something was last added to each, taken away or renamed."""
        for folder in sorted({name.rpartition("/")[0] for name in self.names}):
            path = os.path.join(self.root, folder)
            try:
                status = os.stat(path)
            except (OSError, ValueError) as error:
                refuse_fault(error, path)
                continue
            yield f"{folder}\0{status.st_dev} {status.st_ino} {status.st_mtime_ns}".encode(errors="surrogatepass")


def _root(image_folder: str) -> str:
    root = os.path.abspath(os.path.expanduser(image_folder))
    if not os.path.isdir(root):
        raise InputError(f"image_folder {image_folder} does not exist")
    return root


def _llava_json(path: str, image_folder: str | None) -> IndexedSource:
    if image_folder is None:
        raise InputError(f"data {path} is a LLaVA JSON: add --image_folder DIR, the root of its image paths")
    root = _root(image_folder)
    names: dict[str, None] = {}  # conversations share images; each counts once
    for number, (entry, _, _) in enumerate(read_entries(path)):
        if not isinstance(entry, dict):
            raise InputError(f"data {path} is not a LLaVA JSON: it must be a list of objects with an 'image' each")
        try:
            names.update(dict.fromkeys(_below(root, name) for name in image_names(entry)))
        except ValueError as error:
            raise InputError(f"data {path}: entry {number}: {error}") from None
    return IndexedSource(len(names), _Files(root, list(names)))


def _below(root: str, name: str) -> str:
    """An absolute path below the root as the relative one, which holds wherever the folder lies."""
    start = root.rstrip("/") + "/"
    return (
        os.path.normpath(name)[len(start) :]
        if os.path.isabs(name) and os.path.normpath(name).startswith(start)
        else name
    )


# --- HF datasets --------------------------------------------------------------------------------------------------


class _Rows:
    """Rows of an arrow table with one undecoded image column."""

    def __init__(self, dataset: Any, column: str, name: str):
        self.dataset, self.column, self.name = dataset, column, name

    def __call__(self, index: int) -> RawSample:
        key = f"{self.name}:{index}"
        try:
            value = self.dataset[index][self.column]
        except Exception as error:
            refuse_fault(error, self.name)
            return RawSample(key, None, f"unreadable row ({type(error).__name__})")
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        return RawSample(key, value, "" if value else "empty")

    def listed(self) -> tuple[Sequence[str], Callable[[int], str | None]]:
        """The dataset's Arrow files."""
        files = [file["filename"] for file in self.dataset.cache_files]
        return [os.path.basename(file) for file in files], files.__getitem__


IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img")


def _parquet(files: list[str], path: str, image_folder: str | None, required: bool = True) -> Any:
    """The source; None if no column can hold images and ``required`` is false.

    Raises:
        InputError: a file is no parquet, has no such column, or all are empty.
    """
    from pyarrow.parquet import ParquetFile

    column, units, total = "", [], 0
    for number, file in enumerate(files):
        try:
            with ParquetFile(file) as parquet:
                schema, rows = (
                    parquet.schema_arrow,
                    [parquet.metadata.row_group(group).num_rows for group in range(parquet.metadata.num_row_groups)],
                )
        except Exception as error:
            refuse_fault(error, file)
            raise InputError(
                f"data {path}: no rows can be read as parquet in {file} ({_line(error)}): fetch it again, or remove it"
            ) from None
        names = _image_columns(schema)
        if not names or (column and column not in names):
            if not required:
                return None
            wanted = f"column '{column}', as the files before it have," if column else "image column"
            raise InputError(f"data {path}: {file} has no {wanted} among {', '.join(schema.names)}")
        column = column or names[0]
        first = 0
        groups: list[int] = []
        for group in range(len(rows)):
            groups.append(group)
            count = sum(rows[group] for group in groups)
            if count and (count >= GROUP_ROWS or group == len(rows) - 1):
                units.append((number, groups, first, count))
                first, groups = first + count, []
        total += first
    if not total:
        raise InputError(f"data {path}: no rows can be read as parquet (all files are empty)")
    return ParquetSource(files, units, column, image_folder)


def _image_columns(schema: Any) -> list[str]:
    """The columns that can hold images, the likeliest first."""
    from pyarrow import types

    def holds_bytes(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind))

    def holds_file(kind: Any) -> bool:
        if not types.is_struct(kind):
            return False
        return any(field.name == "bytes" and holds_bytes(field.type) for field in kind)

    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        declared = {name: str(feature.get("_type")) for name, feature in features.items()}
    except (KeyError, ValueError, TypeError, AttributeError):
        declared = {}
    kinds = {field.name: field.type for field in schema if declared.get(field.name, "Image") in ("Image", "Value")}
    columns = [name for name in kinds if declared.get(name) == "Image"]
    columns += [
        name
        for name in IMAGE_COLUMNS
        if name in kinds
        and (
            holds_bytes(kinds[name])
            or holds_file(kinds[name])
            or types.is_string(kinds[name])
            or types.is_large_string(kinds[name])
        )
    ]
    columns += [name for name, kind in kinds.items() if holds_file(kind)]
    return list(dict.fromkeys(columns))


def _saved_dataset(path: str) -> IndexedSource:
    import datasets

    try:
        dataset = datasets.load_from_disk(path)
    except Exception as error:
        raise InputError(f"data {path}: not readable as a saved dataset ({_line(error)})") from None
    if isinstance(dataset, dict):
        split = "train" if "train" in dataset else next(iter(dataset))
        if split != "train":
            log.warning("data %s: its split '%s' is taken, as none is called train", path, split)
        dataset = dataset[split]
    return _rows(dataset, path)


def _hub_dataset(path: str) -> IndexedSource:
    import datasets

    name, _, split = path[3:].partition(":")
    try:
        dataset = datasets.load_dataset(name, split=split or "train")
    except Exception as error:
        raise InputError(
            f"data {path} cannot be loaded ({_line(error)}); check name and split (hf:ORG/NAME:SPLIT), the network, "
            "and that $HF_HOME can be written"
        ) from None
    return _rows(dataset, path)


def _rows(dataset: Any, path: str) -> IndexedSource:
    import datasets

    columns = [n for n, f in dataset.features.items() if isinstance(f, datasets.Image)]
    columns += [
        n
        for n, f in dataset.features.items()
        if n in IMAGE_COLUMNS and n not in columns and not isinstance(f, datasets.ClassLabel)
    ]
    if not columns:
        raise InputError(f"data {path} has no image column among {', '.join(dataset.features)}")
    column = columns[0]
    if isinstance(dataset.features[column], datasets.Image):
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return IndexedSource(len(dataset), _Rows(dataset.select_columns(column), column, os.path.basename(path)))


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
