"""The toy world's files: img2dataset's shards and MMVP-VLM's layout, exactly."""

import csv
import io
import json
import multiprocessing
import os
import tarfile

import pytest
from PIL import Image

from llava_genhancer.errors import InputError
from llava_genhancer.toyworld import paths, scenes, writers


def _tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_shards_have_img2datasets_layout_and_repeat_exactly(tmp_path):
    shards = writers.write_shards(tmp_path / "a", 25, seed=3, per_shard=10)
    assert [path.name for path in shards] == ["00000.tar", "00001.tar", "00002.tar"]
    count = 0
    for path in shards:
        with tarfile.open(path) as tar:
            names = tar.getnames()
            assert len(names) % 3 == 0
            for jpg, txt, facts in zip(names[::3], names[1::3], names[2::3], strict=True):
                key = jpg.removesuffix(".jpg")
                assert (txt, facts) == (f"{key}.txt", f"{key}.json")
                image = Image.open(io.BytesIO(tar.extractfile(jpg).read()))
                assert image.size == (scenes.IMAGE_SIZE,) * 2
                record = json.loads(tar.extractfile(facts).read())
                assert record["key"] == key
                assert record["caption"] == tar.extractfile(txt).read().decode()
                assert scenes.Scene(**record["scene"]).split() == "train"
                count += 1
    assert count == 25
    writers.write_shards(tmp_path / "b", 25, seed=3, per_shard=10)
    assert _tree(tmp_path / "a") == _tree(tmp_path / "b")


@pytest.mark.parametrize("split", ["dev", "test"])
def test_pair_sets_have_mmvp_vlms_layout(tmp_path, split):
    writers.write_mmvp(tmp_path, split, seed=2)
    with open(tmp_path / "Questions.csv", newline="") as file:
        header, *rows = list(csv.reader(file))
    assert header == ["Question ID", "Type", "Statement"]
    assert [int(row[0]) for row in rows] == list(range(1, 271))
    types = [pattern.type for pattern in scenes.PATTERNS]
    assert [row[1] for row in rows] == [name for name in types for _ in range(30)]
    images = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.jpg")}
    assert images == {f"MLLM_VLM Images/{row[1]}/{row[0]}.jpg" for row in rows}
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert int(first[0]) % 2 == 1
        assert first[2] != second[2]


def test_prepared_pair_sets_hold_no_scene_twice(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(writers.scenes, "render", lambda scene: seen.append(scene) or Image.new("RGB", (8, 8)))
    writers.write_mmvp(tmp_path / "dev", "dev", seed=2)
    writers.write_mmvp(tmp_path / "test", "test", seed=3)
    assert len({scene.key() for scene in seen}) == len(seen) == 540
    assert [scene.split() for scene in seen] == ["dev"] * 270 + ["test"] * 270


SMALL = {"TRAIN_IMAGES": 60, "LLAVA_IMAGES": 40, "QUESTIONS_PER_DETAIL": 6, "CRITTERS_PER_CLASS": 1,
         "CAPTIONED_IMAGES": 5}  # fmt: skip


def _prepare_small(folder):
    for name, value in SMALL.items():
        setattr(writers, name, value)
    writers.prepare(folder)


def test_prepare_renders_once_even_when_three_ask_at_once(tmp_path, monkeypatch):
    context = multiprocessing.get_context("fork")
    askers = [context.Process(target=_prepare_small, args=(tmp_path,)) for _ in range(3)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert [asker.exitcode for asker in askers] == [0, 0, 0]
    rendered = ["benchmarks", "llava", "mmvp_dev", "mmvp_test", "questions_dev", "questions_test", "shards"]
    rendered += ["zero_shot_dev", "zero_shot_test"]
    assert sorted(os.listdir(tmp_path)) == rendered, "scratch folders were left behind"
    for name, value in SMALL.items():
        monkeypatch.setattr(writers, name, value)
    before = _tree(tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    world = writers.prepare(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == stamps
    assert world.shards == tmp_path / "shards"
    # A folder that another version of the code has rendered is rendered anew.
    (tmp_path / "mmvp_dev" / "world.sha256").write_text("another")
    (tmp_path / "mmvp_dev" / "Questions.csv").unlink()
    writers.prepare(tmp_path)
    assert _tree(tmp_path) == before


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAVA_GENHANCER_CACHE", str(tmp_path))
    assert paths.cache_folder() == tmp_path / "toyworld-v1"
    monkeypatch.delenv("LLAVA_GENHANCER_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.cache_folder() == tmp_path / ".cache" / "llava_genhancer" / "toyworld-v1"
    assert paths.cache_folder(tmp_path / "x") == tmp_path / "x"


def test_a_cache_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="LLAVA_GENHANCER_CACHE"):
        writers.prepare(tmp_path / "file" / "below")


def test_nothing_to_write_is_a_clear_error(tmp_path):
    with pytest.raises(InputError, match="at least 1"):
        writers.write_shards(tmp_path, 0, seed=0)


def test_resolve_names_the_shipped_folders_only():
    assert paths.resolve("toyworld:clip").endswith("toyworld/weights/clip")
    assert paths.resolve("openai/clip-vit-large-patch14") == "openai/clip-vit-large-patch14"
