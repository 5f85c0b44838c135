"""Ids, labels, order and pixels equal the original LLaVA's (`make test-compat`)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "llava"))

from slow_llama import FLAGS, write_tokenizer  # noqa: E402

from llava_genhancer.llava.batches import group_by_modality  # noqa: E402
from llava_genhancer.llava.conversation import encode  # noqa: E402
from llava_genhancer.llava.dataset import ImageView, load_image_processor  # noqa: E402
from llava_genhancer.llava.samples import read_sample  # noqa: E402
from llava_genhancer.llava.tokenizer import load_tokenizer, save_hf_tokenizer  # noqa: E402
from llava_genhancer.toyworld.paths import resolve  # noqa: E402

PYTHON = os.environ.get("LLAVA_GENHANCER_COMPAT_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="needs old LLaVA's environment: make test-compat")

# The original's name of a template, and ours.
NAMES = {
    "plain": "plain",
    "v1": "v1",
    "llama_2": "llama_2",
    "llava_llama_2": "llava_llama_2",
    "mistral_instruct": "mistral",
}


def entry(*texts: str, image: str | None = "a.jpg") -> dict[str, Any]:
    """An entry of LLaVA's JSON; texts in turn from human and gpt."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": "1", **({"image": image} if image else {}), "conversations": turns}


CONVERSATIONS = [
    entry("<image>\nWhat are the colors of the bus in the image?", "The bus in the image is white and red."),
    entry(
        "What feature can be seen on the back of the bus?\n<image>",
        "The back of the bus features an advertisement.",
        "Is the bus driving down the street or pulled off to the side?",
        "The bus is driving down the street, which is crowded with people and other vehicles.",
    ),
    entry(
        "<image>\nIs there a cat?\nAnswer the question using a single word or phrase.", "Yes", "Where?", "12 o'clock"
    ),
    entry("Look: <image> what is it, <image>?", "It's a naïve café; 中文 and 😀."),
    entry("<image>", "A list:\n\n1. one\n2. two\n\n```python\nprint('hi')\n```", "And\nthen?", "  indented, twice  "),
    entry("<image>\n😀?", "😀 first", "ok", "\nline first"),
    entry("Who are you?", "An assistant.", "Sure?", "Yes, quite sure.", "OK", "OK", image=None),
    entry("What does <image> mean in HTML?", "Nothing: the tag is <img>.", image=None),
    entry("<image>\nIndent  it:\n    a\n        b", "def f():\n    if x:\n        return  1\n\n  - one\n     - two"),
    entry("Write 3 * 4 = ?\t\n", "\n12", "again", " 12", image=None),
]
FROM_GPT = {**entry(), "conversations": [{"from": "gpt", "value": "Hello!"}, *CONVERSATIONS[0]["conversations"]]}
CAPTIONS = [
    entry("Give a brief description of the image.\n<image>", "olive oil is a healthy ingredient"),
    entry("<image>\nWhat is this?", "😀 café, no. 12 "),
    entry("Describe.\n<image>", " the dog\nruns"),
]


MARKERS = {
    "0": {"content": "<unk>", **FLAGS},
    "1": {"content": "<s>", **FLAGS, "rstrip": True},
    "2": {"content": "</s>", **FLAGS, "lstrip": True},
    "520": {"content": "<im_start>", **FLAGS, "lstrip": True, "rstrip": True},
}
STRIPPING = {"added_tokens_decoder": MARKERS, "additional_special_tokens": ["<im_start>"]}
YI = {"bos_piece": "<|startoftext|>", "eos_piece": "<|endoftext|>"}
YI_NAMES = {"bos_token": YI["bos_piece"], "eos_token": YI["eos_piece"], "add_bos_token": False}
TEXTS = [
    "", " ", "    ", "a  b", "  a", "a  ", "\n  a\n    b", "\t\ta", " " * 40 + "x", "▁a ▁", "<s> a", " <s>  a", "a <s>",
    "</s>a", "a </s>  b", "<unk>  <unk>", "<im_start>  user \n<im_start>", "<|startoftext|> a <|endoftext|>", "<sym>",
    "<sym> a<sym><sym>b", "zzz zz z", "naïve 中文 😀", "<0x0A>", "USER: <s> ASSISTANT:  </s>USER: x",
]  # fmt: skip


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Questions, and what the original answers."""
    folder = tmp_path_factory.mktemp("original")
    legacy = write_tokenizer(folder / "legacy", legacy=True)
    # The original's count of tokens needs "USER" to be one piece and " USER" two: as in Llama's vocabulary.
    modern = write_tokenizer(folder / "modern", legacy=False, start="(USER:")
    texts = []
    for number, options in enumerate(
        {"legacy": legacy, **made}
        for legacy in (True, False)
        for made in (
            {},
            {"changes": STRIPPING},
            {"changes": YI_NAMES, **YI},
            {"symbols": ["<sym>", "zz", "zzz", "▁▁▁"]},
        )
    ):
        made = write_tokenizer(folder / f"texts-{number}", **options)
        (made / "config.json").write_text('{"model_type": "llama"}')
        export = folder / f"export-{number}"
        export.mkdir()
        save_hf_tokenizer(str(made), export)
        (export / "config.json").write_text('{"model_type": "llava"}')
        texts += [(str(made), False, TEXTS), (str(export), True, TEXTS)]
    cases = [("plain", caption) for caption in CAPTIONS]
    cases += [(name, talk) for name in NAMES if name != "plain" for talk in [*CONVERSATIONS, FROM_GPT]]
    generator = torch.Generator().manual_seed(0)
    orders = []
    for count, batch_size, chunks in ((100, 4, 3), (97, 4, 2), (96, 4, 2), (33, 2, 4), (40, 4, 4)):
        lengths = torch.randint(1, 60, (count,), generator=generator)
        text_only = torch.rand(count, generator=generator) < 0.3
        orders.append((torch.where(text_only, -lengths, lengths).tolist(), batch_size, chunks, count))
        orders.append((lengths.tolist(), batch_size, chunks, count))
    images = []
    for number, size in enumerate([(50, 31), (31, 50), (48, 48), (120, 17), (200, 150)]):
        coarse = torch.randint(0, 256, (6, 6, 3), generator=generator, dtype=torch.uint8)
        path = folder / f"{number}.png"
        Image.fromarray(coarse.numpy()).resize(size, Image.Resampling.BICUBIC).save(path)
        images.append(str(path))
    questions = {
        "tokenizers": [str(legacy), str(modern)],
        "cases": cases,
        "texts": texts,
        "orders": orders,
        "images": images,
        "processor": resolve("toyworld:clip"),
    }
    (folder / "questions.json").write_text(json.dumps(questions))
    command = [
        str(PYTHON),
        str(Path(__file__).with_name("read_conversations.py")),
        str(folder / "questions.json"),
        str(folder / "answers.json"),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    answers = json.loads((folder / "answers.json").read_text())
    assert answers["transformers"] == "4.37.2"
    return {"questions": questions, "views": load_file(folder / "answers.json.safetensors"), **answers}


@pytest.mark.parametrize("number", [0, 1], ids=["legacy", "not legacy"])
def test_ids_and_labels(original: dict[str, Any], number: int) -> None:
    tokenizer = load_tokenizer(original["questions"]["tokenizers"][number])
    for (name, talk), (ids, labels) in zip(original["questions"]["cases"], original["read"][number], strict=True):
        sample = read_sample(talk, 0)
        mine = encode(sample.turns, NAMES[name], tokenizer, images=bool(sample.images))
        assert mine.input_ids == ids, (name, talk)
        assert mine.labels == labels, (name, talk)
        assert any(label != -100 for label in labels)  # the original could count this sample's tokens


def test_texts_by_the_slow_tokenizer_and_by_the_exported_one(original: dict[str, Any]) -> None:
    assert len(original["texts"]) == 16
    for (folder, fast, texts), theirs in zip(original["questions"]["texts"], original["texts"], strict=True):
        assert load_tokenizer(folder)(texts).input_ids == theirs, (folder, fast)
    assert original["texts"][::2] == original["texts"][1::2]


def test_order(original: dict[str, Any]) -> None:
    for (lengths, batch_size, chunks, seed), order in zip(
        original["questions"]["orders"], original["orders"], strict=True
    ):
        mine = group_by_modality(lengths, batch_size, chunks, torch.Generator().manual_seed(seed))
        assert mine == order, (len(lengths), batch_size, chunks)


def test_lengths(original: dict[str, Any]) -> None:
    samples = [read_sample(talk, 0) for _, talk in original["questions"]["cases"]]
    assert [s.words if s.images else -s.words for s in samples] == original["lengths"]


@pytest.mark.parametrize("mode", ["pad", "square"])
def test_pixels(original: dict[str, Any], mode: Any) -> None:
    view = ImageView(load_image_processor(original["questions"]["processor"]), mode)
    for path, expected in zip(original["questions"]["images"], original["views"][mode], strict=True):
        assert torch.equal(view(Image.open(path).convert("RGB")), expected), path
