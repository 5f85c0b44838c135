"""The shipped Llama and its tokenizer: ordinary files, words that come back, answers read from a text."""

import json
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors import safe_open
from sentencepiece import SentencePieceProcessor
from transformers import AutoModelForCausalLM, AutoTokenizer

from llava_genhancer.llava.conversation import IGNORE_INDEX, VICUNA_SYSTEM, Turn, encode
from llava_genhancer.llava.tokenizer import load_tokenizer
from llava_genhancer.toyworld import language, questions, scenes
from llava_genhancer.toyworld.paths import resolve

LLAMA = Path(resolve("toyworld:llama"))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(LLAMA))


def test_all_shipped_weights_are_half_precision_and_under_ten_megabytes():
    assert sum(p.stat().st_size for p in LLAMA.parent.rglob("*") if p.is_file()) < 10_000_000
    with safe_open(LLAMA / "model.safetensors", "pt") as weights:
        kinds = {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118
    assert kinds == {"F16"}


def test_the_llama_loads_strictly_with_room_for_a_conversation(tokenizer):
    model, report = AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    config = model.config
    assert config.model_type == "llama"
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert config.hidden_size // config.num_attention_heads % 2 == 0
    assert config.vocab_size == len(tokenizer) == language.VOCABULARY
    rng = Random(0)
    longest = max(
        len(encode([Turn(*turn) for turn in questions.conversation(scenes.sample_scene(rng), rng)], "v1", tokenizer)[0])
        for _ in range(300)
    )
    assert longest + 36 < config.max_position_embeddings == tokenizer_config()["model_max_length"]


def tokenizer_config() -> dict:
    return json.loads((LLAMA / "tokenizer_config.json").read_text())


def test_the_tokenizer_is_llamas_kind_in_every_file():
    pieces = SentencePieceProcessor(model_file=str(LLAMA / "tokenizer.model"))
    assert [pieces.id_to_piece(i) for i in (0, 1, 2)] == ["<unk>", "<s>", "</s>"]
    assert pieces.is_byte(3)
    assert pieces.id_to_piece(3) == "<0x00>"
    assert pieces.pad_id() == -1
    loaded = AutoTokenizer.from_pretrained(LLAMA)
    for text in (VICUNA_SYSTEM, "USER: Where is the star?\nAnswer ASSISTANT: left", "Grüße, 12 ☃", "  two  spaces"):
        ids = pieces.encode(text)
        assert load_tokenizer(str(LLAMA))(text, add_special_tokens=False).input_ids == ids
        assert pieces.decode(ids) == text
        if not text.startswith(" "):  # transformers 5 builds one that takes a leading space for the word boundary
            assert loaded(text).input_ids == [1, *ids]
            assert loaded.decode(ids) == text


def test_every_answer_is_one_token_and_every_word_of_the_system_prompt_too(tokenizer):
    for detail, values in scenes.DETAILS.items():
        for value in values:
            word = questions.answer(detail, value)
            assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word
    words = VICUNA_SYSTEM.replace(",", "").replace(".", "").replace("'s", "").split()
    for word in words:
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word


def test_training_the_tokenizer_repeats_the_shipped_files(tmp_path):
    language.write_tokenizer(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (LLAMA / path.name).read_bytes(), path.name
    assert {p.name for p in tmp_path.iterdir()} | {"config.json", "model.safetensors", "generation_config.json"} == {
        p.name for p in LLAMA.iterdir()
    }


def test_it_answers_from_a_description_and_guesses_without_one(tokenizer):
    """It knows the language; what an image says, it has to be taught."""
    model = AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32).eval()
    rng = Random(9)

    def right(told: bool) -> float:
        samples = []
        for _ in range(120):
            scene = scenes.sample_scene(rng, "dev")
            asked = questions.question(scene, rng.choice(list(scenes.DETAILS)), "short", rng)
            text = f"{questions.description(scene, rng)}\n{asked.text}" if told else asked.text
            samples.append(encode([Turn(text, asked.options[asked.truth])], "v1", tokenizer))
        ids, labels = language.pad(samples)
        with torch.no_grad():
            predicted = model(input_ids=ids).logits[:, :-1].argmax(-1)
        targets = labels[:, 1:]
        return float(((predicted == targets) | (targets == IGNORE_INDEX)).all(1).float().mean())

    assert right(told=True) > 0.85
    assert right(told=False) < 0.5


def test_training_runs_and_repeats_exactly():
    first, second = (language.train_llama(seed=3, steps=2, batch_size=2) for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
