"""Zero-shot classification and retrieval: parity with clip_benchmark, one set in every layout, resume, refusals."""

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from llava_genhancer.cli import main
from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.tower import Tower
from llava_genhancer.evaluate.towers import load_tower
from llava_genhancer.evaluate.zero_shot import measure as zero_shot
from llava_genhancer.evaluate.zero_shot.data import Classification, Retrieval
from llava_genhancer.evaluate.zero_shot.layouts import load_sets
from llava_genhancer.evaluate.zero_shot.prompts import set_name, templates_of
from llava_genhancer.evaluate.zero_shot.results import (
    IMAGE_RECALL,
    TEXT_RECALL,
    TOP1,
    Answers,
    Store,
    TowerAnswers,
    change,
    load_results,
)
from llava_genhancer.evaluate.zero_shot.table3 import COLUMNS, TABLE3, beside_table3, published

CLASSES = ("cat", "big dog", "red one", "blue")
WORDS = ("a red dog", "the blue cat", "two closed", "left right", "small big", "open one")
Layout = Callable[[Path], Path]


def picture(number: int) -> bytes:
    rng = np.random.default_rng(number)
    data = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (20 + number % 3, 24, 3), dtype=np.uint8)).save(data, "PNG")
    return data.getvalue()


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


# --- one classification set of 16 images, four classes, in every layout ---------------------------------------------


def by_folders(root: Path) -> Path:
    for index in range(16):
        folder = root / "test" / f"class{index // 4}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:02}.png").write_bytes(picture(index))
    (root / "classnames.txt").write_text("\n".join(CLASSES))
    return root


def by_named_folders(root: Path) -> Path:
    """Without a split's folder, names by folder."""
    by_folders(root)
    for folder in (root / "test").iterdir():
        folder.rename(root / folder.name)
    (root / "test").rmdir()
    (root / "classnames.txt").unlink()
    (root / "classnames.json").write_text(json.dumps({f"class{i}": name for i, name in enumerate(CLASSES)}))
    return root


def by_webdataset(root: Path) -> Path:
    (root / "test").mkdir(parents=True)
    for shard, numbers in enumerate((range(10), range(10, 16))):
        with tarfile.open(root / "test" / f"{shard}.tar", "w") as archive:
            for index in numbers:
                add(archive, f"s{index:07}.cls", str(index // 4).encode())
                add(archive, f"s{index:07}.png", picture(index))
    (root / "test" / "nshards.txt").write_text("2\n")
    (root / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
    return root


def by_parquet(root: Path) -> Path:
    import datasets

    names = datasets.ClassLabel(names=[c.replace(" ", "_") for c in CLASSES])
    features = datasets.Features({"img": datasets.Image(), "fine_label": names, "coarse_label": datasets.Value("int8")})
    rows = [{"img": {"bytes": picture(i)}, "fine_label": i // 4, "coarse_label": 0} for i in range(16)]
    (root / "data").mkdir(parents=True)
    datasets.Dataset.from_list(rows, features=features).to_parquet(root / "data" / "test-00000-of-00001.parquet")
    datasets.Dataset.from_list(rows[:1], features=features).to_parquet(root / "data" / "train-00000-of-00001.parquet")
    return root


# --- one retrieval set of eight images ------------------------------------------------------------------------------


def captions_of(index: int) -> list[str]:
    return [f"{WORDS[(index + k) % 6]} {index} {k}" for k in range(2 + index % 2)]


def by_jsonl(root: Path) -> Path:
    (root / "images").mkdir(parents=True)
    lines = []
    for index in range(8):
        (root / "images" / f"{index}.png").write_bytes(picture(index))
        lines.append(json.dumps({"image": f"images/{index}.png", "captions": captions_of(index)}))
    (root / "captions.jsonl").write_text("\n".join(lines))
    return root


def by_karpathy(root: Path) -> Path:
    by_jsonl(root)
    (root / "captions.jsonl").unlink()
    images = [
        {"filename": f"{i}.png", "split": "test", "sentences": [{"raw": c} for c in captions_of(i)]} for i in range(8)
    ]
    images.insert(3, {"filename": "absent.png", "split": "train", "sentences": []})
    (root / "dataset_coco.json").write_text(json.dumps({"dataset": "coco", "images": images}))
    return root


def by_retrieval_webdataset(root: Path) -> Path:
    (root / "test").mkdir(parents=True)
    with tarfile.open(root / "test" / "0.tar", "w") as archive:
        for index in range(8):
            add(archive, f"s{index:07}.png", picture(index))
            add(archive, f"s{index:07}.txt", "\n".join(captions_of(index)).encode())
    (root / "dataset_type.txt").write_text("retrieval\n")
    return root


@pytest.fixture(scope="module")
def clip(clip_dir: Path) -> Tower:
    return load_tower(str(clip_dir), "cpu")


@pytest.fixture(scope="module")
def siglip(siglip_dir: Path) -> Tower:
    return load_tower(str(siglip_dir), "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``cars`` (classification) and ``flickr30k`` (retrieval) below one folder."""
    root = tmp_path_factory.mktemp("sets")
    by_folders(root / "cars")
    by_jsonl(root / "flickr30k")
    return root


def of_one(path: Path) -> Classification | Retrieval:
    (found,) = load_sets([path])
    return found


# --- what is measured -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_classification_is_clip_benchmarks(kind: str, folder: Path, request: pytest.FixtureRequest) -> None:
    from clip_benchmark.metrics.zeroshot_classification import run_classification, zero_shot_classifier

    tower: Tower = request.getfixturevalue(kind)
    data = of_one(folder / "cars")
    model = SimpleNamespace(
        encode_text=lambda ids: tower.model.get_text_features(input_ids=ids).pooler_output,
        encode_image=lambda pixels: tower.model.get_image_features(pixel_values=pixels).pooler_output,
    )
    theirs = zero_shot_classifier(model, tower.texts, list(data.classes), list(data.templates), "cpu", amp=False)
    torch.testing.assert_close(zero_shot.classifier(tower, data, batch_size=5), theirs.T)
    batches = [(tower.images([data.images.open(i)])["pixel_values"], torch.tensor([data.labels[i]])) for i in range(16)]
    logits, truth = run_classification(model, theirs, batches, "cpu", amp=False)
    (answers,) = zero_shot.classify(tower, data, batch_size=6)
    assert [x for (x,) in answers.units] == (logits.argmax(1) == truth).tolist()
    assert answers.score.n == 16
    assert answers.guess == 25


def test_recall_is_what_counting_by_hand_gives(clip: Tower, folder: Path) -> None:
    data = of_one(folder / "flickr30k")
    by_image, by_text = zero_shot.retrieve(clip, data, batch_size=3)
    pixels = torch.cat([clip.image_features([data.images.open(i)]) for i in range(8)]).double().numpy()
    pixels /= np.linalg.norm(pixels, axis=1, keepdims=True)
    texts = [(owner, t) for owner, all_of in enumerate(data.captions) for t in all_of]
    words = np.concatenate([clip.text_features([t]).double().numpy() for _, t in texts])
    words /= np.linalg.norm(words, axis=1, keepdims=True)
    expected: list[list[bool]] = [[] for _ in range(8)]
    for (owner, _), word in zip(texts, words, strict=True):
        nearest = sorted(range(8), key=lambda i: -float(word @ pixels[i]))[:5]
        expected[owner].append(owner in nearest)
    assert [list(unit) for unit in by_image.units] == expected
    for image in range(8):
        nearest = sorted(range(len(texts)), key=lambda j: -float(words[j] @ pixels[image]))[:5]
        assert by_text.units[image] == (any(texts[j][0] == image for j in nearest),)
    assert (by_image.metric, by_text.metric) == (IMAGE_RECALL, TEXT_RECALL)
    assert by_image.guess == pytest.approx(62.5)
    assert not all(map(all, by_image.units))  # the set can tell


@pytest.mark.parametrize("layout", [by_named_folders, by_webdataset, by_parquet])
def test_a_classification_set_is_the_same_in_every_layout(
    layout: Layout, clip: Tower, folder: Path, tmp_path: Path
) -> None:
    first, other = of_one(folder / "cars"), of_one(layout(tmp_path / "wds_cars"))
    assert (other.name, other.classes, other.labels) == ("cars", CLASSES, first.labels)
    assert other.templates == first.templates
    assert zero_shot.classify(clip, other)[0].units == zero_shot.classify(clip, first)[0].units


@pytest.mark.parametrize("layout", [by_karpathy, by_retrieval_webdataset])
def test_a_retrieval_set_is_the_same_in_every_layout(layout: Layout, folder: Path, tmp_path: Path) -> None:
    first, other = of_one(folder / "flickr30k"), of_one(layout(tmp_path / "wds_flickr30k"))
    assert other.name == "flickr30k"
    assert other.captions == first.captions
    for index in range(8):
        assert other.images.get(index) == first.images.get(index)


def test_names_and_prompts_are_clip_benchmarks(tmp_path: Path) -> None:
    names = {
        "wds_imagenet1k": "imagenet1k",
        "ImageNet": "imagenet1k",
        "wds_vtab-cifar100": "cifar100",
        "CIFAR-100": "cifar100",
        "stanford_cars": "cars",
        "SUN397": "sun397",
        "coco": "mscoco_captions",
        "wds_mscoco_captions": "mscoco_captions",
        "wds_flickr30k": "flickr30k",
        "my_own": "my_own",
    }
    assert {folder: set_name(tmp_path / folder) for folder in names} == names
    assert len(templates_of("imagenet1k", tmp_path)) == 80
    assert templates_of("my_own", tmp_path) == templates_of("imagenet1k", tmp_path)
    assert templates_of("cars", tmp_path)[3] == "i love my {c}!"
    (tmp_path / "zeroshot_classification_templates.txt").write_text("one {c}\n\n")
    assert templates_of("cars", tmp_path) == ("one {c}",)


def test_wnids_take_the_names_known_for_them(tmp_path: Path) -> None:
    """ImageNet's folders hold no names; only all 1 000 can be named by place."""
    for i in range(1000):
        folder = tmp_path / "imagenet" / "val" / f"n{i:08}"
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(b"")
    found = of_one(tmp_path / "imagenet")
    assert (found.name, found.named, len(found.classes)) == ("imagenet1k", "clip_benchmark", 1000)
    assert found.classes[:2] == ("tench", "goldfish")
    (tmp_path / "imagenet" / "val" / "n00000007" / "1.png").unlink()
    with pytest.raises(InputError, match="999 folders are called by wnid"):
        load_sets([tmp_path / "imagenet"])


def test_a_hub_table_of_captions_with_its_splits_in_one_file(folder: Path, tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "caption": [datasets.Value("string")], "split": datasets.Value("string")}
    )
    rows = [{"image": {"bytes": picture(i)}, "caption": captions_of(i), "split": "test"} for i in range(8)]
    rows.insert(2, {"image": {"bytes": picture(99)}, "caption": ["no"], "split": "train"})
    (tmp_path / "flickr30k" / "data").mkdir(parents=True)
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "flickr30k" / "data" / "all.parquet")
    first, other = of_one(folder / "flickr30k"), of_one(tmp_path)
    assert (other.name, other.captions) == ("flickr30k", first.captions)
    assert [other.images.get(i) for i in range(8)] == [first.images.get(i) for i in range(8)]


# --- intervals, comparisons, files ----------------------------------------------------------------------------------


def answers(text: str, metric: str = TOP1) -> Answers:
    return Answers("cars", metric, "x", tuple(tuple(c == "1" for c in word) for word in text.split()), 25.0)


def test_scores_and_changes_are_over_images() -> None:
    first, other = answers("1 0 1 1 0 0 0 0"), answers("0 0 1 1 1 1 1 1")
    assert (first.score.right, first.score.n, first.score.percent) == (3, 8, 37.5)
    assert first.score.low == pytest.approx(13.68, abs=0.01)  # Wilson's
    found = change(first, other)
    assert (found.difference, found.test) == (37.5, "exact McNemar")
    assert found.p == 2 * (1 + 5) / 2**5  # four gained, one lost
    # Captions of one image stand and fall together: half the images right is known no better than by one caption each.
    together, alone = answers("11111 00000 " * 20, IMAGE_RECALL), answers("1 0 " * 20)
    assert together.score.n == 200
    width = together.score.high - together.score.low
    assert width == pytest.approx(alone.score.high - alone.score.low, rel=0.15)
    with pytest.raises(InputError, match="different data"):
        change(first, replace(other, sha256="y"))


def test_json_round_trip() -> None:
    kept = TowerAnswers("folder", "a", (answers("1 0 1"), answers("101 01", IMAGE_RECALL)), weights={"m": "s"})
    assert TowerAnswers.from_dict(json.loads(json.dumps(kept.to_dict()))) == kept
    with pytest.raises(InputError, match="not a zero-shot result"):
        TowerAnswers.from_dict({"tower": "x"})


def test_the_command_measures_once_and_says_all(
    clip_dir: Path, siglip_dir: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "eval" / "zero_shot.json"
    command = ["zero-shot", str(clip_dir), str(siglip_dir), "--data", str(folder), "--output", str(output)]
    with pytest.raises(SystemExit, match="0"):
        main(command)
    said = capsys.readouterr().out
    assert "tiny-siglip against tiny-clip, cars, top-1:" in said
    first = json.loads(output.read_text())
    assert [s["name"] for s in first["sets"]] == ["cars", "flickr30k"]
    assert len(first["comparisons"]) == 3
    towers = load_results(output)
    assert [t.label for t in towers] == ["tiny-clip", "tiny-siglip"]
    store = sorted((tmp_path / "eval" / "zero_shot").iterdir())
    assert len(store) == 4

    # One answer changed by hand, one file spoilt: the first is believed, the second is measured again.
    cars = [p for p in store if p.name.startswith("cars-")]
    kept = json.loads(cars[0].read_text())
    kept["answers"][0]["answers"] = " ".join(["1"] * 16)
    cars[0].write_text(json.dumps(kept))
    cars[1].write_text("{")
    zero_shot.run([str(clip_dir), str(siglip_dir)], [folder], output)
    again = {t.label: t.answers[0] for t in load_results(output)}
    before = {t.label: t.answers[0] for t in towers}
    assert sum(again[label] == before[label] for label in again) == 1
    assert any(a.score.percent == 100 for a in again.values())


def test_other_weights_or_data_are_measured_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put({"m": "1"}, [answers("1 0")])
    assert store.get({"m": "1"}, "cars", "x") == [answers("1 0")]
    assert store.get({"m": "2"}, "cars", "x") is None
    assert store.get({"m": "1"}, "cars", "y") is None
    assert store.get({}, "cars", "x") is None


def test_table3_beside_towers_of_its_backbone_alone() -> None:
    assert all(len(row) == len(COLUMNS) for row in TABLE3.values())
    ours = TowerAnswers("t", "ours", (answers("1 0"),), recipe="openai-l14-224", backbone="openai-l14-224")
    assert published(ours, ours.answers[0]) == 77.6
    assert published(replace(ours, recipe=None), ours.answers[0]) == 77.7
    assert published(replace(ours, backbone=None), ours.answers[0]) is None
    page = beside_table3([ours])
    assert "disputed" in page
    assert "| **ours** | - | - | - | 50.0 | - | - | - | - |" in page
    toy = replace(ours, answers=(replace(answers("1"), data="critters"),))
    assert beside_table3([toy]) == ""


# --- refusals -------------------------------------------------------------------------------------------------------


def spoil_label(root: Path) -> None:
    (root / "classnames.txt").write_text("cat\ndog\n")


def spoil_count(root: Path) -> None:
    (root / "test" / "nshards.txt").write_text("3")


def spoil_shard(root: Path) -> None:
    shard = root / "test" / "1.tar"
    shard.write_bytes(shard.read_bytes()[:700])


def spoil_templates(root: Path) -> None:
    (root / "zeroshot_classification_templates.txt").write_text("a photo")


def spoil_type(root: Path) -> None:
    (root / "dataset_type.txt").write_text("multilabel")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_label, "label 2 has no name among its 2 class names"),
        (spoil_count, "2 shards in test/, and nshards.txt says 3"),
        (spoil_shard, r"1\.tar"),
        (spoil_templates, r"'a photo' has no \{c\}"),
        (spoil_type, "of the type multilabel"),
    ],
)
def test_a_broken_webdataset_is_one_clear_line(spoil: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    root = by_webdataset(tmp_path / "wds_cars")
    spoil(root)
    with pytest.raises(InputError, match=message):
        load_sets([root])


def test_what_is_no_set_is_refused(tmp_path: Path, clip: Tower) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        load_sets([tmp_path / "absent"])
    with pytest.raises(InputError, match="holds no zero-shot data set"):
        load_sets([tmp_path])
    (tmp_path / "sets" / "cifar-100-python").mkdir(parents=True)
    with pytest.raises(InputError, match="pickles can run code"):
        load_sets([tmp_path / "sets"])
    root = by_jsonl(tmp_path / "sets" / "coco")
    lines = (root / "captions.jsonl").read_text()
    (root / "captions.jsonl").write_text(lines + '\n{"image": "../../x.png", "captions": ["a"]}')
    with pytest.raises(InputError, match=r"entry 9: '\.\./\.\./x\.png' is no path below"):
        load_sets([root])
    (root / "captions.jsonl").write_text("\n".join(lines.splitlines()[:4]))
    with pytest.raises(InputError, match="has 4 images: recall@5 needs 5"):
        zero_shot.retrieve(clip, of_one(root))
    by_karpathy(tmp_path / "sets" / "mscoco")
    with pytest.raises(InputError, match="are both the data set mscoco_captions"):
        load_sets([tmp_path / "sets"])


def test_a_bad_image_ends_the_measurement(tmp_path: Path, clip: Tower) -> None:
    root = by_folders(tmp_path / "cars")
    (root / "test" / "class1" / "05.png").write_bytes(picture(5)[:100])
    with pytest.raises(InputError, match=r"image test/class1/05\.png cannot be decoded"):
        zero_shot.classify(clip, of_one(root))


def test_broken_weights_are_said(tmp_path: Path, clip: Tower, folder: Path) -> None:
    broken = load_tower(clip.name, "cpu")
    with torch.no_grad():
        broken.model.visual_projection.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="embeddings are not finite"):
        zero_shot.evaluate_tower(broken, load_sets([folder]))


def test_mmvps_folder_is_no_zero_shot_set(benchmark_dir):
    with pytest.raises(InputError, match="is MMVP-VLM's folder, which has no classes"):
        load_sets([benchmark_dir])
