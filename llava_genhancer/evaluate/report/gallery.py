"""The questions that one model wins and loses against the baseline, with their images, as HTML."""

from __future__ import annotations

import base64
import contextlib
import html
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from llava_genhancer.evaluate.mllm.evaluation import Evaluation
from llava_genhancer.evaluate.mllm.local_data import cache_folder
from llava_genhancer.evaluate.mllm.results import Model, TaskRun
from llava_genhancer.evaluate.mllm.table2 import COLUMNS

PER_TASK = 4  # wins shown, and losses
SIDE = 336  # pixels; larger images are made smaller
QUALITY = 85


def gallery(found: Evaluation) -> str:
    """A section per compared model; empty where nothing was compared, or all answers are alike."""
    if found.baseline is None:
        return ""
    return "\n".join(part for model in found.others if (part := _model(found.baseline, model)))


def differing(first: TaskRun, other: TaskRun) -> tuple[list[int], list[int]]:
    """Numbers of the documents that only ``other`` has right, and those that only ``first`` has."""
    shared = sorted(first.documents.keys() & other.documents.keys())
    right = {n: (bool(first.item(n)["right"]), bool(other.item(n)["right"])) for n in shared}
    return [n for n in shared if right[n] == (False, True)], [n for n in shared if right[n] == (True, False)]


def _model(baseline: Model, model: Model) -> str:
    parts = []
    for names in dict.fromkeys(column.tasks for column in COLUMNS):
        task = next((model.tasks[n] for n in names if n in model.tasks and n in baseline.tasks), None)
        if task is None:
            continue
        first = baseline.tasks[task.name]
        wins, losses = differing(first, task)
        shown = {"wins": _spread(wins), "losses": _spread(losses)}
        images = _images(task, [n for numbers in shown.values() for n in numbers])
        for kind, numbers in shown.items():
            if numbers:
                total = len(wins if kind == "wins" else losses)
                told = f"{html.escape(task.name)}: {len(numbers)} of {total} {kind}"
                cards = "".join(_card(n, first, task, (baseline.label, model.label), images.get(n)) for n in numbers)
                parts.append(f'<h3>{told}</h3><div class="cards">{cards}</div>')
    if not parts:
        return ""
    title = f"Wins and losses: {html.escape(model.label)} against {html.escape(baseline.label)}"
    return f"<h2>{title}</h2><p>Questions that only one of the two answers rightly.</p>" + "".join(parts)


def _card(number: int, first: TaskRun, other: TaskRun, labels: Sequence[str], image: Image.Image | None) -> str:
    sample = other.documents[number]
    lines = [f"<p class=ask>{_words(sample.get('input'))}</p>", f"<p>right: <b>{_words(sample.get('target'))}</b></p>"]
    for label, task in zip(labels, (first, other), strict=True):
        right = task.item(number)["right"]
        reply = _words(task.documents[number].get("filtered_resps"))
        mark = "✓" if right else "✗"
        lines.append(f"<p class={'yes' if right else 'no'}>{mark} {html.escape(label)}: {reply}</p>")
    seen = "<p class=none>its image was not found</p>"
    if image is not None:
        small = " class=small" if max(image.size) < 100 else ""
        seen = f'<img{small} loading="lazy" alt="document {number}" src="{data_uri(image)}">'
    return f"<figure>{seen}<figcaption>{''.join(lines)}<p class=none>document {number}</p></figcaption></figure>"


def data_uri(image: Image.Image) -> str:
    """A JPEG inside of the page; an image of few pixels stays lossless."""
    image = image.convert("RGB")
    small = max(image.size) < 100
    if not small:
        image.thumbnail((SIDE, SIDE))
    data = io.BytesIO()
    image.save(data, "PNG") if small else image.save(data, "JPEG", quality=QUALITY)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(data.getvalue()).decode()}"


def _words(value: Any, limit: int = 700) -> str:
    if isinstance(value, list):
        value = " / ".join(map(str, value))
    words = str(value if value is not None else "").strip()
    return html.escape(words if len(words) <= limit else words[: limit - 1] + "…").replace("\n", "<br>")


def _spread(numbers: Sequence[int]) -> list[int]:
    """At most ``PER_TASK``, evenly spread."""
    if len(numbers) <= PER_TASK:
        return list(numbers)
    return [numbers[i * len(numbers) // PER_TASK] for i in range(PER_TASK)]


def _images(task: TaskRun, numbers: Sequence[int]) -> dict[int, Image.Image]:
    """The documents' images, as far as the data set lies on this machine; nothing is downloaded."""
    if not numbers:
        return {}
    try:
        from datasets import load_dataset

        with _offline():
            config, path = task.config, Path(task.config["dataset_path"])
            cache = str(cache_folder(path.parents[1])) if path.is_absolute() else None
            docs = load_dataset(str(path), config.get("dataset_name"), split=config["test_split"], cache_dir=cache)
        found = {n: docs[n].get("image", docs[n].get("Image")) for n in numbers if n < len(docs)}
        return {n: image for n, image in found.items() if image is not None}
    except (ImportError, OSError, ValueError, KeyError):  # datasets' own errors are OSErrors and ValueErrors
        return {}


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    import datasets

    before, bars = datasets.config.HF_HUB_OFFLINE, datasets.are_progress_bars_disabled()
    datasets.config.HF_HUB_OFFLINE = True
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
        if not bars:
            datasets.enable_progress_bars()
