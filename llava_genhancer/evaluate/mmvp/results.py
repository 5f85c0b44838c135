"""What MMVP-VLM measured: per-pair answers, scores with intervals, comparisons, and their JSON.

Scores are in percent. One pair is 0.74 points, guessing gives 25, and the binomial standard error is about 4 points.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_genhancer.errors import InputError
from llava_genhancer.evaluate import paper
from llava_genhancer.evaluate.mmvp.data import PAIRS, PAIRS_PER_PATTERN, Benchmark
from llava_genhancer.evaluate.paper import PATTERNS
from llava_genhancer.evaluate.statistics import (
    mcnemar_exact,
    paired_difference_interval,
    stratified_interval,
    wilson_interval,
)
from llava_genhancer.run import read_json, versions, write_json

GUESS = 25.0  # percent: two statements, two images each
ONE_PAIR = 100 / PAIRS  # points


@dataclass(frozen=True)
class Score:
    """``right`` of ``n`` pairs; ``percent`` and its 95 % interval ``low``..``high``, all in percent."""

    right: int
    n: int
    percent: float
    low: float
    high: float


@dataclass(frozen=True)
class PairResult:
    """What a tower said about one pair.

    Attributes:
        ids: the two rows' ids.
        probability: per statement, softmax weight of the pair's first image.
        correct: per statement, whether the right image got more.
    """

    ids: tuple[int, int]
    probability: tuple[float, float]
    correct: tuple[bool, bool]

    @property
    def right(self) -> bool:
        return self.correct[0] and self.correct[1]


@dataclass(frozen=True)
class MmvpResult:
    """One tower's answers to all 135 pairs, and everything that follows from them.

    Attributes:
        tower: folder or hub id, as given.
        label: short name for tables and figures.
        recipe: the recipe that made the tower; None for an original one.
        backbone: recipe name of its backbone in the paper's Table 1, if it is one of those.
        method: the published method that made the tower (a key of ``paper.NAMES``), or words for what has no published
            row; None for a tower without a recipe or a released name.
        source: what the tower was made from, by its marker file; None for an original one.
    """

    tower: str
    label: str
    model_type: str
    pairs: tuple[PairResult, ...]
    recipe: str | None = None
    backbone: str | None = None
    method: str | None = None
    weights: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"
    source: str | None = None

    @property
    def patterns(self) -> list[Score]:
        """The nine patterns in the paper's order, each with Wilson's interval."""
        scores = []
        for i in range(len(PATTERNS)):
            block = self.pairs[i * PAIRS_PER_PATTERN : (i + 1) * PAIRS_PER_PATTERN]
            right = sum(p.right for p in block)
            low, high = wilson_interval(right, len(block))
            scores.append(Score(right, len(block), 100 * right / len(block), 100 * low, 100 * high))
        return scores

    @property
    def average(self) -> Score:
        """The benchmark's score, the mean over patterns, with the stratified interval."""
        strata = [(s.right, s.n) for s in self.patterns]
        low, high = stratified_interval(strata)
        percent = 100 * sum(k / n for k, n in strata) / len(strata)
        return Score(sum(k for k, _ in strata), len(self.pairs), percent, 100 * low, 100 * high)

    @property
    def paper(self) -> paper.Table1Row | None:
        """The published row of this tower's backbone and method; None for a tower without such a row."""
        return paper.published(self.backbone, paper.made_by(self.method, self.recipe))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; per-pair answers are kept, so that every figure can be computed again."""

        def rounded(score: Score) -> dict[str, Any]:
            interval = [round(score.low, 2), round(score.high, 2)]
            return {"right": score.right, "n": score.n, "percent": round(score.percent, 2), "interval": interval}

        return {
            "tower": self.tower,
            "label": self.label,
            "model_type": self.model_type,
            "recipe": self.recipe,
            "backbone": self.backbone,
            "method": self.method,
            "source": self.source,
            "weights": self.weights,
            "device": self.device,
            "average": rounded(self.average),
            "patterns": {name: rounded(s) for name, s in zip(PATTERNS, self.patterns, strict=True)},
            "paper": {"method": row.method, "average": row.average, "source": row.source}
            if (row := self.paper)
            else None,
            "pairs": [
                {"ids": list(p.ids), "probability": list(p.probability), "correct": list(p.correct)} for p in self.pairs
            ],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MmvpResult:
        """The inverse of :meth:`to_dict`; scores are computed again from the pairs.

        Raises:
            InputError: fields are missing, or it has not 135 pairs.
        """
        try:
            pairs = tuple(
                PairResult((a, b), (float(p), float(q)), (bool(x), bool(y)))
                for (a, b), (p, q), (x, y) in ((d["ids"], d["probability"], d["correct"]) for d in values["pairs"])
            )
            names = ("tower", "label", "model_type", "recipe", "backbone", "weights", "device")
            later: dict[str, Any] = {name: values.get(name) for name in ("method", "source")}
            result = cls(pairs=pairs, **later, **{name: values[name] for name in names})
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"not an MMVP-VLM result ({type(error).__name__}: {error}): run mmvp-vlm again") from None
        if len(pairs) != PAIRS:
            raise InputError(f"an MMVP-VLM result with {len(pairs)} pairs instead of {PAIRS}: run mmvp-vlm again")
        return result


@dataclass(frozen=True)
class Comparison:
    """A tower against the first one, pair by pair.

    Attributes:
        gained, lost: pairs only this tower, only the first one has right.
        difference, low, high: change of the score in points and its 95 % interval.
        p: exact two-sided McNemar test.
    """

    gained: int
    lost: int
    difference: float
    low: float
    high: float
    p: float

    def to_dict(self) -> dict[str, Any]:
        interval = [round(self.low, 2), round(self.high, 2)]
        points = {"difference": round(self.difference, 2), "interval": interval}
        return {"gained": self.gained, "lost": self.lost, **points, "mcnemar_p": self.p}


def compare(first: MmvpResult, other: MmvpResult) -> Comparison:
    """``other`` minus ``first`` on the same pairs.

    Raises:
        InputError: their pairs differ.
    """
    if [p.ids for p in first.pairs] != [p.ids for p in other.pairs]:
        raise InputError(f"{first.tower} and {other.tower} were measured on different pairs: measure them together")
    both = [(a.right, b.right) for a, b in zip(first.pairs, other.pairs, strict=True)]
    gained, lost = both.count((False, True)), both.count((True, False))
    low, high = paired_difference_interval(gained, lost, len(both))
    difference = other.average.percent - first.average.percent
    return Comparison(gained, lost, difference, 100 * low, 100 * high, mcnemar_exact(gained, lost))


def results_to_dict(results: Sequence[MmvpResult], benchmark: Benchmark) -> dict[str, Any]:
    """The whole measurement as JSON: benchmark, versions, towers (the first is the reference), comparisons with it."""
    return {
        "format": 1,
        "benchmark": {"path": str(benchmark.path), "pairs": len(benchmark.pairs), "sha256": benchmark.sha256},
        "unit": "percent",
        "guess": GUESS,
        "versions": versions(),
        "folder": os.getcwd(),
        "towers": [r.to_dict() for r in results],
        "comparisons": [
            {"tower": r.label, "against": results[0].label, **compare(results[0], r).to_dict()} for r in results[1:]
        ],
    }


def save_results(path: str | Path, results: Sequence[MmvpResult], benchmark: Benchmark) -> dict[str, Any]:
    """Write :func:`results_to_dict` atomically and return it."""
    measured = results_to_dict(results, benchmark)
    write_json(path, measured)
    return measured


def load_results(path: str | Path) -> list[MmvpResult]:
    """The towers of a file that :func:`save_results` wrote, first one first.

    Raises:
        InputError: missing, malformed, or of another format.
    """
    values = read_json(path)
    if not isinstance(values, dict) or not isinstance(values.get("towers"), list) or not values["towers"]:
        raise InputError(f"{path} is not an MMVP-VLM result: it lists no towers")
    try:
        return [MmvpResult.from_dict(t) for t in values["towers"]]
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
