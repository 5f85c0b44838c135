"""Tiny random towers of all three kinds, and a set in MMVP-VLM's official layout, all made on the spot."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

# The official set's folder names, in the order of its rows.
TYPES = (
    "Orientation", "Presence", "State", "Quantity", "Spatial", "Color", "Structural Character", "Text",
    "Camera_Perspective",
)  # fmt: skip


def write_benchmark(
    folder: Path, image: Callable[[int], Image.Image], statement: Callable[[int], str], suffix: str = ".jpg"
) -> Path:
    """270 rows; ``image(id)`` and ``statement(id)`` say what belongs to an id."""
    folder.mkdir(parents=True)
    with open(folder / "Questions.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["Question ID", "Type", "Statement"])
        for number in range(1, 271):
            kind = TYPES[(number - 1) // 30]
            writer.writerow([number, kind, statement(number)])
            path = folder / "MLLM_VLM Images" / kind / f"{number}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image(number).save(path)
    return folder


@pytest.fixture(scope="session")
def make_benchmark() -> Callable[..., Path]:
    return write_benchmark


def _with_own_questions(source: Path, folder: Path) -> Path:
    folder.mkdir(parents=True)
    shutil.copy(source / "Questions.csv", folder)
    (folder / "MLLM_VLM Images").symlink_to(source / "MLLM_VLM Images", target_is_directory=True)
    return folder


@pytest.fixture(scope="session")
def with_own_questions() -> Callable[[Path, Path], Path]:
    """A set's copy whose CSV may be changed; its images stay the source's."""
    return _with_own_questions


@pytest.fixture(scope="session")
def official_types() -> tuple[str, ...]:
    return TYPES


@pytest.fixture(scope="session")
def benchmark_dir(tmp_path_factory) -> Path:
    """Noise images of several sizes; statements with commas, quotes, capitals and one far too long."""
    rng = np.random.default_rng(0)
    words = ["red", "blue", "Dog", "cat", "left", "right", "one", "two", "Open", "closed", "small", "big"]

    def image(number: int) -> Image.Image:
        size = (18 + number % 7, 20 + number % 5, 3)
        return Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8))

    def statement(number: int) -> str:
        text = f'the {words[number % 12]}, "{words[number % 5]}" {words[number % 7]} {number}'
        return text * 20 if number == 100 else text

    return write_benchmark(tmp_path_factory.mktemp("mmvp") / "MMVP_VLM", image, statement)


def _save(model: torch.nn.Module, folder: Path, image_processor: dict) -> Path:
    """Weights spread wide enough that no pair is decided by rounding."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif name == "logit_scale":
                parameter.fill_(3.0)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(image_processor))
    return folder


@pytest.fixture(scope="session")
def clip_dir(tmp_path_factory) -> Path:
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("towers") / "tiny-clip"
    folder.mkdir()
    letters = sorted(ByteLevel.alphabet())
    vocab = [*letters, *(x + "</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": len(vocab) - 2, "eos_token_id": len(vocab) - 1, "pad_token_id": len(vocab) - 1}
    config = CLIPConfig(
        text_config={**shared, **ends, "vocab_size": len(vocab), "max_position_embeddings": 77},
        vision_config={**shared, "image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    processor = {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16}, "do_resize": True,
        "crop_size": {"height": 16, "width": 16}, "do_center_crop": True, "resample": 3, "do_normalize": True,
        "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "do_convert_rgb": True,
    }  # fmt: skip
    return _save(CLIPModel(config), folder, processor)


def _siglip_tokenizer(folder: Path) -> int:
    """A sentencepiece model of the test's own words; returns its size."""
    import sentencepiece
    from transformers import SiglipTokenizer

    text = "a photo of the red blue dog cat left right one two open closed small big 1 2 3 4 5 6 7 8 9 0 "
    lines = [(text * 2)[i : i + len(text)] for i in range(0, len(text), 3)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "spiece"), vocab_size=60, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    tokenizer = SiglipTokenizer(str(folder / "spiece.model"))
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


@pytest.fixture(scope="session")
def siglip_dir(tmp_path_factory) -> Path:
    from transformers import SiglipConfig, SiglipModel

    folder = tmp_path_factory.mktemp("towers") / "tiny-siglip"
    folder.mkdir()
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config={**shared, "vocab_size": _siglip_tokenizer(folder), "max_position_embeddings": 64},
        vision_config={**shared, "image_size": 16, "patch_size": 8},
    )
    processor = {
        "image_processor_type": "SiglipImageProcessor", "size": {"height": 16, "width": 16}, "do_resize": True,
        "resample": 3, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    return _save(SiglipModel(config), folder, processor)


@pytest.fixture(scope="session")
def siglip2_dir(tmp_path_factory) -> Path:
    """NaFlex, whose processor gives patches, mask and shapes. Its tokenizer, like Gemma's, keeps capitals."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, Siglip2Config, Siglip2Model

    folder = tmp_path_factory.mktemp("towers") / "tiny-siglip2"
    folder.mkdir()
    vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    for word in (*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789,",):
        vocab[word] = len(vocab)
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Siglip2Config(
        text_config={**shared, "vocab_size": len(vocab), "max_position_embeddings": 64},
        vision_config={**shared, "num_patches": 16, "patch_size": 8},
    )
    processor = {
        "image_processor_type": "Siglip2ImageProcessor", "patch_size": 8, "max_num_patches": 16, "do_resize": True,
        "resample": 2, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    return _save(Siglip2Model(config), folder, processor)
