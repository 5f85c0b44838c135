"""The toy world's benchmarks: the real ones' columns, right answers that are right, and what each is after."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

datasets = pytest.importorskip("datasets")

from llava_genhancer.evaluate.mllm.benchmarks import cvbench, hallusionbench, mmvp, naturalbench, pope, scienceqa  # noqa: E402
from llava_genhancer.toyworld.benchmarks import write_benchmarks  # noqa: E402

# Name, configuration, split and columns, as on the hub.
SETS = {
    "lmms-lab-eval/MMVP": (None, "train", "Index Question Options image", mmvp, "Correct Answer"),
    "BaiqiL/NaturalBench-lmms-eval": (None, "test", "Index Question Answer Question_Type Image", naturalbench, ""),
    "nyu-visionx/CV-Bench": (
        "default", "test", "idx type task image question choices answer prompt filename source", cvbench, "",
    ),
    "lmms-lab-encoder/POPE": (None, "test", "id question_id question answer image_source image category", pope, ""),
    "lmms-lab-encoder/ScienceQA": (
        "ScienceQA-IMG", "test",
        "image question choices answer hint task grade subject topic category skill lecture solution", scienceqa, "",
    ),
    "lmms-lab-encoder/HallusionBench": (
        None, "image",
        "category subcategory visual_input set_id figure_id sample_note question_id question gt_answer_details "
        "gt_answer filename image", hallusionbench, "",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    folder, cache = tmp_path_factory.mktemp("benchmarks"), tmp_path_factory.mktemp("cache")
    write_benchmarks(folder, seed=7)
    return {
        name: datasets.load_dataset(str(folder / name), config, split=split, cache_dir=str(cache)).to_list()
        for name, (config, split, *_) in SETS.items()
    }


@pytest.mark.parametrize("name", SETS)
def test_columns_and_answers(name: str, docs: dict[str, list[dict]]) -> None:
    _, _, columns, benchmark, spaced = SETS[name]
    expected = {*columns.split(), *([spaced] if spaced else [])}
    rows = docs[name]
    if benchmark is hallusionbench:
        rows = hallusionbench.with_group_sizes(datasets.Dataset.from_list(rows)).to_list()
        expected |= {"figure_size", "question_size"}
    assert set(rows[0]) == expected
    for row in rows:
        options = benchmark.options(row)
        right = [next(iter(benchmark.process(row, [option]).values()))["right"] for option in options]
        assert sum(right) == 1
        assert options[right.index(True)].lower() == benchmark.target(row).lower()


def test_mmvps_pairs_differ_in_image_and_answer_alone(docs: dict[str, list[dict]]) -> None:
    rows = docs["lmms-lab-eval/MMVP"]
    assert [row["Index"] for row in rows] == list(range(1, 91))
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert (first["Question"], first["Options"]) == (second["Question"], second["Options"])
        assert first["Correct Answer"] != second["Correct Answer"]
        assert first["image"] != second["image"]


def test_naturalbenchs_groups_cannot_be_guessed(docs: dict[str, list[dict]]) -> None:
    """One answer to all gives half of the answers and no group."""
    rows = docs["BaiqiL/NaturalBench-lmms-eval"]
    for start in range(0, len(rows), 4):
        group = rows[start : start + 4]
        assert group[0]["Answer"] == group[3]["Answer"] != group[1]["Answer"] == group[2]["Answer"]
        assert group[0]["Image"] == group[2]["Image"] != group[1]["Image"] == group[3]["Image"]
        assert group[0]["Question"] == group[1]["Question"] != group[2]["Question"] == group[3]["Question"]
    assert Counter(row["Question_Type"] for row in rows) == {"multiple_choice": 60, "yes_no": 60}


def test_balance(docs: dict[str, list[dict]]) -> None:
    answers = Counter((row["category"], row["answer"]) for row in docs["lmms-lab-encoder/POPE"])
    assert set(answers.values()) == {20}
    assert len(answers) == 6
    parts = Counter((row["type"], row["source"]) for row in docs["nyu-visionx/CV-Bench"])
    assert parts == {("2D", "ADE20K"): 30, ("2D", "COCO"): 30, ("3D", "Omni3D"): 30}
    figures = Counter((row["set_id"], row["figure_id"]) for row in docs["lmms-lab-encoder/HallusionBench"])
    assert set(figures.values()) == {2}


def test_no_scene_is_from_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_genhancer.toyworld import benchmarks, scenes

    drawn, render = [], scenes.render
    monkeypatch.setattr(scenes, "render", lambda scene: (drawn.append(scene), render(scene))[1])
    first = benchmarks.write_benchmarks(tmp_path / "a", seed=3)
    assert {scene.split() for scene in drawn} == {"test"}
    second = benchmarks.write_benchmarks(tmp_path / "b", seed=3)
    for path in first.rglob("*.parquet"):
        assert path.read_bytes() == (second / path.relative_to(first)).read_bytes()
