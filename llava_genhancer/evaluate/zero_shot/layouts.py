"""The layouts in which zero-shot data sets lie on disks, each read into one of the two kinds of set.

A set is a folder with one of these, looked for in this order::

    test/0.tar ...         clip_benchmark's webdataset export: .webp/.png/.jpg with .cls, or with .txt of captions
    *.parquet              a hub data set (below any folder; the files of "test" or "val" where there are such)
    captions.jsonl         {"image": "images/1.jpg", "captions": ["...", ...]} a line
    dataset_*.json         Karpathy's splits of Flickr30k and COCO; those of "test" count
    CLASS/*.jpg            a folder of images per class, itself or below "test" or "val" (ImageNet: wnids)

Class names: ``classnames.txt`` (a line per class; in a folder of images by the folders' sorted names),
``classnames.json`` (a list, or an object from folder to name), a parquet's own, clip_benchmark's for ImageNet's wnids,
or the folders' names. Prompts: see :func:`~llava_genhancer.evaluate.zero_shot.prompts.templates_of`.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_genhancer.data.decode import IMAGE_SUFFIXES
from llava_genhancer.data.entries import read_entries
from llava_genhancer.errors import InputError, reason
from llava_genhancer.evaluate.zero_shot.data import Classification, Images, Retrieval, ZeroShotSet
from llava_genhancer.evaluate.zero_shot.prompts import lines_of, packaged_classes, set_name, templates_of
from llava_genhancer.files import expand
from llava_genhancer.run import read_json

SPLITS = ("test", "val", "validation")
LABELS = ("fine_label", "label", "labels", "cls")
CAPTIONS = ("captions", "caption", "sentences", "txt")
PICKLED = "cifar-100-python"
HINT = (
    "give a data set's folder, or one that holds such folders: clip_benchmark's webdataset export, parquet, "
    "captions.jsonl, Karpathy's dataset_*.json, or a folder of images per class"
)


def load_sets(paths: Sequence[str | Path]) -> list[ZeroShotSet]:
    """Every set in ``paths``: each one a set's folder, or a folder of such folders.

    Raises:
        InputError: no set there, two of one name, or a set that cannot be used.
    """
    sets: dict[str, ZeroShotSet] = {}
    for path in paths:
        for folder in find_folders(Path(expand(path))):
            found = read_set(folder)
            if found.name in sets:
                raise InputError(
                    f"{folder} and {sets[found.name].path} are both the data set {found.name}: give one of them"
                )
            sets[found.name] = found
    return list(sets.values())


def find_folders(path: Path) -> list[Path]:
    """``path`` itself if it is a set's folder, else those of its folders that are.

    Raises:
        InputError: there is none.
    """
    if not path.is_dir():
        raise InputError(f"{path} is not a folder: {HINT}")
    if (path / "Questions.csv").is_file():
        raise InputError(f"{path} is MMVP-VLM's folder, which has no classes: `mmvp-vlm` and `curve --mmvp` read it")
    if _marked(path):
        return [path]
    folders = [p for p in sorted(path.iterdir()) if p.is_dir()]
    marked = [p for p in folders if _marked(p) or any(p.glob("*/*.parquet"))]
    if not marked and _class_folders(path):
        return [path]
    if found := [p for p in folders if p in marked or _class_folders(p)]:
        return found
    if path.name == PICKLED or any(path.glob(f"**/{PICKLED}")):
        raise InputError(f"{path}: CIFAR-100's pickles can run code and are not read: get its parquet files instead")
    raise InputError(f"{path} holds no zero-shot data set: {HINT}")


def read_set(folder: Path) -> ZeroShotSet:
    """The set in a folder.

    Raises:
        InputError: files are missing or not as expected; names what and where.
    """
    found: ZeroShotSet
    if shards := _shards(folder):
        found = _webdataset(folder, shards)
    elif files := _parquet_files(folder):
        found = _parquet(folder, files)
    elif (folder / "captions.jsonl").is_file():
        found = _jsonl(folder)
    elif split := sorted(folder.glob("dataset_*.json")):
        found = _karpathy(folder, split[0])
    else:
        found = _folders(folder)
    if not len(found.images):
        raise InputError(f"{folder} holds no images: {HINT}")
    if isinstance(found, Retrieval):
        if bare := [k for k, c in zip(found.images.keys, found.captions, strict=True) if not c]:
            raise InputError(f"{folder}: image {bare[0]} has no caption")
    elif wrong := [x for x in found.labels if not 0 <= x < len(found.classes)]:
        hint = "; a split without labels? keep that with labels alone" if wrong[0] == -1 else ""
        raise InputError(f"{folder}: label {wrong[0]} has no name among its {len(found.classes)} class names{hint}")
    return found


def _marked(folder: Path) -> bool:
    names = ("captions.jsonl", "classnames.txt", "classnames.json")
    return (
        any((folder / name).is_file() for name in names)
        or bool(_shards(folder) or any(folder.glob("dataset_*.json")) or any(folder.glob("*.parquet")))
        or any((folder / "data").glob("*.parquet"))
        or any(_class_folders(folder / split) for split in SPLITS)
    )


def _named(folder: Path, images: Images, labels: Sequence[int], classes: Sequence[str], named: str) -> Classification:
    name = set_name(folder)
    templates = templates_of(name, folder)
    return Classification(name, folder, images, tuple(labels), tuple(classes), templates, named)


def _class_names(folder: Path, folders: Sequence[str] = ()) -> tuple[list[str], str] | None:
    """The names in a file of the set's own, and that file's name; ``folders`` are what an object's keys must be."""
    if (path := folder / "classnames.txt").is_file():
        return lines_of(path), path.name
    if not (path := folder / "classnames.json").is_file():
        return None
    names = read_json(path)
    if isinstance(names, dict) and folders:
        if missing := [f for f in folders if f not in names]:
            raise InputError(f"{path} has no name for the folder {missing[0]}")
        names = [names[f] for f in folders]
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise InputError(f"{path} must be a list of class names, or an object from folder to name")
    return names, path.name


# --- folders and JSON ---------------------------------------------------------------------------------------------


def _files(paths: Sequence[Path], root: Path) -> Images:
    for path in paths:
        if not path.is_file():
            raise InputError(f"{root}: image {path} is missing")
    keys = tuple(str(p.relative_to(root)) for p in paths)
    return Images(keys, tuple(p.stat().st_size for p in paths), lambda i: paths[i].read_bytes())


def _pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())


def _class_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [p for p in sorted(folder.iterdir()) if p.is_dir() and any(_pictures(p))]


def _folders(folder: Path) -> Classification:
    root = next((folder / split for split in SPLITS if _class_folders(folder / split)), folder)
    folders = _class_folders(root)
    names = [p.name for p in folders]
    classes, named = _class_names(folder, names) or _names_of_folders(folder, names)
    if len(classes) != len(folders):
        raise InputError(f"{folder}: {len(classes)} class names in {named} for {len(folders)} folders of images")
    paths = [_pictures(p) for p in folders]
    labels = [i for i, found in enumerate(paths) for _ in found]
    return _named(folder, _files([p for found in paths for p in found], folder), labels, classes, named)


def _names_of_folders(folder: Path, names: list[str]) -> tuple[list[str], str]:
    if not all(re.fullmatch(r"n\d{8}", name) for name in names):
        return [name.replace("_", " ") for name in names], "folders"
    known = packaged_classes("imagenet1k") or []
    if len(names) != len(known):
        raise InputError(
            f"{folder}: {len(names)} folders are called by wnid, and names are known for all {len(known) or 1000} of "
            "ImageNet-1K alone (with clip_benchmark installed): add a classnames.json from wnid to name"
        )
    return known, "clip_benchmark"


def _inside(folder: Path, name: Any, where: str) -> Path:
    """A path of the annotations, which must not lead out of the set."""
    if not isinstance(name, str) or name.startswith("/") or ".." in Path(name).parts:
        raise InputError(f"{where}: '{name}' is no path below {folder}")
    return folder / name


def _jsonl(folder: Path) -> Retrieval:
    paths, captions = [], []
    for number, entry in enumerate(read_entries(str(folder / "captions.jsonl")), 1):
        where, value = f"{folder / 'captions.jsonl'}, entry {number}", entry.value
        texts = value.get("captions") if isinstance(value, dict) else None
        if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
            raise InputError(f'{where}: must be {{"image": PATH, "captions": [TEXT, ...]}}')
        paths.append(_inside(folder, value.get("image"), where))
        captions.append(tuple(texts))
    return Retrieval(set_name(folder), folder, _files(paths, folder), tuple(captions))


def _karpathy(folder: Path, file: Path) -> Retrieval:
    """All captions of the test images: five each in Flickr30k, five to seven in COCO."""
    values = read_json(file)
    paths, captions = [], []
    try:
        for number, image in enumerate(values["images"]):
            if image["split"] != "test":
                continue
            name = "/".join(filter(None, [image.get("filepath"), image["filename"]]))
            plain = _inside(folder, name, f"{file}, image {number}")
            below = [p / name for p in (folder / "images", folder / "flickr30k-images")]
            paths.append(next((p for p in [plain, *below] if p.is_file()), plain))
            captions.append(tuple(" ".join(str(s["raw"]).split()) for s in image["sentences"]))
    except (KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise InputError(f"{file} is not in the form of Karpathy's splits ({what})") from None
    return Retrieval(set_name(folder), folder, _files(paths, folder), tuple(captions))


# --- webdataset ---------------------------------------------------------------------------------------------------


def _shards(folder: Path) -> list[Path]:
    found = [p for p in (folder / "test").glob("*.tar") if p.stem.isdigit()]
    return sorted(found, key=lambda p: int(p.stem))


def _webdataset(folder: Path, shards: list[Path]) -> ZeroShotSet:
    counted = lines_of(folder / "test" / "nshards.txt") if (folder / "test" / "nshards.txt").is_file() else []
    if counted and counted[0] != str(len(shards)):
        raise InputError(f"{folder}: {len(shards)} shards in test/, and nshards.txt says {counted[0]}: get the others")
    kind_file = folder / "dataset_type.txt"
    kind = lines_of(kind_file)[0].lower() if kind_file.is_file() else "classification"
    if kind not in ("classification", "retrieval"):
        raise InputError(f"{folder}: a data set of the type {kind}, and only classification and retrieval are measured")
    annotation = ".txt" if kind == "retrieval" else ".cls"
    keys, sizes, places, annotations = [], [], [], []
    for shard in shards:
        pictures: dict[str, tarfile.TarInfo] = {}
        texts: dict[str, str] = {}
        try:
            with tarfile.open(shard, "r:") as archive:
                for member in archive:
                    stem, suffix = Path(member.name).with_suffix("").as_posix(), Path(member.name).suffix.lower()
                    if suffix in IMAGE_SUFFIXES:
                        pictures[stem] = member
                    elif suffix == annotation and (content := archive.extractfile(member)) is not None:
                        texts[stem] = content.read().decode()
        except (tarfile.TarError, OSError, UnicodeDecodeError, EOFError) as error:
            raise InputError(f"{shard} cannot be read ({reason(error)}): get it again") from None
        if odd := sorted(pictures.keys() ^ texts.keys()):
            raise InputError(f"{shard}: {odd[0]} lacks its image or its {annotation}: get it again")
        for stem, member in pictures.items():
            keys.append(f"{shard.name}:{stem}")
            sizes.append(member.size)
            places.append((shard, member.offset_data))
            annotations.append(texts[stem])

    def get(index: int) -> bytes:
        path, offset = places[index]
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(sizes[index])

    images = Images(tuple(keys), tuple(sizes), get)
    if kind == "retrieval":
        captions = tuple(tuple(t for t in text.splitlines() if t.strip()) for text in annotations)
        return Retrieval(set_name(folder), folder, images, captions)
    names = _class_names(folder)
    if names is None:
        raise InputError(f"{folder} has no classnames.txt: it lies beside test/ in clip_benchmark's export")
    try:
        labels = [int(text) for text in annotations]
    except ValueError as error:
        raise InputError(f"{folder}: a .cls is no class's number ({reason(error)})") from None
    return _named(folder, images, labels, *names)


# --- parquet ------------------------------------------------------------------------------------------------------


def _parquet_files(folder: Path) -> list[str]:
    found = sorted(folder.rglob("*.parquet"))
    for split in SPLITS:
        if of_split := [p for p in found if re.search(rf"(^|[^a-z]){split}([^a-z]|$)", p.name)]:
            return list(map(str, of_split))
    return list(map(str, found))


def _parquet(folder: Path, files: list[str]) -> ZeroShotSet:
    import datasets

    try:
        rows = datasets.load_dataset("parquet", data_files=files, split="train")
    except Exception as error:  # arrow and datasets raise anything
        raise InputError(f"{folder}: no rows can be read as parquet ({reason(error)})") from None
    column = next((n for n, f in rows.features.items() if isinstance(f, datasets.Image)), None)
    label = next((n for n in LABELS if n in rows.features), None)
    caption = next((n for n in CAPTIONS if n in rows.features), None)
    if column is None or (label or caption) is None:
        raise InputError(
            f"{folder}: needed are an image column and one of {', '.join(LABELS + CAPTIONS)}, and there are "
            f"{', '.join(rows.features)}"
        )
    if "split" in rows.features and (of_test := [i for i, split in enumerate(rows["split"]) if split == "test"]):
        rows = rows.select(of_test)
    pictures = rows.cast_column(column, datasets.Image(decode=False)).select_columns(column)

    def get(index: int) -> bytes:
        value = pictures[index][column]
        return value["bytes"] or Path(value["path"]).read_bytes()

    total = sum(Path(f).stat().st_size for f in files)
    images = Images(tuple(f"row {i}" for i in range(len(rows))), (total,), get)
    if label is None:
        texts = [[t] if isinstance(t, str) else t for t in rows[caption]]
        return Retrieval(set_name(folder), folder, images, tuple(map(tuple, texts)))
    names = _class_names(folder)
    if names is None and isinstance(feature := rows.features[label], datasets.ClassLabel):
        # ImageNet's are lists of synonyms on the hub; in its order the names are known that everybody measures with.
        known = packaged_classes("imagenet1k") if set_name(folder) == "imagenet1k" else None
        own = [name.replace("_", " ") for name in feature.names]
        names = (known, "clip_benchmark") if known and len(known) == len(own) else (own, label)
    if names is None:
        raise InputError(f"{folder}: its column {label} has no class names: add a classnames.txt, a line per class")
    return _named(folder, images, list(rows[label]), *names)
