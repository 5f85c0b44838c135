"""Llama's slow tokenizer, written anew on sentencepiece alone: what encoding is compared with."""

import json
import re
from pathlib import Path

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

SENTENCES = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "What is in the picture? A red cat lies on a wooden table, next to a blue cup.",
    "Describe the image concisely. Two dogs run over green grass; one of them is brown.",
    "How many people are there? There are 12 people, 3 of them are children.",
    "You are a helpful language and vision assistant, and follow the user's instructions.",
    "(USER:) (ASSISTANT:) [INST] <<SYS>> <</SYS>> [/INST]",
    "  two spaces   three\ttab, naïve café",
]


def write_tokenizer(folder: Path, *, legacy: bool | None = True, start: str = "USER: ") -> Path:
    """A Llama tokenizer's folder; ``start`` in front of half of the sentences makes it, or its parts, one piece."""
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.txt"
    text.write_text("\n".join([*SENTENCES, *(start + sentence + " ASSISTANT: yes" for sentence in SENTENCES)] * 5))
    SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=520,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    text.unlink()
    settings: dict[str, object] = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    if legacy is not None:
        settings["legacy"] = legacy
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}


class SlowLlama:
    """Text between special tokens goes to sentencepiece by itself.

    Legacy: with a word boundary in front of each such text. Else: in front of a whole text only.
    """

    def __init__(self, folder: Path, *, legacy: bool):
        self.legacy = legacy
        model = (folder / "tokenizer.model").read_bytes()
        if not legacy:
            model += b"\x1a\x02\x18\x00"  # protobuf's last value counts: normalizer_spec.add_dummy_prefix = false
        self.pieces = SentencePieceProcessor(model_proto=model)

    def __call__(self, text: str) -> list[int]:
        """Ids of a text without the opening token."""
        if not self.legacy and text and not text.startswith(tuple(SPECIAL)):
            text = "▁" + text.replace("▁", " ")
        ids: list[int] = []
        for part in re.split("(<unk>|<s>|</s>)", text):
            ids += [SPECIAL[part]] if part in SPECIAL else self.pieces.encode(part)
        return ids

    def around_images(self, prompt: str, image: int = -200) -> list[int]:
        """A prompt as LLaVA reads it: opening token, then the texts around ``<image>``, each by itself."""
        ids = [1]
        for number, text in enumerate(prompt.split("<image>")):
            ids += [image] * (number > 0) + self(text)
        return ids

    def spell(self, ids: list[int]) -> str:
        """What ids stand for, to the last space."""
        special = {i: text for text, i in SPECIAL.items()}
        spelt = b""
        for i in ids:
            piece = special.get(i) or self.pieces.id_to_piece(i)
            byte = re.fullmatch("<0x(..)>", piece)
            spelt += bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode()
        return spelt.decode()
