"""Generation quality: scores against a computation by hand, captions beside their images, a training's whole curve."""

import json
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel

from llava_genhancer import recipes
from llava_genhancer.enhance.export import export_tower
from llava_genhancer.enhance.train import _write_strip, enhance
from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.generation import Judge, captions_of, measure, read_strip
from llava_genhancer.evaluate.mmvp.measure import evaluate_tower, load_benchmark
from llava_genhancer.evaluate.report.generation_section import final
from llava_genhancer.evaluate.report.write import write_report
from llava_genhancer.evaluate.towers import load_tower
from llava_genhancer.toyworld.writers import write_shards


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_fields) -> tuple[Path, recipes.Recipe]:
    """An ordinary run with pictures at 0, 2, 4 of both stages, and snapshots at 2 and 3 of the second."""
    short = {f"stage{n}.{name}": steps for n in (1, 2) for name, steps in (("max_steps", 4), ("sample_steps", 2))}
    recipe = recipes.override(recipes.Recipe(), {**tiny_fields, **short, "stage2.snapshot_steps": "2,3"})
    folder = tmp_path_factory.mktemp("generation") / "run"
    enhance(recipe, folder)
    return folder, recipe


def test_nothing_is_nearer_than_the_image_itself(tiny_clip, images) -> None:
    quality = Judge(load_tower(str(tiny_clip)), images).of(images)
    assert quality.clip_score == pytest.approx(1, abs=1e-6)
    assert (quality.mse, quality.psnr, quality.caption_score) == (0, None, None)


def test_scores_by_hand(tiny_clip, images) -> None:
    tower = load_tower(str(tiny_clip))
    rebuilt = images.flip(-1) // 2
    texts = ["a red critter", "one ball", "a star", "the letter x", "a blue critter"]
    quality = Judge(tower, images, texts).of(rebuilt)

    model = CLIPModel.from_pretrained(tiny_clip)

    def tokens(batch: torch.Tensor) -> torch.Tensor:
        pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in batch]
        pixels = tower.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        return model.visual_projection(model.vision_model(pixels).pooler_output)

    with torch.no_grad():
        cosines = torch.cosine_similarity(tokens(images), tokens(rebuilt))
        told = model.text_projection(model.text_model(tower.texts(texts)).pooler_output)
        caption = torch.cosine_similarity(told, tokens(rebuilt)).mean()
    assert quality.clip_score == pytest.approx(float(cosines.mean()), abs=1e-5)
    half = 2.776 * float(cosines.std()) / math.sqrt(5)
    assert quality.clip_interval == pytest.approx([quality.clip_score - half, quality.clip_score + half], abs=1e-4)
    assert quality.caption_score == pytest.approx(float(caption), abs=1e-5)
    mse = np.square(images.numpy() / 255.0 - rebuilt.numpy() / 255.0).mean()
    assert quality.mse == pytest.approx(mse, rel=1e-5)
    assert quality.psnr == pytest.approx(10 * math.log10(1 / mse), rel=1e-5)


def test_another_resolution_is_compared_at_the_originals(tiny_clip, images) -> None:
    judge = Judge(load_tower(str(tiny_clip)), images)
    large = images.repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert judge.of(large).mse < 0.01 < judge.of(images.flip(-1)).mse
    with pytest.raises(InputError, match="4 rebuilt images for 5 originals"):
        judge.of(images[:4])


def test_a_strip_is_read_as_it_was_written(tmp_path, images) -> None:
    _write_strip(tmp_path / "strip.png", images)
    assert torch.equal(read_strip(tmp_path / "strip.png"), images)
    Image.new("RGB", (50, 32)).save(tmp_path / "odd.png")
    with pytest.raises(InputError, match="50 pixels wide and 32 high"):
        read_strip(tmp_path / "odd.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(InputError, match="cannot be read"):
        read_strip(tmp_path / "text.png")


def test_captions_are_those_of_the_pictured_images(tmp_path, images_folder) -> None:
    written = write_shards(tmp_path / "shards", 6, seed=1, per_shard=4)
    expected = []
    for path in written:
        with tarfile.open(path) as archive:
            names = [name for name in archive.getnames() if name.endswith(".json")]
            expected += [json.loads(archive.extractfile(name).read())["caption"] for name in names]
    recipe = recipes.override(recipes.Recipe(), {"data": str(tmp_path / "shards")})
    assert captions_of(recipe, 5) == expected[:5], "over the end of the first shard"

    lines = written[0].read_bytes()
    start = lines.index(b"\xff\xd8\xff")
    written[0].write_bytes(lines[:start] + bytes(400) + lines[start + 400 :])  # the first image no longer decodes
    assert captions_of(recipe, 3) == expected[1:4]

    assert captions_of(recipes.override(recipe, {"data": str(images_folder)}), 3) is None
    assert captions_of(recipes.override(recipe, {"data": str(tmp_path / "gone")}), 3) is None


def test_an_ordinary_run_has_its_curve(finished, benchmark_dir, tmp_path) -> None:
    folder, recipe = finished
    measured = measure(folder, benchmark_dir)
    assert {s: [p["step"] for p in points] for s, points in measured["stages"].items()} == {
        "1": [0, 2, 4], "2": [0, 2, 4],
    }  # fmt: skip
    assert measured["images"] == 3
    assert measured["originals"]["mse"] == 0
    assert measured["stages"]["1"][-1]["mse"] == measured["stages"]["2"][0]["mse"], "same images, noise and weights"
    assert all(p["psnr"] > 0 and -1 <= p["clip_score"] <= 1 for points in measured["stages"].values() for p in points)
    assert final(folder) == measured["stages"]["2"][-1]

    snapshots = {step: str(export_tower(folder, tmp_path / str(step), recipe, step=step)) for step in (2, 3)}
    benchmark = load_benchmark(benchmark_dir)
    towers = {0: recipe.backbone, **snapshots, 4: str(folder / "tower")}
    expected = {step: evaluate_tower(tower, benchmark).average.percent for step, tower in towers.items()}
    assert {p["step"]: p["percent"] for p in measured["mmvp_vlm"]} == expected
    with Image.open(folder / "figures" / "generation.png") as figure:
        assert min(figure.size) > 100
    assert not list(folder.glob(".snapshot-*"))
    report = write_report(folder).read_text()
    assert "| stage 2, step 4 |" in report
    assert f"MMVP-VLM meanwhile: {expected[0]:.1f} % at step 0 and {expected[4]:.1f} % at step 4" in report
    assert "](figures/generation.png)" in report

    first = (folder / "eval" / "generation.json").read_bytes()
    assert measure(folder, benchmark_dir) == measured
    assert (folder / "eval" / "generation.json").read_bytes() == first


def test_a_run_without_pictures_is_told_what_to_do(finished, tmp_path) -> None:
    manifest = (finished[0] / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(InputError, match="no pictures in stage1/samples or stage2/samples: set sample_steps"):
        measure(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        measure(tmp_path / "nowhere")
