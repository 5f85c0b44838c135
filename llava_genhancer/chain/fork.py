"""LLaVA's two trainings by a fork's own code: the arguments of its scripts, filled from our recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from llava_genhancer.chain.needs import Data
from llava_genhancer.errors import InputError
from llava_genhancer.fields import GUARD_FIELDS
from llava_genhancer.llava.recipes import LlavaRecipe

# Fields of our LLaVA recipe that no argument of LLaVA's train.py expresses.
OURS_ALONE = (
    "attention", "cache_folder", "keep_checkpoints", "max_bad_fraction", "name", "normalise_loss", "precision",
    *GUARD_FIELDS, "packing", "cache_features",
)  # fmt: skip


def check_fields(changed: Iterable[str]) -> None:
    """Refuse changes of fields that a fork's trainer would not read.

    Raises:
        InputError: with the first such field.
    """
    for name in changed:
        if name.rpartition(".")[2] in OURS_ALONE:
            raise InputError(
                f"--llava.{name} has no counterpart in a fork's train.py: leave it out, or leave out --fork"
            )


def arguments(
    recipe: LlavaRecipe, step: str, data: Data, tower: str, folder: Path, *, world: int, cpu: bool
) -> list[str]:
    """What LLaVA's ``train.py`` takes; its forks kept the names.

    Args:
        world: processes over all machines; accumulation makes up for what they lack of the global batch.
    """
    from llava_genhancer.toyworld.paths import resolve

    table = recipe.step(step)
    if table.global_batch_size % (table.per_device_batch_size * world):
        raise InputError(
            f"--llava.{step}.global_batch_size {table.global_batch_size} is not a multiple of {world} processes x "
            f"per_device_batch_size {table.per_device_batch_size}: change one of them"
        )
    values: dict[str, object] = {
        "model_name_or_path": resolve(recipe.llm),
        "version": table.conversation,
        "data_path": data.json.absolute(),
        "image_folder": data.images.absolute(),
        "vision_tower": _absolute(resolve(tower)),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": recipe.vision_feature_layer,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "bf16": True,  # without it LLaVA's tower is fp16, whatever the rest is
        "output_dir": (folder / f"llava-{step}").absolute(),
        "num_train_epochs": table.epochs,
        "per_device_train_batch_size": table.per_device_batch_size,
        "gradient_accumulation_steps": table.global_batch_size // (table.per_device_batch_size * world),
        "save_strategy": "steps",
        "save_steps": table.save_steps,
        "save_total_limit": 1,
        "learning_rate": table.learning_rate,
        "weight_decay": recipe.weight_decay,
        "adam_beta1": recipe.adam_beta1,
        "adam_beta2": recipe.adam_beta2,
        "adam_epsilon": recipe.adam_epsilon,
        "max_grad_norm": recipe.max_grad_norm,
        "warmup_ratio": table.warmup_ratio,
        "lr_scheduler_type": "constant_with_warmup" if table.lr_scheduler == "constant" else table.lr_scheduler,
        "logging_steps": table.log_steps,
        "model_max_length": recipe.max_length,
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "dataloader_num_workers": recipe.num_workers,
        "lazy_preprocess": True,
        "seed": recipe.seed,
        "report_to": "none",
    }
    values |= {"use_cpu": True} if cpu else {"tf32": True}
    if table.max_steps is not None:
        values["max_steps"] = table.max_steps
    values["image_aspect_ratio"] = table.image_mode
    values["group_by_modality_length"] = table.group_by_modality_length
    if table.projector_learning_rate is not None:
        values["mm_projector_lr"] = table.projector_learning_rate
    if step == "pretrain":
        values["tune_mm_mlp_adapter"] = True
    else:
        if recipe.pretrain.max_steps != 0:
            values["pretrain_mm_mlp_adapter"] = result("pretrain", folder).absolute()
        if recipe.lora_rank:
            values |= {"lora_enable": True, "lora_r": recipe.lora_rank, "lora_alpha": int(recipe.lora_alpha)}
            values["lora_dropout"] = recipe.lora_dropout
    return options(values)


def launched(python: str, words: tuple[str, ...], zero: str | None, hostfile: str | None) -> list[str]:
    """The whole command, in the fork's folder: under DeepSpeed with ``zero``'s JSON, or in one process without."""
    # train_mem asks for flash-attention, which no CPU has.
    if zero is None:
        return [python, "-m", "llava_genhancer.launch", "llava.train.train", *words]
    hosts = ["--hostfile", hostfile] if hostfile else []
    launcher = [python, "-m", "deepspeed.launcher.runner", *hosts, "--module", "llava_genhancer.launch"]
    return [*launcher, "llava.train.train_mem", "--deepspeed", zero, *words]


def result(step: str, folder: Path) -> Path:
    """What a finished training leaves; LLaVA crashes where a finished pretraining is started again."""
    return folder / f"llava-{step}" / ("mm_projector.bin" if step == "pretrain" else "config.json")


def sources(step: str, folder: Path, tower: str) -> tuple[Path, ...]:
    """What a training's result must not be older than; a tower from a hub does not change."""
    if step == "finetune":
        return (result("pretrain", folder),)
    return (Path(tower) / "config.json",) if Path(tower).is_absolute() or Path(tower).exists() else ()


def options(values: Mapping[str, object]) -> list[str]:
    """``--name value`` for each."""
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def _absolute(name: str) -> str:
    """A folder by its full path, since the fork runs in its own; a hub id as it is."""
    return str(Path(name).absolute()) if Path(name).exists() else name
