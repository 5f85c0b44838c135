"""What zero-shot measurements found: answers per image, scores with intervals, comparisons, and their JSON.

Scores are in percent. A unit is what was drawn as a whole, an image with all its captions: intervals and tests are over
units, since the captions of one image are right and wrong together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llava_genhancer.errors import InputError
from llava_genhancer.evaluate import resampling
from llava_genhancer.evaluate.mmvp.results import Score
from llava_genhancer.evaluate.resampling import Counts
from llava_genhancer.evaluate.statistics import wilson_interval
from llava_genhancer.run import read_json, versions, write_json

TOP1, IMAGE_RECALL, TEXT_RECALL = "top-1", "image R@5", "text R@5"
METRICS = (TOP1, IMAGE_RECALL, TEXT_RECALL)


@dataclass(frozen=True)
class Answers:
    """A tower's answers to one data set by one metric.

    Attributes:
        sha256: the data set's.
        units: per image, whether each answer about it is right: one, or for image retrieval one per caption.
        guess: what guessing gives, in percent.
    """

    data: str
    metric: str
    sha256: str
    units: tuple[tuple[bool, ...], ...]
    guess: float

    @property
    def name(self) -> str:
        return f"{self.data}, {self.metric}"

    @cached_property
    def counts(self) -> Counts:
        """Right answers and answers per unit, as ``resampling`` takes them: (units, 1, 2)."""
        return np.array([[[sum(unit), len(unit)]] for unit in self.units], dtype=np.int64)

    @cached_property
    def score(self) -> Score:
        """Percent right; Wilson's interval for one answer per unit, else a bootstrap over units."""
        right, n = (int(x) for x in self.counts[:, 0].sum(axis=0))
        single = len(self.units) == n
        interval = wilson_interval(right, n) if single else resampling.interval(self.counts)
        assert interval is not None
        return Score(right, n, 100 * right / n, 100 * interval[0], 100 * interval[1])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; answers as words of 0 and 1, one word per image, so that every figure can be computed again."""
        words = " ".join("".join("01"[x] for x in unit) for unit in self.units)
        return {**self.summary(), "sha256": self.sha256, "answers": words}

    def summary(self) -> dict[str, Any]:
        s = self.score
        return {
            "data": self.data,
            "metric": self.metric,
            "right": s.right,
            "n": s.n,
            "percent": round(s.percent, 2),
            "interval": [round(s.low, 2), round(s.high, 2)],
            "guess": round(self.guess, 2),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Answers:
        """The inverse of :meth:`to_dict`.

        Raises:
            InputError: it is not that.
        """
        try:
            units = tuple(tuple(x == "1" for x in word) for word in values["answers"].split())
            if not units:
                raise ValueError("no answers")
            return cls(values["data"], values["metric"], values["sha256"], units, float(values["guess"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"not a zero-shot result ({type(error).__name__}: {error}): run zero-shot again") from None


@dataclass(frozen=True)
class TowerAnswers:
    """One tower's answers to all the data sets of a measurement.

    Attributes:
        tower: folder or hub id, as given; ``label`` is its short name.
        recipe, backbone, weights, method, source: as of :class:`~llava_genhancer.evaluate.tower.Tower`.
    """

    tower: str
    label: str
    answers: tuple[Answers, ...]
    recipe: str | None = None
    backbone: str | None = None
    weights: dict[str, str] | None = None
    method: str | None = None
    source: str | None = None

    @property
    def mean(self) -> float:
        """Percent, over all data sets and metrics alike."""
        return sum(a.score.percent for a in self.answers) / len(self.answers)

    def to_dict(self) -> dict[str, Any]:
        names = ("tower", "label", "recipe", "backbone", "weights", "method", "source")
        facts = {name: getattr(self, name) for name in names}
        return {**facts, "mean": round(self.mean, 2), "scores": [a.to_dict() for a in self.answers]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TowerAnswers:
        """The inverse of :meth:`to_dict`.

        Raises:
            InputError: it is not that.
        """
        try:
            facts = {name: values[name] for name in ("tower", "label", "recipe", "backbone", "weights")}
            facts |= {name: values.get(name) for name in ("method", "source")}
            return cls(answers=tuple(map(Answers.from_dict, values["scores"])), **facts)
        except (KeyError, TypeError) as error:
            raise InputError(f"not a zero-shot result ({type(error).__name__}: {error}): run zero-shot again") from None


@dataclass(frozen=True)
class Change:
    """A tower's score minus the first tower's on the same answers: points, 95 % interval, p and its test's name."""

    difference: float
    low: float
    high: float
    p: float
    test: str

    def to_dict(self) -> dict[str, Any]:
        interval = [round(self.low, 2), round(self.high, 2)]
        return {"difference": round(self.difference, 2), "interval": interval, "p": self.p, "test": self.test}


def change(first: Answers, other: Answers) -> Change:
    """``other`` minus ``first``, paired image by image: bootstrap interval; exact McNemar or a permutation test.

    Raises:
        InputError: they are of different data or metrics.
    """
    if (first.data, first.metric, first.sha256) != (other.data, other.metric, other.sha256):
        raise InputError(f"{first.name} and {other.name} were measured on different data: measure them together")
    interval = resampling.difference_interval(first.counts, other.counts)
    assert interval is not None
    p, test = resampling.paired_p(first.counts, other.counts)
    difference = other.score.percent - first.score.percent
    return Change(difference, 100 * interval[0], 100 * interval[1], p, test)


def results_to_dict(towers: Sequence[TowerAnswers], sets: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The whole measurement as JSON: data sets, versions, towers (the first is the reference), comparisons with it."""
    first, *others = towers
    comparisons = [
        {"tower": other.label, "against": first.label, "data": a.data, "metric": a.metric, **change(a, b).to_dict()}
        for other in others
        for a, b in zip(first.answers, other.answers, strict=True)
    ]
    return {
        "format": 1,
        "unit": "percent",
        "sets": list(sets),
        "versions": versions(),
        "towers": [t.to_dict() for t in towers],
        "comparisons": comparisons,
    }


def load_results(path: str | Path) -> list[TowerAnswers]:
    """The towers of a file that the command wrote, first one first.

    Raises:
        InputError: missing, malformed, or of another format.
    """
    values = read_json(path)
    if not isinstance(values, dict) or not isinstance(values.get("towers"), list) or not values["towers"]:
        raise InputError(f"{path} is not a zero-shot result: it lists no towers")
    try:
        return [TowerAnswers.from_dict(t) for t in values["towers"]]
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


class Store:
    """Answers by weights and data set, a file each, written as they come: what is there is not measured again.

    Args:
        folder: where; None keeps nothing.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder

    def get(self, weights: dict[str, str], data: str, sha256: str) -> list[Answers] | None:
        """The answers of these weights to this data set, by each of its metrics; None if there are none that fit."""
        path = self._path(weights, data, sha256)
        if path is None or not path.is_file():
            return None
        try:
            return [Answers.from_dict(a) for a in read_json(path)["answers"]]
        except (InputError, KeyError, TypeError):
            return None  # a file that anybody may have spoilt; measured again, it is whole

    def put(self, weights: dict[str, str], answers: Sequence[Answers]) -> None:
        """Keep the answers to one data set."""
        if (path := self._path(weights, answers[0].data, answers[0].sha256)) is not None:
            write_json(path, {"weights": weights, "answers": [a.to_dict() for a in answers]})

    def _path(self, weights: dict[str, str], data: str, sha256: str) -> Path | None:
        if self.folder is None or not weights:  # weights that cannot be told apart
            return None
        key = hashlib.sha256(json.dumps([sorted(weights.items()), sha256]).encode()).hexdigest()[:16]
        return self.folder / f"{data}-{key}.json"
