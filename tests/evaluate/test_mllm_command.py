"""`llava-genhancer mllm` beside the whole chain (test_demo.py): its refusals, the data's caches and revisions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.mllm.local_data import CACHE_VARIABLE, cache_folder
from llava_genhancer.evaluate.mllm.measure import evaluate, revisions
from llava_genhancer.toyworld.benchmarks import write_benchmarks

pytest.importorskip("lmms_eval")


def test_an_evaluation_without_results_has_failed(
    llava_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lmms-eval reports most errors and then ends with status 0."""
    for program, status in (("true", 0), ("false", 1)):
        monkeypatch.setattr("sys.executable", shutil.which(program))
        with pytest.raises(InputError, match=f"ended with status {status} and 0 results of genhancer: .* --data DIR"):
            evaluate([str(llava_folders)], tmp_path / "out")
    killed = tmp_path / "killed"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(killed))
    with pytest.raises(InputError, match="was killed, most often because memory ran out: lower --batch_size"):
        evaluate([str(llava_folders)], tmp_path / "out")
    assert not list(tmp_path.rglob("provenance.json"))


def test_the_share_without_an_answer_is_of_all_documents_and_other_data_are_asked_again(
    llava_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """CV-Bench counts its parts apart (``cvbench_3d_n``); a tenth is of the whole. A stand-in writes the results."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    results = tmp_path / "of cvbench.json"
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\nmkdir -p '{tmp_path}/out/m'\ncp '{results}' \"{tmp_path}/out/m/$$_results.json\"\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))

    def ask(lost: int, data: Path) -> str:
        metrics = {"cvbench_2d_ade20k_n,none": 30, "cvbench_3d_n,none": 30, "cvbench_unanswered,none": lost}
        counts = {"cvbench": {"original": 90, "effective": 90}}
        results.write_text(json.dumps({"results": {"cvbench": metrics}, "n-samples": counts, "configs": {}}))
        evaluate([str(llava_folders)], tmp_path / "out", labels=["m"], tasks="cvbench", data=data)
        return capsys.readouterr().out

    assert "done before" not in ask(6, folders[0])
    assert "done before" in ask(6, folders[0])
    assert "done before" not in ask(6, folders[1])
    for path in tmp_path.rglob("*_results.json"):
        path.unlink()
    with pytest.raises(InputError, match=r"more than 10% of the documents have no answer \(m: cvbench 10 of 90\)"):
        ask(10, folders[0])


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
