"""What a recipe of an enhancement holds beside its method: data, optimisation, stages, and the checks of the whole.

Nothing in this file imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llava_genhancer.errors import InputError
from llava_genhancer.fields import Guards, option, resolve_paths
from llava_genhancer.method import Method

PARTS = ("backbone", "projector", "denoiser")


@dataclass(frozen=True, kw_only=True)
class StageRecipe:
    """One training stage: what learns, how fast, for how long."""

    trains: tuple[str, ...] = option(("projector", "denoiser"), "parts that learn: backbone, projector, denoiser")
    learning_rate: float = option(1e-4, "peak learning rate")
    max_steps: int = option(100_000, "optimizer steps; 0 skips the stage")
    lr_scheduler: Literal["constant", "cosine"] = option("constant", "schedule after the warm-up")
    warmup_steps: int = option(
        0, "linear warm-up; the reference states 10 and ignores it, so the paper's runs had 0", at_most="max_steps"
    )
    save_steps: int = option(1_000, "steps between checkpoints")
    sample_steps: int = option(5_000, "steps between reconstruction pictures; 0 draws none")
    log_steps: int = option(10, "steps between log entries")
    snapshot_steps: tuple[int, ...] = option(
        (), "steps whose trained weights are kept for `export --step N`", at_most="max_steps"
    )

    def __post_init__(self) -> None:
        unknown = sorted(set(self.trains) - set(PARTS))
        if unknown or not self.trains:
            raise InputError(
                f"trains={','.join(self.trains) or '(empty)'}: choose some of {', '.join(PARTS)}, comma-separated"
            )
        if self.max_steps < 0 or self.save_steps < 1 or self.log_steps < 1 or self.sample_steps < 0:
            raise InputError("a stage needs max_steps >= 0, save_steps >= 1, log_steps >= 1 and sample_steps >= 0")
        if not 0 <= self.warmup_steps <= max(self.max_steps, 0):
            raise InputError(
                f"warmup_steps={self.warmup_steps} must lie between 0 and max_steps={self.max_steps}: lower it, or "
                "raise max_steps"
            )
        if not 0 < self.learning_rate <= 1:
            raise InputError(f"learning_rate={self.learning_rate} must be positive and at most 1")


# What a field must be where its type alone says too little.
POSITIVE_COUNTS = (
    "global_batch_size", "per_device_batch_size", "sample_ode_steps", "shuffle_block", "denoiser_heads",
    "denoiser_head_dim", "vec_dim", "txt_dim", "draws_per_image",
)  # fmt: skip
NOT_NEGATIVE = (
    "num_workers", "lora_rank", "lora_alpha", "sample_images", "seed", "max_grad_norm", "weight_decay",
    "denoiser_layers", "denoiser_single_layers", "unmask_temperature", "cache_crops",
)  # fmt: skip
MAX_SEED = 2**32 - 100  # numpy takes 32 bits, and the stages count on from it
PAPER_SNAPSHOTS = (50, 100, 200, 300, 500, 1000, 2000, 3000, *range(3500, 10_001, 500))


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a training reads and how it learns, whatever the method."""

    # Data.
    data: str | None = option(None, "tar shards, image folder, HF dataset or LLaVA JSON", path="path")
    image_folder: str | None = option(None, "root of the image paths in a LLaVA JSON", path="path")
    data_sharding: Literal["disjoint", "replicated"] = option(
        "disjoint", "ranks read different samples (ours), or all the same ones as in the reference"
    )
    num_workers: int = option(4, "data workers per rank")
    shuffle_block: int = option(1_000, "samples per shuffled block of a shard stream")
    max_bad_fraction: float = option(0.1, "share of undecodable images above which the run stops")
    crop_scale: tuple[float, float] = option((0.9, 1.0), "RandomResizedCrop: range of the area")
    crop_ratio: tuple[float, float] = option((0.75, 4 / 3), "RandomResizedCrop: range of the aspect ratio")
    cache_crops: int = option(
        0,
        "fixed crops per image whose targets, and tokens while the backbone is frozen, are computed once and kept on "
        "disk (its cost is logged first); 0 computes fresh crops in every step, as the paper does (ours)",
    )
    cache_folder: str | None = option(
        None, "where; runs of the same data, crops and weights share it; none = in the run", path="path"
    )
    cache_dtype: Literal["float16", "float32"] = option(
        "float16", "numbers in the cache (ours: float16 halves the disk; float32 is exact)"
    )

    # Optimisation.
    global_batch_size: int = option(256, "images per optimizer step over all ranks; accumulation follows from it")
    per_device_batch_size: int = option(16, "images per rank and forward")
    optimizer: Literal["adamw", "sgd"] = option("adamw", "adamw, or sgd with momentum (DIVA)")
    momentum: float = option(0.9, "SGD's")
    adam_beta1: float = option(0.9, "AdamW")
    adam_beta2: float = option(0.999, "AdamW")
    adam_epsilon: float = option(1e-8, "AdamW")
    weight_decay: float = option(0.01, "AdamW's decoupled, SGD's L2")
    decay_biases_and_norms: bool = option(
        True, "decay every trained weight as the reference does; false spares 1-d ones"
    )
    max_grad_norm: float = option(1.0, "clip the global gradient norm here; 0 = never")
    precision: Literal["bf16", "fp32"] = option("bf16", "arithmetic of the trained model; master weights are fp32")
    gradient_checkpointing: bool = option(False, "recompute the denoiser's activations in the backward pass")
    seed: int = option(0, "seeds initialisation, noise, data order and augmentation (the reference seeds nothing)")


@dataclass(frozen=True, kw_only=True)
class Recipe(Guards, Training, Method):  # a field's place: the last base's come first
    """A whole enhancement. Defaults are the paper's OpenAI ViT-L/14@224 row (arXiv 2503.19480, section 4 and appendix).

    Fields marked (ours) are choices that the paper leaves open or defects of the released code that we mend; the other
    value reproduces the reference.
    """

    # Keeping.
    keep_checkpoints: int = option(2, "complete checkpoints kept per stage, two at least")
    sample_images: int = option(8, "images in the reconstruction pictures")
    sample_ode_steps: int = option(20, "Euler, DDIM or unmasking steps for the pictures")
    merge_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "arithmetic of the LoRA merge (ours; bfloat16 loses most of a small update)"
    )
    lora_scale: float = option(1.0, "exported tower = original + lora_scale * update, 0..1 (ours)")

    stage1: StageRecipe = option(StageRecipe(), "the denoiser learns to rebuild from a frozen backbone")
    stage2: StageRecipe = option(
        StageRecipe(
            trains=("backbone",),
            learning_rate=1e-5,
            max_steps=5_000,
            save_steps=500,
            sample_steps=500,
            snapshot_steps=tuple(s for s in PAPER_SNAPSHOTS if s <= 5_000),
        ),
        "the backbone learns through the denoiser; trains=backbone is the paper's `only`, all three its `all`",
    )

    def __post_init__(self) -> None:
        resolve_paths(self)
        if self.keep_checkpoints < 2:
            raise InputError(f"keep_checkpoints={self.keep_checkpoints}: keep two at least, one may be half-written")
        if not 0 <= self.lora_scale <= 1:
            raise InputError(f"lora_scale={self.lora_scale} must lie between 0 (original) and 1 (enhanced)")
        for name in POSITIVE_COUNTS:
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        for name in NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise InputError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("t_scale", "adam_epsilon", "contrast_temperature"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name}={getattr(self, name)} must be positive")
        for name in ("lora_dropout", "adam_beta1", "adam_beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must lie in [0, 1)")
        if not 0 <= self.max_bad_fraction <= 1:
            raise InputError(f"max_bad_fraction={self.max_bad_fraction} must lie in [0, 1]")
        for name in ("image_size", "target_size", "local_count"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name}={value} must be at least 1")
        self.check_guards()
        if self.seed > MAX_SEED:
            raise InputError(f"seed={self.seed} must be at most {MAX_SEED}")
        if self.cache_crops and self.target_size is not None:
            raise InputError("cache_crops keeps crops of one size: leave target_size at none")
        if self.cache_crops and self.objective == "contrast":
            raise InputError("cache_crops needs objective=rebuild: the contrast sees a fresh second view of each image")
        if self.objective == "contrast" and self.per_device_batch_size < 2:
            raise InputError("objective=contrast compares images of a micro-batch: per_device_batch_size of 2 at least")
        learns = [s for s in (self.stage1, self.stage2) if s.max_steps > 0 and "denoiser" in s.trains]
        if self.denoiser_dtype != "float32" and learns:
            raise InputError(f"denoiser_dtype={self.denoiser_dtype} is for a frozen denoiser: take it out of `trains`")
        self.check_method()
        for name, top in (("crop_scale", 1.0), ("crop_ratio", float("inf")), ("mask_ratio", 1.0)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= top:
                raise InputError(f"{name}={low},{high} must rise from above 0{' to at most 1' if top == 1 else ''}")

    def stage(self, number: int) -> StageRecipe:
        """The table of stage 1 or 2."""
        return {1: self.stage1, 2: self.stage2}[number]

    def frozen_backbone(self, stage: int) -> bool:
        """Whether the backbone is the pre-trained one from the beginning to the end of a stage."""
        tables = [self.stage(s) for s in range(1, stage + 1)]
        return all("backbone" not in table.trains for table in tables if table.max_steps > 0)
