"""Every kind of source, and what is said when there is none."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from packing import encoded, picture, write_shards, write_tar
from PIL import Image

from llava_genhancer.data.decode import BadImage
from llava_genhancer.data.images import IndexedSource, ParquetSource, RawSample, ShardSource, fingerprint, open_source
from llava_genhancer.errors import InputError


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> list[Path]:
    """Three shards of 4, 3 and 5 images."""
    return write_shards(tmp_path_factory.mktemp("shards"), (4, 3, 5))


def keys(source: ShardSource | IndexedSource) -> list[str]:
    return [sample.key for sample in samples(source)]


def same(image: Image.Image, seed: int) -> bool:
    return np.array_equal(np.asarray(image), np.asarray(picture(seed)))


# --- tar shards ---------------------------------------------------------------------------------------------------


def test_shards_by_file_folder_glob_and_brace(shards) -> None:
    folder = shards[0].parent
    everything = [f"{s:05}.tar:{i:06}" for s, part in enumerate((range(4), range(4, 7), range(7, 12))) for i in part]
    assert keys(open_source(str(shards[1]))) == everything[4:7]
    for path in (f"{folder}", f"{folder}/", f"{folder}/*.tar", f"{folder}/{{00000..00002}}.tar"):
        assert keys(open_source(path)) == everything, path
    assert keys(open_source(f"{folder}/{{00002,00000}}.tar")) == everything[7:] + everything[:4]
    assert keys(open_source(f"{folder}/0000[01].tar")) == everything[:7]
    assert all(same(image, i) for i, (_, image) in enumerate(open_source(str(folder)).first(12)))


def test_shards_agree_with_webdatasets_own_reader(shards) -> None:
    import webdataset

    theirs = [(s["__key__"], s["png"]) for s in webdataset.WebDataset(list(map(str, shards)), shardshuffle=False)]
    source = open_source(str(shards[0].parent))
    ours = [(s.key.partition(":")[2], s.data) for i in range(len(source)) for s in source.read(i)]
    assert ours == theirs


def test_names_that_leave_a_tar_are_only_names(tmp_path, monkeypatch) -> None:
    names = ["../../escaped.png", "/tmp/absolute.png", "sub/dir/deep.png", "UPPER.PNG", "ünï.png", "n" * 150 + ".png"]
    write_tar(tmp_path / "a.tar", [(n, encoded(picture(i))) for i, n in enumerate(names)])
    before = set(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    found = open_source(str(tmp_path)).first(10)
    assert [k for k, _ in found] == [f"a.tar:{os.path.splitext(n)[0]}" for n in names]
    assert all(same(image, i) for i, (_, image) in enumerate(found))
    assert set(tmp_path.rglob("*")) == before, "a tar is read, never unpacked"


def test_links_devices_and_folders_in_a_tar_are_passed_over(tmp_path) -> None:
    import tarfile

    path = write_tar(tmp_path / "a.tar", [("a.png", encoded(picture(0)))])
    with tarfile.open(path, "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo("evil.png")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    assert keys(open_source(str(path))) == ["a.tar:a"]


def damaged(path: Path, how: str) -> list[str]:
    """Damage a shard of three images; the keys that can still be read."""
    data = path.read_bytes()
    third = data.index(b"000002.txt")
    cases = {
        "cut in an image": (data[: data.index(b"000002.png") + 700], 2),
        "cut in a header": (data[: third + 100], 2),
        "cut between members": (data[:third], 2),
        "garbage header": (data[:third] + b"\xab" * 512 + data[third + 512 :], 2),
        "garbage throughout": (b"\xab" * len(data), 0),
        "empty": (b"", 0),
    }
    content, left = cases[how]
    path.write_bytes(content)
    return [f"{path.name}:{i:06}" for i in range(left)]


@pytest.mark.parametrize(
    "how",
    ["cut in an image", "cut in a header", "cut between members", "garbage header", "garbage throughout", "empty"],
)
def test_a_damaged_shard_gives_what_it_has_and_one_bad_sample(tmp_path, how) -> None:
    (path,) = write_shards(tmp_path, [3])
    expected = damaged(path, how)
    samples = list(ShardSource([str(path)]).read(0))
    assert [s.key for s in samples] == [*expected, f"{path.name}:"]
    assert all(same(s.image(), i) for i, s in enumerate(samples[:-1]))
    with pytest.raises(BadImage, match="unreadable shard"):
        samples[-1].image()


def test_a_shard_that_vanishes_is_one_bad_sample(tmp_path) -> None:
    paths = write_shards(tmp_path, [2, 2])
    source = open_source(str(tmp_path))
    paths[1].unlink()
    assert keys(source) == ["00000.tar:000000", "00000.tar:000001", "00001.tar:"]


def test_an_empty_tar_is_whole(tmp_path) -> None:
    write_tar(tmp_path / "a.tar", [])
    assert list(ShardSource([str(tmp_path / "a.tar")]).read(0)) == []


def test_only_the_first_shard_is_opened_at_the_start(tmp_path, monkeypatch) -> None:
    """A thousand shards cost a listing of names; their contents are read when their turn comes."""
    import builtins

    write_shards(tmp_path, [1] * 6)
    opened, original = [], builtins.open

    def watched(file, *args, **kwargs):
        if str(file).endswith(".tar"):
            opened.append(Path(file).name)
        return original(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", watched)
    source = open_source(str(tmp_path))
    assert set(opened) == {"00000.tar"}
    next(source.read(3))
    assert set(opened) == {"00000.tar", "00003.tar"}


# --- folders and LLaVA's JSON -------------------------------------------------------------------------------------


def test_an_image_folder_with_everything_in_it(tmp_path) -> None:
    for i, name in enumerate(("b.png", "a/c.PNG", "a/b.jpeg", "z.webp", ".hidden/d.bmp")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.asarray(picture(i))).save(tmp_path / name)
    (tmp_path / "readme.txt").write_text("no image")
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    source = open_source(str(tmp_path))
    assert keys(source) == [".hidden/d.bmp", "a/b.jpeg", "a/c.PNG", "b.png", "gone.jpg", "z.webp"]
    with pytest.raises(BadImage, match="file not found"):
        source.get(4).image()
    assert same(source.get(3).image(), 0)


def llava_json(folder: Path, entries: object) -> str:
    path = folder / "chat.json"
    path.write_text(json.dumps(entries))
    return str(path)


def test_llava_json_counts_each_image_once_and_stays_in_its_folder(tmp_path) -> None:
    root = tmp_path / "images"
    (root / "coco").mkdir(parents=True)
    for i, path in enumerate((root / "coco" / "a.png", root / "b.png", tmp_path / "secret.png")):
        path.write_bytes(encoded(picture(i)))
    bad = ["../secret.png", "coco/../../secret.png", str(tmp_path / "secret.png"), "", "images", "a\0b.png"]
    entries = [
        {"id": 1, "image": "coco/a.png", "conversations": []},
        {"id": 2, "conversations": []},  # text only
        {"id": 3, "image": "coco/a.png"},
        {"id": 4, "image": ["b.png", "coco/./a.png"]},
        *({"image": [name]} for name in bad),
    ]
    source = open_source(llava_json(tmp_path, entries), image_folder=str(root))
    assert keys(source) == ["coco/a.png", "b.png", "coco/./a.png", *bad]
    assert [same(source.get(i).image(), seed) for i, seed in ((0, 0), (1, 1), (2, 0))] == [True] * 3
    for i, name in enumerate(bad[:4]):
        with pytest.raises(BadImage, match="path leaves the image folder"):
            source.get(3 + i).image()
        assert source.get(3 + i).data is None, name
    for i in (7, 8):
        with pytest.raises(BadImage, match=r"file not found|damaged"):
            source.get(i).image()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not valid JSON"),
        ('"a.png"', "must be a list of objects"),
        ("[1]", "must be a list of objects"),
        ("[]", "holds no images"),
        ('[{"conversations": []}]', "holds no images"),
        ('[{"image": "a.png"}, {"image": 5}]', "entry 1: 'image' must be a path"),
        ('[{"image": {"path": "a.png"}}]', "entry 0: 'image' must be a path"),
        ('[{"image": ["a.png", null]}]', "entry 0: 'image' must be a path"),
        ('[{"image": "a.png"}] [{"image": "b.png"}]', r"'\[' follows the end of its list, after 1 entries: join"),
        ('[{"image": "none.png"}]', "none of the first images can be decoded"),
    ],
)
def test_llava_jsons_that_are_none(tmp_path, content, words) -> None:
    (tmp_path / "chat.json").write_text(content)
    with pytest.raises(InputError, match=words):
        open_source(str(tmp_path / "chat.json"), image_folder=str(tmp_path))


def test_llava_json_needs_its_folder(tmp_path) -> None:
    path = llava_json(tmp_path, [{"image": "a.png"}])
    with pytest.raises(InputError, match="add --image_folder"):
        open_source(path)
    with pytest.raises(InputError, match=r"image_folder .*nowhere does not exist"):
        open_source(path, image_folder=str(tmp_path / "nowhere"))


# --- HF datasets --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset():
    """Five images in a `datasets.Dataset`, one of them missing and one damaged."""
    import datasets

    cells = [{"bytes": encoded(picture(i)), "path": None} for i in range(5)]
    cells[1] = None
    cells[3] = {"bytes": b"no image", "path": None}
    features = datasets.Features({"label": datasets.Value("int32"), "picture": datasets.Image()})
    return datasets.Dataset.from_dict({"label": list(range(5)), "picture": cells}, features=features)


def samples(source: ShardSource | IndexedSource) -> list[RawSample]:
    if isinstance(source, ShardSource):
        return [sample for i in range(len(source)) for sample in source.read(i)]
    return [source.get(i) for i in range(len(source))]


def outcomes(source: ShardSource | IndexedSource) -> list[Image.Image | str]:
    """Images, and the reasons why there are none."""
    found: list[Image.Image | str] = []
    for sample in samples(source):
        try:
            found.append(sample.image())
        except BadImage as error:
            found.append(str(error))
    return found


def check_five(source: ShardSource | IndexedSource) -> None:
    found = outcomes(source)
    assert [o if isinstance(o, str) else same(o, i) for i, o in enumerate(found)] == [
        True,
        "empty",
        True,
        "not an image",
        True,
    ]
    assert len(set(keys(source))) == 5
    assert source.estimate() == 5


def test_parquet_by_file_folder_glob_and_nested_folder(tmp_path, dataset) -> None:
    (tmp_path / "data" / "nested").mkdir(parents=True)
    dataset.to_parquet(tmp_path / "data" / "nested" / "train.parquet")
    for path in ("data/nested/train.parquet", "data/nested", "data/nested/*.parquet", "data"):
        check_five(open_source(str(tmp_path / path)))


def test_save_to_disk_with_and_without_splits(tmp_path, dataset) -> None:
    import datasets

    dataset.save_to_disk(tmp_path / "plain")
    check_five(open_source(str(tmp_path / "plain")))
    datasets.DatasetDict({"test": dataset.select([0]), "train": dataset}).save_to_disk(tmp_path / "splits")
    check_five(open_source(str(tmp_path / "splits")))


def test_a_hub_id_is_loaded_by_name_and_split(dataset, monkeypatch) -> None:
    import datasets

    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    check_five(open_source("hf:someone/pictures"))
    open_source("hf:someone/pictures:validation[:10]")
    assert asked == [("someone/pictures", "train"), ("someone/pictures", "validation[:10]")]


def test_hf_data_that_is_none(tmp_path) -> None:
    import datasets

    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but not really")
    datasets.Dataset.from_dict({"text": ["a"], "label": [1]}).to_parquet(tmp_path / "text.parquet")
    empty = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": []}, features=empty).to_parquet(tmp_path / "empty.parquet")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_info.json").write_text("{}")
    for path, words in (
        (tmp_path / "broken.parquet", "no rows can be read as parquet"),
        (tmp_path / "text.parquet", "no image column among text, label"),
        (tmp_path / "empty.parquet", "no rows can be read as parquet"),
        (tmp_path / "saved", "not readable as a saved dataset"),
        ("hf:nobody/nothing", "cannot be loaded"),
        ("hf:", "cannot be loaded"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            open_source(str(path))
        assert "\n" not in str(caught.value)


# --- nothing there ------------------------------------------------------------------------------------------------


def test_what_is_no_source_is_said(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "junk.tar").write_bytes(b"junk" * 1000)
    (tmp_path / "dir.tar").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("hello")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"no image")
    write_tar(tmp_path / "captions.tar", [("a.txt", b"only words")])
    for path, words in (
        ("", "does not exist"),
        ("nowhere", "does not exist"),
        ("notes.txt", "is a file of no known kind"),
        ("notes.txt/below", "does not exist"),
        ("empty", "holds no images"),
        ("texts", "holds no images"),
        ("bad", "none of the first images can be decoded"),
        ("captions.tar", "none of the first images can be decoded"),
        ("junk.tar", "no readable .*tar"),
        ("dir.tar/*.tar", "matches no file"),
        ("none-*.tar", "matches no file"),
        ("{00000..00009}.tar", "10 of 10 shards are missing, first "),
        ("{00000..00009.tar", "Unbalanced braces"),
        ("texts/*", "no readable .*tar"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            open_source(str(tmp_path / path) if path else "")
        assert "\n" not in str(caught.value)


def test_an_unreadable_shard_is_named_before_anything_starts(tmp_path, monkeypatch) -> None:
    paths = write_shards(tmp_path, [1, 1])
    # Permissions do not bind root, so the answer is given here.
    monkeypatch.setattr(os, "access", lambda path, mode: path != str(paths[1]))
    with pytest.raises(InputError, match=r"00001.tar may not be read"):
        open_source(str(tmp_path))


def test_a_source_is_known_wherever_it_lies(tmp_path, shards) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for shard in shards:
        shutil.copy(shard, moved)
    known = fingerprint(open_source(str(shards[0].parent)))
    assert fingerprint(open_source(str(moved))) == known
    assert fingerprint(open_source(str(shards[0]))) != known
    for name in ("a.png", "b.png"):
        Image.new("RGB", (9, 9)).save(moved / name)
    (moved / "images").mkdir()
    Image.new("RGB", (9, 9)).save(moved / "images" / "a.png")
    one = fingerprint(open_source(str(moved / "images")))
    Image.new("RGB", (9, 9)).save(moved / "images" / "b.png")
    assert fingerprint(open_source(str(moved / "images"))) != one


# --- which of a folder's files are the data -----------------------------------------------------------------------


def rows(path: Path, seeds: list[int], **options) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(pyarrow.table({"image": [encoded(picture(seed)) for seed in seeds], "n": seeds}), path, **options)


def metadata(path: Path) -> None:
    """As img2dataset writes beside each shard."""
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.table({"url": ["http://a"], "key": ["000"], "status": ["success"]}), path)


def test_shards_in_folders_are_taken_before_their_metadata(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (path,) = write_shards(tmp_path / "cc3m" / folder, [3])
        metadata(path.with_suffix(".parquet"))
    for path in ("cc3m", "cc3m/**/*.tar"):
        found = keys(open_source(str(tmp_path / path)))
        assert found == [f"{folder}/00000.tar:{i:06}" for folder in "ab" for i in range(3)], "no key twice"
    with pytest.raises(InputError, match="has no image column among url, key, status"):
        open_source(str(tmp_path / "cc3m" / "a" / "00000.parquet"))


def test_all_shards_of_a_folder_are_found_and_what_macos_leaves_is_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_shards(tmp_path, [2])
    write_shards(tmp_path / "more", [1])
    (tmp_path / "._00000.tar").write_bytes(b"\0\5\x16\7")
    (tmp_path / "preview.png").write_bytes(encoded(picture(0)))
    source = open_source(str(tmp_path))
    assert keys(source) == ["00000.tar:000000", "00000.tar:000001", "more/00000.tar:000000"]
    assert "the tar shards are read; 1 images beside them are not (first preview.png)" in caplog.text
    (tmp_path / "00000.tar").rename(tmp_path / "00000.TAR")
    assert len(keys(open_source(str(tmp_path / "00000.TAR")))) == 2


def test_images_in_folders_are_taken_before_their_metadata(tmp_path: Path) -> None:
    """img2dataset's ``--output_format files``."""
    (tmp_path / "00000").mkdir()
    (tmp_path / "00000" / "000.jpg").write_bytes(encoded(picture(0)))
    metadata(tmp_path / "00000.parquet")
    assert keys(open_source(str(tmp_path))) == ["00000/000.jpg"]


def test_shards_beside_images_are_not_guessed_about(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", [1])
    (tmp_path / "a.jpg").write_bytes(encoded(picture(0)))
    with pytest.raises(InputError, match=r"1 tar shards \(first shards/00000.tar\) and 1 images \(first a.jpg\): give"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["data/train-00000-of-00001-ab.parquet", "data/test-00000-of-00001-ab.parquet"], 1),
        (["train/0000.parquet", "validation/0000.parquet", "test/0000.parquet"], 1),
        (["default/train/0.parquet", "default/val/0.parquet"], 1),
        (["0000.parquet", "dev.parquet"], 1),
        (["test/0.parquet", "test/1.parquet"], 2),
        (["contest-trains/1.parquet", "latest/0.parquet"], 2),
        (["mytest_train/0-train.parquet", "test_sets/train.parquet"], 2),
        (["cc3m/train/0.tar", "cc3m/val/0.tar"], 1),
        (["train-0.tar", "validation-0.tar"], 1),
    ],
)
def test_test_and_validation_files_are_left_out_and_named(
    tmp_path: Path, names: list[str], taken: int, caplog: pytest.LogCaptureFixture
) -> None:
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".tar"):
            write_tar(tmp_path / name, [(f"{number}.png", encoded(picture(number)))])
        else:
            rows(tmp_path / name, [number])
    images = outcomes(open_source(str(tmp_path)))
    assert len(images) == taken
    assert all(same(image, number) for number, image in enumerate(images)), "the first ones"
    assert ("left out" in caplog.text and names[-1] in caplog.text) == (taken < len(names))


def test_empty_shards_are_skipped_wherever_they_stand(tmp_path: Path) -> None:
    for empty in (0, 1, 2):
        paths = write_shards(tmp_path, [2, 2, 2])
        paths[empty].write_bytes(b"")
        source = open_source(str(tmp_path))
        assert len(samples(source)) == 5
        assert [s.key for s in samples(source) if s.data is None] == [f"0000{empty}.tar:"]
        assert source.estimate() > 0
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"shard .*00000.tar is no readable"):
        open_source(str(tmp_path))


def test_other_names_of_images_are_read_and_the_rest_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from PIL import features

    good = ["a.jfif", "b.JPE", "c.img", "d.jpg"]
    for name in good:
        (tmp_path / name).write_bytes(encoded(picture(0), "JPEG"))
    if features.check("avif"):
        good.append("e.avif")
        (tmp_path / "e.avif").write_bytes(encoded(picture(0), "AVIF"))
    (tmp_path / "f.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    (tmp_path / "g.img").write_bytes(b"a disk")
    for name in ("._a.jfif", "._d.jpg"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    (tmp_path / "h.xyz").write_bytes(b"")
    (tmp_path / "plain").write_bytes(b"")
    (tmp_path / "a.txt").write_bytes(b"a caption")
    source = open_source(str(tmp_path))
    read = {sample.key: outcome for sample, outcome in zip(samples(source), outcomes(source), strict=True)}
    assert [key for key, outcome in read.items() if not isinstance(outcome, str)] == sorted(good)
    assert {k: v for k, v in read.items() if isinstance(v, str)} == {
        "f.heic": "HEIC, which is not read",
        "g.img": "not an image",
    }
    assert isinstance(source, IndexedSource)
    assert source.passed_over == {"._*": 2, ".xyz": 1, "": 1, ".txt": 1}
    assert "1 .xyz" in caplog.text
    assert "1 without suffix" in caplog.text


def test_what_macos_leaves_in_a_tar_is_no_image(tmp_path: Path) -> None:
    members = [("._a.png", b"\0\5\x16\7"), ("a.png", encoded(picture(0))), ("b/._c.png", b"\0\5\x16\7")]
    write_tar(tmp_path / "a.tar", members)
    assert keys(open_source(str(tmp_path))) == ["a.tar:a"]


# --- parquet in place ---------------------------------------------------------------------------------------------


def test_parquet_is_read_where_it_lies(tmp_path: Path) -> None:
    """Nothing is copied, so that HF_HOME need not be writable."""
    rows(tmp_path / "data" / "a.parquet", [0, 1, 2])
    program = (
        f"from llava_genhancer.data.images import open_source\nsource = open_source({str(tmp_path / 'data')!r})\n"
        "print(sum(sample.image().size == (12, 10) for sample in source.read(0)))"
    )
    (tmp_path / "file").write_text("no folder")
    env = {**os.environ, "HF_HOME": str(tmp_path / "file" / "home")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, timeout=120)
    assert done.stdout.split() == ["3"], done.stderr


@pytest.mark.parametrize("group", [1, 7, 400, 5000])
def test_rows_come_in_order_whatever_the_row_groups(tmp_path: Path, group: int) -> None:
    rows(tmp_path / "a.parquet", list(range(2500)), row_group_size=group)
    rows(tmp_path / "b.parquet", list(range(2500, 2510)))
    source = open_source(str(tmp_path))
    found = samples(source)
    assert [s.key for s in found] == [f"a.parquet:{i}" for i in range(2500)] + [f"b.parquet:{i}" for i in range(10)]
    assert all(same(found[i].image(), i) for i in (0, 1, 999, 1000, 1001, 2499, 2500, 2509))
    assert len(source) <= 5, "small row groups are read together"


def test_a_large_row_group_is_not_held_in_memory(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    schema = pyarrow.schema([("image", pyarrow.binary())])
    options = {"compression": "none", "use_dictionary": False, "write_batch_size": 8}  # pages of 8 rows
    with ParquetWriter(tmp_path / "a.parquet", schema, **options) as writer:
        writer.write_table(pyarrow.table({"image": [os.urandom(1 << 20) for _ in range(300)]}, schema))
    source = ParquetSource([str(tmp_path / "a.parquet")], [(0, [0], 0, 300)], "image", None)
    before, read, most = pyarrow.total_allocated_bytes(), 0, 0
    for sample in source.read(0):
        read += len(sample.data or b"")
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert read == 300 << 20
    assert most < 100 << 20


def test_damaged_rows_count_each(tmp_path: Path) -> None:
    rows(tmp_path / "a.parquet", list(range(30)), row_group_size=30, compression="zstd", use_dictionary=False)
    rows(tmp_path / "b.parquet", [30])
    source = open_source(str(tmp_path))
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[4:400] = bytes(396)
    (tmp_path / "a.parquet").write_bytes(content)
    found = samples(source)
    assert len(found) == 31
    assert {s.problem.partition(" (")[0] for s in found[:30] if s.data is None} == {"unreadable row"}
    assert found[30].data is not None
    (tmp_path / "a.parquet").write_bytes(content[:500])
    with pytest.raises(InputError, match=r"no rows can be read as parquet in .*a.parquet .*: fetch it again"):
        open_source(str(tmp_path))


def test_parquet_of_paths_needs_the_images_folder(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(encoded(picture(0)))
    write_table(pyarrow.table({"image": ["a.png", "../b.png"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a.parquet:0: a path and no bytes\); add --image_folder DIR"):
        open_source(str(tmp_path / "a.parquet"))
    image, outside = outcomes(open_source(str(tmp_path / "a.parquet"), str(tmp_path / "images")))
    assert same(image, 0)
    assert outside == "path leaves the image folder"


# --- why none can be decoded --------------------------------------------------------------------------------------


def test_an_error_names_the_first_image_its_reason_and_the_likely_cause(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(encoded(picture(0)))
    for entries, folder, words in (
        (["a.png"], tmp_path, r"a.png: file not found\); is image_folder .* the folder that the paths start from"),
        (["/far/a.png"], images, r"/far/a.png: path leaves .*\); absolute paths must lie below image_folder .*images"),
    ):
        path = llava_json(tmp_path, [{"image": name} for name in entries])
        with pytest.raises(InputError, match=words):
            open_source(path, str(folder))
    path = llava_json(tmp_path, [{"image": str(images / "a.png")}])
    assert keys(open_source(path, str(images))) == ["a.png"], "as LLaVA takes it"
    for name, content, words in (
        (
            "lfs",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
            r"a.png: a git-lfs pointer.*git lfs pull",
        ),
        ("mac", None, r"holds no images \(passed over: 1 \._\*\)"),
        ("bad", b"no image", r"the first of 1, a.png: not an image\); check the files"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / ("._a.png" if content is None else "a.png")).write_bytes(content or b"\0")
        with pytest.raises(InputError, match=words):
            open_source(str(tmp_path / name))
