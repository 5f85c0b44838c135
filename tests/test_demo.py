"""The whole chain in the toy world, a few steps of everything: what it leaves, and that a second start does nothing."""

import functools
import importlib.metadata
import json
from pathlib import Path

import pytest

from llava_genhancer.demo import demo
from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.mllm.results import read_models
from llava_genhancer.toyworld import benchmarks, probes, writers

FIELDS = {
    "stage1.max_steps": "2", "stage2.max_steps": "2", "stage2.snapshot_steps": "", "stage1.warmup_steps": "0",
    "sample_images": "0", "num_workers": "0", "global_batch_size": "8", "per_device_batch_size": "8",
    "llava.pretrain.max_steps": "2", "llava.finetune.max_steps": "2", "llava.num_workers": "0",
    "llava.pretrain.global_batch_size": "4", "llava.pretrain.per_device_batch_size": "4",
    "llava.finetune.global_batch_size": "4", "llava.finetune.per_device_batch_size": "4",
}  # fmt: skip

# Units of each of Table 2's columns, two of everything.
COUNTS = {
    "mmvp": 18, "naturalbench_acc": 2, "naturalbench_q_acc": 2, "naturalbench_i_acc": 2, "naturalbench_g_acc": 2,
    "cvbench_2d_ade20k": 2, "cvbench_2d_coco": 2, "cvbench_3d": 2, "pope_random": 2, "pope_popular": 2,
    "pope_adversarial": 2, "scienceqa_img": 2, "hallusionbench": 2,
}  # fmt: skip


@pytest.fixture
def small_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_GENHANCER_CACHE", str(tmp_path / "cache"))
    sizes = {"TRAIN_IMAGES": 64, "LLAVA_IMAGES": 48, "QUESTIONS_PER_DETAIL": 2}
    for name, value in (sizes | {"CRITTERS_PER_CLASS": 1, "CAPTIONED_IMAGES": 6}).items():
        monkeypatch.setattr(writers, name, value)
    for name in ("PAIRS_PER_PATTERN", "GROUPS", "PER_PART", "PER_CATEGORY", "SCIENCE", "SETS"):
        monkeypatch.setattr(benchmarks, name, 2)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache" / "hub"))
    monkeypatch.delenv("LMMS_EVAL_DATASETS_CACHE", raising=False)  # the plug-in chooses one where it was loaded before
    few = functools.partial(probes.run_probes, train_scenes=60, test_scenes=30)
    monkeypatch.setattr(probes, "run_probes", few)


def test_the_whole_chain_and_again(tmp_path: Path, small_world: None, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert demo(FIELDS, run) == 0, capfd.readouterr().err
    words = (run / "report.md").read_text()
    for said in ("## MMVP-VLM", "## Retention", "## Linear probes", "## LLaVA", "| enhanced | finetune | 2 |",
                 "| **average** | 20 |", "(baseline/llava-finetune/manifest.json)"):  # fmt: skip
        assert said in words, said
    manifest = json.loads((run / "llava-finetune" / "manifest.json").read_text())
    assert manifest["command"][:4] == ["llava-genhancer", "llava", "finetune", "tiny"]
    measured = json.loads((run / "eval" / "questions.json").read_text())
    assert [m["label"] for m in measured["models"]] == ["original", "enhanced", "blind"]
    asked = {model.label: model for model in read_models(run / "eval" / "lmms")}
    assert list(asked) == ["original", "enhanced"]
    for model in asked.values():
        assert {name: m.n for name, m in model.columns.items()} == COUNTS
        assert not any(m.unparsed for m in model.columns.values()), "the likeliest option is one of them"
        task = model.tasks["mmvp"]
        assert (task.lmms_eval, str(task.revision)[:7]) == (importlib.metadata.version("lmms_eval"), "sha256:")
        assert "python -m lmms_eval --model llava_genhancer --model_args pretrained=" in task.command
    assert "### Against original" in words
    for folder in (run, run / "baseline"):
        for step in ("pretrain", "finetune"):
            assert (folder / f"llava-{step}" / "manifest.json").is_file()
        assert (folder / "llava-finetune" / "hf" / "config.json").is_file()
        assert (folder / "llava-finetune" / "llava" / "config.json").is_file()
    assert {p.name for p in tmp_path.iterdir()} == {"run", "cache"}

    results = [p for p in run.rglob("*") if p.is_file() and p.suffix in (".safetensors", ".bin", ".pt")]
    results += [p for p in (run / "eval").rglob("*") if p.is_file()]
    before = {p: p.stat().st_mtime_ns for p in results}
    capfd.readouterr()
    assert demo(FIELDS, run) == 0
    assert {p: p.stat().st_mtime_ns for p in results} == before, "a second start does nothing"
    assert capfd.readouterr().out.count("done before") == 5


def test_seeds_are_counted_from_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--seeds 0"):
        demo({}, tmp_path, seeds=0)
