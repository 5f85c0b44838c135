"""A byte-pair tokenizer of CLIP's kind whose merges come from the toy world's captions."""

import itertools
import json
from collections import Counter
from pathlib import Path
from random import Random

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from llava_genhancer.toyworld import scenes

MAX_LENGTH = 77  # MMVP-VLM's protocol pads to 77
_START, _END = "<|startoftext|>", "<|endoftext|>"


def world_words() -> Counter[str]:
    """Every word a caption or statement can hold, with a count that follows how often it occurs."""
    rng = Random(0)
    words: Counter[str] = Counter(["a", "photo", "of", "an"])
    for _ in range(2000):
        words.update(scenes.caption(scenes.sample_scene(rng), rng, 1.0).split())
    return words


def learn_merges(words: Counter[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, the most frequent pair first (ties in alphabetical order), until every word is one token."""
    spelled = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, pieces in spelled.items():
            for pair in itertools.pairwise(pieces):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, pieces in spelled.items():
            joined: list[str] = []
            for piece in pieces:
                if joined and (joined[-1], piece) == best:
                    joined[-1] += piece
                else:
                    joined.append(piece)
            spelled[word] = joined


def write_tokenizer(folder: str | Path) -> CLIPTokenizer:
    """Write the tokenizer's files, for old and new transformers alike, into ``folder`` and return it loaded.

    Vocabulary: CLIP's 256 bytes, the same at a word's end, the merges, start and end of text (the highest ids).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(ByteLevel.alphabet())
    merges = learn_merges(world_words())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), _START, _END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_LENGTH, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer
