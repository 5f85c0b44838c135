"""Which data a run trained on: kept for each stage, and the same ones asked for when a stage goes on."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from llava_genhancer import recipes, run
from llava_genhancer.enhance import train
from llava_genhancer.enhance.train import enhance
from llava_genhancer.errors import InputError

RecipeFrom = Callable[..., recipes.Recipe]


@pytest.fixture
def recipe_from(tiny_fields: dict) -> RecipeFrom:
    """A run of a few steps."""
    short = {"stage1.max_steps": 4, "stage1.save_steps": 2, "stage2.max_steps": 2, "stage2.snapshot_steps": ""}
    fields = {**tiny_fields, **short, "sample_images": 0}
    return lambda **changes: recipes.override(recipes.Recipe(name="test"), {**fields, **changes})


@pytest.fixture
def images(images_folder: Path, tmp_path: Path) -> Path:
    """The forty images as BMP: all of one size."""
    (tmp_path / "images").mkdir()
    for path in images_folder.iterdir():
        Image.open(path).save(tmp_path / "images" / f"{path.stem}.bmp")
    return tmp_path / "images"


@pytest.fixture
def others(images: Path, tmp_path: Path) -> Path:
    """Other images of the same names and sizes."""
    shutil.copytree(images, tmp_path / "others")
    for path in (tmp_path / "others").iterdir():
        ImageOps.invert(Image.open(path)).save(path)
    return tmp_path / "others"


def go_back(stage_dir: Path) -> None:
    """Leave a stage as a crash after its first checkpoint does."""
    for path in (stage_dir / "checkpoint-4", stage_dir / "result.json", stage_dir / "weights.safetensors"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_a_stage_goes_on_with_its_data_wherever_they_lie_and_with_no_others(
    recipe_from: RecipeFrom, images: Path, others: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    enhance(recipe_from(data=str(images)), run_dir, stages=(1,))
    weights = run.sha256(run_dir / "stage1" / "weights.safetensors")
    go_back(run_dir / "stage1")
    with pytest.raises(InputError, match=r"cannot be resumed exactly: data was \w{16}, is \w{16}"):
        enhance(recipe_from(data=str(others)), run_dir, stages=(1,))
    images.rename(tmp_path / "elsewhere")
    enhance(recipe_from(data=str(tmp_path / "elsewhere")), run_dir, stages=(1,))
    assert run.sha256(run_dir / "stage1" / "weights.safetensors") == weights


def test_a_cache_of_one_set_does_not_serve_another(
    recipe_from: RecipeFrom, images: Path, others: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    for number, (data, folders) in enumerate(((images, 1), (others, 2), (images, 2))):
        recipe = recipe_from(data=str(data), cache_crops=1, cache_folder=str(cache))
        enhance(recipe, tmp_path / f"run{number}", stages=(1,))
        assert len(list(cache.glob("targets-*"))) == folders


def test_each_stage_s_data_are_kept_and_shown(
    recipe_from: RecipeFrom, images: Path, others: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from llava_genhancer.evaluate.report.write import write_report

    run_dir = tmp_path / "run"
    enhance(recipe_from(data=str(images)), run_dir, stages=(1,))
    assert "trains on other data" not in caplog.text
    enhance(recipe_from(data=str(others)), run_dir)
    assert "stage 2 trains on other data" in caplog.text
    kept = run.read_json(run_dir / "manifest.json")["data"]
    assert {stage: entry["path"] for stage, entry in kept.items()} == {"stage1": str(images), "stage2": str(others)}
    assert kept["stage1"]["images"] == kept["stage2"]["images"] == 40
    assert kept["stage1"]["fingerprint"] != kept["stage2"]["fingerprint"]
    write_report(run_dir)
    for shown in (run_dir / "tower" / "README.md", run_dir / "report.md"):
        text = shown.read_text()
        for entry in kept.values():
            assert entry["path"] in text
            assert entry["fingerprint"] in text
    for stage, entry in kept.items():
        assert run.read_json(run_dir / stage / "result.json")["data"]["fingerprint"] == entry["fingerprint"]


def test_a_second_start_looks_at_no_file_of_many_again(
    recipe_from: RecipeFrom, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava_genhancer.data.images import open_source

    for number in range(2000):
        (images / f"none-{number}.jpg").write_bytes(b"")
    recipe, looked_at = recipe_from(data=str(images)), []
    run.open_run(tmp_path / "run", recipe)
    first = train.record_data(recipe, 1, tmp_path / "run", open_source(str(images)))
    sizes = train.open_source.__globals__["_sizes"]

    def watched(paths: list[str]) -> list[int]:
        looked_at.append(len(paths))
        return sizes(paths)

    monkeypatch.setattr("llava_genhancer.data.images._sizes", watched)
    assert train.record_data(recipe, 1, tmp_path / "run", open_source(str(images))) == first
    assert max(looked_at) <= 1024
    (images / "new.jpg").write_bytes(b"")
    again = train.record_data(recipe, 1, tmp_path / "run", open_source(str(images)))
    assert again["fingerprint"] != first["fingerprint"]
