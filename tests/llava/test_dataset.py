"""What of a JSON is used and why not the rest, what a sample becomes, and batches that go on exactly."""

import itertools
import json
import math
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from slow_llama import write_tokenizer

from llava_genhancer.data import entries
from llava_genhancer.data.decode import bounded
from llava_genhancer.errors import InputError
from llava_genhancer.llava.batches import LlavaLoader, global_batches, group_by_modality
from llava_genhancer.llava.conversation import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Encoded, Turn, encode
from llava_genhancer.llava.dataset import (
    Collator,
    ImageView,
    LlavaDataset,
    cut,
    load_image_processor,
    pad_to_square,
)
from llava_genhancer.llava.samples import BadSample, Samples, read_samples
from llava_genhancer.llava.tokenizer import load_tokenizer

TOKENS_PER_IMAGE = 9


def talk(*texts: str, first: int = 0) -> list[dict[str, str]]:
    """A conversation, in turn from human and gpt."""
    return [{"from": ("human", "gpt")[(i + first) % 2], "value": text} for i, text in enumerate(texts)]


def entry(key: str, *texts: str, image: Any = None) -> dict[str, Any]:
    """An entry of the JSON."""
    return {"id": key, **({} if image is None else {"image": image}), "conversations": talk(*texts)}


USABLE = [
    entry("image", "What is it?\n<image>", "A cat.", image="a.png"),
    entry("again", "<image> What is <image>it?", "A cat.", image="sub/b.png"),
    entry("later", "Hello", "Hi", "<image>\nWhat?", "A dog.", image=["a.png"]),
    entry("two", "<image>\n<image>\nWhich?", "The first.", "And <image>?", "No.", image=["a.png", "a.png", "b.png"]),
    entry("text", "What does <image> mean?", "Nothing."),
    entry("unshown", "What is it?", "A cat.", image="a.png"),
    {"id": "greeting", "conversations": talk("Hello!", "Who are you?", "I.", first=1)},
    {"conversations": talk("no", "id")},
]
UNUSABLE = [
    ("not an object", ["a list"]),
    ("no conversation", {"id": "1"}),
    ("no conversation", {"id": "1", "conversations": []}),
    ("no conversation", {"id": "1", "conversations": "human: hi"}),
    ('a turn has no text as "value"', {"id": "1", "conversations": [{"from": "human"}, *talk("x", first=1)]}),
    ('a turn has no text as "value"', {"id": "1", "conversations": [*talk("x"), {"from": "gpt", "value": None}]}),
    ('a turn has no text as "value"', {"id": "1", "conversations": ["hi", "ho"]}),
    ("no answer at the end", entry("1", "hi")),
    ("no answer at the end", entry("1", "hi", "ho", "again")),
    ("an answer without a question", {"id": "1", "conversations": talk("ho", first=1)}),
    ('two turns in a row from "human"', {"id": "1", "conversations": [*talk("hi"), *talk("again")]}),
    ('two turns in a row from "gpt"', {"id": "1", "conversations": [*talk("hi", "a"), *talk("b", first=1)]}),
    ('two turns in a row from "gpt"', {"id": "1", "conversations": [*talk("a", first=1), *talk("b", first=1)]}),
    *(
        (f'a turn from "{role}" ("human" and "gpt" are read)', {"id": "1", "conversations": turns})
        for role, turns in {
            "system": [{"from": "system", "value": "x"}, *talk("hi", "ho")],
            "user": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "ho"}],
            "tool": [*talk("hi"), {"from": "tool", "value": "x"}, *talk("ho", first=1)],
            "None": [{"from": None, "value": "hi"}, *talk("ho", first=1)],
            "a role with a name o": [{"from": "a role with a name of its own", "value": "hi"}, *talk("ho", first=1)],
        }.items()
    ),
    ('a turn without "from" ("human" and "gpt" are read)', {"id": "1", "conversations": [{"value": "hi"}]}),
    ("an empty answer", entry("1", "hi", " \n")),
    ("an empty question", entry("1", "", "ho")),
    ("a character that is not Unicode in the answer", entry("1", "hi", "ho \ud800")),
    ("not as many <image> as images", entry("1", "<image> hi", "ho", "<image>", "x", image="a.png")),
    ("not as many <image> as images", entry("1", "<image> hi", "ho", image=["a.png", "b.png"])),
    ("image in an answer", entry("1", "hi", "<image>", image="a.png")),
    ("image names cannot be read", entry("1", "<image>", "x", image=7)),
    ("image names cannot be read", entry("1", "<image>", "x", image=["a.png", ""])),
    ("image names cannot be read", entry("1", "<image>", "x", image=[None])),
    ("image names cannot be read", {**entry("1", "<image>", "x"), "images": [{"path": "a.png"}]}),
    ("image names cannot be read", {**entry("1", "<image>", "x", image="a.png"), "images": ["b.png"]}),
    *(
        ("image outside the image folder", entry("1", "<image>", "x", image=name))
        for name in (
            "/etc/passwd",
            "../a.png",
            "a/../../b.png",
            "a\\..\\..\\b.png",
            "C:\\a.png",
            "\\\\host\\a",
            "..",
            "a\0.png",
        )
    ),
]


def write(path: Path, data: Any) -> Path:
    """A JSON file."""
    path.write_bytes(json.dumps(data, ensure_ascii=False).encode("utf-8", "backslashreplace"))
    return path


def test_every_reason_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = read_samples(write(tmp_path / "d.json", [*(bad for _, bad in UNUSABLE), *USABLE]), tmp_path)
    assert samples.report.by_reason == Counter(reason for reason, _ in UNUSABLE)
    assert (samples.report.read, samples.report.skipped) == (len(UNUSABLE) + len(USABLE), len(UNUSABLE))
    assert f"{len(UNUSABLE)} of {len(UNUSABLE) + len(USABLE)} cannot be used" in caplog.text
    assert "(first 1: /etc/passwd is not inside" in caplog.text
    assert samples.as_text.keys == [
        ("text", "text has <image> but the sample has no image"),
        ("unshown", "sample has an image but no text has <image>"),
    ]
    assert "1 of 8: sample has an image but no text has <image> (first unshown)" in caplog.text
    assert '1 begin with an answer ("gpt"), which is dropped' in caplog.text
    assert [samples[i].key for i in range(len(samples))] == [
        *(u.get("id", f"#{len(UNUSABLE) + len(USABLE) - 1}") for u in USABLE)
    ]
    assert [samples[i].images for i in range(len(samples))] == [
        ["a.png"], ["sub/b.png"], ["a.png"], ["a.png", "a.png", "b.png"], [], [], [], [],
    ]  # fmt: skip
    assert [samples[i].turns for i in range(len(samples))] == [
        [Turn("<image>\nWhat is it?", "A cat.")],
        [Turn("<image>\nWhat is it?", "A cat.")],
        [Turn("Hello", "Hi"), Turn("<image>\nWhat?", "A dog.")],
        [Turn("<image>\n<image>\nWhich?", "The first."), Turn("And <image>?", "No.")],
        [Turn("What does <image> mean?", "Nothing.")],
        [Turn("What is it?", "A cat.")],
        [Turn("Who are you?", "I.")],
        [Turn("no", "id")],
    ]
    assert samples.lengths.tolist() == [6, 6, 6, 8, -5, -5, -5, -2]


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("form", ["list", "indented", "escaped", "lines"])
def test_scan_equals_json_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, form: str) -> None:
    """Entries that lie across blocks, characters that do, too: the places found are those of the entries."""
    monkeypatch.setattr(entries, "BLOCK_BYTES", block)
    data = [*USABLE, entry("ünï", '中文 ]}, {"[', "😀\\n \u2028 end")]
    text = {
        "list": json.dumps(data, ensure_ascii=False),
        "indented": "\ufeff\n" + json.dumps(data, indent=2, ensure_ascii=False) + "\n",
        "escaped": json.dumps(data),
        "lines": "\n".join(json.dumps(one, ensure_ascii=False) for one in data),
    }[form]
    path = tmp_path / "d.json"
    path.write_bytes(text.encode())
    samples = read_samples(path, tmp_path)
    assert len(samples) == len(data)
    raw = path.read_bytes()
    assert [json.loads(raw[start : start + size]) for start, size, _ in samples.index.tolist()] == data
    assert samples[len(data) - 1].turns == [Turn('中文 ]}, {"[', "😀\\n \u2028 end")]
    other = read_samples(write(tmp_path / "e.json", [*data, USABLE[0]]), tmp_path)
    assert samples.fingerprint == read_samples(path, tmp_path).fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "no usable sample: it is empty"),
        (b"", "no usable sample: it is empty"),
        (b'[{"id": "1"}]', "no usable sample: 1 of 1 cannot be used: 1 no conversation"),
        (b'[{"id": "1"}, {"id', "entry 1 is not valid JSON"),
        (b'[{"id": "1"}, ', "ends after 1 entries without closing"),
        (b"id,image\n1,2", "entry 0 is not valid JSON"),
        (b"[\xff\xfe]", "is not UTF-8"),
    ],
)
def test_files_that_are_no_data(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "d.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_samples(path, tmp_path)


def test_paths_that_are_none(tmp_path: Path) -> None:
    data = write(tmp_path / "d.json", USABLE)
    with pytest.raises(InputError, match="names images: give image_folder"):
        read_samples(data)
    with pytest.raises(InputError, match=r"image_folder .*nowhere does not exist"):
        read_samples(data, tmp_path / "nowhere")
    with pytest.raises(InputError, match="No such file"):
        read_samples(tmp_path / "no.json", tmp_path)
    assert len(read_samples(write(tmp_path / "text.json", USABLE[4:5]))) == 1


def test_images_is_read_like_image(tmp_path: Path) -> None:
    """LLaVA-NeXT's lists, ShareGPT's key: the samples are those of the same JSON in LLaVA-1.5's own form."""
    (tmp_path / "größe" / "深い").mkdir(parents=True)
    names = ["größe/深い/naïve 1.png", "a.png"]
    one = [entry(str(i), "<image>\nWhat?", "A cat.", image=name) for i, name in enumerate(names)]
    two = entry("2", "<image>\n<image>\nWhich?", "This.", image=names)
    expected = read_samples(write(tmp_path / "a.json", [*one, two]), tmp_path)
    assert [expected[i].images for i in range(3)] == [names[:1], names[1:], names]
    forms: dict[str, Callable[[list[str]], dict[str, Any]]] = {
        "images": lambda images: {"images": images},
        "image": lambda images: {"image": images},
        "both": lambda images: {"image": images, "images": images},
        "null": lambda images: {"image": None, "images": images},
        "path": lambda images: {"images": images[0] if len(images) == 1 else images},
    }
    for name, form in forms.items():
        data = [{**e, **form(e["image"] if isinstance(e["image"], list) else [e["image"]])} for e in (*one, two)]
        for e in data:
            if "image" not in form([]):
                e.pop("image")
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps(e, ensure_ascii=name != "image") for e in data))
        samples = read_samples(path, tmp_path)
        assert [samples[i] for i in range(3)] == [expected[i] for i in range(3)], name
        assert (samples.with_image, samples.as_text.read, samples.as_text.skipped) == (3, 3, 0)


@pytest.mark.parametrize(
    "image", [{}, {"image": None}, {"image": ""}, {"image": []}, {"images": []}, {"images": None}, {"image": math.nan}]
)
def test_text_that_mentions_an_image_it_has_not_is_counted(tmp_path: Path, image: dict[str, Any]) -> None:
    good = entry("good", "<image>\nWhat?", "A cat.", image="a.png")
    bad = {**entry("bad", "<image>\nWhat?", "A cat."), **image}
    samples = read_samples(write(tmp_path / "d.json", [good, bad, entry("text", "Who?", "I.")]), tmp_path)
    assert samples.facts() == {
        "samples": 3,
        "with_image": 1,
        "left_out": {"by_reason": {}, "keys": []},
        "read_as_text": {
            "by_reason": {"text has <image> but the sample has no image": 1},
            "keys": [["bad", "text has <image> but the sample has no image"]],
        },
    }


def test_absolute_paths_and_climbing_inside_the_image_folder(tmp_path: Path) -> None:
    """As LLaVA takes them, whether the folder or the path goes over a link; what leaves the folder is named."""
    root, other = tmp_path / "real" / "images", tmp_path / "other"
    (root / "sub").mkdir(parents=True)
    other.mkdir()
    for folder in (root, root / "sub", other, tmp_path / "real"):
        Image.new("RGB", (9, 9)).save(folder / "a.png")
    (tmp_path / "link").symlink_to(root)
    (root / "train").symlink_to(other)  # a user's own link out of the folder
    inside = [
        f"{root}/a.png", f"{root}/sub/a.png", f"{tmp_path}/link/a.png", f"{root}/sub/../a.png", "sub/../a.png",
        f"{tmp_path}/other/../real/images/a.png", "train/a.png", f"{root}/train/a.png",
    ]  # fmt: skip
    outside = [
        f"{tmp_path}/real/a.png", f"{other}/a.png", "../a.png", "sub/../../a.png", f"{root}/../a.png",
        f"{root}-2/a.png", "train/../real/a.png", "train/../train/a.png",
    ]  # fmt: skip
    data = [entry(name, "<image>", "x", image=name) for name in (*inside, *outside)]
    for folder in (root, tmp_path / "link"):
        samples = read_samples(write(tmp_path / "d.json", data), folder)
        assert [samples[i].key for i in range(len(samples))] == inside
        assert all(Path(samples.image_path(samples[i].images[0])).is_file() for i in range(len(samples)))
        assert samples.report.by_reason == {"image outside the image folder": len(outside)}
        expected = f"{outside[0]}: {outside[0]} is not inside {folder}"
        assert samples.first == {"image outside the image folder": expected}


# --- images and length --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(5, 5), (9, 4), (4, 9), (10, 7), (1, 8)])
def test_pad_to_square_keeps_the_image_in_the_middle(size: tuple[int, int]) -> None:
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    side = max(size)
    expected = np.empty((side, side, 3), np.uint8)
    expected[:] = (122, 116, 104)
    top, left = (side - height) // 2, (side - width) // 2
    expected[top : top + height, left : left + width] = pixels
    assert np.array_equal(pad_to_square(Image.fromarray(pixels), (122, 116, 104)), expected)


def test_view(tiny_clip: Path) -> None:
    """Square: the middle of the image fills the view. Pad: all of it is seen, around it CLIP's mean, nearly 0."""
    processor = load_image_processor(str(tiny_clip))
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60] = 255
    image = Image.fromarray(pixels)
    square, padded = ImageView(processor, "square")(image), ImageView(processor, "pad")(image)
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    assert square.shape == padded.shape == (3, 32, 32)
    assert square.dtype == padded.dtype == torch.float32
    assert torch.allclose(square[:, 2:-2, 2:-2].mean((1, 2)), (1 - mean) / std, atol=1e-4)
    seen = padded * std[:, None, None] + mean[:, None, None]
    assert torch.allclose(seen[:, 16, [2, 16, 29]], torch.tensor([0.0, 1.0, 0.0]).expand(3, 3), atol=0.02)
    background = torch.tensor([int(255 * m) / 255 for m in processor.image_mean])
    assert torch.allclose(seen[:, 0, 0], background, atol=1e-4)


@pytest.mark.parametrize("mode", ["pad", "square"])
@pytest.mark.parametrize("size", [(8, 1_000_000), (1_000_000, 8), (1080, 30_000)])
def test_a_very_long_image_takes_bounded_memory(tiny_clip: Path, mode: Any, size: tuple[int, int]) -> None:
    """Padded to a square as it is, it would take gigabytes or terabytes; the views are those of a smaller likeness."""
    processor = load_image_processor(str(tiny_clip))
    image = Image.new("RGB", size, (200, 30, 30))
    tracemalloc.start()
    view = ImageView(processor, mode)(image)
    peak = tracemalloc.get_traced_memory()[1]  # numpy's share of it, where the square was twelve times as large
    tracemalloc.stop()
    assert peak < 400e6
    width, height = (max(1, round(side * 4000 / max(size))) for side in size)
    likeness = Image.new("RGB", (width, height), (200, 30, 30))
    assert torch.allclose(view, ImageView(processor, mode)(likeness), atol=1e-6)


@pytest.mark.parametrize("size", [(8000, 20), (20, 8000), (320, 10), (1000, 700)])
def test_ordinary_images_are_padded_to_the_same_pixels(tiny_clip: Path, size: tuple[int, int]) -> None:
    processor = load_image_processor(str(tiny_clip))
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    background = tuple(int(value * 255) for value in processor.image_mean)
    expected = processor(pad_to_square(image, background), return_tensors="np")["pixel_values"][0]
    assert np.array_equal(ImageView(processor, "pad")(image), expected)
    if size != (8000, 20) and size != (20, 8000):
        expected = processor(image, return_tensors="np")["pixel_values"][0]
        assert np.array_equal(ImageView(processor, "square")(image), expected)


def test_the_middle_of_a_very_long_image_is_what_the_centre_crop_leaves(tiny_clip: Path) -> None:
    processor = load_image_processor(str(tiny_clip))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40 * 50, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    assert bounded(image, pad=False, crop=True).size == (40 * 32, 40)
    assert np.abs(ImageView(processor, "square")(image).numpy() - expected).max() < 0.02


def test_an_image_without_memory_is_that_images_failure(folder: Path, tiny_clip: Path) -> None:
    """A processor that finds no memory for one image: the sample is left out, counted and named."""
    dataset = build(read_samples(folder / "d.json", folder / "images"), folder, tiny_clip)
    processor = dataset.view.processor

    class Short:
        image_mean, do_center_crop = processor.image_mean, True

        def __call__(self, image: Image.Image, **kwargs: Any) -> Any:
            if image.getpixel((0, 0))[0] == 40:
                np.empty(1 << 60, np.uint8)
            return processor(image, **kwargs)

    dataset.view = ImageView(Short(), "square")
    item = dataset[4]
    assert item["skipped"] == [("i4", "not enough memory for it")]
    assert item["key"] == "i5"


def test_cut_never_splits_an_image() -> None:
    """For every length: the longest beginning whose expansion fits."""
    image, n = IMAGE_TOKEN_INDEX, 4
    ids = [1, image, 5, 6, 7, image, 8, 9]
    labels = [IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX, 6, 7, IGNORE_INDEX, 8, 9]
    for max_length in range(1, 20):
        sizes = np.cumsum([n if token == image else 1 for token in ids])
        kept = int((sizes <= max_length).sum())
        if kept < 4:
            with pytest.raises(BadSample, match="no room for an answer"):
                cut(Encoded(ids, labels), n, max_length)
        else:
            assert cut(Encoded(ids, labels), n, max_length) == (ids[:kept], labels[:kept])


# --- the data set -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, a broken one among them, and a JSON of twenty samples with images and eleven without."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    for i in range(20):
        Image.new("RGB", (30 + i, 40), (10 * i, 100, 200)).save(folder / "images" / f"{i}.png")
    (folder / "images" / "3.png").write_bytes(b"nothing like an image")
    (folder / "images" / "7.png").unlink()
    data = [entry(f"i{i}", "<image>\nWhat?", "A cat. " * (1 + i % 4), image=f"{i}.png") for i in range(20)]
    data += [entry(f"t{i}", "Who?", "I am. " * (1 + i % 5)) for i in range(11)]
    data[5] = entry("i5", "<image>\n<image>\nWhich?", "This one.", image=["5.png", "6.png"])
    data[9] = entry("i9", "What? " * 100 + "<image>", "Never said.", image="9.png")
    data[10] = entry("i10", "<image>", "A long answer. " * 100, image="10.png")
    write(folder / "d.json", data)
    write_tokenizer(folder / "llama")
    return folder


@pytest.fixture(scope="module")
def dataset(folder: Path, tiny_clip: Path) -> LlavaDataset:
    """The data set of the folder."""
    return build(read_samples(folder / "d.json", folder / "images"), folder, tiny_clip)


def build(samples: Samples, folder: Path, tiny_clip: Path) -> LlavaDataset:
    """A data set with the folder's tokenizer."""
    return LlavaDataset(
        samples,
        template="v1",
        tokenizer=load_tokenizer(str(folder / "llama")),
        view=ImageView(load_image_processor(str(tiny_clip)), "pad"),
        tokens_per_image=TOKENS_PER_IMAGE,
        max_length=200,
    )


def test_items(dataset: LlavaDataset) -> None:
    for position, (key, count) in {0: ("i0", 1), 5: ("i5", 2), 20: ("t0", 0)}.items():
        item = dataset[position]
        ids, labels = encode(dataset.samples[position].turns, "v1", dataset.tokenizer)
        assert (item["key"], item["input_ids"].tolist(), item["labels"].tolist()) == (key, ids, labels)
        assert (item["images"] is None) == (count == 0)
        assert count == 0 or item["images"].shape == (count, 3, 32, 32)
        assert item["skipped"] == []
        assert not item["truncated"]
    assert not torch.equal(*dataset[5]["images"])


def test_what_cannot_be_used_gives_way_to_its_kind(dataset: LlavaDataset, folder: Path, tiny_clip: Path) -> None:
    assert (dataset[3]["key"], dataset[3]["skipped"]) == ("i4", [("i3", "not an image")])
    assert (dataset[7]["key"], dataset[7]["skipped"]) == ("i8", [("i7", "file not found")])
    long = dataset[9]
    assert (long["key"], long["skipped"]) == ("i10", [("i9", "no room for an answer")])
    assert long["truncated"]
    assert len(long["input_ids"]) + TOKENS_PER_IMAGE - 1 == 200

    path = write(folder / "last.json", [USABLE[4], entry("ok", "<image>", "x", image="0.png"), USABLE[4],
                                        entry("no", "<image>", "x", image="no.png")])  # fmt: skip
    around = build(read_samples(path, folder / "images"), folder, tiny_clip)
    assert (around[3]["key"], around[3]["skipped"]) == ("ok", [("no", "file not found")])
    path.write_text(path.read_text().replace("{", " ", 1))  # the file changes while the training runs
    changed = build(around.samples, folder, tiny_clip)[0]
    assert changed["skipped"] == [("#0", "the JSON changed, or cannot be read")]
    assert changed["key"] == "text"

    nothing = write(folder / "nothing.json", [entry(f"n{i}", "<image>", "x", image="no.png") for i in range(80)])
    broken = build(read_samples(nothing, folder / "images"), folder, tiny_clip)
    with pytest.raises(InputError, match=r"50 samples in a row cannot be used \(n\d+: file not found;"):
        next(iter(LlavaLoader(broken, Collator(0, TOKENS_PER_IMAGE), batch_size=1, seed=10**6)))


def test_an_image_behind_the_cut_is_not_seen(dataset: LlavaDataset, folder: Path, tiny_clip: Path) -> None:
    data = [entry("1", "<image>\nWhat?", "A long answer. " * 100, "<image>\nAnd?", "No.", image=["0.png", "no.png"])]
    item = build(read_samples(write(folder / "cut.json", data), folder / "images"), folder, tiny_clip)[0]
    assert item["skipped"] == []
    assert item["truncated"]
    assert torch.equal(item["images"], dataset[0]["images"])
    assert (item["input_ids"] == IMAGE_TOKEN_INDEX).sum() == 1


def test_collator(dataset: LlavaDataset) -> None:
    items = [dataset[20], dataset[5], dataset[0]]
    batch = Collator(7, TOKENS_PER_IMAGE)(items)
    sizes = [len(i["input_ids"]) + n * (TOKENS_PER_IMAGE - 1) for i, n in zip(items, (0, 2, 1), strict=True)]
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (3, max(sizes))
    assert batch["attention_mask"].sum(1).tolist() == sizes
    for row, (item, size) in enumerate(zip(items, sizes, strict=True)):
        expected_ids, expected_labels = [], []
        for token, label in zip(item["input_ids"].tolist(), item["labels"].tolist(), strict=True):
            times = TOKENS_PER_IMAGE if token == IMAGE_TOKEN_INDEX else 1
            expected_ids += [token] * times
            expected_labels += [label] * times
        assert batch["input_ids"][row].tolist() == expected_ids + [7] * (max(sizes) - size)
        assert batch["labels"][row].tolist() == expected_labels + [IGNORE_INDEX] * (max(sizes) - size)
    assert torch.equal(batch["pixel_values"], torch.cat([items[1]["images"], items[2]["images"]]))
    assert batch["keys"] == ["t0", "i5", "i0"]
    assert Collator(7, TOKENS_PER_IMAGE)(items[:1])["pixel_values"] is None
    assert (batch["tokens"], batch["lengths"]) == (sum(sizes), None)


def test_a_packed_batch_is_the_padded_one_without_padding(dataset: LlavaDataset) -> None:
    items = [dataset[20], dataset[5], dataset[0]]
    items[1] = {**items[1], "labels": items[1]["labels"].clone()}
    items[1]["labels"][0] = items[1]["input_ids"][0] = 11  # learned, had it anything before it
    padded = Collator(7, TOKENS_PER_IMAGE)(items)
    packed = Collator(7, TOKENS_PER_IMAGE, packing=True)(items)
    real = padded["attention_mask"].bool()
    assert packed["lengths"] == real.sum(1).tolist()
    assert packed["tokens"] == padded["tokens"] == packed["input_ids"].numel()
    assert torch.equal(packed["input_ids"], padded["input_ids"][real][None])
    targets = padded["labels"].clone()
    targets[:, 0] = IGNORE_INDEX
    assert torch.equal(packed["labels"], targets[real][None])
    assert (packed["labels"][:, 1:] != IGNORE_INDEX).sum() == (padded["labels"][:, 1:] != IGNORE_INDEX).sum()
    assert torch.equal(packed["pixel_values"], padded["pixel_values"])


def test_padding_is_counted(make_loader: Callable[..., LlavaLoader]) -> None:
    loader = make_loader()
    batches = take(loader, 9)
    assert loader.report().tokens == sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert loader.report().places == sum(batch["attention_mask"].numel() for batch in batches)


# --- order --------------------------------------------------------------------------------------------------------


def random_lengths(count: int, share: float = 0.3) -> list[int]:
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, 100, (count,), generator=generator)
    return torch.where(torch.rand(count, generator=generator) < share, -lengths, lengths).tolist()


@pytest.mark.parametrize("by_modality", [False, True])
@pytest.mark.parametrize(("count", "batch_size", "chunks"), [(64, 4, 4), (101, 2, 4), (97, 3, 1), (5, 4, 4), (1, 2, 3)])
def test_an_epoch_gives_every_sample(by_modality: bool, count: int, batch_size: int, chunks: int) -> None:
    lengths = random_lengths(count)

    def batches(seed: int, epoch: int) -> list[list[int]]:
        return global_batches(lengths, batch_size, chunks, seed=seed, epoch=epoch, by_modality=by_modality)

    first = batches(0, 0)
    flat = [i for batch in first for i in batch]
    assert all(len(batch) == batch_size * chunks for batch in first)
    assert len(first) == -(-count // (batch_size * chunks))
    assert sorted(flat[:count]) == list(range(count))
    assert flat[count:] == (flat[:count] * len(flat))[: len(flat) - count]
    assert first == batches(0, 0)
    assert count < 10 or (first != batches(0, 1) and first != batches(1, 0))


def test_batches_of_one_modality_and_even_length() -> None:
    lengths = random_lengths(1003)
    batches = global_batches(lengths, 4, 8, seed=0, epoch=0, by_modality=True)
    sides = [{lengths[i] > 0 for i in batch} for batch in batches]
    assert all(len(side) == 1 for side in sides[:-2])
    assert [True] in (list(side) for side in sides)
    assert [False] in (list(side) for side in sides)
    assert sides[:-2] != sorted(sides[:-2], key=lambda side: min(side))  # mixed over the epoch

    def spread(order: list[list[int]]) -> float:
        """How far the chunks of a batch are apart in length, on average."""
        totals = np.abs(np.array(lengths)[np.array(order)]).reshape(len(order), 8, 4).sum(-1)
        return float(totals.std(1).mean())

    shuffled = global_batches(lengths, 4, 8, seed=0, epoch=0, by_modality=False)
    assert spread(batches[:-2]) < spread(shuffled) / 10


def test_order_is_the_originals() -> None:
    """The answer of LLaVA's own sampler, asked after torch.manual_seed(3); `make test-compat` asks it more."""
    lengths = [5, -3, 8, 2, -9, 4, 7, -1, 6, 3, -2, 11, -4, 10, 1, -8]
    order = group_by_modality(lengths, 2, 2, torch.Generator().manual_seed(3))
    assert order == [11, 9, 0, 5, 4, 7, 15, 1, 13, 14, 2, 8, 3, 6, 10, 12]


# --- the loader ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make_loader(dataset: LlavaDataset) -> Callable[..., LlavaLoader]:
    """Loaders of batches of 2 with 2 micro-batches a step."""

    def make(**kwargs: Any) -> LlavaLoader:
        settings = {"batch_size": 2, "accumulation": 2, "by_modality": True, "seed": 1, "max_bad_fraction": 0.5}
        return LlavaLoader(dataset, Collator(0, TOKENS_PER_IMAGE), **{**settings, **kwargs})

    return make


def take(loader: LlavaLoader, count: int) -> list[dict[str, Any]]:
    """The next batches; the loader's state is after the last of them."""
    batches = list(itertools.islice(loader, count))
    loader.close()
    return batches


def assert_same(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    assert len(first) == len(second)
    for one, two in zip(first, second, strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            same = torch.equal(value, two[name]) if isinstance(value, torch.Tensor) else value == two[name]
            assert same, name


def test_ranks_share_every_global_batch(make_loader: Callable[..., LlavaLoader], dataset: LlavaDataset) -> None:
    loaders = [make_loader(rank=rank, world_size=2) for rank in range(2)]
    assert loaders[0].steps_per_epoch == 4  # 31 samples by 8
    given = [take(loader, 10) for loader in loaders]
    for epoch, step in ((0, 0), (0, 3), (1, 0)):
        batches = global_batches(dataset.samples.lengths.tolist(), 2, 4, seed=1, epoch=epoch, by_modality=True)
        micro = [given[rank][2 * (4 * epoch + step) + k] for k in range(2) for rank in range(2)]
        asked = [f"t{i - 20}" if i > 19 else f"i{i}" for i in batches[step]]
        replaced = {"i3": "i4", "i7": "i8", "i9": "i10"}
        assert [key for batch in micro for key in batch["keys"]] == [replaced.get(key, key) for key in asked]


@pytest.mark.parametrize(("stop", "workers"), [(0, 0), (5, 0), (8, 0), (17, 0), (11, 2)])
def test_goes_on_exactly(make_loader: Callable[..., LlavaLoader], tmp_path: Path, stop: int, workers: int) -> None:
    """Stopped anywhere, in a later epoch too, with other workers before and after, the state having been a file."""
    whole = make_loader()
    batches = take(whole, 22)
    before, after = make_loader(num_workers=workers), make_loader(num_workers=workers // 2)
    assert_same(take(before, stop), batches[:stop])
    torch.save(before.state_dict(), tmp_path / "state.pt")
    after.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_same(take(after, 22 - stop), batches[stop:])
    assert after.report() == whole.report()
    assert whole.report().by_reason.keys() == {"not an image", "file not found", "no room for an answer"}
    assert whole.report().truncated > 0


def test_other_data_is_no_place_to_go_on(
    make_loader: Callable[..., LlavaLoader], folder: Path, tiny_clip: Path
) -> None:
    other = write(folder / "other.json", [*json.loads((folder / "d.json").read_text()), USABLE[4]])
    dataset = build(read_samples(other, folder / "images"), folder, tiny_clip)
    loader = LlavaLoader(dataset, Collator(0, TOKENS_PER_IMAGE), batch_size=2)
    with pytest.raises(InputError, match=r"other\.json changed since the checkpoint"):
        loader.load_state_dict(make_loader().state_dict())


def test_randomness_of_the_training_is_left_alone(make_loader: Callable[..., LlavaLoader]) -> None:
    state = torch.get_rng_state()
    take(make_loader(num_workers=1), 2)
    assert torch.equal(state, torch.get_rng_state())


def test_too_many_bad_samples_end_the_run(folder: Path, tiny_clip: Path, dataset: LlavaDataset) -> None:
    data = [entry(f"{i}", "<image>", "x", image="no.png" if i % 3 else "0.png") for i in range(100)]
    loader = LlavaLoader(
        build(read_samples(write(folder / "bad.json", data), folder / "images"), folder, tiny_clip),
        Collator(0, TOKENS_PER_IMAGE),
        batch_size=4,
    )
    with pytest.raises(InputError, match=r"of 5\d cannot be used: \d+ file not found .*--max_bad_fraction"):
        take(loader, 100)
    odd = [*json.loads((folder / "d.json").read_text()), *(["odd"] * 30)]
    samples = read_samples(write(folder / "odd.json", odd), folder / "images")
    with pytest.raises(InputError, match=r"30 of 61 cannot be used: 30 not an object \(first #31\); fix the data"):
        LlavaLoader(build(samples, folder, tiny_clip), Collator(0, TOKENS_PER_IMAGE), batch_size=4)
    lost = [entry(f"lost{i}", "<image>", "x") for i in range(20)]
    samples = read_samples(write(folder / "lost.json", [*data[:40], *lost]), folder / "images")
    with pytest.raises(InputError, match=r"20 of 60: text has <image> but the sample has no image \(first lost0\)"):
        LlavaLoader(build(samples, folder, tiny_clip), Collator(0, TOKENS_PER_IMAGE), batch_size=4)


def test_no_interpreter_waits_for_workers() -> None:
    """They ignore SIGTERM, with which an interpreter ends them; one that still holds them must end all the same."""
    program = (
        "from torch.utils.data import DataLoader\n"
        "from llava_genhancer.data.loader import start_worker\n"
        "batches = iter(DataLoader(range(1000), num_workers=1, worker_init_fn=start_worker))\n"
        "next(batches)\n"
        "raise SystemExit(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (3, "")
