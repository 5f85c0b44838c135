"""A tiny Llama and LLaVA's two JSON files, as ordinary folders, and the fields of recipes that use them."""

import json
from pathlib import Path

import pytest
from PIL import Image
from small_llama import write_llama


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a sentencepiece tokenizer and Vicuna's generation_config."""
    return write_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def llava_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """LLaVA's two JSON files over twenty images: captions; conversations with text-only and two-image samples."""
    folder = tmp_path_factory.mktemp("llava-data")
    (folder / "images").mkdir()
    colours = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
    captions, conversations = [], []
    for i in range(20):
        name, colour = list(colours.items())[i % 3]
        Image.new("RGB", (40 + i, 30), colour).save(folder / "images" / f"{i}.png")
        image = {"id": str(i), "image": f"{i}.png"}
        ask, say = {"from": "human"}, {"from": "gpt"}
        caption = f"a {name} ball near a table"
        turns = [{**ask, "value": "<image>\nwhat is in the picture?"}, {**say, "value": caption}]
        captions.append({**image, "conversations": turns})
        turns = [{**ask, "value": "<image>\nwhat colour is the ball?"}, {**say, "value": name}]
        if i % 4 == 0:
            turns += [{**ask, "value": "how many cats are there?"}, {**say, "value": "two cats"}]
        if i % 5 == 4:  # no image
            image.pop("image")
            turns = [{**ask, "value": "one and two?"}, {**say, "value": "three" + " yes" * (i % 7)}]
        conversations.append({**image, "conversations": turns})
    for name, samples in (("pretrain", captions), ("finetune", conversations)):
        (folder / f"{name}.json").write_text(json.dumps(samples))
    return {"pretrain": folder / "pretrain.json", "finetune": folder / "finetune.json", "images": folder / "images"}


@pytest.fixture(scope="session")
def llava_fields(tiny_llama: Path, tiny_clip: Path, llava_data: dict[str, Path]) -> dict[str, object]:
    """Recipe fields of a LLaVA that trains in seconds."""
    fields: dict[str, object] = {
        "llm": str(tiny_llama),
        "tower": str(tiny_clip),
        "precision": "fp32",
        "num_workers": 0,
        "max_length": 160,
        "seed": 0,
    }
    for step in ("pretrain", "finetune"):
        fields |= {
            f"{step}.data": str(llava_data[step]),
            f"{step}.image_folder": str(llava_data["images"]),
            f"{step}.global_batch_size": 8,
            f"{step}.per_device_batch_size": 4,
            f"{step}.learning_rate": 1e-2 if step == "pretrain" else 1e-3,
            f"{step}.max_steps": 6,
            f"{step}.save_steps": 3,
        }
    return fields
