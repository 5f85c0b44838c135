"""Likelihoods behind a shared, cached question against each whole sequence by itself; batches, images, generation."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.mllm.respondent import Ask, Respondent, pack
from llava_genhancer.llava.chat import load_llava
from llava_genhancer.llava.conversation import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Encoded, Turn, encode
from llava_genhancer.llava.model import Llava, load_llm, load_tower
from llava_genhancer.llava.original import read_llava
from llava_genhancer.llava.tokenizer import load_tokenizer

IMAGES = [
    Image.new("RGB", size, colour) for size, colour in (((60, 40), "red"), ((30, 50), "blue"), ((48, 48), "white"))
]
ASKED = [
    Ask.about("What colour is the critter?\nA. red\nB. blue", IMAGES[:1]),
    Ask.about("Which of the two pictures shows a red critter, the first or the second?", IMAGES[1:]),
    Ask.about("Is the critter red?", ()),
    Ask.about("Where is the star?", IMAGES[:1]),
]
OPTIONS = [
    ["A", "B"],
    ["first", "The critter is blue.", "The critter is red and has horns.", "none"],
    ["Yes", "No"],
    ["left", "right", "left of the critter"],
]


def respondent(folder: Path, form: str = "hf", **words: Any) -> Respondent:
    model, processor = load_llava(folder / form, device="cpu", **words)
    return Respondent(model, processor.image_processor, load_tokenizer(str(folder / form)), "v1")


@pytest.fixture(scope="module")
def asked(llava_folders: Path) -> Respondent:
    return respondent(llava_folders)


@pytest.fixture(scope="module")
def trained(llava_folders: Path) -> Llava:
    """The same weights in the class that trains: no widened vocabulary, no processor's ids, no cache."""
    model, _ = load_llava(llava_folders / "llava", device="cpu")
    language = load_llm("toyworld:llama", torch.float32)
    language.load_state_dict(dict(read_llava(llava_folders / "llava").language))
    return Llava(
        model.config, load_tower("toyworld:clip", torch.float32), model.model.multi_modal_projector, language
    ).eval()


def wide(trained: Llava, values: list[int], ids: list[int]) -> list[int]:
    """Values of tokens, with each image's as often as it has patches."""
    side = trained.config.image_seq_length
    return [v for v, i in zip(values, ids, strict=True) for _ in range(side if i == IMAGE_TOKEN_INDEX else 1)]


def pixels(asked: Respondent, ask: Ask) -> torch.Tensor | None:
    return asked.image_processor(list(ask.images), return_tensors="pt").pixel_values if ask.images else None


def whole(trained: Llava, asked: Respondent, ask: Ask, option: str) -> float:
    """The sum over one sequence, read whole."""
    row = encode([Turn(ask.text, option)], "v1", asked.tokenizer)
    ids, labels = (wide(trained, values, row.input_ids) for values in row)
    with torch.no_grad():
        steps = trained.logits(torch.tensor([ids]), pixels(asked, ask))[0, :-1].log_softmax(-1)
    return sum(float(steps[i, x]) for i, x in enumerate(labels[1:]) if x != IGNORE_INDEX)


def test_as_each_whole_sequence_by_itself(asked: Respondent, trained: Llava) -> None:
    """All questions in one batch, their options behind one reading, as the training's class reads each alone."""
    scores = asked.score(ASKED, OPTIONS)
    assert [len(own) for own in scores] == [2, 4, 2, 3]
    for ask, options, own in zip(ASKED, OPTIONS, scores, strict=True):
        for option, score in zip(options, own, strict=True):
            assert score.total == pytest.approx(whole(trained, asked, ask, option), abs=1e-4), option
    assert scores[1][2].mean == pytest.approx(scores[1][2].total / scores[1][2].tokens)


def test_grouped_heads_and_another_vocabulary(tiny_clip: Path, tmp_path: Path) -> None:
    """A language model whose queries share their keys, with words of many tokens: still as each sequence alone."""
    from small_llama import write_llama
    from small_llava import write_llava_folders

    tiny_llama = write_llama(tmp_path / "llama")
    folder = write_llava_folders(tmp_path / "run", llm=str(tiny_llama), tower=str(tiny_clip))
    asked = respondent(folder)
    assert asked.model.config.text_config.num_key_value_heads < asked.model.config.text_config.num_attention_heads
    language = load_llm(str(tiny_llama), torch.float32)
    language.load_state_dict(dict(read_llava(folder / "llava").language))
    tower, projector = load_tower(str(tiny_clip), torch.float32), asked.model.model.multi_modal_projector
    trained = Llava(asked.model.config, tower, projector, language).eval()
    for ask, options, scores in zip(ASKED, OPTIONS, asked.score(ASKED, OPTIONS), strict=True):
        for option, score in zip(options, scores, strict=True):
            assert score.total == pytest.approx(whole(trained, asked, ask, option), abs=1e-4), option


@pytest.mark.parametrize("form", ["hf", "llava"])
def test_batches_and_options_change_nothing(asked: Respondent, llava_folders: Path, form: str) -> None:
    """One question at a time, and one option at a time, from either form."""
    together = asked.score(ASKED, OPTIONS)
    alone = respondent(llava_folders, form)
    for ask, options, scores in zip(ASKED, OPTIONS, together, strict=True):
        one = alone.score([ask], [options])[0]
        single = [alone.score([ask], [[option]])[0][0] for option in options]
        for a, b, c in zip(scores, one, single, strict=True):
            assert a.total == pytest.approx(b.total, abs=1e-4) == pytest.approx(c.total, abs=1e-4)
            assert a[1:] == b[1:] == c[1:]


@contextlib.contextmanager
def little_memory(more: int) -> Iterator[None]:
    """The process may grow by so many bytes only: torch's own allocator refuses what is beyond."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    libc.mallopt(-3, 1 << 18)  # M_MMAP_THRESHOLD: from this size on new memory is taken from the system, and counts
    before = resource.getrlimit(resource.RLIMIT_AS)

    def limit(beyond: int) -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + beyond, before[1]))

    taken: list[int] = []
    limit(4 << 20)
    while (block := libc.malloc(1 << 20)) is not None:  # what earlier tests have freed is no room for tensors
        taken.append(block)
    try:
        limit(more)
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        for block in taken:
            libc.free(block)


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc and /proc")
def test_a_batch_that_memory_does_not_hold_is_halved(llava_folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked, many = respondent(llava_folders), 96
    alone = asked.score(ASKED[:1], OPTIONS[:1])[0]
    with caplog.at_level("WARNING"), little_memory(16 << 20):
        scores = asked.score(ASKED[:1] * many, OPTIONS[:1] * many)
    assert 1 <= asked.at_once < many
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == "out of memory with 96 questions at a time: going on with 48"
    assert len(said) <= 8, "what went well is how it goes on"
    assert len(scores) == many
    for one in scores:
        assert [s.total for s in one] == pytest.approx([s.total for s in alone], abs=1e-4)


def test_memory_that_does_not_hold_one_question_is_told(llava_folders: Path) -> None:
    asked = respondent(llava_folders)
    with pytest.raises(InputError, match=r"^out of memory with one question at a time: .*dtype=bfloat16"):
        asked._in_parts(lambda part: [torch.empty(1 << 60)], [1, 2, 3])
    with pytest.raises(RuntimeError, match=r"size mismatch|cannot be multiplied"):  # a bug is no lack of memory
        asked._in_parts(lambda part: [torch.ones(2, 2) @ torch.ones(3)], [1, 2, 3])


def test_a_tower_that_makes_more_of_an_image_than_its_places(llava_folders: Path) -> None:
    asked = respondent(llava_folders)
    asked.model.config.image_seq_length -= 1
    with pytest.raises(InputError, match=r"makes \d+ features of these images where .*image_seq_length"):
        asked.score(ASKED[:1], OPTIONS[:1])


def test_generation_in_batches(asked: Respondent, trained: Llava) -> None:
    """Left padding and mixed images change no answer; the likeliest next token each time, as the training's class."""
    said = asked.say(ASKED, max_new_tokens=8, do_sample=False)
    assert said == [asked.say([ask], max_new_tokens=8, do_sample=False)[0] for ask in ASKED]
    tokenizer = load_tokenizer("toyworld:llama")
    for ask, text in zip(ASKED, said, strict=True):
        row = encode([Turn(ask.text, None)], "v1", tokenizer).input_ids
        ids = torch.tensor([wide(trained, row, row)])
        tokens = trained.generate(ids, pixels(asked, ask), max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert tokenizer.decode(tokens[0], skip_special_tokens=True).strip() == text


def test_greedy_is_what_generation_says(llava_folders: Path) -> None:
    """With the shipped weights, which end their answers."""
    asked = respondent(llava_folders)
    shipped = load_llm("toyworld:llama", torch.float32).state_dict()
    with torch.no_grad():
        for name, parameter in asked.model.model.language_model.named_parameters():
            parameter[: len(shipped[f"model.{name}"])] = shipped[f"model.{name}"]
        asked.model.lm_head.weight[: len(shipped["lm_head.weight"])] = shipped["lm_head.weight"]
    (said,) = asked.say(ASKED[:1], max_new_tokens=8, do_sample=False)
    scores = asked.score(ASKED[:1], [[said, f"{said} A", "critter"]])[0]
    assert [score.greedy for score in scores] == [True, False, False]


def test_rows_that_widen_the_vocabulary_take_no_probability(asked: Respondent) -> None:
    head = asked.model.get_output_embeddings().weight
    assert len(asked.never) > 0
    kept = head[asked.never].clone()
    before = asked.score(ASKED[:1], OPTIONS[:1])
    try:
        with torch.no_grad():
            head[asked.never] = 9.0
        assert asked.score(ASKED[:1], OPTIONS[:1]) == before
    finally:
        with torch.no_grad():
            head[asked.never] = kept


def test_the_processor_writes_the_same_ids(asked: Respondent, llava_folders: Path) -> None:
    _, processor = load_llava(llava_folders / "hf", device="cpu")
    for ask in ASKED[:3]:
        words = ask.text.split("\n", len(ask.images))[-1]
        content = [{"type": "image"}] * len(ask.images) + [{"type": "text", "text": words}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=list(ask.images) or None, text=text, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == asked._prompt(ask.text)


def test_images_are_padded_to_a_square(asked: Respondent) -> None:
    """A wide image is seen whole, with the mean colour above and below: as the square picture that says so."""
    processor = asked.image_processor
    mean = tuple(int(255 * x) for x in processor.image_mean)
    wide = Image.new("RGB", (60, 20))
    wide.paste((255, 0, 0), (0, 0, 10, 20))  # a centre crop would lose it
    square = Image.new("RGB", (60, 60), mean)
    square.paste(wide, (0, 20))
    seen, expected = (asked._pixels([Ask("", [image])])["pixel_values"] for image in (wide, square))
    torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ("What?", 0, "What?"),
        ("What?", 2, "<image>\n<image>\nWhat?"),
        ("Here <image> and <image>: same?", 2, "Here <image> and <image>: same?"),
        ("<image>\nWhat is <image>?", 1, "<image>\n\nWhat is ?"),
        ("What does <image> mean?", 0, "What does  mean?"),
    ],
)
def test_where_images_stand(text: str, count: int, expected: str) -> None:
    assert Ask.about(text, IMAGES[:count]).text == expected


def test_pack() -> None:
    """Options that part at their first token, later, and before the answer begins."""
    no = IGNORE_INDEX
    rows = [Encoded([7, 8, 1, 3, 2], [no, no, 1, 3, 2]), Encoded([7, 8, 1, 2], [no, no, 1, 2])]
    packed = pack(rows)
    assert (packed.shared, packed.ids, packed.positions, packed.options) == ([7, 8], [1, 3, 1], [2, 3, 2], [0, 0, 1])
    assert packed.scored == [(0, 0, 1), (0, 1, 3), (0, 2, 2), (1, 0, 1), (1, 3, 2)]
    assert packed.lengths == [3, 2]
    packed = pack([Encoded([7, 8, 2], [no, no, 2]), Encoded([7, 9, 2], [no, no, 2])])
    assert (packed.shared, packed.ids, packed.positions) == ([7], [8, 9], [1, 1])
    assert packed.scored == [(0, 1, 2), (1, 2, 2)]
    assert pack([Encoded([7, 2], [no, 2])]).ids == []


def test_bf16_and_another_tower(asked: Respondent, llava_folders: Path, tmp_path: Path) -> None:
    """bf16 keeps RoPE's frequencies exact; a tower given is the tower that sees."""
    half = respondent(llava_folders, dtype=torch.bfloat16)
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert {b.dtype for n, b in half.model.named_buffers() if n.endswith("inv_freq")} == {torch.float32}
    for a, b in zip(asked.score(ASKED, OPTIONS), half.score(ASKED, OPTIONS), strict=True):
        assert [s.total for s in b] == pytest.approx([s.total for s in a], rel=0.05)
    from transformers import CLIPModel

    from llava_genhancer.toyworld.models import save_clip
    from llava_genhancer.toyworld.paths import resolve

    clip = CLIPModel.from_pretrained(resolve("toyworld:clip"))
    with torch.no_grad():
        clip.vision_model.embeddings.class_embedding.mul_(2)
        clip.vision_model.embeddings.patch_embedding.weight.mul_(-1)
    for name in ("preprocessor_config.json", "vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((Path(resolve("toyworld:clip")) / name).read_bytes())
    save_clip(clip, tmp_path)
    others = [respondent(llava_folders, form, tower=str(tmp_path)).score(ASKED, OPTIONS) for form in ("hf", "llava")]
    for one, other in zip(*others, strict=True):
        assert [s.total for s in one] == pytest.approx([s.total for s in other], abs=1e-5)
    assert others[0][0][0].total != pytest.approx(asked.score(ASKED, OPTIONS)[0][0].total, abs=1e-3)
    assert others[0][2] == asked.score(ASKED, OPTIONS)[2]  # no image in it
