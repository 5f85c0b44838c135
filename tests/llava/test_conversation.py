"""Ids equal an independent slow tokenizer's, labels cover what the assistant says and nothing else."""

import itertools
import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from slow_llama import FLAGS, SPECIAL, SlowLlama, write_tokenizer

from llava_genhancer.errors import InputError
from llava_genhancer.llava.conversation import (
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    TEMPLATES,
    Turn,
    chat_template,
    check_template,
    encode,
    encode_prompt,
    get_template,
    render,
    stop_token_ids,
)
from llava_genhancer.llava.samples import BadSample, read_sample
from llava_genhancer.llava.tokenizer import load_tokenizer, save_hf_tokenizer

DATA = Path(os.environ.get("LLAVA_GENHANCER_TEST_DATA", Path(__file__).parents[2] / "../shared/data"))
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
CONVERSATIONS = [
    [Turn("<image>\nWhat is in the picture?", "A red cat on a table.")],
    [Turn("<image>\nHow many?", "12"), Turn("Are they\nchildren?", "3 of them are."), Turn("Sure?", "Yes.")],
    [Turn("Who are you?", "An assistant:\n\n1. helpful\n2. polite\n")],
    [Turn("<image>", "naïve café, 中文 and 😀")],
    [Turn("<image>\n😀?", "😀 first"), Turn("ok", "\nline first"), Turn("ok", "  spaces first and last  ")],
    [Turn("<image>\n<image>\nWhich is red?", "The second."), Turn("And <image> here", "None.")],
    [Turn("USER: hi ASSISTANT: ho", "ASSISTANT: USER: <<SYS>> [INST] odd [/INST]")],
    [Turn(" x", "y")],
]


@pytest.fixture(scope="module", params=[True, False, None], ids=["legacy", "not legacy", "unsaid"])
def llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, SlowLlama]:
    """A Llama tokenizer as we load it, and the slow one on the same file."""
    folder = write_tokenizer(tmp_path_factory.mktemp("llama"), legacy=request.param)
    return load_tokenizer(str(folder)), SlowLlama(folder, legacy=request.param is not False)


@pytest.fixture(scope="module")
def bytes_tokenizer() -> Any:
    """A byte-level tokenizer as Llama-3's and Qwen's: spaces belong to words, and markers are tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    markers = sorted({marker for template in TEMPLATES.values() for marker in template.markers})
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>", *markers],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SYSTEM] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def learned_runs(ids: list[int], labels: list[int]) -> list[list[int]]:
    """The stretches of ids that are learned."""
    assert len(ids) == len(labels)
    assert all(label in (token, IGNORE_INDEX) for token, label in zip(ids, labels, strict=True))
    pairs = itertools.groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORE_INDEX)
    return [[token for token, _ in run] for learned, run in pairs if learned]


@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_v1_is_the_slow_tokenizers_reading(llama: tuple[Any, SlowLlama], turns: list[Turn]) -> None:
    tokenizer, slow = llama
    prompt = SYSTEM + "".join(f"USER: {question} ASSISTANT: {answer}</s>" for question, answer in turns)
    ids, labels = encode(turns, "v1", tokenizer)
    assert ids == slow.around_images(prompt)
    assert [slow.spell(run) for run in learned_runs(ids, labels)] == [f" {turn.answer}</s>" for turn in turns]


@pytest.mark.parametrize("caption", ["a red cat", "😀 cat", " two dogs", "line\n\nline ", "中"])
def test_plain_reads_image_and_learns_caption(llama: tuple[Any, SlowLlama], caption: str) -> None:
    tokenizer, slow = llama
    ids, labels = encode([Turn("<image>\nDescribe it.", caption)], "plain", tokenizer)
    assert ids == slow.around_images(f"<image>{caption}\n")
    assert ids[:2] == [1, IMAGE_TOKEN_INDEX]
    assert labels == [IGNORE_INDEX] * 2 + ids[2:]


def test_llama_2_and_mistral_texts(llama: tuple[Any, SlowLlama]) -> None:
    tokenizer, slow = llama
    turns = CONVERSATIONS[1]
    system = "".join(text for text, _ in render([Turn("", None)], "llava_llama_2", tokenizer)).removesuffix(" [/INST]")
    assert system.startswith("[INST] <<SYS>>\nYou are a helpful language and vision assistant. ")
    assert system.endswith(" using natural language.\n<</SYS>>\n\n")
    rounds = [f"{question} [/INST] {answer} </s>" for question, answer in turns]
    for name, start, between in (("llava_llama_2", system, "<s>[INST] "), ("mistral", "[INST] ", "[INST] ")):
        ids, labels = encode(turns, name, tokenizer)
        assert ids == slow.around_images(start + between.join(rounds))
        assert [slow.spell(run) for run in learned_runs(ids, labels)] == [f" {turn.answer} </s>" for turn in turns]


def test_random_text(llama: tuple[Any, SlowLlama]) -> None:
    """Any characters at all: ids as the slow tokenizer, nothing but the answers learned."""
    tokenizer, slow = llama
    rng = random.Random(0)
    letters = [
        "a",
        "e",
        "US",
        "ER",
        "cat ",
        " ",
        "  ",
        " " * 7,
        "\n",
        "\n    ",
        ".",
        "7",
        "é",
        "中",
        "😀",
        "ASSISTANT:",
        "‍",
        "\t",
        "\r\n",
    ]
    for _ in range(300):
        turns = [Turn(*("".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in "qa")) for _ in range(2)]
        prompt = SYSTEM + "".join(f"USER: {question} ASSISTANT: {answer}</s>" for question, answer in turns)
        ids, labels = encode(turns, "v1", tokenizer)
        assert ids == slow.around_images(prompt), turns
        assert [slow.spell(run) for run in learned_runs(ids, labels)] == [f" {t.answer}</s>" for t in turns], turns


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_every_template_learns_the_answers(bytes_tokenizer: Any, name: str, turns: list[Turn]) -> None:
    check_template(name, bytes_tokenizer)
    ids, labels = encode(turns, name, bytes_tokenizer)
    form = get_template(name)
    stop = form.stop.replace("{eos}", "<|endoftext|>")
    learned = [f"{form.lead}{turn.answer}{stop}" for turn in turns]
    runs = [bytes_tokenizer.decode(run) for run in learned_runs(ids, labels)]
    # Where nothing is read between two answers, they are learned as one.
    assert runs == learned or "".join(runs) == "".join(learned)
    text = "".join(text for text, _ in render(turns, name, bytes_tokenizer))
    shown = [[]]  # type: list[list[int]]
    for token in ids:
        shown[-1].append(token) if token != IMAGE_TOKEN_INDEX else shown.append([])
    assert [bytes_tokenizer.decode(part) for part in shown] == text.split("<image>")


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_is_the_beginning_of_what_was_learned(llama: tuple[Any, SlowLlama], name: str) -> None:
    tokenizer, _ = llama
    for turns in CONVERSATIONS[:4]:
        ids, labels = encode(turns, name, tokenizer)
        prompt = encode_prompt([*turns[:-1], Turn(turns[-1].question, None)], name, tokenizer)
        assert prompt == ids[: len(prompt)]
        assert labels[len(prompt)] == ids[len(prompt)] != IGNORE_INDEX
        assert len(turns) > 1 or labels[: len(prompt)] == [IGNORE_INDEX] * len(prompt)


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_template_writes_the_same(llama: tuple[Any, SlowLlama], name: str) -> None:
    tokenizer, _ = llama

    def rendered(messages: list[dict[str, Any]], **kwargs: Any) -> str:
        template = chat_template(name)
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **kwargs)

    turns = [
        Turn("<image>\nIs it 'red'?", "It\\'s\n{red}."),
        Turn("Sure?", "Yes."),
        Turn("<image>\n<image>\nNow?", "No"),
    ]
    messages: list[dict[str, Any]] = []
    for question, answer in turns:
        count = question.count("<image>\n")
        text = {"type": "text", "text": question.replace("<image>\n", "")}
        messages.append({"role": "user", "content": [*[{"type": "image"}] * count, text]})
        asked = [*turns[: len(messages) // 2], Turn(question, None)]
        assert rendered(messages, add_generation_prompt=True) == "".join(t for t, _ in render(asked, name, tokenizer))
        messages.append({"role": "assistant", "content": answer})
        assert rendered(messages) == "".join(text for text, _ in render(turns[: len(messages) // 2], name, tokenizer))
    as_text = [{**m, "content": "Sure?" if m["role"] == "user" else m["content"]} for m in messages[:2]]
    assert rendered(as_text) == "".join(t for t, _ in render([Turn("Sure?", turns[0].answer)], name, tokenizer))
    with pytest.raises(Exception, match="roles must be user"):
        rendered([{"role": "system", "content": "Be brief."}, *messages])


def test_image_is_a_word_where_there_is_none(llama: tuple[Any, SlowLlama]) -> None:
    tokenizer, slow = llama
    ids, _ = encode([Turn("What does <image> mean in HTML?", "A <image> tag?")], "v1", tokenizer, images=False)
    assert ids == [1, *slow(SYSTEM + "USER: What does <image> mean in HTML? ASSISTANT: A <image> tag?</s>")]


def test_templates_that_do_not_fit(llama: tuple[Any, SlowLlama], bytes_tokenizer: Any) -> None:
    tokenizer, _ = llama
    with pytest.raises(InputError, match=r"no conversation template 'v2'.*plain, v1"):
        get_template("v2")
    with pytest.raises(InputError, match=r"no token <\|im_start\|>.*'qwen'"):
        check_template("qwen", tokenizer)
    check_template("v1", tokenizer)
    assert stop_token_ids("v1", tokenizer) == [2]
    end = bytes_tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|endoftext|>"])
    assert stop_token_ids("llama_3", bytes_tokenizer) == end


def test_long_text_takes_time_in_proportion(llama: tuple[Any, SlowLlama]) -> None:
    tokenizer, _ = llama

    def seconds(words: int) -> float:
        start = time.process_time()
        encode([Turn("<image>\nTell a story.", "The red cat and the dog. " * words)] * 3, "v1", tokenizer)
        return time.process_time() - start

    seconds(100)
    assert seconds(16_000) < 60 * max(seconds(1_000), 0.01)  # in proportion: 16 times; quadratic: 256


def test_tokens_that_a_folder_adds(tmp_path: Path) -> None:
    """A chat model on Llama's vocabulary: its markers are tokens of their own, its end is the one it names."""
    folder = write_tokenizer(tmp_path / "chat")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    settings["added_tokens_decoder"] = {
        str(i): {"content": token, **flags}
        for i, token in ((0, "<unk>"), (1, "<s>"), (2, "</s>"), (521, "<|im_end|>"), (520, "<|im_start|>"))
    }
    settings |= {"eos_token": {"content": "<|im_end|>", **flags}, "pad_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(str(folder))
    check_template("chatml", tokenizer)
    ids, labels = encode(CONVERSATIONS[1], "chatml", tokenizer)
    assert [run[-1] for run in learned_runs(ids, labels)] == [521] * 3
    assert ids[:2] == [1, 520]
    assert (stop_token_ids("chatml", tokenizer), tokenizer.pad_token_id) == ([521], 0)

    settings["added_tokens_decoder"]["530"] = {"content": "<far>", **flags}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="<far> has the id 530"):
        load_tokenizer(str(folder))


def added(content: str, **flags: bool) -> dict[str, Any]:
    """An entry of ``added_tokens_decoder``."""
    return {"content": content, **FLAGS, **flags}


YI = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<unk>"}
MARKERS = {str(SPECIAL[token]): added(token) for token in SPECIAL}
# What write_tokenizer is given, and what the slow tokenizer has to know of it.
VOCABULARIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Llama's": ({}, {}),
    "user-defined symbols": ({"symbols": ["<sym>", "ab c", "zz", "zzz", "▁▁▁", "x▁y"]}, {}),
    "Yi's names": (
        {"bos_piece": YI["bos_token"], "eos_piece": YI["eos_token"], "changes": YI},
        {"special": {"<unk>": 0, YI["bos_token"]: 1, YI["eos_token"]: 2}},
    ),
    "added tokens that strip": (
        {
            "changes": {
                "added_tokens_decoder": {
                    **MARKERS,
                    "1": added("<s>", rstrip=True),
                    "2": added("</s>", lstrip=True, normalized=True),
                    "520": added("<im_start>", lstrip=True, rstrip=True),
                    "521": added("<t>", special=False, normalized=True, rstrip=True),
                },
                "additional_special_tokens": ["<im_start>"],
            }
        },
        {
            "special": {**SPECIAL, "<im_start>": 520, "<t>": 521},
            "named": [*SPECIAL, "<im_start>"],
            "strips": {"<s>": "rstrip", "</s>": "lstrip", "<im_start>": "lstrip rstrip", "<t>": "rstrip"},
        },
    ),
    "padding beyond the vocabulary": (
        {"changes": {"pad_token": "[PAD]", "additional_special_tokens": ["<im_start>"]}},
        {"special": {**SPECIAL, "[PAD]": 520, "<im_start>": 521}},
    ),
    "no byte fallback": ({"byte_fallback": False}, {}),
    "no boundary in front": ({"add_dummy_prefix": False}, {}),
    "runs of blanks collapsed": ({"remove_extra_whitespaces": True}, {}),
}
ODD = [
    "a", "e", "US", "ER:", "cat ", "cats", " ", "  ", "   ", "     ", " " * 17, "\n", ".", "12", "é", "中", "😀", "\t",
    "\r\n", "▁", "▁▁", "<s>", "</s>", "<unk>", "<im_start>", "<t>", "[PAD]", "<|startoftext|>", "<|endoftext|>",
    "<sym>", "ab c", "zz", "z", "x y", "x▁y", "<", "<0x0A>", "\0", "the user", "USER: What is",
]  # fmt: skip
odd_texts = st.lists(st.sampled_from(ODD) | st.text(max_size=3), max_size=8).map("".join)
thorough = hypothesis_settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(
    scope="module",
    params=[(name, legacy) for name in VOCABULARIES for legacy in (True, False) if legacy or "collapsed" not in name],
    ids=lambda param: f"{param[0]}, {'legacy' if param[1] else 'not legacy'}",
)
def vocabulary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SlowLlama]:
    """A Llama tokenizer's folder, and the slow tokenizer of it."""
    name, legacy = request.param
    written, known = VOCABULARIES[name]
    folder = write_tokenizer(tmp_path_factory.mktemp("vocabulary"), legacy=legacy, **written)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder, SlowLlama(folder, legacy=legacy, **known)


def comparable(text: str, slow: SlowLlama) -> bool:
    """Whether fast and slow must agree: not on one added token alone, which the slow one gives a boundary."""
    return slow.legacy or text not in slow.special or text in slow.named


def test_any_text_has_the_slow_tokenizers_ids(vocabulary: tuple[Path, SlowLlama]) -> None:
    folder, slow = vocabulary
    tokenizer = load_tokenizer(str(folder))

    @thorough
    @given(odd_texts)
    def check(text: str) -> None:
        if comparable(text, slow):
            assert tokenizer(text, add_special_tokens=False).input_ids == slow(text)

    check()


def test_the_export_reads_a_prompt_as_training_did(vocabulary: tuple[Path, SlowLlama], tmp_path: Path) -> None:
    """``tokenizer.json`` and ``tokenizer.model`` of an export agree with each other and with the text around images."""
    from transformers import AutoTokenizer

    folder, slow = vocabulary
    image = save_hf_tokenizer(str(folder), tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    exported, again, trained = (
        AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path)), load_tokenizer(str(folder))
    )  # fmt: skip
    assert image == exported.convert_tokens_to_ids("<image>") == len(trained)
    assert (tmp_path / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    assert exported.bos_token_id == again.bos_token_id == trained.bos_token_id == 1

    @thorough
    @given(st.lists(odd_texts, min_size=1, max_size=3))
    def check(texts: list[str]) -> None:
        if all(comparable(text, slow) for text in texts):
            expected = slow.around_images("<image>".join(texts), image)
            assert exported("<image>".join(texts)).input_ids == expected
            assert [1, *again(texts[0], add_special_tokens=False).input_ids] == [1, *slow(texts[0])]
            assert exported.decode(expected) == again.decode(expected)

    check()


@pytest.mark.parametrize("reading", ["legacy", "modern"])
def test_real_conversations_have_llavas_ids_and_labels(tmp_path: Path, reading: str) -> None:
    """Llama's own vocabulary: ids and labels as LLaVA's code gives them, except where LLaVA masks a sample."""
    file = DATA / "llava_labels_real_llama.json"
    if not file.is_file():
        pytest.skip(f"needs {file.name} in LLAVA_GENHANCER_TEST_DATA")
    shutil.copyfile(DATA / "llama_tokenizer.model", tmp_path / "tokenizer.model")
    changes = {"tokenizer_class": "LlamaTokenizer", "legacy": reading == "legacy"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(changes))
    tokenizer = load_tokenizer(str(tmp_path))
    given_data = json.loads(file.read_text())
    compared = 0
    for entry, gold in zip(given_data["items"], given_data["gold"][reading], strict=True):
        try:
            sample = read_sample(entry, 0)
        except BadSample:
            assert gold["warn"], entry["id"]
            continue
        ids, labels = encode(sample.turns, entry["mode"], tokenizer, images=bool(sample.images))
        assert ids == gold["ids"], entry["id"]
        assert gold["warn"] or labels == gold["labels"], entry["id"]
        compared += not gold["warn"]
    assert compared == 29


def folder_with(tmp_path: Path, *, config: bool = True, **changes: Any) -> Path:
    """A Llama tokenizer's folder with a changed ``tokenizer_config.json``, or none."""
    folder = write_tokenizer(tmp_path / "changed", changes=changes)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    if not config:
        (folder / "tokenizer_config.json").unlink()
    return folder


NAMES = {"bos_token": added("<s>"), "eos_token": {"__type": "AddedToken", **added("</s>")}, "unk_token": "<unk>"}


@pytest.mark.parametrize(
    ("changes", "around"),
    [
        ({"tokenizer_class": None}, (1, None)),
        ({"tokenizer_class": "LlamaTokenizerFast", **NAMES}, (1, None)),
        ({"config": False}, (1, None)),
        ({"add_bos_token": False}, (None, None)),
        ({"add_bos_token": False, "add_eos_token": True}, (None, 2)),
        ({"add_eos_token": True}, (1, 2)),
        ({"bos_token": None, "pad_token": None, "unk_token": None}, (None, None)),
    ],
)
def test_what_a_folder_says_of_its_tokenizer(
    tmp_path: Path, changes: dict[str, Any], around: tuple[int | None, int | None]
) -> None:
    folder = folder_with(tmp_path, **changes)
    slow = SlowLlama(folder, legacy=True, special={"</s>": 2} if "unk_token" in changes and not around[0] else None)
    tokenizer = load_tokenizer(str(folder))
    text = "USER: a  cat</s> <unk>"
    begin, end = ([i] if i else [] for i in around)
    assert tokenizer(text).input_ids == begin + slow(text) + end
    ids, labels = encode([Turn("<image>\nHi", "a  cat")], "v1", tokenizer)
    assert ids[: len(begin) + 1] == [*begin, slow(SYSTEM)[0]]
    assert slow.spell(learned_runs(ids, labels)[0]) == " a  cat</s>"
    image = save_hf_tokenizer(str(folder), tmp_path)
    assert load_tokenizer(str(tmp_path))(text).input_ids == begin + slow(text)  # a prompt has no end
    assert image == 520


def test_special_tokens_map_and_tokenizer_json_alone(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, bos_token=None, eos_token=None, legacy=False)
    slow = SlowLlama(folder, legacy=False)
    (folder / "special_tokens_map.json").write_text(json.dumps(NAMES))
    tokenizer = load_tokenizer(str(folder))
    text = "</s> a  cat<s>  b"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer(text).input_ids == [1, *slow(text)]
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    (folder / "special_tokens_map.json").unlink()
    named = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    for written in ({"tokenizer_class": "LlamaTokenizer", **named}, {"tokenizer_class": None, **named}, {}):
        (folder / "tokenizer_config.json").write_text(json.dumps(written))
        alone = load_tokenizer(str(folder))
        assert (alone.bos_token_id, alone.eos_token_id) == (1, 2)
        assert alone(text).input_ids == [1, *slow(text)]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram", "hard_vocab_limit": False}, "model_type is unigram, not bpe"),
        ({"normalization_rule_name": "nmt_nfkc"}, "it normalises text \\(nmt_nfkc\\)"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix is true"),
        ({"remove_extra_whitespaces": True, "legacy": False}, "remove_extra_whitespaces is true with legacy: false"),
        (
            {"changes": {"added_tokens_decoder": {**MARKERS, "300": added("<t>")}}},
            "the added token <t> has the id 300 of the piece",
        ),
    ],
)
def test_vocabularies_that_no_fast_tokenizer_reads(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    folder = write_tokenizer(tmp_path / "odd", **options)
    with pytest.raises(InputError, match=f"tokenizer.model is not supported: {reason}"):
        load_tokenizer(str(folder))


def test_equal_scores_that_matter_are_refused(tmp_path: Path) -> None:
    """Pieces that were put beside a finished vocabulary often share one score; sentencepiece joins the leftmost."""
    from transformers.utils.sentencepiece_model_pb2_new import ModelProto

    folder = write_tokenizer(tmp_path / "equal")
    model = ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    pieces = {piece.piece for piece in model.pieces}
    assert {"q", "w", "y"} <= pieces
    assert not {"qw", "wy"} & pieces
    for piece in ("wy", "qw"):
        model.pieces.add(piece=piece, score=1.0)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="pieces with equal scores overlap, as in 'qwy'"):
        load_tokenizer(str(folder))


def test_a_class_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, tokenizer_class="BaichuanTokenizer")
    with pytest.raises(
        InputError, match=r"tokenizer_class BaichuanTokenizer cannot be loaded .* set LlamaTokenizer"
    ) as e:
        load_tokenizer(str(folder))
    assert "\n" not in str(e.value)
