"""Answers by likelihood: against sums taken token by token, the same in any batch, blind without its image."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava_genhancer.errors import InputError
from llava_genhancer.evaluate import questions
from llava_genhancer.evaluate.question_results import (
    BLIND,
    Answer,
    QuestionResult,
    compare,
    load_results,
    save_results,
)
from llava_genhancer.evaluate.report import llava_section
from llava_genhancer.evaluate.report.write import write_report
from llava_genhancer.evaluate.statistics import mcnemar_exact, wilson_interval
from llava_genhancer.toyworld.writers import write_questions


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> Path:
    return write_questions(tmp_path_factory.mktemp("toy") / "dev", "dev", seed=5, per_detail=2)


@pytest.fixture(scope="module")
def loaded(llava_folders):
    from llava_genhancer.llava.chat import load_llava

    return load_llava(llava_folders / "hf")


def test_answers_are_the_most_likely_texts_taken_one_by_one(asked, loaded):
    """Without batches, labels or padding: the prompt as the processor writes it, then one token at a time."""
    model, processor = loaded
    listed = questions.load_questions(asked)[::3]
    for q, answered in zip(listed, questions.answer_questions(model, processor, listed, "v1"), strict=True):
        content = [{"type": "image"}, {"type": "text", "text": q.question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=Image.open(q.image), text=prompt, return_tensors="pt")
        start = inputs["input_ids"].shape[1]
        scores = []
        for option in q.options:
            answer = processor.tokenizer(f"{option}</s>", add_special_tokens=False).input_ids  # it adds the space
            ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], 1)
            with torch.no_grad():
                logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0]
            steps = logits.log_softmax(-1)[range(start - 1, start - 1 + len(answer)), answer]
            scores.append(float(steps.sum()))
        assert answered == Answer(
            q.id, q.detail, len(q.options), q.answer, max(range(len(scores)), key=scores.__getitem__)
        )


def test_batches_change_nothing_and_a_blank_image_is_a_blank_image(asked, loaded, tmp_path):
    model, processor = loaded
    listed = questions.load_questions(asked)
    answers = questions.answer_questions(model, processor, listed, "v1", batch_size=64)
    assert questions.answer_questions(model, processor, listed, "v1", batch_size=1) == answers
    mean = tuple(int(255 * x) for x in processor.image_processor.image_mean)
    Image.new("RGB", (48, 48), mean).save(tmp_path / "blank.png")
    shown = [dataclasses.replace(q, image=tmp_path / "blank.png") for q in listed]
    blind = questions.answer_questions(model, processor, listed, "v1", blank=True)
    assert questions.answer_questions(model, processor, shown, "v1") == blind


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image": "../../secret.jpg"}, "no image"),
        ({"image": "missing.jpg"}, "no image"),
        ({"options": ["a", "a"]}, "two different options"),
        ({"options": ["a", "b"], "answer": 2}, "two different options"),
        ({"answer": None}, "is no question"),
    ],
)
def test_odd_questions_are_named(tmp_path, asked, change, said):
    entries = json.loads((asked / "questions.json").read_text())
    entries[3] |= change
    (tmp_path / "images").symlink_to(asked / "images")
    (tmp_path / "questions.json").write_text(json.dumps(entries))
    (tmp_path.parent / "secret.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=rf"entry 3.*{said}"):
        questions.load_questions(tmp_path)


def _result(label: str, right: dict[str, list[bool]]) -> QuestionResult:
    answers = [
        Answer(f"{detail}-{i}", detail, 4, 1, 1 if ok else 0)
        for detail, values in right.items()
        for i, ok in enumerate(values)
    ]
    return QuestionResult(label, f"models/{label}", {}, tuple(answers))


ORIGINAL = _result("original", {"facing": [True] * 3 + [False] * 7, "colour": [True] * 9 + [False]})
ENHANCED = _result("enhanced", {"facing": [True] * 2 + [False] + [True] * 6 + [False], "colour": [True] * 10})
BLINDED = _result(BLIND, {"facing": [False] * 10, "colour": [True] * 2 + [False] * 8})


def test_scores_and_comparisons_by_hand():
    score = ORIGINAL.details["facing"]
    assert (score.right, score.n, score.percent) == (3, 10, 30.0)
    assert (score.low / 100, score.high / 100) == pytest.approx(wilson_interval(3, 10))
    assert ORIGINAL.average.percent == pytest.approx((30 + 90) / 2)
    assert ORIGINAL.chance == {"facing": 25.0, "colour": 25.0}
    facing = compare(ORIGINAL, ENHANCED, "facing")
    assert (facing.gained, facing.lost, facing.difference) == (6, 1, 50.0)
    assert facing.p == mcnemar_exact(6, 1) == 0.125
    both = compare(ORIGINAL, ENHANCED)
    assert (both.gained, both.lost, both.difference) == (7, 1, 30.0)
    with pytest.raises(InputError, match="different questions"):
        compare(ORIGINAL, dataclasses.replace(ENHANCED, answers=ENHANCED.answers[1:]))


def test_results_survive_their_file_and_a_broken_file_is_named(tmp_path):
    path = tmp_path / "questions.json"
    save_results(path, [ORIGINAL, ENHANCED, BLINDED], {"path": "set", "sha256": "00"})
    assert load_results(path) == [ORIGINAL, ENHANCED, BLINDED]
    for broken in ("{}", '{"models": []}', '{"models": [{"label": "x"}]}', "[]"):
        path.write_text(broken)
        with pytest.raises(InputError, match="holds no answers"):
            load_results(path)


def test_the_report_shows_each_detail_of_each_model(tmp_path):
    path = tmp_path / llava_section.QUESTIONS
    save_results(path, [ORIGINAL, ENHANCED, BLINDED], {"path": "set", "sha256": "0123456789abcdef0"})
    for folder in ("llava-pretrain", "llava-finetune", "baseline/llava-finetune"):
        (tmp_path / folder).mkdir(parents=True)
        facts = {"steps": 7, "images_seen": 224, "final_loss": 0.5, "trainable_parameters": 1000, "seconds": 61.0}
        facts |= {"padding_share": 0.2971} if folder == "llava-pretrain" else {}
        (tmp_path / folder / "result.json").write_text(json.dumps(facts))
        called = json.dumps({"command": ["/bin/llava-genhancer", "llava", folder]})
        (tmp_path / folder / "manifest.json").write_text(called)
    words = write_report(tmp_path).read_text()
    for said in (
        "## LLaVA", "| facing | 10 | 25.0 | 30.0 [10.8, 60.3] | 80.0 [49.0, 94.3] | 0.0 [0.0, 27.8] | +50.0 (0.125) |",
        "| **average** | 20 | 25.0 | 60.0", "(figures/questions.png)", "blank image", "not normalised by length",
        "LLaVA with the enhanced tower against the original: +30.0 points", "within noise",
        "| original | finetune | 7 |", "| 1,000 | 0.2971 |", "| 1,000 | - |",
        "llava-genhancer llava baseline/llava-finetune",
        "llava-genhancer questions models/original models/enhanced --labels original enhanced --data set",
        "[baseline/llava-finetune/manifest.json](baseline/llava-finetune/manifest.json)",
    ):  # fmt: skip
        assert said in words, said
    assert min(Image.open(tmp_path / "figures" / "questions.png").size) > 200
    facts = json.loads((tmp_path / "report.json").read_text())
    assert [(f["tower"], f["step"]) for f in facts["llava"]] == [
        ("enhanced", "pretrain"), ("enhanced", "finetune"), ("original", "finetune")]  # fmt: skip
    assert [m["label"] for m in facts["questions"]["models"]] == ["original", "enhanced", BLIND]
    assert "answers" not in facts["questions"]["models"][0]
    path.write_text('{"data": {}}')
    assert "LLaVA: its data are not as expected" in write_report(tmp_path).read_text()
