"""`llava-genhancer mllm`: the real lmms-eval command on a tiny LLaVA and the toy world's own benchmarks."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.local_data import CACHE_VARIABLE, cache_folder
from llava_genhancer.evaluate.mllm import evaluate, revisions
from llava_genhancer.evaluate.mllm_results import read_models
from llava_genhancer.toyworld.benchmarks import write_benchmarks

pytest.importorskip("lmms_eval")


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks"), seed=7)


@pytest.mark.launch
def test_a_checkpoint_is_asked_once(
    llava_folders: Path,
    benchmarks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    tasks = "mmvp,scienceqa_img"

    def ask() -> None:
        evaluate(
            [str(llava_folders)], tmp_path / "out", labels=["enhanced"], tasks=tasks, data=benchmarks, batch_size=8,
            limit=8,
        )  # fmt: skip

    ask()
    (model,) = read_models(tmp_path / "out")
    assert model.label == "enhanced"
    assert {name: m.n for name, m in model.columns.items()} == {"mmvp": 4, "scienceqa_img": 8}
    task = model.tasks["mmvp"]
    assert task.lmms_eval == "0.7.3"
    assert task.revision == revisions({"mmvp": {"dataset_path": str(benchmarks / "lmms-lab-eval/MMVP")}})["mmvp"]
    assert task.command.startswith(f"LLAVA_GENHANCER_DATA={benchmarks} python -m lmms_eval --model llava_genhancer ")
    assert not any(m.unparsed for m in model.columns.values()), "the likeliest option is one of them"
    capfd.readouterr()
    ask()
    assert "enhanced: done before" in capfd.readouterr().out
    assert len(list((tmp_path / "out").rglob("*_results.json"))) == 1
    os.utime(tmp_path / "out" / "enhanced" / "provenance.json", (1, 1))  # older than the checkpoint now
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(InputError, match="ended with status 1 and 0 results"):
        ask()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"labels": ["a", "b"]}, "give one name for each of 1 checkpoints"),
        ({"data": "/nowhere"}, "--data /nowhere is not a folder"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_runs(arguments, said, llava_folders: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        evaluate([str(llava_folders)], tmp_path, **arguments)
    with pytest.raises(InputError, match="holds no LLaVA"):
        evaluate([str(tmp_path)], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_cache_for_each_state_of_the_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` takes a copy with a card for another one of the same folder name."""
    from datasets import load_dataset

    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    copies = [write_benchmarks(tmp_path / name, seed) for name, seed in (("first", 1), ("second", 2))]

    def first_question(root: Path, cache: Path) -> dict:
        science = root / "lmms-lab-encoder" / "ScienceQA"
        return load_dataset(str(science), "ScienceQA-IMG", split="test", cache_dir=str(cache))[0]["choices"]

    own = [first_question(root, cache_folder(root)) for root in copies]
    assert own[0] != own[1]
    shared = [first_question(root, tmp_path / "shared") for root in copies]
    assert shared[0] == shared[1], "if this fails, `datasets` has learned to tell them apart"
    before = cache_folder(copies[0])
    (copies[0] / "lmms-lab-encoder" / "ScienceQA" / "README.md").write_text("changed")
    assert cache_folder(copies[0]) != before
    monkeypatch.setenv(CACHE_VARIABLE, "/chosen")
    assert cache_folder(copies[0]) == Path("/chosen")


def test_revisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refs = tmp_path / "datasets--a--b" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("0123abc\n")
    configs = {"one": {"dataset_path": "a/b"}, "two": {"dataset_path": "a/c"}}
    assert revisions(configs) == {"one": "0123abc"}
    assert json.dumps(revisions(configs))
