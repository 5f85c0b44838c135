"""The benchmarks' table, the model of communication, and short runs of the step's variants and of the data stream."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
SMALL = {"denoiser_layers": 1, "denoiser_single_layers": 1, "per_device_batch_size": 2, "global_batch_size": 2}


@pytest.fixture(scope="module", autouse=True)
def scripts_path():
    """Scripts find each other beside them."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


def test_a_row_says_what_is_better() -> None:
    from table import Row

    seconds = Row("a", "ms", 2.0, 3.0, "b", floor=1.0).cells()
    assert seconds[3] == "1.50"
    assert seconds[5] == "2.00"
    rate = Row("a", "images/s", 3.0, 2.0, "b", floor=6.0, rate=True).cells()
    assert rate[3] == "1.50"
    assert rate[5] == "2.00"
    assert Row("a", "ms", 2.0).cells()[2:] == [""] * 5


def test_recorded_results_make_a_table(tmp_path: Path) -> None:
    from table import HEAD, main, table

    recorded = {"step": "cpu-tiny", "mllm": "mllm-eval-cpu-tiny", "llava": "cpu-llava-train", "data": "cpu-data-stream"}
    recorded |= {"variants": "cpu-step-variants", "mllm-memory": "mllm-memory-cpu-small"}
    for name, file in recorded.items():
        (tmp_path / f"{name}.json").write_text((ROOT / "benchmarks" / "results" / f"{file}.json").read_text())
    lines = table(tmp_path).splitlines()
    assert lines[0] == "| " + " | ".join(HEAD) + " |"
    assert all(line.count("|") == len(HEAD) + 1 for line in lines)
    for what in ("stage 1, step", "stage 2, optimizer", "MLLM, words, batch 1", "LLaVA pretrain", "data, one worker"):
        assert any(line.startswith(f"| {what} |") for line in lines), what
    assert main(["--show", str(tmp_path)]) == 0


def test_bytes_by_zero_stage() -> None:
    from scaling import payload, wire

    assert payload(None, 10, 5, 2, 4, False) == (40, 0)  # fp32 gradients, once
    assert payload(1, 10, 5, 2, 4, False) == (20, 20)
    assert payload(2, 10, 5, 2, 4, False) == (80, 20)
    assert payload(3, 10, 5, 2, 4, False) == (0, 4 * (2 * 25 + 20))
    assert payload(3, 10, 5, 2, 4, True) == (0, 4 * (2 * 30 + 20))
    # A ring's all-reduce is a reduce-scatter and an all-gather.
    assert wire(None, 10, 0, 4, 1, False, 2) == 40
    assert wire(1, 10, 0, 4, 1, False, 2) == 60
    assert wire(1, 10, 0, 4, 1, False, 1000) == pytest.approx(120, rel=2e-3)


def test_forecast_of_the_paper_recipe() -> None:
    from scaling import forecast

    from llava_genhancer.recipes import get_recipe

    rows = forecast(get_recipe("openai-l14-224"), 1, link=50e9, flops=4e14)
    assert [(r["ranks"], r["zero"]) for r in rows] == [(n, z) for n in (8, 64, 512) for z in (None, 1, 2, 3)]
    assert {r["ranks"]: r["images_per_rank"] for r in rows} == {8: 32, 64: 4, 512: 1}
    assert all(r["communication_s"] > 0 for r in rows)


def test_step_variants_compute_the_same(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both stages: ours, and the same on transformers, peft and diffusers alone, have one loss and one gradient."""
    import step_variants

    monkeypatch.setattr(step_variants, "REDUCED", {**step_variants.REDUCED, **SMALL})
    result: dict[str, Any] = step_variants.main(["--rounds", "1", "--device", "cpu"])
    for stage in ("1", "2"):
        found = result["stages"][stage]
        assert found["failed"] == {}
        variants = found["variants"]
        assert variants["ours"]["ratio_to_ours"] == 1
        assert variants["the libraries alone"]["gradient_difference"] < 1e-5
        exact = {"the libraries alone", "cached", "rotary tables once", "AdamW not fused", "VAE channels-last"}
        assert all(variants[name]["loss_difference"] < 1e-5 for name in exact)
        assert 0 < variants["VAE bf16"]["loss_difference"] < 0.01
        assert found["floors"]["cached"] < found["floors"]["ours"]
        assert 0 <= found["trainer"]["outside_share"] < 1
        assert found["host_syncs"] == {}, "there is no GPU to wait for"
    assert "the libraries alone" in capsys.readouterr().out


def test_a_variant_that_fails_is_named_and_the_rest_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import step_candidates
    import step_variants

    def fails(world: Any) -> None:
        raise RuntimeError("no tables here\nand more")

    monkeypatch.setattr(step_variants, "REDUCED", {**step_variants.REDUCED, **SMALL})
    monkeypatch.setattr(step_candidates, "constant_rope", fails)
    trainer = {"step_s": 1.0, "outside_share": 0.0, "host_syncs_per_step": 0.0}
    monkeypatch.setattr(step_variants, "trainer_step", lambda *inputs: trainer)
    found = step_variants.main(["--rounds", "1", "--device", "cpu", "--stages", "1"])["stages"]["1"]
    assert found["failed"] == {"rotary tables once": "RuntimeError: no tables here"}
    assert {"ours", "cached", "VAE bf16"} < set(found["variants"])
    assert "rotary tables once" not in found["variants"]


def test_data_stream_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import data_stream

    options = ["--size", "32", "--rounds", "1", "--shards", "1", "5", "--samples", "20", "2000", "--opened", "5"]
    result = data_stream.main([*options, "--output", str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text())["ratio"] == result["ratio"]
    assert set(result["resident_bytes_by_shards"]) == {"1", "5"}
    assert set(result["start_up_s_by_samples"]) == {"20", "2000"}
    assert set(result["open_s_by_kind"]) == {"tar shards", "saved dataset", "folder", "LLaVA JSON"}
    assert "images/s a worker" in capsys.readouterr().out


def test_both_normalisations_are_trainings_own(tiny_clip: Path, tiny_vae: Path) -> None:
    from data_stream import MEAN, STD, normalised
    from transformers import CLIPModel

    from llava_genhancer.enhance.backbones import VisionBackbone

    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    eye, vae = normalised(images)
    backbone = VisionBackbone(CLIPModel.from_pretrained(tiny_clip), list(MEAN), list(STD))
    assert torch.equal(eye, backbone.normalise(images))
    assert torch.equal(vae, images.float() / 127.5 - 1)
