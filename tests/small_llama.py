"""A tiny language model of the Llama family as an ordinary folder."""

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

WORDS = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: ASSISTANT: what colour is the ball? how many cats are there? "
    "red green blue one two three left right of near a table in the picture yes no"
)


BLANK_RUNS = range(2, 17)


def train_pieces(lines: Iterable[str], vocab_size: int, *, symbols: Sequence[str] = (), **options: Any) -> bytes:
    """A sentencepiece model with Llama's properties, trained on ``lines``.

    Llama's: byte pairs with byte fallback, a boundary in front of a text, no other normalisation, and pieces for 2 to
    16 blanks, which with the single blank have the lowest score, so that they join last.

    Args:
        vocab_size: pieces in all.
        symbols: user-defined symbols.
        options: of sentencepiece's trainer, in place of Llama's.
    """
    import sentencepiece
    from transformers.utils.sentencepiece_model_pb2_new import ModelProto

    written = io.BytesIO()
    llamas = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": -1,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=written,
        vocab_size=vocab_size - len(BLANK_RUNS),
        user_defined_symbols=list(symbols),
        **{**llamas, **options},
    )
    model = ModelProto.FromString(written.getvalue())
    for piece in model.pieces:
        if piece.piece == "▁":
            piece.score = -1e9
    for blanks in BLANK_RUNS:
        if "▁" * blanks not in symbols:
            model.pieces.add(piece="▁" * blanks, score=-1e9)
    return model.SerializeToString()


def write_llama(folder: Path, *, model_type: str = "llama", tied: bool = False, legacy: bool = True) -> Path:
    """A random two-layer language model of the family with a Llama tokenizer trained on :data:`WORDS`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True)
    lines = [WORDS, *WORDS.split("."), *WORDS.split()]
    (folder / "tokenizer.model").write_bytes(train_pieces(lines, 380))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": legacy,
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
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
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
