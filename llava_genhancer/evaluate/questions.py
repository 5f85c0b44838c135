"""Does a LLaVA know the answer? Questions with known options: the likeliest is the model's answer.

Nothing is sampled or parsed, and nothing is normalised by length.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from llava_genhancer.data.decode import BadImage, decode
from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.mllm.respondent import Ask, Respondent, Score, Unanswerable, one_by_one
from llava_genhancer.evaluate.mmvp.measure import short_labels
from llava_genhancer.evaluate.question_results import BLIND, Answer, QuestionResult, save_results
from llava_genhancer.evaluate.words import p_value, percent
from llava_genhancer.files import expand
from llava_genhancer.run import read_json, sha256

log = logging.getLogger(__name__)
FILE = "questions.json"


@dataclass(frozen=True)
class Question:
    """One entry of ``questions.json``; ``options[answer]`` is right."""

    id: str
    image: Path
    detail: str
    question: str
    options: tuple[str, ...]
    answer: int


def load_questions(folder: str | Path) -> list[Question]:
    """The questions of a folder with ``questions.json`` and ``images/``.

    Raises:
        InputError: missing or malformed file, an image outside the folder or not there.
    """
    folder = Path(expand(folder))
    images = (folder / "images").resolve()
    entries = read_json(folder / FILE)
    questions = []
    for number, entry in enumerate(entries if isinstance(entries, list) else []):
        try:
            path = (images / entry["image"]).resolve()
            options = tuple(str(option) for option in entry["options"])
            answer = int(entry["answer"])
            question = Question(str(entry["id"]), path, str(entry["detail"]), str(entry["question"]), options, answer)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{folder / FILE}: entry {number} is no question ({type(error).__name__}: {error})"
            ) from None
        if not (path.is_relative_to(images) and path.is_file()):
            raise InputError(f"{folder / FILE}: entry {number}: no image {entry['image']!r} in {images}")
        if not (len(set(options)) == len(options) >= 2 and 0 <= answer < len(options)):
            raise InputError(f"{folder / FILE}: entry {number}: give two different options at least, and the right one")
        questions.append(question)
    if not questions:
        raise InputError(f"{folder / FILE} holds no list of questions")
    return questions


def answer_questions(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    template: str,
    *,
    blank: bool = False,
    batch_size: int = 64,
) -> list[Answer]:
    """The model's answers, in the questions' order; a question that cannot be answered has the reason instead.

    Args:
        model, processor: from :func:`llava_genhancer.llava.chat.load_llava`.
        template: name of the conversation template that the model was trained with.
        blank: show an image of the mean colour instead of the question's.
        batch_size: options at a time, in whole questions; it changes speed and memory only.

    Raises:
        InputError: no question could be answered.
    """
    from tqdm import tqdm

    respondent = Respondent(model, processor.image_processor, processor.tokenizer, template)
    answers: list[Answer] = []

    def scored(part: Sequence[Question]) -> list[list[Score]]:
        asked = [Ask.about(q.question, [_blank(processor) if blank else _open(q.image)]) for q in part]
        return respondent.score(asked, [q.options for q in part])

    with tqdm(total=len(questions), desc="questions", unit="q", disable=None, leave=False) as bar:
        for batch in _batches(questions, batch_size):
            before = respondent.at_once
            for q, scores in zip(batch, one_by_one(scored, batch), strict=True):
                if isinstance(scores, Unanswerable):
                    respondent.at_once = before
                    log.warning("question %s has no answer and counts as wrong: %s", q.id, scores)
                    answers.append(Answer(q.id, q.detail, len(q.options), q.answer, -1, str(scores)))
                    continue
                totals = [score.total for score in scores]
                answers.append(Answer(q.id, q.detail, len(q.options), q.answer, totals.index(max(totals))))
            bar.update(len(batch))
    if all(a.reason is not None for a in answers):
        raise InputError(f"none of {len(answers)} questions was answered: {answers[0].reason}")
    return answers


def _batches(questions: Sequence[Question], rows: int) -> Iterator[list[Question]]:
    """Whole questions in order, with at most ``rows`` options in all; a question with more stands alone."""
    batch: list[Question] = []
    for question in questions:
        if batch and sum(len(q.options) for q in [*batch, question]) > rows:
            yield batch
            batch = []
        batch.append(question)
    if batch:
        yield batch


def _open(path: Path) -> Image.Image:
    try:
        return decode(path)
    except BadImage as error:
        raise Unanswerable(f"{path} cannot be used: {error}") from None


def _blank(processor: Any) -> Image.Image:
    """What LLaVA pads with, and nothing else."""
    mean = processor.image_processor.image_mean
    return Image.new("RGB", (64, 64), tuple(int(255 * value) for value in mean))


def run(
    checkpoints: Sequence[str | Path],
    data: str | Path,
    output: str | Path,
    *,
    labels: Sequence[str] | None = None,
    template: str = "v1",
    batch_size: int = 64,
    device: str | None = None,
) -> dict[str, Any]:
    """Ask every checkpoint, and the first also without its image; print a table and write the JSON.

    Args:
        checkpoints: folders in HF's form or the original's; the others are compared with the first.
        data: folder with ``questions.json`` and ``images/``.
        output: the JSON to write.
        labels: names for tables and figure, one per checkpoint; default: as much of each path as tells them apart.

    Returns:
        What the JSON holds.

    Raises:
        InputError: anything wrong with what was given.
    """
    from llava_genhancer.llava.chat import load_llava

    if labels is not None and len(labels) != len(checkpoints):
        raise InputError(f"{len(labels)} labels for {len(checkpoints)} checkpoints: give one each")
    questions = load_questions(data)
    results: list[QuestionResult] = []
    for label, checkpoint in zip(labels or short_labels([str(c) for c in checkpoints]), checkpoints, strict=True):
        model, processor = load_llava(checkpoint, device=device)
        weights = {p.name: sha256(p) for p in sorted(Path(checkpoint).glob("*.safetensors"))}
        for name, blank in [(label, False)] if results else [(label, False), (BLIND, True)]:
            answers = answer_questions(model, processor, questions, template, blank=blank, batch_size=batch_size)
            results.append(QuestionResult(name, str(checkpoint), weights, tuple(answers)))
    results.sort(key=lambda result: result.label == BLIND)  # last
    measured = save_results(output, results, {"path": str(data), "sha256": sha256(Path(data) / FILE)})
    for result in results:
        lost = f", {len(result.unanswered)} of them not answered" if result.unanswered else ""
        print(f"{result.label:12} {percent(result.average)} of {len(questions)} questions{lost}")
    for other in measured["comparisons"]:
        c = other["all"]
        print(
            f"{other['label']} against {other['against']}: {c['difference']:+.1f} points, p {p_value(c['mcnemar_p'])}"
        )
    print(f"results: {output}")
    return measured
