"""What a LLaVA answered to questions with known options: scores per detail with intervals, comparisons, their JSON.

Scores are in percent. Wilson's 95 % interval per detail, a stratified one for the average over details.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.mmvp.results import Comparison, Score
from llava_genhancer.evaluate.statistics import (
    mcnemar_exact,
    paired_difference_interval,
    stratified_interval,
    wilson_interval,
)
from llava_genhancer.run import read_json, versions, write_json

BLIND = "blind"  # label of the first model when it is shown a blank image
SCORING = (
    "The option with the highest sum of token log-probabilities, its end token included, after image and question; not "
    "normalised by length."
)


@dataclass(frozen=True)
class Answer:
    """``chosen`` and ``truth`` are places among the question's ``options``, of which there are that many.

    A question that could not be answered has the place -1 and counts as wrong.
    """

    id: str
    detail: str
    options: int
    truth: int
    chosen: int
    reason: str | None = None  # why it could not be answered

    @property
    def right(self) -> bool:
        return self.chosen == self.truth


@dataclass(frozen=True)
class QuestionResult:
    """One model's answers to every question, and what follows from them.

    Attributes:
        label: short name for tables and figures.
        checkpoint: its folder, as given.
        weights: SHA-256 of its weight files.
    """

    label: str
    checkpoint: str
    weights: dict[str, str]
    answers: tuple[Answer, ...]

    @property
    def details(self) -> dict[str, Score]:
        """Per detail, in the questions' order."""
        scores = {}
        for detail in dict.fromkeys(a.detail for a in self.answers):
            answers = [a for a in self.answers if a.detail == detail]
            right, n = sum(a.right for a in answers), len(answers)
            low, high = wilson_interval(right, n)
            scores[detail] = Score(right, n, 100 * right / n, 100 * low, 100 * high)
        return scores

    @property
    def average(self) -> Score:
        """The unweighted mean over details."""
        strata = [(s.right, s.n) for s in self.details.values()]
        low, high = stratified_interval(strata)
        percent = 100 * sum(k / n for k, n in strata) / len(strata)
        return Score(sum(k for k, _ in strata), len(self.answers), percent, 100 * low, 100 * high)

    @property
    def chance(self) -> dict[str, float]:
        """What guessing gives per detail, percent."""
        chances: dict[str, list[float]] = {}
        for a in self.answers:
            chances.setdefault(a.detail, []).append(100 / a.options)
        return {detail: sum(values) / len(values) for detail, values in chances.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; every answer is kept, so that all figures can be computed again."""
        return {
            "label": self.label,
            "checkpoint": self.checkpoint,
            "weights": self.weights,
            "average": _rounded(self.average),
            "details": {detail: _rounded(score) for detail, score in self.details.items()},
            "answers": [[a.id, a.detail, a.options, a.truth, a.chosen] for a in self.answers],
            "unanswered": self.unanswered,
        }

    @property
    def unanswered(self) -> dict[str, str]:
        """Ids of the questions that could not be answered, each with the reason."""
        return {a.id: a.reason for a in self.answers if a.reason is not None}


def _rounded(score: Score) -> dict[str, Any]:
    interval = [round(score.low, 2), round(score.high, 2)]
    return {"right": score.right, "n": score.n, "percent": round(score.percent, 2), "interval": interval}


def compare(first: QuestionResult, other: QuestionResult, detail: str | None = None) -> Comparison:
    """``other`` minus ``first`` on the same questions: those of one detail, or all.

    Over all questions the difference is of the pooled share, which is the average's where details have equal numbers.

    Raises:
        InputError: their questions differ.
    """
    if [a.id for a in first.answers] != [a.id for a in other.answers]:
        raise InputError(f"{first.label} and {other.label} were asked different questions: measure them together")
    pairs = zip(first.answers, other.answers, strict=True)
    both = [(a.right, b.right) for a, b in pairs if detail in (None, a.detail)]
    gained, lost = both.count((False, True)), both.count((True, False))
    low, high = paired_difference_interval(gained, lost, len(both))
    difference = 100 * (gained - lost) / len(both)
    return Comparison(gained, lost, difference, 100 * low, 100 * high, mcnemar_exact(gained, lost))


def save_results(path: str | Path, results: Sequence[QuestionResult], data: dict[str, Any]) -> dict[str, Any]:
    """Write the measurement atomically and return it; the others are compared with the first.

    Args:
        data: ``{"path", "sha256"}`` of the questions.
    """
    first, *others = results
    comparisons = [
        {
            "label": other.label,
            "against": first.label,
            "all": compare(first, other).to_dict(),
            "details": {detail: compare(first, other, detail).to_dict() for detail in first.details},
        }
        for other in others
    ]
    measured = {
        "format": 1,
        "data": {**data, "questions": len(first.answers)},
        "unit": "percent",
        "scoring": SCORING,
        "chance": {detail: round(value, 2) for detail, value in first.chance.items()},
        "versions": versions(),
        "folder": os.getcwd(),
        "models": [result.to_dict() for result in results],
        "comparisons": comparisons,
    }
    write_json(path, measured)
    return measured


def load_results(path: str | Path) -> list[QuestionResult]:
    """The models of a file that :func:`save_results` wrote; scores are computed again from the answers.

    Raises:
        InputError: missing, malformed, or of another format.
    """
    values = read_json(path)
    try:
        results = [
            QuestionResult(
                label=str(model["label"]),
                checkpoint=str(model["checkpoint"]),
                weights=dict(model["weights"]),
                answers=tuple(
                    Answer(str(i), str(detail), int(n), int(t), int(c), model.get("unanswered", {}).get(str(i)))
                    for i, detail, n, t, c in model["answers"]
                ),
            )
            for model in values["models"]
        ]
        if not results or not all(result.answers for result in results):
            raise ValueError("no answers")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} holds no answers to questions ({type(error).__name__}: {error}): measure again"
        ) from None
    return results
