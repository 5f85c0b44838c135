"""Recipes of LLaVA's two trainings: the projector learns to show images, then language model and it learn to answer.

The presets are LLaVA-1.5's published scripts to the last argument (arXiv 2310.03744, haotian-liu/LLaVA scripts/v1_5).
``vicuna-7b`` and ``vicuna-13b`` finetune every weight of the language model, with ``-lora`` appended LoRA adapters.
Nothing in this file imports torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from llava_genhancer.errors import InputError
from llava_genhancer.fields import GUARD_FIELDS, Guards, option, resolve_paths, suggest

STEPS = ("pretrain", "finetune")


@dataclass(frozen=True, kw_only=True)
class LlavaStep:
    """One of the two trainings: its data, how a sample is read, and how fast what learns learns."""

    data: str | None = option(None, "LLaVA's JSON: a list of {id, image, conversations}", path="path")
    image_folder: str | None = option(None, "root of the image paths in the JSON", path="path")
    conversation: str = option("plain", "template: plain, v1 (Vicuna), llama_2, llama_3, chatml, mistral")
    image_mode: Literal["square", "pad"] = option(
        "square", "square: resize and centre crop; pad: to a square with the mean colour first"
    )
    global_batch_size: int = option(256, "samples per optimizer step over all ranks; accumulation follows from it")
    per_device_batch_size: int = option(32, "samples per rank and forward")
    learning_rate: float = option(1e-3, "peak learning rate of AdamW")
    projector_learning_rate: float | None = option(None, "the projector's own; none = learning_rate")
    lr_scheduler: Literal["cosine", "constant"] = option("cosine", "schedule after the warm-up")
    warmup_ratio: float = option(0.03, "share of the steps with linear warm-up")
    epochs: float = option(1.0, "passes over the data")
    max_steps: int | None = option(None, "optimizer steps; none = as many as the epochs take, 0 skips the step")
    group_by_modality_length: bool = option(
        False, "batches of one modality and of similar length, shuffled as LLaVA's sampler does"
    )
    packing: bool = option(
        False,
        "a rank's samples in one row without padding, each seeing only itself: the same loss but for rounding, in less "
        "work (ours; LLaVA pads)",
    )
    cache_features: bool = option(
        False,
        "what the frozen tower says of each image is computed once and kept on disk (its cost is logged first; 659 GB "
        "for LLaVA's 558 000 images): pays for small language models, several epochs, sweeps (ours)",
    )
    save_steps: int = option(1_000, "steps between checkpoints (LLaVA: 24 000, none in practice)")
    log_steps: int = option(1, "steps between log entries")

    def __post_init__(self) -> None:
        resolve_paths(self)
        if self.learning_rate <= 0 or (self.projector_learning_rate is not None and self.projector_learning_rate <= 0):
            raise InputError("learning_rate and projector_learning_rate must be positive")
        if self.epochs <= 0 or (self.max_steps is not None and self.max_steps < 0):
            raise InputError("a step needs epochs > 0, and max_steps >= 0 or none")
        for name in ("global_batch_size", "per_device_batch_size", "save_steps", "log_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.warmup_ratio <= 1:
            raise InputError(f"warmup_ratio={self.warmup_ratio} must lie between 0 and 1")


FINETUNE = LlavaStep(
    conversation="v1",
    image_mode="pad",
    global_batch_size=128,
    per_device_batch_size=16,
    learning_rate=2e-5,
    group_by_modality_length=True,
)


@dataclass(frozen=True, kw_only=True)
class LlavaTraining:
    """The two halves and how they learn, in both steps."""

    name: str = option("custom", "name printed in reports")

    # The two halves.
    llm: str = option(
        "lmsys/vicuna-7b-v1.5", "folder or hub id of a causal language model of the Llama family", path="name"
    )
    tower: str = option(
        "openai/clip-vit-large-patch14-336", "folder or hub id of the vision tower: CLIP or SigLIP", path="name"
    )
    vision_feature_layer: int = option(-2, "hidden state of the tower that is shown to the language model")
    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"] = option(
        "auto", "auto = flash-attention 2 where it is installed and usable, else torch's own"
    )
    max_length: int = option(2048, "tokens of a sample, image included; what is longer loses its end")

    # LoRA on the language model.
    lora_rank: int = option(0, "rank; 0 finetunes every weight of the language model")
    lora_alpha: float = option(256.0, "LoRA scale numerator: update = alpha / rank * B A")
    lora_dropout: float = option(0.05, "dropout in front of A")

    # Optimisation.
    adam_beta1: float = option(0.9, "AdamW")
    adam_beta2: float = option(0.999, "AdamW")
    adam_epsilon: float = option(1e-8, "AdamW")
    weight_decay: float = option(0.0, "AdamW, on matrices only as Trainer does")
    max_grad_norm: float = option(
        1.0,
        "clip the global gradient norm here; 0 = never. LLaVA's JSONs are silent, which DeepSpeed reads as 1.0 and so "
        "does Trainer without it",
    )
    normalise_loss: Literal["micro_batch", "items"] = option(
        "micro_batch", "mean over a micro-batch's tokens (LLaVA), or over those of the whole global batch"
    )
    precision: Literal["bf16", "fp32"] = option("bf16", "arithmetic; trained weights have fp32 masters, frozen none")
    gradient_checkpointing: bool = option(True, "recompute the language model's activations in the backward pass")
    seed: int = option(42, "seeds initialisation, data order and dropout (Trainer's default, as LLaVA's scripts use)")


@dataclass(frozen=True, kw_only=True)
class LlavaRecipe(Guards, LlavaTraining):  # a field's place: the last base's come first
    """A LLaVA from a language model and a vision tower. Defaults are LLaVA-1.5's; (ours) marks what it leaves open."""

    # Data and keeping.
    num_workers: int = option(4, "data workers per rank")
    max_bad_fraction: float = option(0.1, "share of unusable samples above which the run stops (ours)")
    keep_checkpoints: int = option(2, "complete checkpoints kept per step, two at least")
    cache_folder: str | None = option(
        None,
        "where cache_features writes; trainings of the same images and tower share it; none = in the run",
        path="path",
    )

    pretrain: LlavaStep = option(LlavaStep(), "the projector learns, on image captions")
    finetune: LlavaStep = option(FINETUNE, "language model and projector learn, on conversations")

    def __post_init__(self) -> None:
        resolve_paths(self)
        if self.keep_checkpoints < 2:
            raise InputError(f"keep_checkpoints={self.keep_checkpoints}: keep two at least, one may be half-written")
        self.check_guards()
        if self.max_length < 16:
            raise InputError(f"max_length={self.max_length} leaves no room for a conversation")
        for name in ("num_workers", "lora_rank", "seed", "max_grad_norm", "weight_decay"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.lora_dropout < 1 or not 0 <= self.max_bad_fraction <= 1:
            raise InputError("lora_dropout must lie in [0, 1) and max_bad_fraction in [0, 1]")

    def step(self, name: str) -> LlavaStep:
        """The table of ``pretrain`` or ``finetune``."""
        return {"pretrain": self.pretrain, "finetune": self.finetune}[name]


def vicuna(size: str) -> LlavaRecipe:
    """LLaVA-1.5 of ``7b`` or ``13b``. LLaVA states 3.5 h + 10 h on 8 A100 for 7b; not yet run by us."""
    return LlavaRecipe(name=f"vicuna-{size}", llm=f"lmsys/vicuna-{size}-v1.5")


def lora(recipe: LlavaRecipe) -> LlavaRecipe:
    """The same with LoRA adapters: LLaVA's finetune_lora.sh."""
    return dataclasses.replace(
        recipe,
        name=f"{recipe.name}-lora",
        lora_rank=128,
        finetune=dataclasses.replace(recipe.finetune, learning_rate=2e-4, projector_learning_rate=2e-5),
    )


def tiny() -> LlavaRecipe:
    """The toy world's LLaVA: minutes on two CPU cores, through the code of the big ones."""
    return LlavaRecipe(
        name="tiny",
        llm="toyworld:llama",
        tower="toyworld:clip",
        precision="fp32",
        gradient_checkpointing=False,
        num_workers=1,
        seed=0,
        pretrain=LlavaStep(global_batch_size=32, learning_rate=3e-3, save_steps=100, log_steps=10),
        finetune=dataclasses.replace(
            FINETUNE,
            global_batch_size=16,
            per_device_batch_size=16,
            learning_rate=1.5e-3,
            epochs=2,
            save_steps=100,
            log_steps=10,
        ),
    )


RECIPES: dict[str, Callable[[], LlavaRecipe]] = {
    "tiny": tiny,
    "vicuna-7b": lambda: vicuna("7b"),
    "vicuna-13b": lambda: vicuna("13b"),
    "vicuna-7b-lora": lambda: lora(vicuna("7b")),
    "vicuna-13b-lora": lambda: lora(vicuna("13b")),
}

# Fields that may change between two starts of one run: they alter where or how often, never what is computed, or say
# what to do where the run would end.
_HARMLESS = ("name", "cache_folder", "num_workers", "keep_checkpoints", "max_bad_fraction", *GUARD_FIELDS)
_HARMLESS_IN_STEP = ("data", "image_folder", "save_steps", "log_steps")


def harmless_fields(step: str) -> tuple[str, ...]:
    """Fields whose change a run folder of ``step`` accepts, the other step's whole table among them."""
    other = STEPS[1 - STEPS.index(step)]
    lora_fields = ("lora_rank", "lora_alpha", "lora_dropout") if step == "pretrain" else ()
    return (
        *_HARMLESS,
        *lora_fields,
        *(f"{step}.{name}" for name in _HARMLESS_IN_STEP),
        *(f"{other}.{f.name}" for f in dataclasses.fields(LlavaStep)),
    )


def get_recipe(name: str) -> LlavaRecipe:
    """The named preset.

    Raises:
        InputError: unknown name, with the nearest known one.
    """
    if name not in RECIPES:
        raise InputError(f"unknown LLaVA recipe '{name}'{suggest(name, RECIPES)}; known: {', '.join(RECIPES)}")
    return RECIPES[name]()
