"""Llama's slow tokenizer, written anew on sentencepiece alone: what encoding is compared with."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from small_llama import train_pieces

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


def write_tokenizer(
    folder: Path,
    *,
    legacy: bool | None = True,
    start: str = "USER: ",
    symbols: Sequence[str] = (),
    changes: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """A Llama tokenizer's folder.

    Args:
        start: stands in front of half of the sentences, which makes it, or its parts, one piece.
        symbols: user-defined symbols.
        changes: of ``tokenizer_config.json``.
        options: of sentencepiece's trainer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = [*SENTENCES, *(start + sentence + " ASSISTANT: yes" for sentence in SENTENCES)] * 5
    pieces = train_pieces(lines, 520, symbols=symbols, split_digits=True, **options)
    (folder / "tokenizer.model").write_bytes(pieces)
    settings: dict[str, Any] = {
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
    settings |= changes or {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}


class SlowLlama:
    """Text between special tokens goes to sentencepiece by itself.

    Legacy: with a word boundary in front of each such text. Else: in front of a whole text only.

    Args:
        special: special tokens and their ids.
        named: those that are begin, end, unknown, padding or additional_special_tokens; all if absent.
        strips: special tokens with lstrip or rstrip.
    """

    def __init__(
        self,
        folder: Path,
        *,
        legacy: bool,
        special: dict[str, int] | None = None,
        named: Sequence[str] | None = None,
        strips: dict[str, str] | None = None,
    ):
        self.legacy, self.strips = legacy, strips or {}
        self.special = SPECIAL if special is None else special
        self.named = tuple(self.special) if named is None else tuple(named)
        model = (folder / "tokenizer.model").read_bytes()
        if not legacy:
            model += b"\x1a\x02\x18\x00"  # protobuf's last value counts: normalizer_spec.add_dummy_prefix = false
        self.pieces = SentencePieceProcessor(model_proto=model)

    def __call__(self, text: str) -> list[int]:
        """Ids of a text without the opening token."""
        if not self.legacy and text:
            text = "▁" + text.replace("▁", " ")
        longest = sorted(self.special, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, longest))})", text)
        if not self.legacy and parts[0] == "▁" and len(parts) > 1 and parts[1] in self.named:
            parts[0] = ""
        for place in range(1, len(parts), 2):
            strip = self.strips.get(parts[place], "")
            if "lstrip" in strip:
                parts[place - 1] = parts[place - 1].rstrip()
                if not self.legacy and place == 1 and parts[0] == "▁" and parts[1] in self.named:
                    parts[0] = ""
            if "rstrip" in strip:
                parts[place + 1] = parts[place + 1].lstrip()
        ids: list[int] = []
        for place, part in enumerate(parts):
            ids += [self.special[part]] if place % 2 else self.pieces.encode(part)
        return ids

    def around_images(self, prompt: str, image: int = -200) -> list[int]:
        """A prompt as LLaVA reads it: opening token, then the texts around ``<image>``, each by itself."""
        ids = [1]
        for number, text in enumerate(prompt.split("<image>")):
            ids += [image] * (number > 0) + self(text)
        return ids

    def spell(self, ids: list[int]) -> str:
        """What ids stand for, to the last space."""
        special = {i: text for text, i in self.special.items()}
        spelt = b""
        for i in ids:
            piece = special.get(i) or self.pieces.id_to_piece(i)
            byte = re.fullmatch("<0x(..)>", piece)
            spelt += bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode()
        return spelt.decode()
