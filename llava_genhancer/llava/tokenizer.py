"""The language model's tokenizer: fast, with the ids of the slow one that LLaVA uses, and ``<image>`` in the HF export.

LLaVA tokenizes the text before and after each image by itself with transformers 4.37's slow ``LlamaTokenizer``: text is
split at special tokens, and sentencepiece encodes what lies between. With ``legacy`` (the default) each text between
special tokens gets a word boundary ``▁`` in front; with ``legacy: false`` (Vicuna 1.5) only the start of the whole text
does, unless a special token stands there.

transformers' own conversion (5.23) is not exact: it orders merges by id, not by score, puts the boundary elsewhere, and
needs a protobuf at least as new as the one that generated sentencepiece's module.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

from llava_genhancer import run
from llava_genhancer.errors import InputError
from llava_genhancer.llava.model import local
from llava_genhancer.tower.export import TOKENIZER_FILES, find_file

log = logging.getLogger(__name__)
IMAGE_TOKEN = "<image>"
# transformers' attributes of special tokens, in the order in which missing ones get their ids.
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FURTHER = ("additional_special_tokens", "extra_special_tokens")
LLAMA_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}  # of a folder that names none
NORMAL, UNKNOWN, USER_DEFINED, UNUSED = 1, 2, 4, 5  # types of a sentencepiece model's pieces
BPE = 2  # a sentencepiece model's model_type
MAX_TIES = 200_000
# Begins the names of user-defined symbols; a noncharacter, which no text contains.
MARK = "\U0010ffff"


class Special(NamedTuple):
    """A token at which text is split.

    Attributes:
        id: its id, or None for the vocabulary's id of that text or the next free one.
        lstrip, rstrip: whether white space in front of it, or after it, is dropped.
        named: whether it is one of transformers' special tokens (begin, end, ..., additional_special_tokens).
    """

    content: str
    id: int | None = None
    lstrip: bool = False
    rstrip: bool = False
    named: bool = True


def save_hf_tokenizer(source: str, folder: Path) -> int:
    """Write ``source``'s tokenizer with ``<image>`` added, for transformers 4.37 to 5.x.

    The tokenizer starts anew after each ``<image>``, as training does. It adds no end token even with
    ``add_eos_token: true``: the chat template writes the ends of answers, and a prompt has none.

    Returns:
        The id of ``<image>``.

    Raises:
        InputError: no tokenizer there, or one that cannot be loaded.
    """
    from tokenizers import AddedToken, Tokenizer

    path = local(source)
    for name in TOKENIZER_FILES:
        if found := find_file(path, name):
            shutil.copyfile(found, folder / name)
    settings = read_settings(path)
    loaded = load_tokenizer(source)
    if loaded.add_eos_token:
        loaded.add_eos_token = settings["add_eos_token"] = False
    if is_llama(path, settings):
        # A reader's defaults differ between versions of transformers.
        settings |= {"tokenizer_class": settings.get("tokenizer_class") or "LlamaTokenizer"}
        settings |= {"add_bos_token": loaded.add_bos_token, "add_eos_token": False}
    tokenizer = Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    tokenizer.add_special_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    image_id = cast(int, tokenizer.token_to_id(IMAGE_TOKEN))
    state = json.loads(tokenizer.to_str())
    if state["model"]["type"] == "BPE":  # old readers take merges as "a b" only, new ones both ways
        state["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]]
    run.write_json(folder / "tokenizer.json", state)

    named = {name: getattr(loaded, name) for name in NAMED}
    pad = named["pad_token"] or named["unk_token"] or named["eos_token"]
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    (folder / "added_tokens.json").unlink(missing_ok=True)
    settings.pop("chat_template", None)  # the language model's own; the processor has ours
    run.write_json(
        folder / "tokenizer_config.json",
        {
            **settings,
            **{name: token for name, token in named.items() if token or name in settings},
            # The flags must be tokenizer.json's: where they differ, transformers puts these in their place.
            "added_tokens_decoder": {
                str(token["id"]): {name: value for name, value in token.items() if name != "id"}
                for token in state["added_tokens"]
                if not token["content"].startswith(MARK)
            },
            "pad_token": pad,
            "image_token": IMAGE_TOKEN,
            "padding_side": "left",
            "processor_class": "LlavaProcessor",
        },
    )
    return image_id


def load_tokenizer(source: str) -> Any:
    """The tokenizer to train with: fast, token for token the slow one that LLaVA uses.

    Raises:
        InputError: no tokenizer there, or one that cannot be loaded.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = local(source)
    settings = read_settings(path)
    llama = is_llama(path, settings)
    if llama and (model_file := find_file(path, "tokenizer.model")):
        return _load_llama(path, model_file, settings)
    if not any(find_file(path, name) for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        raise InputError(f"llm {source} has no tokenizer: its folder needs tokenizer.model or tokenizer.json")
    # transformers 5 takes only vocabulary and merges from the tokenizer.json of a LlamaTokenizer.
    reader = PreTrainedTokenizerFast if llama else AutoTokenizer
    try:
        tokenizer = reader.from_pretrained(path)
    except Exception as error:  # tokenizers raises plain Exceptions
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        kind = settings.get("tokenizer_class")
        if find_file(path, "tokenizer.model") and not find_file(path, "tokenizer.json"):
            reason = (
                f"tokenizer_config.json: tokenizer_class {kind} cannot be loaded from tokenizer.model ({reason}); "
                "set LlamaTokenizer there if the model uses Llama's kind of vocabulary, or add a tokenizer.json"
            )
        raise InputError(f"llm {source} has no tokenizer that can be loaded: {reason}") from None
    if llama:
        for name, token in LLAMA_NAMES.items():
            if name not in settings and token in tokenizer.get_vocab():
                setattr(tokenizer, name, token)
    if not tokenizer.is_fast:
        raise InputError(f"llm {source} has no fast tokenizer: its folder needs a tokenizer.json")
    return tokenizer


def read_settings(path: str) -> dict[str, Any]:
    """A folder's ``tokenizer_config.json`` and ``special_tokens_map.json``, combined as transformers 4.37 does it.

    The latter's tokens replace the former's, unless the former has an ``added_tokens_decoder``.
    """
    settings = _read(path, "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings |= _read(path, "special_tokens_map.json")
    return settings


def is_llama(path: str, settings: dict[str, Any]) -> bool:
    """Whether transformers 4.37 reads a folder's tokenizer with its ``LlamaTokenizer``.

    A folder that names no class has its model's; all models that we train, but Qwen and SmolLM, have Llama's.
    """
    config = _read(path, "config.json")
    kind = settings.get("tokenizer_class") or config.get("tokenizer_class")
    if kind:
        return str(kind).startswith("Llama")
    return not str(config.get("model_type")).startswith(("qwen", "llava_qwen", "smollm"))


def _read(path: str, name: str) -> dict[str, Any]:
    """A JSON object of a folder, empty without the file."""
    file = find_file(path, name)
    found = run.read_json(file) if file else {}
    if not isinstance(found, dict):
        raise InputError(f"{file} must be a JSON object, found a {type(found).__name__}")
    return dict(found)


def special_tokens(path: str, settings: dict[str, Any]) -> list[Special]:
    """The tokens that transformers 4.37's slow tokenizer splits text at: those with an id by id, then the others."""
    if "added_tokens_decoder" in settings:
        added = {int(number): token for number, token in settings["added_tokens_decoder"].items()}
    else:
        added = {number: {"content": content} for content, number in _read(path, "added_tokens.json").items()}
        added |= {token["id"]: token for token in _read(path, "tokenizer.json").get("added_tokens", [])}
    named = [settings.get(name) for name in NAMED]
    for name in FURTHER:
        further = settings.get(name) or []
        named += further.values() if isinstance(further, dict) else further
    given: list[dict[str, Any]] = [{"content": token} if isinstance(token, str) else token for token in named if token]
    contents = {token["content"] for token in given}
    tokens = {
        token["content"]: _special(token, number, named=token["content"] in contents)
        for number, token in sorted(added.items())
        if not token["content"].startswith(MARK)
    }
    for token in given:
        tokens.setdefault(token["content"], _special(token, None, named=True))
    return list(tokens.values())


def _special(token: dict[str, Any], number: int | None, *, named: bool) -> Special:
    if token.get("single_word"):
        log.warning("tokenizer_config.json: single_word of %s is ignored: text is split at it", token["content"])
    return Special(token["content"], number, bool(token.get("lstrip")), bool(token.get("rstrip")), named)


def _load_llama(path: str, model_file: str, settings: dict[str, Any]) -> Any:
    from transformers import PreTrainedTokenizerFast

    model = _read_pieces(model_file)
    spec = model.trainer_spec
    # A folder that does not name them has the vocabulary's own: LlamaTokenizer's defaults are Llama's.
    defaults = {"bos_token": spec.bos_id, "eos_token": spec.eos_id, "unk_token": spec.unk_id}
    settings = {**{name: model.pieces[i].piece for name, i in defaults.items() if i >= 0}, **settings}
    named = {name: settings.get(name) for name in NAMED}
    named = {name: token["content"] if isinstance(token, dict) else token for name, token in named.items()}
    flags = {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    flags = {name: bool(default if (found := settings.get(name)) is None else found) for name, default in flags.items()}
    tokenizer = fast_llama_tokenizer(
        model_file,
        legacy=settings.get("legacy") is not False,
        special=special_tokens(path, settings),
        begin=named["bos_token"] if flags["add_bos_token"] else None,
        end=named["eos_token"] if flags["add_eos_token"] else None,
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named, **flags)


def fast_llama_tokenizer(
    model_file: str,
    *,
    legacy: bool = True,
    special: Sequence[Special] | None = None,
    begin: str | None = None,
    end: str | None = None,
) -> Any:
    """A ``tokenizers.Tokenizer`` with the ids of transformers 4.37's slow ``LlamaTokenizer`` on the same model file.

    One difference is left: with ``legacy=False`` a whole text that is nothing but one token of ``special`` that is not
    named gets no word boundary in front.

    Args:
        legacy: put a word boundary in front of every text between special tokens; False: in front of a whole text,
            unless a named special token stands there.
        special: see :func:`special_tokens`; if absent the model file's own unknown, begin and end token.
        begin, end: tokens around a text, where ``add_special_tokens`` is asked for; if ``special`` is absent, the begin
            token.

    Raises:
        InputError: no sentencepiece model, or one that no fast tokenizer equals.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

    model = _read_pieces(model_file)
    spec, rules = model.trainer_spec, model.normalizer_spec
    _refuse(model_file, model, legacy)
    names = [piece.piece for piece in model.pieces]
    if special is None:
        known = [i for i in (spec.unk_id, spec.bos_id, spec.eos_id) if i >= 0]
        special = [Special(names[i], i) for i in known]
        begin = names[spec.bos_id] if spec.bos_id >= 0 else None
    renamed = {s.id: s.content for s in special if s.id is not None and s.id < len(names)}
    _refuse_hidden(model_file, model, renamed)
    scores = {
        piece.piece: piece.score
        for i, piece in enumerate(model.pieces)
        if piece.type == NORMAL and renamed.get(i, piece.piece) == piece.piece
    }
    contents = {s.content for s in special}
    # sentencepiece finds these in normalised text, where no space is left.
    symbols = [
        (i, piece.piece)
        for i, piece in enumerate(model.pieces)
        if piece.type == USER_DEFINED and " " not in piece.piece and i not in renamed and piece.piece not in contents
    ]
    mark = MARK if rules.add_dummy_prefix or not legacy else ""
    for number, content in [*renamed.items(), *((i, mark + symbol) for i, symbol in symbols)]:
        names[number] = content
    vocabulary = {name: i for i, name in enumerate(names)}
    merges = _merges(scores, vocabulary)
    unknown = next(names[i] for i, piece in enumerate(model.pieces) if piece.type == UNKNOWN)
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=spec.byte_fallback)
    )
    steps: list[Any] = []
    if legacy:
        if rules.remove_extra_whitespaces:
            steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
        if rules.add_dummy_prefix:
            steps.append(normalizers.Prepend("▁"))
    else:
        # Here special tokens are found after normalisation, which they have to pass unchanged themselves.
        if any(s.lstrip or s.rstrip for s in special):
            steps.append(normalizers.Replace("▁", " "))
        steps.append(normalizers.Prepend("▁"))
        if left := _any(s.content for s in special if s.lstrip):
            steps.append(normalizers.Replace(Regex(f"[[:space:]]+(?={left})"), ""))
        if right := _any(s.content for s in special if s.rstrip):
            steps.append(normalizers.Replace(Regex(f"(?<={right})[[:space:]]+"), ""))
        if first := _any(s.content for s in special if s.named):
            steps.append(normalizers.Replace(Regex(rf"\A▁(?={first})"), ""))
        if alone := _any(s.content for s in special if not s.named):
            steps.append(normalizers.Replace(Regex(rf"\A▁(?=(?:{alone})\z)"), ""))
    if mark and symbols:
        # A symbol's name, but no text, passes without a word boundary, and so is found inside of a text.
        steps.append(normalizers.Replace(Regex(rf"\A▁{mark}(?=(?:{_any(s for _, s in symbols)})\z)"), ""))
    steps.append(normalizers.Replace(" ", "▁"))
    if legacy and rules.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"▁+\z"), ""))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [
            *([decoders.Replace(mark, "")] if mark and symbols else []),
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_tokens([AddedToken(mark + symbol, normalized=True) for _, symbol in symbols])
    for token in special:
        strip = {"lstrip": token.lstrip, "rstrip": token.rstrip}
        tokenizer.add_special_tokens([AddedToken(token.content, special=True, normalized=not legacy, **strip)])
        if token.id is not None and (found := tokenizer.token_to_id(token.content)) != token.id:
            raise InputError(
                f"{model_file}: added token {token.content} has the id {token.id}, expected {found}: "
                "ids of added tokens must follow the vocabulary without a gap"
            )
    around = [token for token in (begin, end) if token]
    if around:
        single = f"{begin or ''} $A {end or ''}".split()
        pair = f"{begin or ''} $A {end or ''} {begin or ''} $B {end or ''}".split()
        ids = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(around)]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    _check_ties(model_file, model, scores, merges, tokenizer.model)
    return tokenizer


def _any(contents: Iterable[str]) -> str:
    """A pattern of any of the texts, the longest first; "" for none."""
    return "|".join(re.escape(text) for text in sorted(contents, key=len, reverse=True))


def _merges(scores: dict[str, float], ids: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs of pieces that join to a piece, in sentencepiece's order: by the score of what they join to.

    Of pieces with equal scores (Llama's runs of blanks) the longer first: a run then grows from its start, as there,
    where the leftmost of equal pairs is joined.
    """
    merges = []
    for name in sorted(scores, key=lambda name: (-scores[name], -len(name), ids[name])):
        pairs = [(name[:cut], name[cut:]) for cut in range(1, len(name))]
        known = [(a, b) for a, b in pairs if a in scores and b in scores]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def _ties(scores: dict[str, float], merges: list[tuple[str, str]]) -> Iterator[str]:
    """Texts of three pieces of which the first two, or the last two, join with the same score.

    sentencepiece joins the leftmost of equal pairs; tokenizers knows no equal pairs, one of two always comes first.
    """
    first: dict[tuple[float, str], list[str]] = defaultdict(list)
    last: dict[tuple[float, str], list[str]] = defaultdict(list)
    for a, b in merges:
        first[scores[a + b], b].append(a)
        last[scores[a + b], a].append(b)
    for key in first.keys() & last.keys():
        middle = key[1]
        for a in first[key]:
            for c in last[key]:
                if not a == middle == c:
                    yield a + middle + c


def _check_ties(model_file: str, model: Any, scores: dict[str, float], merges: list[tuple[str, str]], bpe: Any) -> None:
    """Compare ``bpe`` with sentencepiece wherever their orders of merges can differ.

    Raises:
        InputError: they differ.
    """
    from sentencepiece import SentencePieceProcessor

    exact = type(model)()
    exact.CopyFrom(model)
    exact.normalizer_spec.add_dummy_prefix = exact.normalizer_spec.remove_extra_whitespaces = False
    processor = SentencePieceProcessor(model_proto=exact.SerializeToString())
    symbols = [piece.piece for piece in model.pieces if piece.type == USER_DEFINED]
    for text in islice(_ties(scores, merges), MAX_TIES):
        if any(symbol in text for symbol in symbols):
            continue
        if [token.id for token in bpe.tokenize(text)] != processor.encode(text):
            raise InputError(
                f"{model_file} is not supported: pieces with equal scores overlap, as in {text!r}, "
                "which no fast tokenizer reads as sentencepiece does; give its pieces scores that differ"
            )


def _read_pieces(model_file: str) -> Any:
    """A sentencepiece model's ``ModelProto``.

    Raises:
        InputError: not a sentencepiece model.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        SentencePieceProcessor(model_file=model_file)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{model_file} is not a sentencepiece model: {str(error).splitlines()[0]}") from None
    try:
        formats = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except Exception:  # its generated code refuses a protobuf that is older than the one that generated it
        formats = importlib.import_module("transformers.utils.sentencepiece_model_pb2_new")
    return formats.ModelProto.FromString(Path(model_file).read_bytes())


def _refuse_hidden(model_file: str, model: Any, renamed: Mapping[int, str]) -> None:
    """Check that no added token has the id of a piece that text is made of, where LLaVA gives both the same id.

    Raises:
        InputError: one has; names both.
    """
    normal = {piece.piece for piece in model.pieces if piece.type == NORMAL}
    for number, content in renamed.items():
        piece = model.pieces[number]
        cuts = range(1, len(piece.piece))
        made = not cuts or any(piece.piece[:cut] in normal and piece.piece[cut:] in normal for cut in cuts)
        if piece.type == NORMAL and piece.piece != content and made:
            raise InputError(
                f"{model_file} is not supported: the added token {content} has the id {number} of the piece "
                f"{piece.piece!r}, which text is made of; give the added token an id behind the vocabulary"
            )


def _refuse(model_file: str, model: Any, legacy: bool) -> None:
    """Check that a fast tokenizer can do what a sentencepiece model does.

    Raises:
        InputError: it cannot; names the property.
    """
    spec, rules = model.trainer_spec, model.normalizer_spec
    kinds = {1: "unigram", 3: "word", 4: "char"}
    normal = {piece.piece for piece in model.pieces if piece.type == NORMAL}
    letters = {letter for piece in normal for letter in piece}
    reasons = {
        f"model_type is {kinds.get(spec.model_type)}, not bpe": spec.model_type != BPE,
        "treat_whitespace_as_suffix is true": spec.treat_whitespace_as_suffix,
        "escape_whitespaces is false": not rules.escape_whitespaces,
        f"it normalises text ({rules.name or 'precompiled_charsmap'})": bool(rules.precompiled_charsmap),
        "remove_extra_whitespaces is true with legacy: false": rules.remove_extra_whitespaces and not legacy,
        "it has unused pieces": any(piece.type == UNUSED for piece in model.pieces),
        f"pieces contain letters that are no piece ({', '.join(sorted(letters - normal)[:3])})": letters - normal,
    }
    for reason, holds in reasons.items():
        if holds:
            raise InputError(
                f"{model_file} is not supported: {reason}, with which no fast tokenizer reads text as LLaVA does; "
                "choose a language model with a byte-pair vocabulary of Llama's kind"
            )
