"""Where images come from: tar shards, a folder, a HF dataset, or LLaVA's JSON with its image folder.

A source is either *sharded* (read front to back, one shard at a time) or *indexed* (any item at any time). It yields
raw samples and never decodes; :mod:`llava_genhancer.data.loader` orders, decodes and counts.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from llava_genhancer.data.decode import IMAGE_SUFFIXES, MAX_BYTES, BadImage, decode
from llava_genhancer.data.entries import image_names, read_entries
from llava_genhancer.errors import InputError
from llava_genhancer.files import expand

MAX_HEADER = 1 << 13  # bytes of an extended tar header
HINT = "give tar shards, an image folder, a HF dataset (parquet folder, or hf:ORG/NAME) or a LLaVA JSON"


@dataclass(frozen=True)
class RawSample:
    """An undecoded image: its key, and bytes, a path, or the reason why there is neither."""

    key: str
    data: bytes | str | None
    problem: str = ""

    def image(self) -> Image.Image:
        """Decode it.

        Raises:
            BadImage: it cannot be.
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
    """

    def __init__(self, shards: list[str]):
        self.shards = shards

    def __len__(self) -> int:
        """Number of shards."""
        return len(self.shards)

    def read(self, shard: int) -> Iterator[RawSample]:
        """The samples of one shard in its own order; damage ends it with one bad sample."""
        path = self.shards[shard]
        name = os.path.basename(path)
        whole = False
        try:
            with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:", tarinfo=_Member) as archive:
                last = -1
                while (member := archive.next()) is not None:
                    if archive.offset <= last:  # sizes in an extended header can lead backwards too
                        raise tarfile.ReadError("a header that leads backwards")
                    last = archive.offset
                    key = f"{name}:{os.path.splitext(member.name)[0]}"
                    if member.isreg() and _is_image(member.name) and member.size > MAX_BYTES:  # sparse, maybe
                        yield RawSample(key, None, "larger than 256 MB")
                    elif member.isreg() and _is_image(member.name):
                        content = archive.extractfile(member)
                        assert content is not None
                        yield RawSample(key, content.read())
                    archive.members = []  # type: ignore[attr-defined]  # tarfile would keep a listing
                # A damaged header looks like the end to tarfile (and to webdataset, which reads through it), and the
                # rest of the shard would be missed in silence. The true end is a block of zeros.
                file.seek(archive.offset)
                whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
        except Exception:  # damaged headers raise anything: ReadError, ValueError, OverflowError, OSError, ...
            whole = False
        if not whole:
            yield RawSample(f"{name}:", None, "unreadable shard, or the rest of one")

    def first(self, count: int) -> list[tuple[str, Image.Image]]:
        """The first decodable images."""
        return _first((s for i in range(len(self.shards)) for s in self.read(i)), count)


class IndexedSource:
    """Items that can be reached by number.

    Args:
        count: how many.
        get: item number to raw sample; must be picklable where data workers are spawned.
    """

    def __init__(self, count: int, get: Callable[[int], RawSample]):
        self.count, self.get = count, get

    def __len__(self) -> int:
        """Number of items."""
        return self.count

    def first(self, count: int) -> list[tuple[str, Image.Image]]:
        """The first decodable images."""
        return _first((self.get(i) for i in range(self.count)), count)


Source = ShardSource | IndexedSource


def fingerprint(source: Source) -> str:
    """What a source is known by wherever it lies: names and sizes of its shards, or its length and some of its keys.

    A training that goes on must find the order that it left.
    """
    if isinstance(source, ShardSource):
        parts = [f"{os.path.basename(path)} {os.path.getsize(path)}" for path in source.shards]
    else:
        step = max(1, len(source) // 32)
        parts = [str(len(source)), *(source.get(i).key for i in range(0, len(source), step))]
    # Names need not be text: what is no UTF-8 in one comes as surrogates.
    return hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).hexdigest()[:16]


def _first(samples: Iterator[RawSample], count: int) -> list[tuple[str, Image.Image]]:
    found: list[tuple[str, Image.Image]] = []
    for tried, sample in enumerate(samples, 1):
        with contextlib.suppress(BadImage):
            found.append((sample.key, sample.image()))
        if len(found) >= count or tried >= 100 * count:  # here, so that no further shard is opened
            break
    return found


def open_source(path: str, image_folder: str | None = None) -> Source:
    """Recognise what ``path`` is, and make sure that at least one image can be read.

    Args:
        path: a ``.tar`` or ``.parquet`` file, or a glob or brace pattern of them; a folder of ``.tar`` files; a folder
            of parquet files or one written by ``Dataset.save_to_disk``; ``hf:ORG/NAME[:SPLIT]``; LLaVA's ``.json``; or
            a folder of images.
        image_folder: root of the image paths in a LLaVA JSON.

    Raises:
        InputError: nothing there, not readable, or no image in it.
    """
    source = _recognise(path, image_folder)
    if len(source) == 0:
        raise InputError(f"data {path} holds no images; {HINT}")
    if not source.first(1):
        raise InputError(f"data {path}: none of the first images can be decoded; check the files, or {HINT}")
    return source


def _recognise(path: str, image_folder: str | None) -> Source:
    if path.startswith("hf:"):
        return _hub_dataset(path)
    expanded = expand(path)
    if any(c in expanded for c in "*?[") or ("{" in expanded and not os.path.exists(expanded)):
        files = _expand(path, expanded)
        return _parquet(files, path) if files[0].endswith(".parquet") else _shards(files, path)
    try:
        if os.path.isfile(expanded):
            if expanded.endswith(".tar"):
                return _shards([expanded], path)
            if expanded.endswith((".json", ".jsonl")):
                return _llava_json(expanded, image_folder)
            if expanded.endswith(".parquet"):
                return _parquet([expanded], path)
            raise InputError(f"data {path} is a file of no known kind; {HINT}")
        if not os.path.isdir(expanded):
            raise InputError(f"data {path} does not exist; {HINT}")
        names = sorted(os.listdir(expanded))
    except PermissionError as error:
        raise InputError(f"data {error.filename or path} may not be read: check its permissions") from None
    for suffix, build in ((".tar", _shards), (".parquet", _parquet)):
        files = [os.path.join(expanded, n) for n in names if n.endswith(suffix)]
        if files:
            return build(files, path)
    if "dataset_info.json" in names or "dataset_dict.json" in names:
        return _saved_dataset(expanded)
    nested = sorted(map(str, Path(expanded).rglob("*.parquet")))
    return _parquet(nested, path) if nested else _folder(expanded)


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
    found = [f for p in patterns for f in (sorted(glob.glob(p)) if any(c in p for c in "*?[") else [p])]
    if not found:
        raise InputError(f"data {path} matches no file")
    return found


def _shards(files: list[str], path: str) -> ShardSource:
    for file in files:
        if not os.access(file, os.R_OK):
            raise InputError(f"data {path}: shard {file} may not be read: check its permissions")
    source = ShardSource(files)
    for sample in source.read(0):
        if sample.data is None:
            raise InputError(f"data {path}: shard {files[0]} is no readable (uncompressed) tar: fetch or pack it again")
        break
    return source


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


# --- folders and JSON ---------------------------------------------------------------------------------------------


class _Files:
    """Files below a root, by number."""

    def __init__(self, root: str, names: list[str]):
        self.root, self.names = root, names

    def __call__(self, index: int) -> RawSample:
        name = self.names[index]
        path = os.path.normpath(os.path.join(self.root, name))
        if os.path.isabs(name) or not path.startswith(self.root.rstrip("/") + "/"):
            return RawSample(name, None, "path leaves the image folder")
        return RawSample(name, path)


def _folder(root: str) -> IndexedSource:
    root = os.path.abspath(root)
    names: list[str] = []
    for folder, _, files in os.walk(root):
        below = "" if folder == root else f"{os.path.relpath(folder, root)}/"  # per file it would take most of the time
        names += [below + name for name in files if _is_image(name)]
    return IndexedSource(len(names), _Files(root, sorted(names)))


def _llava_json(path: str, image_folder: str | None) -> IndexedSource:
    if image_folder is None:
        raise InputError(f"data {path} is a LLaVA JSON: add --image_folder DIR, the root of its image paths")
    root = os.path.abspath(expand(image_folder))
    if not os.path.isdir(root):
        raise InputError(f"image_folder {image_folder} does not exist")
    names: dict[str, None] = {}  # conversations share images; each counts once
    for number, (entry, _, _) in enumerate(read_entries(path)):
        if not isinstance(entry, dict):
            raise InputError(f"data {path} is not a LLaVA JSON: it must be a list of objects with an 'image' each")
        try:
            names.update(dict.fromkeys(image_names(entry)))
        except ValueError as error:
            raise InputError(f"data {path}: entry {number}: {error}") from None
    return IndexedSource(len(names), _Files(root, list(names)))


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
            return RawSample(key, None, f"unreadable row ({type(error).__name__})")
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        return RawSample(key, value, "" if value else "empty")


def _parquet(files: list[str], path: str) -> IndexedSource:
    import datasets

    try:
        dataset = datasets.load_dataset("parquet", data_files=files, split="train")
    except Exception as error:
        raise InputError(f"data {path}: no rows can be read as parquet ({_line(error)})") from None
    return _rows(dataset, path)


def _saved_dataset(path: str) -> IndexedSource:
    import datasets

    try:
        dataset = datasets.load_from_disk(path)
    except Exception as error:
        raise InputError(f"data {path}: not readable as a saved dataset ({_line(error)})") from None
    if isinstance(dataset, dict):
        dataset = dataset["train"] if "train" in dataset else next(iter(dataset.values()))
    return _rows(dataset, path)


def _hub_dataset(path: str) -> IndexedSource:
    import datasets

    name, _, split = path[3:].partition(":")
    try:
        dataset = datasets.load_dataset(name, split=split or "train")
    except Exception as error:
        raise InputError(
            f"data {path} cannot be loaded ({_line(error)}); check name and split (hf:ORG/NAME:SPLIT) and the network"
        ) from None
    return _rows(dataset, path)


def _rows(dataset: Any, path: str) -> IndexedSource:
    import datasets

    columns = [n for n, f in dataset.features.items() if isinstance(f, datasets.Image)]
    columns += [
        n
        for n, f in dataset.features.items()
        if n in ("image", "jpg", "png", "img") and n not in columns and not isinstance(f, datasets.ClassLabel)
    ]
    if not columns:
        raise InputError(f"data {path} has no image column among {', '.join(dataset.features)}")
    column = columns[0]
    if isinstance(dataset.features[column], datasets.Image):
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return IndexedSource(len(dataset), _Rows(dataset.select_columns(column), column, os.path.basename(path)))


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
