"""The fingerprint of a data set: other contents under the same names and sizes are other data, a copy is the same."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from packing import encoded, picture, write_tar

from llava_genhancer.data.images import IndexedSource, RawSample, fingerprint, listing, open_source

Build = Callable[[Path, list[int]], tuple[Path, Path | None]]


def image(seed: int) -> bytes:
    """A BMP, whose size in bytes depends on its pixels' number alone."""
    return encoded(picture(seed), "BMP")


def folder(root: Path, seeds: list[int]) -> tuple[Path, None]:
    for number, seed in enumerate(seeds):
        path = root / "images" / f"{number % 3}" / f"{number:05}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(seed))
    return root / "images", None


def llava_json(root: Path, seeds: list[int]) -> tuple[Path, Path]:
    images, _ = folder(root, seeds)
    names = [str(path.relative_to(images)) for path in sorted(images.rglob("*.bmp"))]
    (root / "chat.json").write_text(json.dumps([{"image": name} for name in names]))
    return root / "chat.json", images


def shards(root: Path, seeds: list[int]) -> tuple[Path, None]:
    (root / "shards").mkdir(parents=True)
    for start in range(0, len(seeds), 4):
        members = [(f"{start + i:05}.bmp", image(seed)) for i, seed in enumerate(seeds[start : start + 4])]
        write_tar(root / "shards" / f"{start:05}.tar", members)
    return root / "shards", None


def table(seeds: list[int]):
    import datasets

    features = datasets.Features({"image": datasets.Image()})
    return datasets.Dataset.from_dict({"image": [{"bytes": image(s), "path": None} for s in seeds]}, features=features)


def parquet(root: Path, seeds: list[int]) -> tuple[Path, None]:
    (root / "rows").mkdir(parents=True)
    table(seeds).to_parquet(root / "rows" / "train.parquet")
    return root / "rows", None


def saved(root: Path, seeds: list[int]) -> tuple[Path, None]:
    table(seeds).save_to_disk(root / "saved")
    return root / "saved", None


def parquet_of_paths(root: Path, seeds: list[int], as_files: bool = False) -> tuple[Path, Path]:
    import pyarrow
    from pyarrow.parquet import write_table

    images, _ = folder(root, seeds)
    names = [str(path.relative_to(images)) for path in sorted(images.rglob("*.bmp"))]
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}) if as_files else pyarrow.string()
    column = [{"bytes": None, "path": name} for name in names] if as_files else names
    write_table(pyarrow.table({"image": pyarrow.array(column, kind)}), root / "train.parquet")
    return root / "train.parquet", images


def parquet_of_files(root: Path, seeds: list[int]) -> tuple[Path, Path]:
    return parquet_of_paths(root, seeds, as_files=True)


KINDS: list[Build] = [folder, llava_json, shards, parquet, parquet_of_paths, parquet_of_files, saved]


def known_by(where: tuple[Path, Path | None]) -> str:
    path, images = where
    return fingerprint(open_source(str(path), None if images is None else str(images)))


@pytest.mark.parametrize("build", KINDS)
def test_equal_names_and_sizes_are_not_the_same_data(tmp_path: Path, build: Build) -> None:
    seeds = list(range(12))
    one = build(tmp_path / "one", seeds)
    known = known_by(one)
    assert len(known) == 16
    assert known_by(build(tmp_path / "again", seeds)) == known
    assert known_by(build(tmp_path / "exchanged", [i + 100 for i in seeds])) != known
    assert known_by(build(tmp_path / "one of them", [*seeds[:7], 99, *seeds[8:]])) != known
    assert known_by(build(tmp_path / "order", seeds[::-1])) != known
    assert known_by(build(tmp_path / "more", [*seeds, 12])) != known


@pytest.mark.parametrize("build", KINDS)
def test_a_copy_elsewhere_is_the_same_data(tmp_path: Path, build: Build) -> None:
    where = build(tmp_path / "one", list(range(5)))
    known = known_by(where)
    shutil.copytree(tmp_path / "one", tmp_path / "far" / "away")  # other folders and times
    for path in (tmp_path / "far" / "away").rglob("*"):
        os.utime(path, (1, 1))
    moved = [None if path is None else tmp_path / "far" / "away" / path.relative_to(tmp_path / "one") for path in where]
    assert known_by((moved[0], moved[1])) == known  # type: ignore[arg-type]


def test_absolute_paths_in_a_json_count_as_those_below_the_image_folder(tmp_path: Path) -> None:
    path, images = llava_json(tmp_path, [1, 2, 3])
    known = known_by((path, images))
    entries = [{"image": str(images / entry["image"])} for entry in json.loads(path.read_text())]
    (tmp_path / "absolute.json").write_text(json.dumps(entries))
    assert known_by((tmp_path / "absolute.json", images)) == known


def test_each_of_many_files_counts_by_name_and_size(tmp_path: Path) -> None:
    """More files than contents are read of: half of them are known by name and size alone."""
    path, _ = folder(tmp_path, [0])
    for number in range(1, 2000):
        (path / f"{number:05}.jpg").write_bytes(bytes(number % 5))
    known = known_by((path, None))
    for number in range(1000, 1003):
        file, content = path / f"{number:05}.jpg", bytes(number % 5)
        file.write_bytes(content + b"x")
        assert known_by((path, None)) != known
        file.write_bytes(content)
        assert known_by((path, None)) == known
    (path / "01000.jpg").rename(path / "01000.png")
    assert known_by((path, None)) != known


def test_blocks_of_large_shards_are_read_throughout(tmp_path: Path) -> None:
    """Shards of 16 MB and more: an exchange of all contents shows, at the cost of some blocks."""
    import numpy as np

    for name, seed in (("one", 0), ("two", 1)):
        (tmp_path / name).mkdir()
        noise = np.random.default_rng(seed).bytes(20 << 20)
        members = [("first.bmp", image(0)), ("middle.bin", noise), ("last.bmp", image(1))]
        write_tar(tmp_path / name / "0.tar", members)
    assert known_by((tmp_path / "one", None)) != known_by((tmp_path / "two", None))


def test_a_listing_holds_until_a_file_comes_goes_or_changes_its_name(tmp_path: Path) -> None:
    path, _ = folder(tmp_path, [0])
    assert listing(open_source(str(path))) == "", "a fingerprint of few files costs nothing"
    for number in range(1, 1500):
        (path / f"{number:05}.jpg").write_bytes(b"")
    known = listing(open_source(str(path)))
    assert known == listing(open_source(str(path))) != ""
    shutil.copytree(path, tmp_path / "copy")
    assert listing(open_source(str(tmp_path / "copy"))) != known, "another place, where anything may differ"
    for change in (
        lambda: (path / "new.jpg").write_bytes(b""),
        lambda: (path / "new.jpg").unlink(),
        lambda: os.replace(path / "00700.jpg", path / "00701.jpg"),
    ):
        change()
        assert listing(open_source(str(path))) != known
        known = listing(open_source(str(path)))


def test_items_of_no_file_count_by_what_they_give() -> None:
    def source(seeds: list[int]) -> IndexedSource:
        return IndexedSource(len(seeds), lambda i: RawSample(str(i), encoded(picture(seeds[i]))))

    assert fingerprint(source([1, 2])) == fingerprint(source([1, 2])) != fingerprint(source([1, 3]))


def test_a_hub_dataset_counts_by_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def known(seeds: list[int]) -> str:
        monkeypatch.setattr(datasets, "load_dataset", lambda name, split: table(seeds))
        return fingerprint(open_source("hf:someone/pictures"))

    assert known([1, 2, 3]) == known([1, 2, 3]) != known([1, 2, 4])
