"""From trained weights to a tower: what the merge keeps, changes and loses, and what the written folder shows."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava_genhancer import run
from llava_genhancer.enhance.backbones import add_lora, load_backbone, load_full_model, merged_state
from llava_genhancer.enhance.export import TOLERANCE, export_tower, merge
from llava_genhancer.enhance.stages import build_stage
from llava_genhancer.errors import InputError
from llava_genhancer.recipes import Recipe
from llava_genhancer.tower.export import check_keys, verify_tower

Run = Callable[..., tuple[Path, Recipe]]


def trained_backbone(recipe: Recipe, size: float):
    """A backbone whose adapters and adapted biases have moved by ``size`` of each weight's norm."""
    backbone = load_backbone(recipe)
    add_lora(backbone, recipe)
    generator = torch.Generator().manual_seed(7)
    modules = dict(backbone.named_modules())
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            elif name.endswith(".base_layer.bias"):
                parameter += size * torch.randn(parameter.shape, generator=generator)
        for module in modules.values():
            if hasattr(module, "lora_B"):
                delta = module.get_delta_weight("default").norm()
                module.lora_B["default"].weight *= size * module.base_layer.weight.norm() / delta
    return backbone.eval()


# --- the merge -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2"])
@torch.no_grad()
def test_merged_weights_give_the_wrapped_outputs(recipe_of, tiny_clip, tiny_siglip, tiny_siglip2, kind: str) -> None:
    folder = {"clip": tiny_clip, "siglip": tiny_siglip, "siglip2": tiny_siglip2}[kind]
    recipe = recipe_of(backbone=str(folder))
    full, original = load_full_model(str(folder)), load_full_model(str(folder)).state_dict()
    wrapped = trained_backbone(recipe, 0.1)
    pixels = torch.randn(3, 3, wrapped.image_size, wrapped.image_size)
    expected, before = wrapped(pixels), load_backbone(recipe).eval()(pixels)
    changed = merge(wrapped, full, recipe)
    merged = load_backbone(recipe).eval()
    merged.load_state_dict({n: v for n, v in full.state_dict().items() if n in merged.state_dict()})
    scale = expected.abs().max()
    assert (merged(pixels) - expected).abs().max() / scale < TOLERANCE
    assert (before - expected).abs().max() / scale > 100 * TOLERANCE
    adapted = {n.replace(".base_layer", "") for n in wrapped.state_dict() if ".base_layer." in n}
    assert changed == adapted
    for name, value in full.state_dict().items():
        assert torch.equal(value, original[name]) == (name not in adapted), name


def test_the_text_tower_stays_even_when_it_carries_lora(recipe_of, tiny_clip) -> None:
    """lora_scope="all": B stays zero without a loss, so the merge must not touch a bit."""
    recipe = recipe_of(lora_scope="all")
    backbone = load_backbone(recipe)
    add_lora(backbone, recipe)
    full = load_full_model(str(tiny_clip))
    assert merge(backbone, full, recipe) == set()


@pytest.mark.parametrize("scale", [0.0, 0.25, 0.5, 1.0])
@torch.no_grad()
def test_points_between_original_and_enhanced(recipe_of, tiny_clip, scale: float) -> None:
    original = load_full_model(str(tiny_clip)).state_dict()
    recipe = recipe_of(lora_scale=scale)
    wrapped = trained_backbone(recipe, 0.1)
    enhanced = merged_state(wrapped)
    full = load_full_model(str(tiny_clip))
    merge(wrapped, full, recipe)
    for name, value in full.state_dict().items():
        update = enhanced[name] - original[name] if name in enhanced else torch.zeros_like(value)
        assert torch.allclose(value, original[name] + scale * update, atol=1e-6), name
        if scale == 0:
            assert torch.equal(value, original[name]), name


def lost_and_cosine(recipe: Recipe, size: float) -> tuple[float, float]:
    """Share of adapted weights that the merge leaves as they were, and the cosine of the done to the wanted update."""
    dtype = getattr(torch, recipe.merge_dtype)
    before = load_full_model(recipe.backbone).state_dict()
    wanted = merged_state(trained_backbone(recipe, size))
    full = load_full_model(recipe.backbone)
    merge(trained_backbone(recipe, size), full, recipe)
    after = full.state_dict()
    names = [n for n in wanted if n.endswith(("fc1.weight", "fc2.weight", "proj.weight"))]

    def flat(update: Callable[[str], Tensor]) -> Tensor:
        return torch.cat([update(n).flatten() for n in names])

    want = flat(lambda n: wanted[n] - before[n])
    done = flat(lambda n: after[n] - (before[n].to(dtype).float() if recipe.merge_dtype == "bfloat16" else before[n]))
    untouched = flat(lambda n: (after[n].to(dtype) == before[n].to(dtype)).float())
    # Where bfloat16 changed nothing, the original's own bits stay: nothing was done.
    done = done * (untouched == 0)
    return float(untouched.mean()), float(torch.nn.functional.cosine_similarity(want, done, dim=0))


@pytest.mark.parametrize(("size", "lost", "cosine"), [(1e-3, 0.78, 0.64), (1e-2, None, 0.987)])
def test_a_merge_in_bfloat16_loses_small_updates(recipe_of, size: float, lost: float | None, cosine: float) -> None:
    """The figures measured on the reference: 78 % of the weights unchanged at ||dW|| / ||W|| = 1e-3, cosine .64."""
    share, similarity = lost_and_cosine(recipe_of(merge_dtype="bfloat16"), size)
    assert similarity == pytest.approx(cosine, abs=0.03)
    if lost is not None:
        assert share == pytest.approx(lost, abs=0.05)
    share, similarity = lost_and_cosine(recipe_of(), size)
    assert similarity > 0.99999
    assert share < 1e-3


# --- the folder ----------------------------------------------------------------------------------------------------


@pytest.fixture
def make_run(recipe_of, tiny_target, tmp_path) -> Run:
    """A run folder as a finished training leaves it, the second stage's adapters set to something visible."""

    def make(**changes: object) -> tuple[Path, Recipe]:
        recipe = recipe_of(**changes)
        run_dir = tmp_path / "run"
        run.open_run(run_dir, recipe)
        files: list[Path] = []
        for stage in (1, 2):
            enhancer = build_stage(recipe, stage, tiny_target, files)
            state = {n: p.detach().clone() for n, p in enhancer.named_parameters() if p.requires_grad}
            generator = torch.Generator().manual_seed(stage)
            for name in state:
                if ".lora_" in name:
                    state[name] = 0.1 * torch.randn(state[name].shape, generator=generator)
            files.append(run_dir / f"stage{stage}" / "weights.safetensors")
            files[-1].parent.mkdir()
            save_file(state, files[-1])
        snapshots = run_dir / "stage2" / "snapshots"
        snapshots.mkdir()
        save_file({n: v / 2 if "lora_B" in n else v for n, v in state.items()}, snapshots / "step-4.safetensors")
        return run_dir, recipe

    return make


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2"])
def test_a_tower_loads_whole_and_keeps_its_text_tower(
    make_run, tiny_clip, tiny_siglip, tiny_siglip2, kind: str
) -> None:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    folder = {"clip": tiny_clip, "siglip": tiny_siglip, "siglip2": tiny_siglip2}[kind]
    run_dir, recipe = make_run(backbone=str(folder))
    tower = export_tower(run_dir, run_dir / "tower", recipe)
    model, info = AutoModel.from_pretrained(tower, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    original = load_file(folder / "model.safetensors")
    state = model.state_dict()
    changed = {n for n, v in original.items() if not torch.equal(state[n], v)}
    assert changed
    assert all(n.startswith(("vision_model.", "visual_projection.")) for n in changed)
    assert (tower / "preprocessor_config.json").is_file()
    assert AutoImageProcessor.from_pretrained(tower) is not None
    assert AutoTokenizer.from_pretrained(tower)("a photo of one").input_ids
    assert verify_tower(tower)["model_type"] == kind


def test_a_tower_is_written_once(make_run) -> None:
    run_dir, recipe = make_run()
    tower = export_tower(run_dir, run_dir / "tower", recipe)
    before = (tower / "model.safetensors").stat().st_mtime_ns
    export_tower(run_dir, tower, recipe)
    assert (tower / "model.safetensors").stat().st_mtime_ns == before
    data = bytearray((tower / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tower / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError, match=r"model\.safetensors is missing or not the file that was exported"):
        verify_tower(tower)
    export_tower(run_dir, tower, recipe)
    verify_tower(tower)


def test_the_card_is_of_this_export(make_run, recipe_of) -> None:
    run_dir, _ = make_run()
    half = export_tower(run_dir, run_dir / "half", recipe_of(lora_scale=0.5), step=4)
    card = (half / "README.md").read_text()
    assert "Exported with lora_scale 0.5 from the snapshot of step 4." in card
    whole = export_tower(run_dir, run_dir / "tower", recipe_of())
    assert "Exported with lora_scale 1.\n" in (whole / "README.md").read_text()


def test_a_snapshot_is_its_own_weights(make_run, recipe_of) -> None:
    run_dir, recipe = make_run(lora_bias="none")
    end = load_file(export_tower(run_dir, run_dir / "tower", recipe) / "model.safetensors")
    early = load_file(export_tower(run_dir, run_dir / "early", recipe, step=4) / "model.safetensors")
    half = load_file(
        export_tower(run_dir, run_dir / "half", recipe_of(lora_bias="none", lora_scale=0.5)) / "model.safetensors"
    )
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    assert not torch.equal(end[name], early[name])
    assert all(torch.allclose(early[n], half[n], atol=1e-6) for n in early)


def test_a_full_fine_tune_is_exported_as_it_is(make_run) -> None:
    run_dir, recipe = make_run(lora_rank=0)
    file = run_dir / "stage2" / "weights.safetensors"
    moved = {n: v + 0.01 for n, v in load_file(file).items()}
    save_file(moved, file)
    tower = load_file(export_tower(run_dir, run_dir / "tower", recipe) / "model.safetensors")
    assert all(torch.equal(tower[n.removeprefix("backbone.")], v) for n, v in moved.items())


def test_a_run_that_never_trained_its_backbone_exports_the_original(make_run, tiny_clip) -> None:
    run_dir, recipe = make_run(**{"stage2.trains": "projector"})
    tower = load_file(export_tower(run_dir, run_dir / "tower", recipe) / "model.safetensors")
    original = load_file(tiny_clip / "model.safetensors")
    assert all(torch.equal(tower[n], v) for n, v in original.items())


# --- what cannot be exported ----------------------------------------------------------------------------------------


def _drop(file: Path, words: str) -> None:
    save_file({n: v for n, v in load_file(file).items() if words not in n}, file)


BAD: dict[str, tuple[Callable[[Path], object], int | None, str]] = {
    "unfinished": (lambda r: (r / "stage2/weights.safetensors").unlink(), None, "stage2 is not finished"),
    "no such step": (lambda r: None, 5, "no snapshot of step 5; kept are: 4"),
    "cut": (lambda r: (r / "stage2/weights.safetensors").write_bytes(b"x" * 50), None, "cannot be read"),
    "a gap": (lambda r: _drop(r / "stage2/weights.safetensors", "fc1.lora_B"), None, "lacks 2 weights"),
    "occupied": (lambda r: run.write_text(r / "tower" / "notes.txt", "mine"), None, "not one of our towers"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_export_is_one_line(make_run, case: str) -> None:
    damage, step, words = BAD[case]
    run_dir, recipe = make_run()
    damage(run_dir)
    with pytest.raises(InputError) as caught:
        export_tower(run_dir, run_dir / "tower", recipe, step=step)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (run_dir / "tower" / "model.safetensors").exists()
    assert not list(run_dir.glob(".tower*")), "a half-written folder is left behind"


def test_another_recipes_weights_are_refused(make_run, recipe_of) -> None:
    run_dir, _ = make_run()
    with pytest.raises(InputError, match="was trained with another recipe"):
        export_tower(run_dir, run_dir / "tower", recipe_of(lora_rank=4))


def test_keys_that_old_readers_would_not_find_are_refused(tiny_clip, tmp_path) -> None:
    """transformers 5 saves a CLIPVisionModel without ``vision_model.``; a 4.37 reader then takes random weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    CLIPVisionModel(CLIPVisionConfig.from_pretrained(tiny_clip)).save_pretrained(tmp_path / "vision")
    assert "embeddings.class_embedding" in load_file(tmp_path / "vision" / "model.safetensors")
    with pytest.raises(InputError, match="would not load in LLaVA's forks"):
        check_keys(tmp_path / "vision")


@pytest.mark.parametrize("tower", ["vision_model.", "text_model."])
def test_both_towers_must_be_there(tiny_clip, tmp_path, tower: str) -> None:
    folder = Path(shutil.copytree(tiny_clip, tmp_path / "clip"))
    check_keys(folder)
    _drop(folder / "model.safetensors", tower)
    with pytest.raises(InputError, match=f"no weight is named {tower}"):
        check_keys(folder)


@pytest.mark.parametrize("changes", [{}, {"lora_scale": 0.5}, {"merge_dtype": "bfloat16"}])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_makes_no_tower(make_run, changes, value) -> None:
    run_dir, recipe = make_run(**changes)
    file = run_dir / "stage2" / "weights.safetensors"
    state = load_file(file)
    state[next(n for n in sorted(state) if "lora_B" in n)][0, 0] = value
    save_file(state, file)
    with pytest.raises(InputError, match="not finite"):
        export_tower(run_dir, run_dir / "tower", recipe)
    assert not (run_dir / "tower").exists()
