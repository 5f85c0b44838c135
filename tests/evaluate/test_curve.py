"""The curve over strengths: what is mixed is what `export` merges, the ends are exact, nothing is done twice."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPModel

from llava_genhancer import recipes
from llava_genhancer.cli import main
from llava_genhancer.enhance.export import merge
from llava_genhancer.errors import InputError
from llava_genhancer.evaluate import curve
from llava_genhancer.evaluate.curve import load_points, mixed, parse_scales
from llava_genhancer.evaluate.mmvp.measure import run as run_mmvp
from llava_genhancer.evaluate.report.write import write_report
from llava_genhancer.evaluate.tower import Tower
from llava_genhancer.evaluate.towers import load_tower
from llava_genhancer.evaluate.zero_shot.measure import run as run_zero_shot
from llava_genhancer.run import write_json


@pytest.fixture(scope="module")
def towers(clip_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An original, and the same with another vision half."""
    import shutil

    folder = tmp_path_factory.mktemp("towers") / "moved"
    shutil.copytree(clip_dir, folder)
    model = CLIPModel.from_pretrained(clip_dir)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("vision_model"):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return clip_dir, folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets") / "cars"
    for index in range(12):
        images = folder / ("red", "blue", "green")[index % 3]
        images.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (20 * index, 255 - 20 * index, 7 * index)).save(images / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, make_benchmark: Callable[..., Path]) -> Path:
    def image(number: int) -> Image.Image:
        return Image.new("RGB", (16, 16), (number % 256, (7 * number) % 256, (31 * number) % 256))

    return make_benchmark(tmp_path_factory.mktemp("pairs") / "MMVP_VLM", image, lambda number: f"red {number}")


def states_equal(a: Tower, b: Tower) -> bool:
    theirs = b.model.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in a.model.state_dict().items())


def test_the_ends_are_the_towers_and_between_is_what_export_merges(towers: tuple[Path, Path]) -> None:
    first, other = (load_tower(str(t), "cpu") for t in towers)
    before = {name: value.clone() for name, value in first.model.state_dict().items()}
    assert states_equal(mixed(first, other, 0), first)
    assert states_equal(mixed(first, other, 1), other)
    middle = mixed(first, other, 0.25)
    assert all(torch.equal(value, before[name]) for name, value in first.model.state_dict().items())

    full = CLIPModel.from_pretrained(towers[0])
    enhanced = CLIPModel.from_pretrained(towers[1]).vision_model
    merge(torch.nn.ModuleDict({"vision_model": enhanced}), full, recipes.Recipe(lora_rank=0, lora_scale=0.25))  # type: ignore[arg-type]
    exported = full.state_dict()
    for name, value in middle.model.state_dict().items():
        assert torch.equal(value, exported[name]), name
    assert not states_equal(middle, first)
    weights = [mixed(first, other, s).weights for s in (0, 0.25, 0.5, 1)]
    assert len({json.dumps(w, sort_keys=True) for w in weights}) == 4, "answers are kept by weights"


def test_towers_of_other_shapes_are_refused(towers: tuple[Path, Path], siglip_dir: Path) -> None:
    first, other = load_tower(str(towers[0]), "cpu"), load_tower(str(siglip_dir), "cpu")
    with pytest.raises(InputError, match="cannot be mixed"):
        mixed(first, other, 0.5)


def test_a_curve_agrees_with_the_commands_at_its_ends_and_goes_on(
    towers: tuple[Path, Path], sets: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "curve.json"
    command = ["curve", *map(str, towers), "--data", str(sets), "--mmvp", str(pairs), "--output", str(target)]
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--lora_scale", "1,0,0.5"])
    assert "| lora_scale | MMVP-VLM | zero-shot mean | cars, top-1 |" in capsys.readouterr().out
    points = load_points(target)
    assert [p.scale for p in points] == [0, 0.5, 1]
    assert Image.open(target.with_suffix(".png")).size[0] > 600
    names = [str(t) for t in towers]
    mmvp, zero_shot = run_mmvp(names, pairs), run_zero_shot(names, [sets])
    for end, point in enumerate((points[0], points[2])):
        assert point.mmvp.to_dict()["pairs"] == mmvp["towers"][end]["pairs"]
        assert point.retention.to_dict()["scores"] == zero_shot["towers"][end]["scores"]
    assert points[1].mmvp.to_dict()["pairs"] not in [t["pairs"] for t in mmvp["towers"]]

    # Two strengths more: those that are there stay as they are, even where a hand has changed them.
    values = json.loads(target.read_text())
    spoilt = values["points"][1]["mmvp"]["pairs"][0]
    spoilt["probability"] = [0.123, 0.456]
    target.write_text(json.dumps(values))
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "zero_shot").iterdir()}
    again = curve.run(names, [sets], pairs, scales="0,0.25,0.5,1", output=target)
    assert again[2].mmvp.pairs[0].probability == (0.123, 0.456)
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "zero_shot").iterdir()}
    assert len(after) == 4
    assert before.items() < after.items()


def test_strengths_are_read_strictly() -> None:
    assert parse_scales("1, 0,0.5,0.5") == [0, 0.5, 1]
    for wrong in ("", "a", "0,2", "-1", "nan"):
        with pytest.raises(InputError, match="--lora_scale"):
            parse_scales(wrong)


def test_what_has_no_curve_is_refused_before_anything_is_loaded(tmp_path: Path, towers: tuple[Path, Path]) -> None:
    names = [str(t) for t in towers]
    with pytest.raises(InputError, match="two towers need --output"):
        curve.run(names, [tmp_path], tmp_path)
    with pytest.raises(InputError, match="give one run's folder, or two towers"):
        curve.run([str(tmp_path)], [tmp_path], tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"recipe": recipes.to_dict(recipes.get_recipe("tiny"))}))
    with pytest.raises(InputError, match="`enhance` is not finished"):
        curve.run([str(tmp_path)], [tmp_path], tmp_path)


def test_the_report_tells_of_retention_and_strength(
    towers: tuple[Path, Path], sets: Path, pairs: Path, tmp_path: Path
) -> None:
    names, run = [str(t) for t in towers], tmp_path / "run"
    write_json(run / "manifest.json", {"recipe": recipes.to_dict(recipes.get_recipe("tiny"))})
    assert "zero-shot retention: not measured here" in write_report(run).read_text()
    run_zero_shot(names, [sets], run / "eval", labels=("original", "enhanced"))
    curve.run(names, [sets], pairs, scales="0,1", output=run / "eval" / "curve.json")
    words = write_report(run).read_text()
    for said in ("## Retention", "| cars | top-1 | 12 | 33.3 |", "Zero-shot retention, mean of 1 scores", "### Beside"):
        assert said in words, said
    assert "not measured here" not in words
    facts = json.loads((run / "report.json").read_text())
    assert "curve.png" in str(facts["figures"])
    assert Image.open(run / "figures" / "curve.png").size[0] > 600
    assert [p["lora_scale"] for p in facts["zero_shot"]["curve"]] == [0, 1]

    (run / "eval" / "curve.json").unlink()
    (run / "eval" / "zero_shot.json").write_text("{}")
    words = write_report(run).read_text()
    assert "it lists no towers" in words
    assert not (run / "figures" / "curve.png").exists()
