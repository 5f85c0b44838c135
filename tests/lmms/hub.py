"""Small local copies of the benchmarks' data sets, with their real layout and columns."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, Sequence, Value
from PIL import Image as Picture

TEXT, INT = Value("string"), Value("int64")
MMVP = [
    {"Index": i, "Question": f"Is the door of truck {(i + 1) // 2} open?", "Options": "(a) Open (b) Closed",
     "Correct Answer": "(a)" if i % 2 else "(b)"}
    for i in range(1, 9)
] + [
    {"Index": 99, "Question": "Does the elephant have long or short tusks?", "Options": "(a) Long (b) Short",
     "Correct Answer": "(b)"},
    {"Index": 100, "Question": "Does the elephant have long or short tusks?", "Options": "(a) Long (b) Short",
     "Correct Answer": "(a)"},
]  # fmt: skip
NATURALBENCH = [
    {"Index": 4 * group + place, "Question": f"Is it {group}?" if kind == "yes_no" else "Which? Option: A:x; B:y;",
     "Answer": ("Yes" if yes else "No") if kind == "yes_no" else ("A" if yes else "B"), "Question_Type": kind}
    for group, kind in enumerate(["yes_no", "multiple_choice", "yes_no"])
    for place, yes in enumerate([True, False, False, True])
]  # fmt: skip
POPE = [
    {"id": str(n), "question_id": str(i), "question": f"Is there a thing {i} in the image?",
     "answer": "yes" if i % 2 else "no", "image_source": f"coco_{i}", "category": category}
    for n, (category, i) in enumerate(itertools.product(["adversarial", "popular", "random"], range(6)))
]  # fmt: skip
SCIENCEQA = [
    {"question": f"Which is {i}?", "choices": ["red", "green", "blue"][: 2 + i % 2], "answer": i % 2,
     "hint": "Look closely." if i % 3 == 0 else "", "task": "closed choice", "grade": "grade3",
     "subject": "natural science", "topic": "biology", "category": "plants", "skill": "colours",
     "lecture": "", "solution": ""}
    for i in range(8)
]  # fmt: skip
HALLUSION = [
    {"category": category, "subcategory": "ocr", "visual_input": "1", "set_id": str(s), "figure_id": str(f),
     "sample_note": "", "question_id": str(q), "question": f"Is line {q} right?", "gt_answer_details": "As it says.",
     "gt_answer": str((f + q) % 2), "filename": f"{category}_{s}_{f}.png"}
    for category, figures in (("VD", (0, 1)), ("VS", (1, 2)))
    for s in range(2) for f in figures for q in range(2 + s)
]  # fmt: skip


def _cvbench(kind: str, source: str, number: int, first: int) -> list[dict[str, Any]]:
    rows = []
    for i in range(first, first + number):
        choices = ["2", "3", "0"][: 2 + i % 2]
        listed = "\n".join(f"({letter}) {c}" for letter, c in zip("ABC", choices, strict=False))
        question = f"How many of kind {i}?"
        rows.append(
            {"idx": i, "type": kind, "task": "Count", "question": question, "choices": choices,
             "answer": f"({'AB'[i % 2]})", "prompt": f"{question} Select from the following choices.\n{listed}",
             "filename": f"{i}.png", "source": source}
        )  # fmt: skip
    return rows


CVBENCH_2D = _cvbench("2D", "ADE20K", 4, 0) + _cvbench("2D", "COCO", 3, 4)
CVBENCH_3D = _cvbench("3D", "Omni3D", 5, 7)


def _write(rows: list[dict[str, Any]], path: Path, picture: str = "image") -> None:
    features: dict[str, Any] = {
        name: INT if isinstance(value, int) else Sequence(TEXT) if isinstance(value, list) else TEXT
        for name, value in rows[0].items()
    }
    columns: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in rows[0]}
    columns[picture] = [Picture.new("RGB", (8, 8), (i % 256, 0, 0)) for i in range(len(rows))]
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(columns, features=Features({**features, picture: Image()})).to_parquet(path)


def _card(folder: Path, configs: dict[str, dict[str, str]]) -> None:
    """The data set's card, where configurations and splits are named: config to split to files."""
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, files in splits.items():
            lines += [f"  - split: {split}", f'    path: "{files}"']
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def write_hub(folder: Path) -> Path:
    """All six data sets as ``folder/<organisation>/<name>``."""
    _write(MMVP, folder / "lmms-lab-eval/MMVP/data/train-00000-of-00001.parquet")
    _write(NATURALBENCH, folder / "BaiqiL/NaturalBench-lmms-eval/data/test-00000-of-00001.parquet", "Image")
    cvbench = folder / "nyu-visionx/CV-Bench"
    _write(CVBENCH_2D, cvbench / "test_2d.parquet")
    _write(CVBENCH_3D, cvbench / "test_3d.parquet")
    _card(cvbench, {"default": {"test": "test*.parquet"}, "2D": {"test": "test_2d*"}, "3D": {"test": "test_3d*"}})
    pope = folder / "lmms-lab-encoder/POPE"
    _write(POPE, pope / "data/test.parquet")
    for category in ("adversarial", "popular", "random"):
        _write([row for row in POPE if row["category"] == category], pope / f"Full/{category}.parquet")
    full = {category: f"Full/{category}.parquet" for category in ("adversarial", "popular", "random")}
    _card(pope, {"default": {"test": "data/test*"}, "Full": full})
    scienceqa = folder / "lmms-lab-encoder/ScienceQA"
    _write(SCIENCEQA, scienceqa / "ScienceQA-IMG/test.parquet")
    _card(scienceqa, {"ScienceQA-IMG": {"test": "ScienceQA-IMG/test*"}})
    hallusion = folder / "lmms-lab-encoder/HallusionBench"
    _write(HALLUSION, hallusion / "data/image.parquet")
    _card(hallusion, {"default": {"image": "data/image*"}})
    return folder
