"""Recipes: the paper's numbers, no loss on the way to JSON and back, and nothing accepted that no run can use."""

import dataclasses
import json
import os
from typing import Any, Literal, get_args, get_origin

import pytest

from llava_genhancer import recipes
from llava_genhancer.errors import InputError
from llava_genhancer.recipes import Recipe, StageRecipe, differences, from_dict, get_recipe, override, to_dict

BACKBONES = {
    "openai-l14-224": "openai/clip-vit-large-patch14",
    "openai-l14-336": "openai/clip-vit-large-patch14-336",
    "metaclip-l14-224": "facebook/metaclip-l14-fullcc2.5b",
    "metaclip-h14-224": "facebook/metaclip-h14-fullcc2.5b",
    "siglip-so400m-224": "google/siglip-so400m-patch14-224",
    "siglip-so400m-384": "google/siglip-so400m-patch14-384",
}
# arXiv 2503.19480 and its released configuration, field by field.
PAPER = {
    "condition": "cls", "vae": "black-forest-labs/FLUX.1-dev", "vae_posterior": "sample", "denoiser_layers": 2,
    "denoiser_single_layers": 4, "denoiser_heads": 24, "denoiser_head_dim": 128, "denoiser_rope_axes": [16, 56, 56],
    "vec_dim": 768, "txt_dim": 4096, "guidance": 4.0, "t_sampling": "logit_normal", "t_scale": 1.0, "t_shift": 0.0,
    "lora_rank": 16, "lora_alpha": 16.0, "lora_dropout": 0.1, "lora_bias": "lora_only", "crop_scale": [0.9, 1.0],
    "crop_ratio": [3 / 4, 4 / 3], "global_batch_size": 256, "per_device_batch_size": 16, "adam_beta1": 0.9,
    "adam_beta2": 0.999, "adam_epsilon": 1e-8, "weight_decay": 0.01, "decay_biases_and_norms": True,
    "max_grad_norm": 1.0, "precision": "bf16",
    "stage1.trains": ["projector", "denoiser"], "stage1.learning_rate": 1e-4, "stage1.max_steps": 100_000,
    "stage1.lr_scheduler": "constant", "stage1.warmup_steps": 0,
    "stage2.trains": ["backbone"], "stage2.learning_rate": 1e-5, "stage2.max_steps": 5_000,
    "stage2.lr_scheduler": "constant", "stage2.warmup_steps": 0,
    "stage2.snapshot_steps": [50, 100, 200, 300, 500, 1000, 2000, 3000, 3500, 4000, 4500, 5000],
}  # fmt: skip


def test_the_recipes_are_the_six_backbones_of_table_1_and_tiny() -> None:
    assert set(recipes.RECIPES) == {"tiny", *BACKBONES}
    assert {n: get_recipe(n).backbone for n in BACKBONES} == BACKBONES


@pytest.mark.parametrize("name", BACKBONES)
def test_every_number_of_the_paper(name) -> None:
    values = to_dict(get_recipe(name))
    assert {k: values[k] for k in PAPER} == PAPER
    assert values["name"] == name


def test_what_departs_from_the_reference_is_marked_and_can_be_turned_back() -> None:
    ours = {k for k, text in recipes.field_help(recipes.Recipe).items() if "ours" in text}
    assert {"data_sharding", "lora_scope", "merge_dtype", "t_dtype"} <= ours
    reference = {
        "data_sharding": "replicated",
        "lora_scope": "all",
        "merge_dtype": "bfloat16",
        "t_dtype": "bfloat16",
        "vae_dtype": "float32",
    }
    assert to_dict(override(Recipe(), reference)).items() >= reference.items()


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_recipe_survives_json(name) -> None:
    recipe = get_recipe(name)
    assert from_dict(json.loads(json.dumps(to_dict(recipe), allow_nan=False)), Recipe) == recipe
    assert get_recipe(f"{name}-flow") == recipe


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_recipe_survives_the_command_line(name) -> None:
    """What `recipes NAME` prints can be given back, every field of it, as text."""
    recipe = get_recipe(name)
    text = {k: ",".join(map(str, v)) if isinstance(v, list) else str(v) for k, v in to_dict(recipe).items()}
    assert override(Recipe(), text) == recipe


def test_every_field_is_explained_and_typed() -> None:
    kinds, helps = recipes.field_types(Recipe), recipes.field_help(recipes.Recipe)
    assert list(kinds) == list(helps) == list(to_dict(Recipe()))
    assert all(len(text) > 3 for text in helps.values())
    assert len([k for k in kinds if k.startswith("stage1.")]) == len(dataclasses.fields(StageRecipe))


def another(kind: Any, value: Any) -> tuple[str, Any]:
    """Some other value of a field's type, as the command line gives it and as the recipe holds it."""
    if get_origin(kind) is Literal:
        choice = next((c for c in get_args(kind) if c != value), value)
        return choice, choice
    if kind is bool:
        return str(not value).lower(), not value
    if kind is int:
        return str(value + 2), value + 2
    if kind is float:
        return str(value / 2), value / 2
    return "other", "other"


@pytest.mark.parametrize("name", recipes.field_types(Recipe))
def test_every_field_can_be_set_from_text_and_shows_as_a_difference(name) -> None:
    base = Recipe()
    if name.startswith("local_"):
        base = Recipe(condition="locals")
    elif name == "denoiser_dtype":
        base = get_recipe("openai-l14-224-flux")
    elif recipes.READ_BY.get(name) == ("masked",):
        base = get_recipe("openai-l14-224-masked")
    kind, value = recipes.field_types(Recipe)[name], to_dict(base)[name]
    special = {
        "denoiser_rope_axes": ("32,48,48", [32, 48, 48]),
        "crop_scale": ("(0.5, 0.75)", [0.5, 0.75]),
        "crop_ratio": ("[1,1.5]", [1.0, 1.5]),
        "image_size": ("448", 448),
        "target_size": ("512", 512),
        "local_count": ("76", 76),
        "mask_ratio": ("0.75, .75", [0.75, 0.75]),
        "data": ("a/b c.tar", os.path.abspath("a/b c.tar")),
        "image_folder": ("~/x", os.path.expanduser("~/x")),
        "cache_folder": ("other", os.path.abspath("other")),
        "stage1.trains": ("backbone,projector,denoiser", ["backbone", "projector", "denoiser"]),
        "stage2.trains": ("denoiser", ["denoiser"]),
        "stage1.snapshot_steps": ("5, 7", [5, 7]),
        "stage2.snapshot_steps": ("", []),
    }
    if name == "denoiser_head_dim":  # moves only together with the axes
        changed = override(Recipe(), {name: "32", "denoiser_rope_axes": "8,12,12"})
        assert changed.denoiser_head_dim == 32
        return
    if name == "denoiser":  # brings its own fields along
        assert override(Recipe(), to_dict(get_recipe("tiny-masked"))).denoiser == "masked"
        return
    text, expected = special.get(name) or another(kind, value)
    changed = override(base, {name: text})
    assert to_dict(changed) == {**to_dict(base), name: expected}
    lines = differences(changed, base)
    assert lines == ([] if expected == value else [f"{name}: {json.dumps(value)} -> {json.dumps(expected)}"])
    assert differences(changed, base, ignore=(name,)) == []


def test_none_and_words_for_truth() -> None:
    assert override(Recipe(image_size=448, data="x"), {"image_size": "none", "data": "None"}) == Recipe()
    for text in ("true", "True", "1", "yes", True):
        assert override(Recipe(), {"gradient_checkpointing": text}).gradient_checkpointing is True
    for text in ("false", "0", "no", False):
        assert override(Recipe(), {"gradient_checkpointing": text}).gradient_checkpointing is False


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_rnk": 1}, "unknown recipe field 'lora_rnk', did you mean 'lora_rank'"),
        ({"stage1.max_step": 1}, "did you mean 'stage1.max_steps'"),
        ({"max_steps": 1}, "did you mean 'stage[12].max_steps'"),
        ({"stage3.max_steps": 1}, "did you mean 'stage[12].max_steps'"),
        ({"qqqqqqqq": 1}, "unknown recipe field 'qqqqqqqq'; "),
        ({"stage1": {}}, "unknown recipe field 'stage1'"),
        ({"lora_rank": "1.5"}, "lora_rank=1.5: needs a value of type int"),
        ({"lora_rank": 1.5}, "needs a value of type int"),
        ({"lora_rank": True}, "needs a value of type int"),
        ({"lora_rank": None}, "needs a value of type int"),
        ({"lora_rank": float("inf")}, "needs a value of type int"),
        ({"stage1.max_steps": 10**30}, "needs a value of type int"),
        ({"stage1.learning_rate": "1e300"}, "must be positive and at most 1"),
        ({"lora_rank": "-1"}, "lora_rank=-1 must not be negative"),
        ({"lora_alpha": "nan"}, "needs a value of type float"),
        ({"lora_alpha": "1e999"}, "needs a value of type float"),
        ({"stage1.learning_rate": "inf"}, "needs a value of type float"),
        ({"stage1.learning_rate": "0"}, "stage1: learning_rate=0.0 must be positive"),
        ({"stage2.warmup_steps": "6000"}, "stage2: warmup_steps=6000 must lie between 0 and max_steps=5000"),
        ({"stage2.trains": ""}, r"stage2: trains=\(empty\)"),
        ({"stage1.trains": "eyes"}, "stage1: trains=eyes: choose some of backbone, projector, denoiser"),
        ({"stage1.save_steps": "0"}, "stage1: a stage needs .*save_steps >= 1"),
        ({"backbone": None}, "backbone=None: needs a value of type str"),
        ({"backbone": 5}, "needs a value of type str"),
        ({"precision": "fp16"}, "choose one of bf16, fp32"),
        ({"gradient_checkpointing": "maybe"}, "say true or false"),
        ({"crop_scale": "1"}, "crop_scale=1: needs 2 comma-separated values"),
        ({"crop_scale": 1}, "crop_scale=1: needs comma-separated values"),
        ({"crop_scale": {"a": 1}}, "needs comma-separated values"),
        ({"crop_scale": "0.5,1.5"}, "crop_scale=0.5,1.5 must rise from above 0 to at most 1"),
        ({"crop_scale": "1,0.9"}, "must rise"),
        ({"crop_ratio": "0,1"}, "crop_ratio=0.0,1.0 must rise from above 0$"),
        ({"denoiser_rope_axes": "16,56,58"}, "must be even and sum to denoiser_head_dim=128"),
        ({"denoiser_rope_axes": "15,57,56"}, "must be even"),
        ({"denoiser_layers": 0, "denoiser_single_layers": 0}, "needs a block"),
        ({"keep_checkpoints": 1}, "keep two at least"),
        ({"lora_scale": 1.01}, "must lie between 0 .* and 1"),
        ({"lora_dropout": 1}, r"lora_dropout=1.0 must lie in \[0, 1\)"),
        ({"adam_beta2": 1.0}, r"adam_beta2=1.0 must lie in \[0, 1\)"),
        ({"adam_epsilon": 0}, "adam_epsilon=0.0 must be positive"),
        ({"max_bad_fraction": 2}, r"max_bad_fraction=2.0 must lie in \[0, 1\]"),
        ({"shuffle_block": 0}, "shuffle_block=0 must be at least 1"),
        ({"image_size": -224}, "image_size=-224 must be at least 1"),
        ({"seed": 2**32}, "seed=4294967296 must be at most"),
        ({"t_scale": 0}, "t_scale=0.0 must be positive"),
        ({"mask_ratio": "0.5,0.9", "vq": "x"}, "vq=x has no meaning with denoiser=flow: only masked reads it"),
        ({"denoiser": "masked"}, "denoiser=masked takes its condition as tokens: condition_into=txt"),
        ({"local_ratio": 0.2}, "local_ratio, local_count, local_replacement need condition=locals, not cls"),
        ({"condition": "pooled", "condition_into": "vec"}, "carries the global token alone"),
        ({"local_count": 0, "condition": "locals"}, "local_count=0 must be at least 1"),
        ({"local_count": 5, "local_ratio": 0.2, "condition": "locals"}, "both say how many: set one"),
    ],
)
def test_what_no_run_can_use_is_refused_in_one_line(changes, words) -> None:
    with pytest.raises(InputError, match=words) as caught:
        from_dict(changes, Recipe)
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(
        InputError, match=r"unknown recipe 'openai-l14-244', did you mean 'openai-l14-224'\?; known: tin"
    ):
        get_recipe("openai-l14-244")
    for name in ("", "-masked", "tiny-masked-flow", "TINY", "tiny "):
        with pytest.raises(InputError, match="unknown recipe"):
            get_recipe(name)


@pytest.mark.parametrize("paradigm", recipes.PARADIGMS)
@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_method_exists_for_every_backbone(name, paradigm) -> None:
    recipe = get_recipe(f"{name}-{paradigm}")
    assert recipe.backbone == get_recipe(name).backbone
    assert recipe.name == (name if paradigm == "flow" else f"{name}-{paradigm}")
    assert from_dict(json.loads(json.dumps(to_dict(recipe), allow_nan=False)), Recipe) == recipe


def test_the_nearest_name_has_its_method() -> None:
    with pytest.raises(InputError, match="did you mean 'tiny-masked'"):
        get_recipe("tiny-maskd")


def test_recipes_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_recipe("tiny").lora_rank = 3  # type: ignore[misc]


@pytest.mark.parametrize("steps", [0, 4, 60])
def test_a_shorter_stage_lowers_what_the_recipe_derives_from_its_length(steps) -> None:
    changed = override(get_recipe("tiny"), {"stage1.max_steps": str(steps), "stage2.max_steps": str(steps)})
    assert changed.stage1.warmup_steps == min(20, steps)
    assert changed.stage2.snapshot_steps == tuple(s for s in (50, 100, 200, 400) if s <= steps)
    assert from_dict(to_dict(changed), Recipe) == changed
    kept = override(get_recipe("tiny"), {"stage2.max_steps": steps, "stage2.snapshot_steps": "9"})
    assert kept.stage2.snapshot_steps == (9,), "what was asked for stays"
    if steps < 30:
        with pytest.raises(InputError, match="stage1: warmup_steps=30 must lie"):
            override(get_recipe("tiny"), {"stage1.max_steps": steps, "stage1.warmup_steps": 30})
    longer = override(get_recipe("tiny"), {"stage1.max_steps": 5_000})
    assert longer.stage1.warmup_steps == 20
