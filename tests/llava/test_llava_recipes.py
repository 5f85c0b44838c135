"""LLaVA's recipes: the published numbers, round trips, what may change in a run."""

import dataclasses

import pytest

from llava_genhancer import recipes
from llava_genhancer.errors import InputError
from llava_genhancer.llava.recipes import RECIPES, LlavaRecipe, LlavaStep, get_recipe, harmless_fields


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_the_published_scripts(size: str) -> None:
    """scripts/v1_5/pretrain.sh and finetune.sh, argument by argument."""
    recipe = get_recipe(f"vicuna-{size}")
    assert (recipe.llm, recipe.tower) == (f"lmsys/vicuna-{size}-v1.5", "openai/clip-vit-large-patch14-336")
    common = {"epochs": 1, "warmup_ratio": 0.03, "lr_scheduler": "cosine", "projector_learning_rate": None}
    published = {
        "pretrain": common
        | {"learning_rate": 1e-3, "per_device_batch_size": 32, "global_batch_size": 256, "conversation": "plain"}
        | {"image_mode": "square", "group_by_modality_length": False},
        "finetune": common
        | {"learning_rate": 2e-5, "per_device_batch_size": 16, "global_batch_size": 128, "conversation": "v1"}
        | {"image_mode": "pad", "group_by_modality_length": True},
    }
    for step, values in published.items():
        table = dataclasses.asdict(recipe.step(step))
        assert {name: table[name] for name in values} == values
    assert (recipe.vision_feature_layer, recipe.max_length, recipe.precision) == (-2, 2048, "bf16")
    assert (recipe.weight_decay, recipe.max_grad_norm, recipe.lora_rank) == (0, 1.0, 0)
    assert recipe.gradient_checkpointing
    assert recipe.normalise_loss == "micro_batch"


def test_the_published_lora_script() -> None:
    plain, lora = get_recipe("vicuna-7b"), get_recipe("vicuna-7b-lora")
    changed = dict(line.split(": ", 1) for line in recipes.differences(lora, plain))
    assert changed == {
        "name": '"vicuna-7b" -> "vicuna-7b-lora"',
        "lora_rank": "0 -> 128",
        "finetune.learning_rate": "2e-05 -> 0.0002",
        "finetune.projector_learning_rate": "null -> 2e-05",
    }
    assert (lora.lora_alpha, lora.lora_dropout) == (256, 0.05)


@pytest.mark.parametrize("name", RECIPES)
def test_round_trip_and_help(name: str) -> None:
    recipe = get_recipe(name)
    flat = recipes.to_dict(recipe)
    assert recipes.from_dict(flat, LlavaRecipe) == recipe
    assert recipes.from_dict({k: str(v) for k, v in flat.items()}, LlavaRecipe) == recipe, "as on a command line"
    helps = recipes.field_help(LlavaRecipe)
    assert helps.keys() == flat.keys()
    assert all(len(text) > 3 for text in helps.values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pretrain.learning_rate": 0}, "must be positive"),
        ({"finetune.epochs": -1}, "epochs > 0"),
        ({"finetune.warmup_ratio": 2}, "between 0 and 1"),
        ({"pretrain.image_mode": "crop"}, "choose one of square, pad"),
        ({"max_length": 3}, "no room"),
        ({"keep_checkpoints": 1}, "two at least"),
        ({"finetune.lora_rank": 3}, "did you mean"),
    ],
)
def test_what_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        recipes.override(LlavaRecipe(), changes)


def test_a_step_minds_its_own_table_only() -> None:
    """Changing what finetuning does must not make a finished pretraining foreign, and the other way round."""
    every = {f.name for f in dataclasses.fields(LlavaStep)}
    assert {f"finetune.{n}" for n in every} <= set(harmless_fields("pretrain"))
    assert {f"pretrain.{n}" for n in every} <= set(harmless_fields("finetune"))
    for step in ("pretrain", "finetune"):
        own = {n.split(".")[1] for n in harmless_fields(step) if n.startswith(step)}
        assert own == {"data", "image_folder", "save_steps", "log_steps"}
    assert "lora_rank" in harmless_fields("pretrain")
    assert "lora_rank" not in harmless_fields("finetune")
    known = recipes.field_types(LlavaRecipe)
    assert set(harmless_fields("pretrain")) | set(harmless_fields("finetune")) <= set(known)
