"""A tiny Llama with a sentencepiece vocabulary, towers, and LLaVA's two JSON files, as ordinary folders."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

WORDS = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: ASSISTANT: what colour is the ball? how many cats are there? "
    "red green blue one two three left right of near a table in the picture yes no"
)


def write_llama(folder: Path, *, model_type: str = "llama", tied: bool = False) -> Path:
    """A random two-layer language model of the family with a Llama tokenizer trained on :data:`WORDS`."""
    import sentencepiece
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True)
    text = folder / "text.txt"
    text.write_text("\n".join([WORDS, *WORDS.split("."), *WORDS.split()]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=380,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    text.unlink()
    (folder / "tokenizer.vocab").unlink()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = AutoConfig.for_model(
        model_type,
        vocab_size=380,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # answers that differ: the default initialisation nearly ignores its input
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder)
    # Vicuna's own: a temperature without sampling, which transformers refuses to save.
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "temperature": 0.9, "top_p": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


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
