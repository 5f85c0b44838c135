"""What lmms-eval wrote about a model, read back: Table 2's columns with intervals, and where each number is from.

Every column is counted again from the logged samples, and has to come to what lmms-eval's own results file says.
"""

from __future__ import annotations

import json
import shlex
from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llava_genhancer.errors import InputError
from llava_genhancer.evaluate import resampling
from llava_genhancer.evaluate.mllm.options import OPTIONS, OURS
from llava_genhancer.evaluate.mllm.table2 import COLUMNS, Column
from llava_genhancer.evaluate.words import shell_line
from llava_genhancer.run import read_json

RESULTS, SAMPLES = "_results.json", "_samples_"
PROVENANCE = "provenance.json"  # what lmms-eval does not write down; see evaluate/mllm/measure.py
FOLDER = "eval/lmms"  # of a run
SHOWN_ARGUMENTS = (
    "model", "model_args", "tasks", "batch_size", "limit", "offset", "num_fewshot", "gen_kwargs", "seed", "output_path",
)  # fmt: skip


@dataclass(frozen=True)
class TaskRun:
    """One task as it was run.

    Attributes:
        results, samples: lmms-eval's two files; ``documents`` are the samples, by their number.
        config: the task's own settings, ``settings`` those of the run.
        metrics: lmms-eval's numbers.
        facts: what :mod:`llava_genhancer.evaluate.mllm.measure` knew besides; empty for a run by hand.
    """

    name: str
    results: Path
    samples: Path
    version: str
    config: Mapping[str, Any]
    settings: Mapping[str, Any]
    metrics: Mapping[str, Any]
    facts: Mapping[str, Any]
    date: str

    @cached_property
    def documents(self) -> dict[int, dict[str, Any]]:
        try:
            lines = self.samples.read_text(encoding="utf-8").splitlines()
            found = [json.loads(line) for line in lines if line.strip()]
            return {int(sample["doc_id"]): sample for sample in found}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.samples} cannot be read as lmms-eval's samples: {error}") from None

    def item(self, number: int) -> Mapping[str, Any]:
        """What a document's reply became; every metric of ours logs the same."""
        sample = self.documents[number]
        return next(v for v in sample.values() if isinstance(v, dict) and "right" in v)

    @cached_property
    def unanswered(self) -> dict[int, str]:
        """The documents that the model could not answer, by number, each with its reason."""
        items = {number: self.item(number) for number in sorted(self.documents)}
        return {number: str(item["unanswered"]) for number, item in items.items() if item.get("unanswered")}

    @property
    def command(self) -> str:
        """A shell's line that repeats the run: folder, variables, command.

        Of a run by hand the task's metadata have them; of a file without those the line has what lmms-eval recorded.
        """
        ran = self.facts if self.facts.get("command") else (self.config.get("metadata") or {}).get("run") or {}
        if command := ran.get("command"):
            return shell_line(command, ran.get("folder"), ran.get("environment"))
        given = self.settings.get("resolved_cli_args") or self.settings
        words = ["lmms-eval"]
        for name in SHOWN_ARGUMENTS:
            value = given.get(name)
            if value not in (None, "", [], 0):
                values = ",".join(map(str, value)) if isinstance(value, list) else str(value)
                words += [f"--{name}", values]
        return shlex.join([*words, "--log_samples"])

    @property
    def lmms_eval(self) -> str | None:
        """lmms-eval's version; its own file names the commit of the folder it was started in instead."""
        metadata = self.config.get("metadata") or {}
        return self.facts.get("versions", {}).get("lmms_eval") or metadata.get("lmms_eval")

    @property
    def revision(self) -> str | None:
        return self.facts.get("data", {}).get(self.name)

    @property
    def data(self) -> str:
        parts = (self.config.get(name) for name in ("dataset_path", "dataset_name", "test_split"))
        return ", ".join(str(part) for part in parts if part)

    @property
    def prompt(self) -> str:
        """The first document's, as the model was asked."""
        first = min(self.documents)
        return str(self.documents[first].get("input", ""))


@dataclass(frozen=True)
class Measured:
    """One column of Table 2 for one model: percent with a 95 % bootstrap interval over ``n`` units.

    Attributes:
        answers: documents that were asked.
        unparsed: replies without an answer in them.
        unanswered: documents that the model could not answer; like the unparsed they count as wrong.
    """

    column: Column
    task: TaskRun
    units: tuple[Hashable, ...]
    counts: resampling.Counts
    answers: int
    unparsed: int
    unanswered: int = 0

    @property
    def n(self) -> int:
        return len(self.units)

    @cached_property
    def percent(self) -> float | None:
        found = resampling.value(self.counts)
        return None if found is None else 100 * found

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        found = resampling.interval(self.counts)
        return None if found is None else (100 * found[0], 100 * found[1])


@dataclass(frozen=True)
class Change:
    """``other`` minus ``first`` in points, on the same units."""

    difference: float
    interval: tuple[float, float]
    p: float
    test: str


@dataclass
class Model:
    """A model that lmms-eval asked: its tasks, and Table 2's columns as far as they were measured."""

    label: str
    folder: Path
    tasks: dict[str, TaskRun] = field(default_factory=dict)

    @cached_property
    def columns(self) -> dict[str, Measured]:
        found = {}
        for column in COLUMNS:
            task = next((self.tasks[name] for name in column.tasks if name in self.tasks), None)
            if task is not None and (measured := measure(column, task)).percent is not None:
                found[column.name] = measured
        return found


def measure(column: Column, task: TaskRun) -> Measured:
    """A column's units, counted from the samples.

    Raises:
        InputError: the samples are not this task's, or do not come to lmms-eval's own number.
    """
    of_unit: defaultdict[Hashable, list[Any]] = defaultdict(list)
    for number, sample in sorted(task.documents.items()):
        if column.metric in sample:
            of_unit[column.key(sample[column.metric], number)].append(sample[column.metric])
    try:
        counts = {unit: column.count(items) for unit, items in of_unit.items()}
    except (KeyError, TypeError) as error:
        raise InputError(f"{task.samples} holds no samples of our task {task.name} ({error})") from None
    if column.unit != "question":  # a group of which too little was asked says nothing
        counts = {unit: own for unit, own in counts.items() if any(denominator for _, denominator in own)}
    items = [item for own in of_unit.values() for item in own]
    array = np.array(list(counts.values()), dtype=np.int64).reshape(len(counts), len(column.count([])), 2)
    lost = sum("unanswered" in i for i in items)
    unparsed = sum(i["answer"] is None for i in items) - lost
    measured = Measured(column, task, tuple(counts), array, len(items), unparsed, lost)
    told = task.metrics.get(f"{column.metric},none")
    if isinstance(told, int | float) and measured.percent is not None and abs(100 * told - measured.percent) > 1e-6:
        raise InputError(
            f"{task.samples.name} and {task.results.name} are of different runs: {measured.percent:.2f} % and "
            f"{100 * told:.2f} % {column.metric}, in {task.samples.parent}"
        )
    return measured


def compare(first: Measured, other: Measured) -> Change | None:
    """None where the two were not asked the same."""
    if set(first.units) != set(other.units) or first.task.name != other.task.name:
        return None
    place = {unit: i for i, unit in enumerate(other.units)}
    ordered = other.counts[[place[unit] for unit in first.units]]
    low_high = resampling.difference_interval(first.counts, ordered)
    if low_high is None or first.percent is None or other.percent is None:
        return None
    p, test = resampling.paired_p(first.counts, ordered)
    return Change(other.percent - first.percent, (100 * low_high[0], 100 * low_high[1]), p, test)


def read_models(folder: Path) -> list[Model]:
    """All models in lmms-eval's output below ``folder``; of a task that was run twice the later run counts.

    Models are told apart by the sub-folder they were written to, and by what was given to ``--model_args``. "original"
    comes first, then the others by name.

    Raises:
        InputError: a results file is malformed.
    """
    models: dict[tuple[Path, str, str], Model] = {}
    for path in sorted(folder.rglob(f"*{RESULTS}"), key=lambda p: (p.parent, p.name)):
        results = read_json(path)
        try:
            settings = results["config"]
            key = (path.parent, str(settings["model"]), str(settings["model_args"]))
            model = models.setdefault(key, Model("", path.parent))
            model.tasks |= _tasks(path, results)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is no results file of lmms-eval ({type(error).__name__}: {error})") from None
    _label(folder, models)
    return sorted(models.values(), key=lambda m: (m.label != "original", m.label))


def _tasks(path: Path, results: Mapping[str, Any]) -> dict[str, TaskRun]:
    """The tasks of ours in one results file, under their own names."""
    provenance = next((p / PROVENANCE for p in path.parents[:2] if (p / PROVENANCE).is_file()), None)
    facts = read_json(provenance) if provenance else {}
    found = {}
    for name, config in results["configs"].items():
        samples = path.with_name(path.name.replace(RESULTS, f"{SAMPLES}{name}.jsonl"))
        version = str(results["versions"].get(name, ""))
        if name.removeprefix(OURS) in OPTIONS and version.startswith("genhancer") and samples.is_file():
            found[name.removeprefix(OURS)] = TaskRun(
                name=name.removeprefix(OURS),
                results=path,
                samples=samples,
                version=version,
                config=config,
                settings=results["config"],
                metrics=results["results"][name],
                facts=facts if path.name in facts.get("results", ()) else {},
                date=str(results.get("date", "")),
            )
    return found


def _label(folder: Path, models: Mapping[tuple[Path, str, str], Model]) -> None:
    """The first sub-folder's name where that tells all apart, else as much as does."""
    short, whole = [], []
    for (place, name, arguments), model in models.items():
        parts = place.relative_to(folder).parts
        short.append(parts[0] if parts else name)
        whole.append("/".join(parts) + f" ({name} {arguments})")
        model.label = short[-1]
    for model, label, long in zip(models.values(), short, whole, strict=True):
        if short.count(label) > 1:
            model.label = long.strip()
