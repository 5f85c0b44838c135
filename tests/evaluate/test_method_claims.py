"""A claim names its method: rows of the paper, report, figures, CSV and model card follow the recipe of the run."""

import csv
import dataclasses
import json
from pathlib import Path

import pytest
from test_report import build_run, result

from llava_genhancer.ablate.grids import GRIDS, cell_recipe
from llava_genhancer.ablate.results import gather
from llava_genhancer.ablate.running import Job
from llava_genhancer.enhance.export import write_card
from llava_genhancer.evaluate.mmvp.results import MmvpResult, load_results
from llava_genhancer.evaluate.report.write import write_report
from llava_genhancer.evaluate.tower import marker_facts
from llava_genhancer.evaluate.zero_shot.results import TOP1, Answers, TowerAnswers
from llava_genhancer.evaluate.zero_shot.table3 import published
from llava_genhancer.method import method_name
from llava_genhancer.recipes import PARADIGMS, RECIPES, get_recipe, override, to_dict

WEIGHTS = {"weights": {"model.safetensors": "0"}}
SIDES = {name: int(name.rsplit("-", 1)[1]) for name in RECIPES if name != "tiny"}
# Published MMVP-VLM of the method with the suffix, by backbone.
AVERAGES = {
    "flow": dict(zip(SIDES, (31.9, 29.6, 31.9, 37.0, 42.2, 40.0), strict=True)),
    "masked": {"openai-l14-224": 28.9, "siglip-so400m-224": 45.2, "siglip-so400m-384": 40.7},
    "diva": dict(zip(SIDES, (25.9, 25.2, 27.4, 31.9, 40.7, 38.5), strict=True)),
    "dcr": dict(zip(SIDES, (33.3, 31.1, 32.6, 37.8, 43.0, 42.2), strict=True)),
    "flux": {"openai-l14-224": 32.6, "metaclip-h14-224": 37.1},
}
# What the report of a run with the suffix must name, and words of other methods that it must not contain.
WORDS = {
    "flow": ("GenHancer, continuous denoiser", "velocity MSE", "rectified-flow ODE", "t_density.png"),
    "masked": ("GenHancer, discrete denoiser", "cross-entropy of masked tokens", "unmasking of VQ tokens"),
    "diva": ("DIVA (arXiv", "MSE of the predicted noise or velocity", "DDIM sampling"),
    "dcr": ("DCR (arXiv", "InfoNCE", "DDIM sampling"),
    "flux": ("GenHancer with a pretrained FLUX", "velocity MSE", "rectified-flow ODE", "t_density.png"),
}


def tower(folder: Path, recipe, **facts) -> MmvpResult:
    """What a measurement of a tower with this marker file is."""
    folder.mkdir(exist_ok=True)
    marker = {"recipe": to_dict(recipe), "source": recipe.backbone, "lora_scale": 1.0, "step": None, **WEIGHTS, **facts}
    (folder / "llava_genhancer.json").write_text(json.dumps(marker))
    return measured(folder, next((s for n, s in SIDES.items() if recipe.name.startswith(n)), 224))


def measured(folder: Path, side: int, name: str | None = None) -> MmvpResult:
    made = marker_facts(folder, [name or str(folder), name or str(folder)], side)
    backbone = made.pop("backbone")
    return result(1, 0.4, backbone=backbone and backbone.recipe, **made)


@pytest.mark.parametrize("suffix", PARADIGMS)
def test_a_run_stands_beside_the_row_of_its_own_method(suffix, tmp_path):
    for base in SIDES:
        row = tower(tmp_path, get_recipe(f"{base}-{suffix}")).paper
        assert (row and row.average) == AVERAGES[suffix].get(base), base
        if row:
            assert row.backbone.recipe == base


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"objective": "contrast"}, {}),
        ({"denoiser_weights": "black-forest-labs/FLUX.1-dev"}, {}),  # -flux by hand: another row than Table 1's
        ({"t_sampling": "uniform"}, {}),
        ({"condition": "locals"}, {}),
        ({"lora_rank": 0}, {}),
        ({"stage1.max_steps": 0, "stage1.warmup_steps": 0}, {}),
        ({"stage2.trains": "backbone,projector,denoiser"}, {}),
        ({"backbone": "someone/finetuned-clip"}, {}),  # the recipe's name is still openai-l14-224
        ({"backbone": "/downloads/OpenAICLIP/clip-vit-large-patch14"}, {}),
        ({"backbone": "genhancer:openai-l14-224"}, {}),
        ({}, {"lora_scale": 0.5}),
        ({}, {"step": 500}),
    ],
)
def test_a_changed_method_has_no_row_of_table_1(changes, facts, tmp_path):
    recipe = override(get_recipe("openai-l14-224"), changes)
    found = tower(tmp_path, recipe, **{"source": recipe.backbone, **facts})
    assert found.paper is None or found.paper.source.startswith("Table 7")
    assert to_table3(found) is None


def test_what_is_no_method_may_differ(tmp_path):
    changes = {"seed": 3, "vae": "/models/ae.safetensors", "stage2.learning_rate": 2e-4, "t_dtype": "bfloat16"}
    assert tower(tmp_path, override(get_recipe("openai-l14-224"), changes)).paper.average == 31.9
    backbone = {"backbone": "/models/openai/clip-vit-large-patch14"}  # a local copy, called by the whole hub id
    assert tower(tmp_path, override(get_recipe("openai-l14-224"), backbone)).paper.average == 31.9


def to_table3(found: MmvpResult) -> float | None:
    answers = Answers("imagenet1k", TOP1, "0", ((True,),), 0.1)
    facts = {name: getattr(found, name) for name in ("tower", "label", "recipe", "backbone", "method", "source")}
    return published(TowerAnswers(answers=(answers,), **facts), answers)


def test_table_3_is_of_the_original_and_of_the_continuous_denoiser(tmp_path):
    towers = {suffix: tower(tmp_path, get_recipe(f"openai-l14-224-{suffix}")) for suffix in PARADIGMS}
    assert {s: to_table3(t) for s, t in towers.items()} == {**dict.fromkeys(PARADIGMS), "flow": 75.6}
    assert to_table3(result(0, 0.2, backbone="openai-l14-224")) == 75.5


@pytest.mark.parametrize(
    ("name", "average"),
    [
        ("openai/clip-vit-large-patch14", 19.3),
        ("/models/openai/clip-vit-large-patch14", 19.3),
        ("/hub/models--openai--clip-vit-large-patch14/snapshots/0123", 19.3),
        ("/downloads/GenHancer/OpenAICLIP/clip-vit-large-patch14", None),  # the authors' enhanced weights' own folder
        ("clip-vit-large-patch14", None),
        ("openai-l14-224", None),
        ("somebody/clip-vit-large-patch14", None),
    ],
)
def test_an_original_is_known_by_its_whole_hub_id(name, average, tmp_path):
    row = measured(tmp_path, 224, name).paper
    assert (row and row.average) == average


def test_a_converted_file_of_unknown_weights_has_no_row(tmp_path):
    (tmp_path / "llava_genhancer.json").write_text(json.dumps({"source": "dcr/openai_vitl14.pt", **WEIGHTS}))
    assert measured(tmp_path, 224).paper is None
    (tmp_path / "llava_genhancer.json").write_text(
        json.dumps({"method": "diva", "backbone": "openai-l14-224", **WEIGHTS})
    )
    assert measured(tmp_path, 224).paper.average == 25.9


@pytest.mark.parametrize("suffix", PARADIGMS)
def test_the_report_and_the_card_name_the_runs_own_method(suffix, tmp_path):
    recipe = get_recipe(f"openai-l14-224-{suffix}")
    enhanced = dataclasses.replace(tower(tmp_path / "marker", recipe), tower=str(tmp_path / "run/tower"))
    original = dataclasses.replace(result(0, 0.2, backbone="openai-l14-224"), tower=recipe.backbone)
    run = build_run(tmp_path / "run", original, enhanced)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest |= {"recipe": to_dict(recipe), "versions": {"llava_genhancer": "0"}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    words = write_report(run).read_text()
    own = AVERAGES[suffix]["openai-l14-224"]
    for said in (*WORDS[suffix], f"{own:.1f}", "| pattern | original | published, original | enhanced | published, "):
        assert said in words, said
    for said in {w for words_ in WORDS.values() for w in words_} - set(WORDS[suffix]):
        assert said not in words, said
    facts = json.loads((run / "report.json").read_text())
    assert facts["method"]["key"] == method_name(to_dict(recipe)).key
    assert facts["mmvp_vlm"]["towers"][1]["paper"]["average"] == own
    with open(run / "tables" / "table1.csv") as file:
        made = {row["method"] for row in csv.DictReader(file) if row["source"] == "run"}
    assert made == {"original", facts["method"]["key"]}
    assert load_results(run / "eval" / "mmvp_vlm.json")[1] == enhanced

    (run / "tower").mkdir()
    marker = json.loads((tmp_path / "marker" / "llava_genhancer.json").read_text())
    (run / "tower" / "llava_genhancer.json").write_text(json.dumps(marker))
    write_card(run / "tower", run)
    card = (run / "tower" / "README.md").read_text()
    assert WORDS[suffix][0] in card
    assert not any(words_[0] in card for s, words_ in WORDS.items() if s != suffix)
    assert ("genhancer" in card.splitlines()[4]) == (suffix in ("flow", "masked", "flux"))


def test_a_card_shows_the_scores_of_its_own_tower_only(tmp_path):
    """Another lora_scale or snapshot of the run, or the tower of a longer training, is another tower."""
    recipe = get_recipe("openai-l14-224")
    enhanced = dataclasses.replace(tower(tmp_path / "tower", recipe), weights=WEIGHTS["weights"])
    run = build_run(tmp_path / "run", result(0, 0.2), enhanced)
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"versions": {"llava_genhancer": "0"}}))
    write_card(tmp_path / "tower", run)
    assert f"{enhanced.average.right}/135" in (tmp_path / "tower" / "README.md").read_text()
    tower(tmp_path / "tower", recipe, lora_scale=0.5, weights={"model.safetensors": "1"})
    write_card(tmp_path / "tower", run)
    card = (tmp_path / "tower" / "README.md").read_text()
    assert "Not measured yet" in card
    assert "/135" not in card


def test_an_enhanced_tower_in_the_first_place_is_not_called_original(tmp_path):
    recipe = get_recipe("openai-l14-224")
    enhanced = dataclasses.replace(tower(tmp_path / "marker", recipe), label="mine")
    for first in ({"method": "genhancer"}, {"tower": "another/clip"}):
        before = dataclasses.replace(result(0, 0.2, backbone="openai-l14-224"), **first)
        words = write_report(build_run(tmp_path / "run", before, enhanced)).read_text()
        assert "MMVP-VLM: t0 " in words, first
        assert "mine against t0" in words, first


def test_an_ablations_cell_with_another_method_has_no_column_of_the_paper(tmp_path):
    grid = GRIDS["table8"]
    cell = grid.cells[0]
    recipe = cell_recipe(grid, cell, "openai-l14-224", {})
    same = Job(cell, 0, recipe, tmp_path / "a", ())
    table = gather("table8", "openai-l14-224", grid, [same], {same.folder: "failed"})
    assert table.rows[0].published == {"openai-l14-224": 28.1}
    other = Job(cell, 0, get_recipe("openai-l14-224-dcr"), tmp_path / "b", ())
    assert gather("table8", "openai-l14-224", grid, [other], {other.folder: "failed"}).rows[0].published == {}
