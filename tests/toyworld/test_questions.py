"""Questions and LLaVA's files: true answers, LLaVA's layout, balanced and disjoint test questions, the same bytes."""

import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from llava_genhancer.toyworld import questions, scenes, writers


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    return writers.write_llava(tmp_path_factory.mktemp("world") / "llava", 120, seed=4)


def _samples(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("form", questions.FORMS)
@pytest.mark.parametrize("detail", scenes.DETAILS)
def test_the_right_option_is_the_scenes_and_no_other(form, detail):
    rng = Random(1)
    for _ in range(20):
        scene = scenes.sample_scene(rng)
        asked = questions.question(scene, detail, form, rng)
        assert len(set(asked.options)) == len(asked.options) == len(scenes.DETAILS[detail])
        word = questions.answer(detail, getattr(scene, detail))
        right = asked.options[asked.truth]
        if form == "letter":
            listed = dict(line.split(". ") for line in asked.text.splitlines() if line[1:3] == ". ")
            assert list(listed) == list(asked.options)
            assert listed[right] == word
        else:
            assert word in right.rstrip(".").split()


def test_options_and_wordings_vary():
    rng = Random(2)
    scene = scenes.sample_scene(rng)
    asked = [questions.question(scene, "facing", "letter", rng) for _ in range(60)]
    assert {q.truth for q in asked} == {0, 1, 2, 3}
    assert {q.text.splitlines()[0] for q in asked} == set(questions.QUESTIONS["facing"])


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_samples_have_llavas_layout(llava, name):
    for sample in _samples(llava, name):
        assert set(sample) - {"image"} == {"id", "conversations"}
        messages = sample["conversations"]
        assert all(set(message) == {"from", "value"} for message in messages)
        assert [m["from"] for m in messages] == ["human", "gpt"] * (len(messages) // 2)
        assert all(m["value"] == m["value"].strip() != "" for m in messages)
        placeholders = "".join(m["value"] for m in messages).count("<image>")
        assert placeholders == ("image" in sample)
        if "image" in sample:
            assert messages[0]["value"].startswith("<image>\n")
            assert Image.open(llava / "images" / sample["image"]).size == (scenes.IMAGE_SIZE,) * 2
    ids = [sample["id"] for sample in _samples(llava, name)]
    assert len(set(ids)) == len(ids)


def test_pretraining_captions_and_finetuning_mixes(llava):
    captions, conversations = _samples(llava, "pretrain"), _samples(llava, "finetune")
    assert all(len(sample["conversations"]) == 2 for sample in captions)
    assert all("critter" in sample["conversations"][1]["value"] for sample in captions)
    assert sum("image" not in sample for sample in conversations) == round(120 * writers.TEXT_ONLY_SHARE)
    assert len({len(sample["conversations"]) for sample in conversations}) > 1, "one turn and several"
    endings = Counter(sample["conversations"][0]["value"].splitlines()[-1] for sample in conversations)
    assert endings[questions.SHORT_SUFFIX] > endings[questions.LETTER_SUFFIX] > 0


def test_text_only_samples_say_what_they_ask_for():
    rng = Random(3)
    for _ in range(40):
        scene = scenes.sample_scene(rng)
        (asked, _), *_ = questions.text_conversation(scene, rng)
        told = asked.splitlines()[0]
        assert f"{scene.shape} critter" in told
        assert all(scenes.phrase(scene, detail) in told for detail in scenes.DETAILS)


def test_test_questions_are_balanced_and_about_scenes_of_their_own(tmp_path):
    folder = writers.write_questions(tmp_path / "test", "test", seed=6, per_detail=12)
    asked = json.loads((folder / "questions.json").read_text())
    assert Counter(q["detail"] for q in asked) == dict.fromkeys(scenes.DETAILS, 12)
    assert len({q["image"] for q in asked}) == len(asked) == len(list((folder / "images").iterdir()))
    for detail, values in scenes.DETAILS.items():
        own = [q for q in asked if q["detail"] == detail]
        right = Counter(q["answer"] for q in own)
        assert set(right) == set(range(len(values)))
        assert max(right.values()) - min(right.values()) <= 1
        assert all(q["options"] == [questions.answer(detail, value) for value in values] for q in own)


def test_dev_and_test_questions_share_no_scene_with_training_or_each_other(tmp_path, monkeypatch):
    drawn: dict[str, set[str]] = {}
    render = scenes.render

    def remember(scene, *args):
        drawn.setdefault(current, set()).add(scene.key())
        return render(scene, *args)

    monkeypatch.setattr(scenes, "render", remember)
    for current, write in (
        ("train", lambda folder: writers.write_llava(folder, 150, seed=4)),
        ("dev", lambda folder: writers.write_questions(folder, "dev", 5, per_detail=6)),
        ("test", lambda folder: writers.write_questions(folder, "test", 6, per_detail=6)),
    ):
        write(tmp_path / current)
    assert {name: len(keys) for name, keys in drawn.items()} == {"train": 150, "dev": 60, "test": 60}
    assert not drawn["train"] & drawn["dev"]
    assert not drawn["train"] & drawn["test"]
    assert not drawn["dev"] & drawn["test"]


def test_the_same_seed_gives_the_same_bytes(llava, tmp_path):
    again = writers.write_llava(tmp_path / "again", 120, seed=4)
    for path in sorted(llava.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (again / path.relative_to(llava)).read_bytes(), path.name
    other = writers.write_llava(tmp_path / "other", 5, seed=5)
    assert (other / "images" / "000000.jpg").read_bytes() != (llava / "images" / "000000.jpg").read_bytes()
