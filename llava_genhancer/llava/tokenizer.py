"""The language model's tokenizer as the exported processor needs it: fast, with ``<image>`` as one token.

LLaVA tokenizes the text before and after each image by itself, with Llama's slow tokenizer in its legacy behaviour,
where every piece of text starts with a word boundary. A fast tokenizer does the same if its normaliser prepends the
boundary to each stretch between special tokens; transformers 5 builds others by default, which lose one piece.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from llava_genhancer import run
from llava_genhancer.errors import InputError
from llava_genhancer.llava.conversation import Template
from llava_genhancer.llava.model import local
from llava_genhancer.tower.export import TOKENIZER_FILES, find_file

IMAGE_TOKEN = "<image>"


def save_hf_tokenizer(source: str, folder: Path, template: Template) -> int:
    """Write ``source``'s tokenizer with ``<image>`` added, for old and new transformers alike.

    Args:
        template: of the conversations that will be tokenized.

    Returns:
        The id of ``<image>``.

    Raises:
        InputError: no tokenizer there.
    """
    from tokenizers import AddedToken, Tokenizer

    path = local(source)
    for name in TOKENIZER_FILES:
        if found := find_file(path, name):
            shutil.copyfile(found, folder / name)
    settings = read_settings(path)
    model_file = sentencepiece_model(path, settings)
    tokenizer: Any
    if model_file is None:
        tokenizer = Tokenizer.from_str(load_tokenizer(source).backend_tokenizer.to_str())
    else:
        tokenizer = fast_llama_tokenizer(model_file, added=added_tokens(path))
        if settings.get("legacy") is False:
            _separate_turns(tokenizer, template)
    named = {i: t for i, t in enumerate(("<unk>", "<s>", "</s>"))} if model_file else {}
    tokenizer.add_special_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    image_id: int = tokenizer.token_to_id(IMAGE_TOKEN)
    state = json.loads(tokenizer.to_str())
    if state["model"]["type"] == "BPE":  # old readers take merges as "a b" only, new ones both ways
        state["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]]
    run.write_json(folder / "tokenizer.json", state)

    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    decoder = {str(i): {"content": token, **flags} for i, token in {**named, image_id: IMAGE_TOKEN}.items()}
    settings.pop("chat_template", None)  # the language model's own; the processor has ours
    run.write_json(
        folder / "tokenizer_config.json",
        {
            **settings,
            "added_tokens_decoder": {**decoder, **settings.get("added_tokens_decoder", {})},
            "pad_token": settings.get("pad_token") or named.get(0) or settings.get("eos_token"),
            "image_token": IMAGE_TOKEN,
            "padding_side": "left",
            "processor_class": "LlavaProcessor",
        },
    )
    return image_id


def _separate_turns(tokenizer: Any, template: Template) -> None:
    """Make a legacy tokenizer write a whole text as a non-legacy one wrote its pieces in training.

    There a word boundary stands at the start and after each image, and none after the end of an answer.
    """
    from tokenizers import Regex, normalizers, pre_tokenizers

    later = template.later.replace("{bos}", "")
    if not later:
        return
    answered = normalizers.Replace(Regex(rf"\A▁(?={re.escape(later)})"), "")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), answered, normalizers.Replace(" ", "▁")])
    if template.first.startswith(later):  # transformers 4.37.2 cannot read this one
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)


def load_tokenizer(source: str) -> Any:
    """The tokenizer to train with: fast, token for token the slow one that LLaVA uses.

    Raises:
        InputError: no tokenizer there.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = local(source)
    settings = read_settings(path)
    if model_file := sentencepiece_model(path, settings):
        legacy = settings.get("legacy") is not False
        tokenizer = fast_llama_tokenizer(model_file, legacy=legacy, added=added_tokens(path))
        named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
        named |= {name: settings[name] for name in named if settings.get(name)}
        named = {name: token["content"] if isinstance(token, dict) else token for name, token in named.items()}
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    if not any(find_file(path, name) for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        raise InputError(f"llm {source} has no tokenizer: its folder needs tokenizer.model or tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(f"llm {source} has no tokenizer that can be loaded: {error}") from None
    if not tokenizer.is_fast:
        raise InputError(f"llm {source} has no fast tokenizer: its folder needs a tokenizer.json")
    return tokenizer


def read_settings(path: str) -> dict[str, Any]:
    """A folder's ``tokenizer_config.json``, empty if it has none."""
    file = find_file(path, "tokenizer_config.json")
    return dict(run.read_json(file)) if file else {}


def sentencepiece_model(path: str, settings: dict[str, Any]) -> str | None:
    """The model file of a tokenizer of Llama's kind (``legacy`` False: Vicuna 1.5's), None for all others."""
    return find_file(path, "tokenizer.model") if settings.get("tokenizer_class", "").startswith("Llama") else None


def added_tokens(path: str) -> dict[str, int]:
    """Tokens that a tokenizer's folder adds to its sentencepiece model, and their ids."""
    added: dict[str, int] = {}
    if file := find_file(path, "added_tokens.json"):
        added |= run.read_json(file)
    if file := find_file(path, "tokenizer_config.json"):
        entries = run.read_json(file).get("added_tokens_decoder", {})
        added |= {token["content"]: int(number) for number, token in entries.items()}
    return dict(sorted(added.items(), key=lambda item: item[1]))


def fast_llama_tokenizer(model_file: str, *, legacy: bool = True, added: dict[str, int] | None = None) -> Any:
    """A ``tokenizers.Tokenizer`` that equals sentencepiece's BPE on every stretch of text between special tokens.

    Args:
        added: further special tokens, see :func:`added_tokens`.
        legacy: every stretch starts with a word boundary, as in Llama's slow tokenizer; False: only the first does.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    try:
        pieces = SentencePieceProcessor(model_file=model_file)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{model_file} is not a sentencepiece model: {str(error).splitlines()[0]}") from None
    names = [pieces.id_to_piece(i) for i in range(pieces.vocab_size())]
    vocabulary = {name: i for i, name in enumerate(names)}
    # sentencepiece joins the pair whose result scores highest; scores fall with the id.
    merges = []
    for i, name in enumerate(names):
        if pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_byte(i):
            continue
        splits = [(name[:cut], name[cut:]) for cut in range(1, len(name))]
        known = [(a, b) for a, b in splits if a in vocabulary and b in vocabulary]
        merges += sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        # Metaspace adds no boundary in front of a space; the slow tokenizer does.
        tokenizer.normalizer = normalizers.Replace(Regex(r"\A[ ▁]"), "  ")
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [AddedToken(names[i], special=True, normalized=False) for i in (0, 1, 2)]
    tokenizer.add_special_tokens(special)
    for token, number in (added or {}).items():
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        if tokenizer.token_to_id(token) != number:
            raise InputError(f"{model_file}: added token {token} has the id {number}, which leaves a gap before it")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return tokenizer
