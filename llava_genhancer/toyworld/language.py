"""The toy world's language model: a tiny Llama and its sentencepiece tokenizer.

It is trained on text alone: captions, and conversations in Vicuna's form in which a description stands where LLaVA puts
an image. So it knows the world's words and how to answer from what it was told, and has never seen a picture.

Shapes: vocabulary of ``VOCABULARY`` pieces, width 96, 3 layers with heads of 32, 512 positions.
"""

import io
import json
import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llava_genhancer.llava.conversation import IGNORE_INDEX, VICUNA_SYSTEM, Encoded, Turn, encode
from llava_genhancer.llava.tokenizer import fast_llama_tokenizer, load_tokenizer
from llava_genhancer.toyworld import questions, scenes
from llava_genhancer.toyworld.training import schedule

logger = logging.getLogger(__name__)

VOCABULARY = 768
CONTEXT = 512  # Vicuna's system prompt, 36 image tokens and a dozen questions fit with room to spare
TURNS = {"short": 8, "letter": 1, "sentence": 4}  # questions in a training text, by form
_UNKNOWN, _START, _END = "<unk>", "<s>", "</s>"


# --- tokenizer ------------------------------------------------------------------------------------------------------


def tokenizer_text() -> Iterator[str]:
    """Lines whose words the vocabulary has to hold: captions, and conversations with their system prompt."""
    rng = Random(0)
    for _ in range(2000):
        scene = scenes.sample_scene(rng)
        yield VICUNA_SYSTEM
        yield questions.description(scene, rng)
        for asked, answered in questions.turns(scene, list(scenes.DETAILS), rng.choice(questions.FORMS), rng):
            yield from f"USER: {asked} ASSISTANT: {answered}".split("\n")
    yield from questions.REQUESTS * 100


def write_tokenizer(folder: str | Path) -> Any:
    """Write the tokenizer's files, for old and new transformers alike, into ``folder`` and return it loaded.

    Llama's kind: byte-pair pieces with the 256 bytes to fall back on, ``<unk>`` 0, ``<s>`` 1, ``</s>`` 2.
    """
    import sentencepiece

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=tokenizer_text(),
        model_writer=model,
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",  # Llama's: text comes back as it went in
        remove_extra_whitespaces=False,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    special = {"bos_token": _START, "eos_token": _END, "unk_token": _UNKNOWN, "pad_token": _UNKNOWN}
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    fast_llama_tokenizer(str(folder / "tokenizer.model")).save(str(folder / "tokenizer.json"))
    return load_tokenizer(str(folder))


# --- model ----------------------------------------------------------------------------------------------------------


def build_llama(*, width: int = 96, layers: int = 3) -> LlamaForCausalLM:
    """A random Llama of ordinary design."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=width * 5 // 2,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 32,
            max_position_embeddings=CONTEXT,
            rms_norm_eps=1e-5,
            # Llama's 0.02 suits a width of 4 096; at this one, attention would start as an average of everything.
            initializer_range=0.1,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings=False,
        )
    )


def save_llama(model: LlamaForCausalLM, folder: str | Path, *, half: bool = False) -> Path:
    """Write ``model`` and its tokenizer as one Hugging Face folder; ``half`` stores float16."""
    folder = Path(folder)
    (model.half() if half else model).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


# --- training -------------------------------------------------------------------------------------------------------


def sample(form: str, rng: Random, tokenizer: Any) -> Encoded:
    """One text to learn from: a description and then, by ``form``, another caption or a conversation about it."""
    scene = scenes.sample_scene(rng)
    told = questions.description(scene, rng)
    if form == "caption":
        first, second = (tokenizer.encode(text, add_special_tokens=False) for text in (told, _caption(scene, rng)))
        return Encoded([tokenizer.bos_token_id, *first, *second], [IGNORE_INDEX] * (1 + len(first)) + second)
    (question, answer), *rest = questions.turns(scene, rng.sample(list(scenes.DETAILS), TURNS[form]), form, rng)
    return encode([Turn(f"{told}\n{question}", answer), *(Turn(*turn) for turn in rest)], "v1", tokenizer)


def _caption(scene: scenes.Scene, rng: Random) -> str:
    return scenes.caption(scene, rng, questions.CAPTION_PROBABILITY) + "\n"


def pad(samples: list[Encoded]) -> tuple[Tensor, Tensor]:
    """Ids and labels (B, L), padded on the right with ``<unk>`` and nothing to learn."""
    length = max(len(s.input_ids) for s in samples)
    ids = torch.tensor([s.input_ids + [0] * (length - len(s.input_ids)) for s in samples])
    labels = torch.tensor([s.labels + [IGNORE_INDEX] * (length - len(s.labels)) for s in samples])
    return ids, labels


def train_llama(*, seed: int, steps: int = 1200, batch_size: int = 32, learning_rate: float = 3e-3) -> LlamaForCausalLM:
    """Train on fresh text; a batch holds samples of one form, so that little of it is padding."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = write_tokenizer(folder)
    torch.manual_seed(seed)
    rng = Random(seed)
    model = build_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    rates = schedule(optimizer, steps, warmup=max(1, steps // 20))
    start, mean_loss = time.perf_counter(), 0.0
    for step in range(steps):
        form = rng.choices(("caption", *questions.FORMS), (0.2, 0.5, 0.15, 0.15))[0]
        ids, labels = pad([sample(form, rng, tokenizer) for _ in range(batch_size)])
        loss = model(input_ids=ids, labels=labels).loss  # causal attention never looks at the padding
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        mean_loss += (loss.item() - mean_loss) / min(step + 1, 50)
        if (step + 1) % 100 == 0:
            logger.info("llama %d/%d loss %.3f, %.0f s", step + 1, steps, mean_loss, time.perf_counter() - start)
    return model.eval()
