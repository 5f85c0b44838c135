"""The step benchmark on tiny shapes, its clock, and the GPU check's script on machines with and without a GPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")
PARTS = ["data", "target encoding", "backbone", "denoiser", "optimizer"]


@pytest.fixture(scope="module")
def benchmark():
    """The benchmark's module; scripts find `measure` beside them."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import enhance_step

        yield enhance_step
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_tiny_benchmark(benchmark, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "deep" / "out.json"
    options = ["--size", "tiny", "--device", "cpu", "--steps", "1", "--batch", "2", "--output", str(output)]
    result = benchmark.main(options)
    assert json.loads(output.read_text()) == json.loads(json.dumps(result))
    text = capsys.readouterr().out
    for stage, trained in ((1, "projector + denoiser"), (2, "LoRA")):
        figures = result["stages"][str(stage)]
        assert list(figures["parts"]) == PARTS, trained
        assert all(p["median_s"] > 0 for p in figures["parts"].values())
        assert figures["step"]["median_s"] > 0
        assert figures["images_per_second"] == pytest.approx(2 / figures["step"]["median_s"])
        assert figures["floor_s"] == pytest.approx(sum(p["floor_s"] or 0 for p in figures["parts"].values()))
        assert figures["loss"] == figures["loss"]
        assert figures["peak_bytes"] > 0
        assert f"stage {stage}: 2 images of 48 px" in text
    # Stage 1 differentiates the denoiser's weights, stage 2 passes through the backbone.
    flops = {s: result["stages"][s]["parts"] for s in ("1", "2")}
    assert flops["1"]["denoiser"]["flops"] > flops["2"]["denoiser"]["flops"]
    assert flops["2"]["backbone"]["flops"] > 2 * flops["1"]["backbone"]["flops"]


def test_full_size_wants_a_gpu(benchmark, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["--size", "full"])
    assert stop.value.code == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_known_towers_become_configs(benchmark) -> None:
    from llava_genhancer import costs, recipes

    for name in recipes.RECIPES:
        recipe = recipes.get_recipe(name)
        facts = costs.backbone_facts(benchmark.tower_config(recipe))
        assert facts == costs.KNOWN_BACKBONES.get(recipe.backbone, facts)


def test_timed_leaves_preparation_out(benchmark) -> None:
    from measure import timed

    seconds = timed(lambda: time.sleep(0.002), CPU, repeats=3, warmup=1, prepare=lambda: time.sleep(0.02))
    assert len(seconds) == 3
    assert 0.002 <= min(seconds) < 0.012


def test_auto_values_fall_back(benchmark) -> None:
    config = {"a": "auto", "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}
    assert benchmark._without_auto(config) == {"zero_optimization": {"stage": 2}}


def check(tmp_path: Path, *options: str, gpu: bool, python: str = "exit 0") -> subprocess.CompletedProcess:
    """Run the GPU check with stand-ins for nvidia-smi and python; the latter logs its arguments."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir(exist_ok=True)
    stand_ins = {"nvidia-smi": f"exit {0 if gpu else 9}", "py": f'echo "$@" >>{tmp_path}/calls\n{python}'}
    for name, body in stand_ins.items():
        (bin_dir / name).write_text(f"#!/bin/sh\n{body}\n")
        (bin_dir / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}", "PYTHON": str(bin_dir / "py")}
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_gpu_check_without_a_gpu(tmp_path: Path) -> None:
    done = check(tmp_path, gpu=False)
    assert done.returncode == 0
    assert done.stdout == "gpu_check: no GPU here, nothing was checked\n"
    assert check(tmp_path, "--require", gpu=False).returncode == 1
    assert check(tmp_path, "--what", gpu=False).returncode == 2
    assert not (tmp_path / "calls").exists()


def test_gpu_check_runs_every_step(tmp_path: Path) -> None:
    python = 'case "$*" in -c*torch*) echo test-gpu;; *"--size full"*) exit 3;; esac'
    done = check(tmp_path, "--steps", "7", "--no-deepspeed", str(tmp_path / "results"), gpu=True, python=python)
    assert done.returncode == 1  # the full size failed, the rest went on
    report = json.loads((tmp_path / "results" / "test-gpu-check.json").read_text())
    assert {name: s["status"] for name, s in report["steps"].items()} == {
        "variants": 3, "full size": 3, "enhance tiny": 0,
    }  # fmt: skip
    calls = (tmp_path / "calls").read_text()
    assert f"--size full --steps 7 --output {tmp_path}/results/test-gpu-full.json" in calls
    assert "doctor openai-l14-224" in calls
    assert "enhance tiny" in calls
    assert f"--size full --rounds 7 --compile --output {tmp_path}/results/test-gpu-variants.json" in calls


def test_gpu_check_ends_what_takes_too_long(tmp_path: Path) -> None:
    python = 'case "$*" in -c*torch*) echo test-gpu;; *"enhance tiny"*) exec sleep 60;; esac'
    done = check(tmp_path, "--limit", "1", "--no-deepspeed", str(tmp_path / "out"), gpu=True, python=python)
    assert done.returncode == 1
    steps = json.loads((tmp_path / "out" / "test-gpu-check.json").read_text())["steps"]
    assert {name: s["status"] for name, s in steps.items()} == {"variants": 0, "full size": 0, "enhance tiny": 124}
    assert steps["enhance tiny"]["seconds"] < 20


def test_gpu_check_rehearses_without_a_gpu(tmp_path: Path) -> None:
    done = check(tmp_path, "--rehearse", "--no-deepspeed", str(tmp_path / "out"), gpu=False)
    assert done.returncode == 0
    calls = (tmp_path / "calls").read_text()
    assert "--size reduced --device cpu" in calls
    assert "--size tiny --device cpu" in calls
    assert "full" not in calls.replace("rehearsal-full", "")


def test_gpu_check_names_a_torch_that_cannot(tmp_path: Path) -> None:
    done = check(tmp_path, str(tmp_path / "results"), gpu=True, python="exit 1")
    assert done.returncode == 1
    assert "cannot use it" in done.stderr


def test_recorded_results_are_whole() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("cpu-tiny.json"):
        recorded = json.loads(path.read_text())
        assert recorded["format"] == 1
        assert all(list(s["parts"]) == PARTS for s in recorded["stages"].values())
