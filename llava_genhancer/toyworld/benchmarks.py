"""The paper's MLLM benchmarks asked about the toy world: small parquet sets with the real ones' names and columns.

Below a folder they lie as on the hub, ``<organisation>/<name>/...``, so that lmms-eval's tasks read them unchanged. All
scenes are of the split "test", which no training sees. What each benchmark is after becomes what this world has of it:
MMVP's pairs differ in one detail, POPE asks for something that is there or not, CV-Bench counts and relates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from llava_genhancer.toyworld import scenes
from llava_genhancer.toyworld.questions import LETTERS, QUESTIONS, SENTENCES, answer
from llava_genhancer.toyworld.scenes import DETAILS, Scene

SPLIT = "test"
PAIRS_PER_PATTERN = 5
GROUPS = 30  # of NaturalBench
PER_PART = 30  # of CV-Bench's three
PER_CATEGORY = 40  # of POPE's three
SCIENCE = 60
SETS = 12  # of HallusionBench
Row = dict[str, Any]

# What CV-Bench's parts ask about: type, source, task and detail.
_CV_PARTS = (
    ("2D", "ADE20K", "Count", "count"),
    ("2D", "COCO", "Relation", "star"),
    ("3D", "Omni3D", "Distance", "view"),
)
# POPE's categories, each harder than the one before: an attribute, the question, and each value's words.
_PLACES = {
    "meadow": "in a meadow", "desert": "in a desert", "night": "at night", "snow": "in the snow",
    "seaside": "at the seaside",
}  # fmt: skip
_FEATURES = {"plain": "without horns or feet", "horns": "with horns", "feet": "with feet"}
_POPE = {
    "random": ("place", "Is this a critter {}?", _PLACES),
    "popular": ("colour", "Is there a critter coloured {} in the image?", {c: c for c in DETAILS["colour"]}),
    "adversarial": ("feature", "Is there a critter {} in the image?", _FEATURES),
}


def write_benchmarks(folder: str | Path, seed: int) -> Path:
    """Write all six sets; what they hold depends on ``seed`` alone."""
    folder, rng = Path(folder), Random(seed)
    _write(_mmvp(rng), folder / "lmms-lab-eval/MMVP/data/train-00000-of-00001.parquet")
    _write(_naturalbench(rng), folder / "BaiqiL/NaturalBench-lmms-eval/data/test-00000-of-00001.parquet")
    cvbench = folder / "nyu-visionx/CV-Bench"
    rows = _cvbench(rng)
    for kind in ("2D", "3D"):
        _write([row for row in rows if row["type"] == kind], cvbench / f"test_{kind.lower()}.parquet")
    _card(cvbench, {"default": "test*.parquet", "2D": "test_2d*", "3D": "test_3d*"})
    _write(_pope(rng), folder / "lmms-lab-encoder/POPE/data/test-00000-of-00001.parquet")
    science = folder / "lmms-lab-encoder/ScienceQA"
    _write(_scienceqa(rng), science / "ScienceQA-IMG/test-00000-of-00001.parquet")
    _card(science, {"ScienceQA-IMG": "ScienceQA-IMG/test*"})
    _write(_hallusion(rng), folder / "lmms-lab-encoder/HallusionBench/data/image-00000-of-00001.parquet")
    return folder


def _two(rng: Random, detail: str) -> tuple[Scene, Scene]:
    """Two scenes that differ in ``detail`` alone."""
    while True:
        first = scenes.sample_scene(rng, SPLIT)
        value = rng.choice([value for value in DETAILS[detail] if value != getattr(first, detail)])
        second = replace(first, **{detail: value})  # type: ignore[arg-type]
        if second.split() == SPLIT:
            return first, second


def _word(scene: Scene, detail: str) -> str:
    return answer(detail, getattr(scene, detail))


def _claim(scene: Scene, detail: str) -> str:
    """A question whose answer is yes for ``scene``."""
    return f"{SENTENCES[detail].format(_word(scene, detail))} Is that true?"


def _mmvp(rng: Random) -> list[Row]:
    rows: list[Row] = []
    for pattern in scenes.PATTERNS:
        for _ in range(PAIRS_PER_PATTERN):
            detail = rng.choice(pattern.details)
            pair = _two(rng, detail)
            words = [_word(scene, detail) for scene in rng.sample(pair, 2)]
            for scene in pair:
                right = "ab"[words.index(_word(scene, detail))]
                facts = {"Question": QUESTIONS[detail][0], "Options": f"(a) {words[0]} (b) {words[1]}"}
                rows.append(
                    {"Index": len(rows) + 1, **facts, "Correct Answer": f"({right})", "image": scenes.render(scene)}
                )
    return rows


def _naturalbench(rng: Random) -> list[Row]:
    """Per group: the first question on both images, then the second; each has another answer on either image."""
    rows: list[Row] = []
    for group in range(GROUPS):
        detail = rng.choice(list(DETAILS))
        pair = _two(rng, detail)
        for asked in range(2):
            words = [_word(scene, detail) for scene in (pair[asked], pair[1 - asked])]
            for image, scene in enumerate(pair):
                if group % 2:
                    kind, question = "yes_no", _claim(pair[asked], detail)
                    right = "Yes" if asked == image else "No"
                else:
                    kind = "multiple_choice"
                    question = f"{QUESTIONS[detail][0]} Option: A:{words[0]}; B:{words[1]};"
                    right = "A" if asked == image else "B"
                facts = {"Question": question, "Answer": right, "Question_Type": kind}
                rows.append({"Index": len(rows), **facts, "Image": scenes.render(scene)})
    return rows


def _cvbench(rng: Random) -> list[Row]:
    rows: list[Row] = []
    for kind, source, task, detail in _CV_PARTS:
        for _ in range(PER_PART):
            scene, choices, right = _choices(rng, detail)
            listed = "\n".join(f"({letter}) {c}" for letter, c in zip(LETTERS, choices, strict=False))
            question = QUESTIONS[detail][0]
            facts = {"type": kind, "task": task, "question": question, "choices": choices, "source": source}
            asked = {
                "answer": f"({LETTERS[right]})",
                "prompt": f"{question} Select from the following choices.\n{listed}",
            }
            rows.append(
                {"idx": len(rows), **facts, **asked, "filename": f"{len(rows)}.png", "image": scenes.render(scene)}
            )
    return rows


def _choices(rng: Random, detail: str) -> tuple[Scene, list[str], int]:
    """A scene, all words for a detail in random order, and the right one's place."""
    scene = scenes.sample_scene(rng, SPLIT)
    words = [answer(detail, value) for value in DETAILS[detail]]
    rng.shuffle(words)
    return scene, words, words.index(_word(scene, detail))


def _pope(rng: Random) -> list[Row]:
    rows: list[Row] = []
    for category, (attribute, question, words) in _POPE.items():
        for index in range(PER_CATEGORY):
            scene = scenes.sample_scene(rng, SPLIT)
            there = getattr(scene, attribute)
            asked = there if index % 2 else rng.choice([value for value in words if value != there])
            facts = {"question": question.format(words[asked]), "answer": "yes" if index % 2 else "no"}
            ids = {"id": str(len(rows)), "question_id": str(index + 1), "image_source": f"toyworld_{len(rows):06d}"}
            rows.append({**ids, **facts, "category": category, "image": scenes.render(scene)})
    return rows


def _scienceqa(rng: Random) -> list[Row]:
    rows: list[Row] = []
    for index in range(SCIENCE):
        detail = list(DETAILS)[index % len(DETAILS)]
        scene, choices, right = _choices(rng, detail)
        taught = dict.fromkeys(("hint", "lecture", "solution"), "")
        place = {"task": "closed choice", "grade": "grade1", "subject": "natural science", "topic": "critters"}
        facts = {"question": QUESTIONS[detail][0], "choices": choices, "answer": right}
        rows.append(
            {**facts, **taught, **place, "category": detail, "skill": "look closely", "image": scenes.render(scene)}
        )
    return rows


def _hallusion(rng: Random) -> list[Row]:
    """Sets of two figures, a scene and its edited copy, with the same two questions."""
    rows: list[Row] = []
    for number in range(SETS):
        detail = rng.choice(list(DETAILS))
        pair = _two(rng, detail)
        kept = rng.choice([other for other in DETAILS if other != detail])
        for figure, scene in enumerate(pair):
            for question, (asked, about) in enumerate(((detail, pair[0]), (kept, pair[figure]))):
                right = getattr(scene, asked) == getattr(about, asked)
                place = {
                    "category": "VD" if number % 2 else "VS",
                    "subcategory": "toyworld",
                    "visual_input": str(figure + 1),
                }
                ids = {"set_id": str(number), "figure_id": str(figure), "sample_note": "", "question_id": str(question)}
                facts = {"question": _claim(about, asked), "gt_answer_details": "", "gt_answer": str(int(right))}
                rows.append(
                    {**place, **ids, **facts, "filename": f"{number}_{figure}.png", "image": scenes.render(scene)}
                )
    return rows


def _write(rows: Sequence[Row], path: Path) -> None:
    import datasets

    text = datasets.Value("string")
    kinds = {int: datasets.Value("int64"), str: text, list: datasets.Sequence(text)}
    features = datasets.Features({n: kinds.get(type(value), datasets.Image()) for n, value in rows[0].items()})
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    path.parent.mkdir(parents=True, exist_ok=True)
    data = datasets.Dataset.from_dict(columns, features=features)
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        data.to_parquet(path)
    finally:
        if shown:
            datasets.enable_progress_bars()


def _card(folder: Path, configs: Mapping[str, str]) -> None:
    """The card names a data set's configurations, each with the files of its test split."""
    lines = [
        f'- config_name: {name}\n  data_files:\n  - split: test\n    path: "{files}"' for name, files in configs.items()
    ]
    (folder / "README.md").write_text("\n".join(["---", "configs:", *lines, "---", ""]))
