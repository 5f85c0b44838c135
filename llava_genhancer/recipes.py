"""Recipes: everything a run depends on, named, typed and printable.

A recipe is a flat, frozen dataclass; the two stages are one nested table each. ``get_recipe("openai-l14-224")`` returns
the paper's numbers, ``override`` changes fields by name and refuses what it does not know, ``to_dict``/``from_dict``
carry a recipe through ``manifest.json`` without loss. Nothing in this file imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from llava_genhancer.errors import InputError

T = TypeVar("T")
R = TypeVar("R")  # a recipe class: Recipe here, LlavaRecipe in llava/recipes.py
PARTS = ("backbone", "projector", "denoiser")


def option(default: T, help: str) -> T:
    """A dataclass field with a default and the sentence that documents it (``--help`` and ``recipes`` print it)."""
    return typing.cast(T, field(default=default, metadata={"help": help}))


@dataclass(frozen=True, kw_only=True)
class StageRecipe:
    """One training stage: what learns, how fast, for how long."""

    trains: tuple[str, ...] = option(("projector", "denoiser"), "parts that learn: backbone, projector, denoiser")
    learning_rate: float = option(1e-4, "peak learning rate of AdamW")
    max_steps: int = option(100_000, "optimizer steps; 0 skips the stage")
    lr_scheduler: Literal["constant", "cosine"] = option("constant", "schedule after the warm-up")
    warmup_steps: int = option(0, "linear warm-up; the reference states 10 and ignores it, so the paper's runs had 0")
    save_steps: int = option(1_000, "steps between checkpoints")
    sample_steps: int = option(5_000, "steps between reconstruction pictures; 0 draws none")
    log_steps: int = option(10, "steps between log entries")
    snapshot_steps: tuple[int, ...] = option((), "steps whose trained weights are kept for `export --step N`")

    def __post_init__(self) -> None:
        unknown = sorted(set(self.trains) - set(PARTS))
        if unknown or not self.trains:
            raise InputError(
                f"trains={','.join(self.trains) or '(empty)'}: choose some of {', '.join(PARTS)}, comma-separated"
            )
        if self.max_steps < 0 or self.save_steps < 1 or self.log_steps < 1 or self.sample_steps < 0:
            raise InputError("a stage needs max_steps >= 0, save_steps >= 1, log_steps >= 1 and sample_steps >= 0")
        if not 0 <= self.warmup_steps <= max(self.max_steps, 0):
            raise InputError(f"warmup_steps={self.warmup_steps} must lie between 0 and max_steps={self.max_steps}")
        if not 0 < self.learning_rate <= 1:
            raise InputError(f"learning_rate={self.learning_rate} must be positive and at most 1")


# What a field must be where its type alone says too little.
POSITIVE_COUNTS = (
    "global_batch_size", "per_device_batch_size", "sample_ode_steps", "shuffle_block", "denoiser_heads",
    "denoiser_head_dim", "vec_dim", "txt_dim",
)  # fmt: skip
NOT_NEGATIVE = (
    "num_workers", "lora_rank", "lora_alpha", "sample_images", "seed", "max_grad_norm", "weight_decay",
    "denoiser_layers", "denoiser_single_layers",
)  # fmt: skip
MAX_SEED = 2**32 - 100  # numpy takes 32 bits, and the stages count on from it
PAPER_SNAPSHOTS = (50, 100, 200, 300, 500, 1000, 2000, 3000, *range(3500, 10_001, 500))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole enhancement. Defaults are the paper's OpenAI ViT-L/14@224 row (arXiv 2503.19480, section 4 and appendix).

    Fields marked (ours) are choices that the paper leaves open or defects of the released code that we mend; the other
    value reproduces the reference.
    """

    name: str = option("custom", "name printed in reports and the model card")

    # The eye.
    backbone: str = option(
        "openai/clip-vit-large-patch14", "folder or hub id of a CLIPModel, SiglipModel, Siglip2Model"
    )
    image_size: int | None = option(None, "training resolution in pixels; none = the backbone's own (ours)")
    condition: Literal["cls"] = option("cls", "what the denoiser is told: cls = the global token alone")

    # What is rebuilt.
    vae: str = option(
        "black-forest-labs/FLUX.1-dev", "AutoencoderKL: diffusers folder, hub id, or the single file ae.safetensors"
    )
    vae_posterior: Literal["sample", "mean"] = option("sample", "target latent: a draw from the posterior, or its mean")
    vae_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "arithmetic of the frozen VAE; the reference: float32"
    )

    # The light denoiser (FluxTransformer2DModel, random init).
    denoiser_layers: int = option(2, "double-stream blocks (Table 5: 1, 2, 3, 4)")
    denoiser_single_layers: int = option(4, "single-stream blocks (Table 5: 2, 4, 6, 8)")
    denoiser_heads: int = option(24, "attention heads")
    denoiser_head_dim: int = option(128, "channels per head; width = heads x head_dim")
    denoiser_rope_axes: tuple[int, int, int] = option((16, 56, 56), "rotary channels per axis, summing to head_dim")
    vec_dim: int = option(768, "width of the condition that modulates every block (AdaLN)")
    txt_dim: int = option(4096, "width of the one condition token in joint attention")
    guidance: float = option(4.0, "constant fed to the guidance embedding")

    # Rectified flow.
    t_sampling: Literal["logit_normal", "uniform"] = option("logit_normal", "density of t in training (Table 4)")
    t_scale: float = option(1.0, "s in t = sigmoid(s * eps) (Table 4: 0.1, 0.5, 1, 5, 10)")
    t_shift: float = option(0.0, "m in t = sigmoid(s * eps + m); 0 is the paper's, positive means noisier (ours)")
    t_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "precision of t before its sinusoid (ours; the reference's bfloat16 keeps about 630 values)"
    )

    # LoRA on the backbone.
    lora_rank: int = option(16, "rank; 0 fine-tunes every weight of the vision tower (Fig. 8)")
    lora_alpha: float = option(16.0, "LoRA scale numerator: update = alpha / rank * B A")
    lora_dropout: float = option(0.1, "dropout in front of A")
    lora_bias: Literal["none", "lora_only"] = option("lora_only", "lora_only also trains the adapted layers' biases")
    lora_scope: Literal["vision", "all"] = option(
        "vision", "towers that carry LoRA (ours: vision; the reference: all, though no loss reaches the text tower)"
    )

    # Data.
    data: str | None = option(None, "tar shards, image folder, HF dataset or LLaVA JSON")
    image_folder: str | None = option(None, "root of the image paths in a LLaVA JSON")
    data_sharding: Literal["disjoint", "replicated"] = option(
        "disjoint", "ranks read different samples (ours), or all the same ones as in the reference"
    )
    num_workers: int = option(4, "data workers per rank")
    shuffle_block: int = option(1_000, "samples per shuffled block of a shard stream")
    max_bad_fraction: float = option(0.1, "share of undecodable images above which the run stops")
    crop_scale: tuple[float, float] = option((0.9, 1.0), "RandomResizedCrop: range of the area")
    crop_ratio: tuple[float, float] = option((0.75, 4 / 3), "RandomResizedCrop: range of the aspect ratio")

    # Optimisation.
    global_batch_size: int = option(256, "images per optimizer step over all ranks; accumulation follows from it")
    per_device_batch_size: int = option(16, "images per rank and forward")
    adam_beta1: float = option(0.9, "AdamW")
    adam_beta2: float = option(0.999, "AdamW")
    adam_epsilon: float = option(1e-8, "AdamW")
    weight_decay: float = option(0.01, "AdamW")
    decay_biases_and_norms: bool = option(
        True, "decay every trained weight as the reference does; false spares 1-d ones"
    )
    max_grad_norm: float = option(1.0, "clip the global gradient norm here; 0 = never")
    precision: Literal["bf16", "fp32"] = option("bf16", "arithmetic of the trained model; master weights are fp32")
    gradient_checkpointing: bool = option(False, "recompute the denoiser's activations in the backward pass")
    seed: int = option(0, "seeds initialisation, noise, data order and augmentation (the reference seeds nothing)")

    # Keeping.
    keep_checkpoints: int = option(2, "complete checkpoints kept per stage, two at least")
    sample_images: int = option(8, "images in the reconstruction pictures")
    sample_ode_steps: int = option(20, "Euler steps of the rectified-flow ODE for the pictures")
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
        if self.keep_checkpoints < 2:
            raise InputError(f"keep_checkpoints={self.keep_checkpoints}: keep two at least, one may be half-written")
        if not 0 <= self.lora_scale <= 1:
            raise InputError(f"lora_scale={self.lora_scale} must lie between 0 (original) and 1 (enhanced)")
        if sum(self.denoiser_rope_axes) != self.denoiser_head_dim or any(a % 2 for a in self.denoiser_rope_axes):
            raise InputError(
                f"denoiser_rope_axes={self.denoiser_rope_axes} must be even and sum to "
                f"denoiser_head_dim={self.denoiser_head_dim}"
            )
        for name in POSITIVE_COUNTS:
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        for name in NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise InputError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("t_scale", "adam_epsilon"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name}={getattr(self, name)} must be positive")
        for name in ("lora_dropout", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must lie in [0, 1)")
        if not 0 <= self.max_bad_fraction <= 1:
            raise InputError(f"max_bad_fraction={self.max_bad_fraction} must lie in [0, 1]")
        if self.image_size is not None and self.image_size < 1:
            raise InputError(f"image_size={self.image_size} must be at least 1")
        if self.seed > MAX_SEED:
            raise InputError(f"seed={self.seed} must be at most {MAX_SEED}")
        if self.denoiser_layers + self.denoiser_single_layers < 1:
            raise InputError("denoiser_layers and denoiser_single_layers are both 0: the denoiser needs a block")
        for name, top in (("crop_scale", 1.0), ("crop_ratio", float("inf"))):
            low, high = getattr(self, name)
            if not 0 < low <= high <= top:
                raise InputError(f"{name}={low},{high} must rise from above 0{' to at most 1' if top == 1 else ''}")


def _paper(name: str, backbone: str, **fields: Any) -> Callable[[], Recipe]:
    return lambda: Recipe(name=name, backbone=backbone, **fields)


def tiny() -> Recipe:
    """The embedded default: toy world, CLIP and VAE; minutes on two CPU cores, through the code of the big ones."""
    return Recipe(
        name="tiny",
        backbone="toyworld:clip",
        vae="toyworld:vae",
        denoiser_layers=1,
        denoiser_single_layers=2,
        denoiser_heads=4,
        denoiser_head_dim=32,
        denoiser_rope_axes=(8, 12, 12),
        vec_dim=64,
        txt_dim=128,
        global_batch_size=32,
        per_device_batch_size=32,
        num_workers=1,
        precision="fp32",
        lora_rank=16,
        stage1=StageRecipe(learning_rate=1e-3, max_steps=1_000, warmup_steps=20, save_steps=250, sample_steps=250),
        stage2=StageRecipe(
            trains=("backbone",),
            learning_rate=1e-3,
            max_steps=400,
            save_steps=100,
            sample_steps=100,
            snapshot_steps=(50, 100, 200, 400),
        ),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "tiny": tiny,
    # Table 1, continuous denoiser: MMVP-VLM 31.9, 29.6, 31.9, 37.0, 42.2, 40.0. Not yet run by us.
    "openai-l14-224": _paper("openai-l14-224", "openai/clip-vit-large-patch14"),
    "openai-l14-336": _paper("openai-l14-336", "openai/clip-vit-large-patch14-336"),
    "metaclip-l14-224": _paper("metaclip-l14-224", "facebook/metaclip-l14-fullcc2.5b"),
    "metaclip-h14-224": _paper("metaclip-h14-224", "facebook/metaclip-h14-fullcc2.5b"),
    "siglip-so400m-224": _paper("siglip-so400m-224", "google/siglip-so400m-patch14-224"),
    "siglip-so400m-384": _paper("siglip-so400m-384", "google/siglip-so400m-patch14-384"),
}
PARADIGM_SUFFIXES = ("-flow",)


def get_recipe(name: str) -> Recipe:
    """The named recipe; the suffix ``-flow`` (continuous denoiser, the default) may be written out.

    Raises:
        InputError: unknown name, with the nearest known one.
    """
    base = name
    for suffix in PARADIGM_SUFFIXES:
        base = base.removesuffix(suffix)
    if base not in RECIPES:
        raise InputError(f"unknown recipe '{name}'{suggest(base, RECIPES)}; known: {', '.join(RECIPES)}")
    return RECIPES[base]()


def field_types(cls: type) -> dict[str, Any]:
    """Names and resolved types of a recipe class's fields, stages as dotted names (``stage1.max_steps``)."""
    flat: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            flat.update({f"{name}.{inner}": t for inner, t in field_types(typing.cast(type, kind)).items()})
        else:
            flat[name] = kind
    return flat


def field_help(cls: type = Recipe) -> dict[str, str]:
    """The sentence behind every dotted field name of a recipe class."""
    texts: dict[str, str] = {}
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(f.default):
            texts.update({f"{f.name}.{inner}": text for inner, text in field_help(type(f.default)).items()})
        else:
            texts[f.name] = f.metadata["help"]
    return texts


def override(recipe: R, changes: Mapping[str, Any]) -> R:
    """A copy of ``recipe`` with fields changed by dotted name; strings are parsed by the field's type.

    Raises:
        InputError: unknown field (with a suggestion) or a value that does not fit.
    """
    known = field_types(type(recipe))
    top: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        if name not in known:
            raise InputError(
                f"unknown recipe field '{name}'{suggest(name, known)}; `llava-genhancer recipes` lists all"
            )
        parsed = _parse(name, value, known[name])
        stage, _, inner = name.rpartition(".")
        if stage:
            nested.setdefault(stage, {})[inner] = parsed
        else:
            top[name] = parsed
    for stage, fields in nested.items():
        try:
            top[stage] = dataclasses.replace(getattr(recipe, stage), **fields)
        except InputError as error:
            raise InputError(f"{stage}: {error}") from None
    return typing.cast(R, dataclasses.replace(typing.cast(Any, recipe), **top))


def to_dict(recipe: Any) -> dict[str, Any]:
    """Plain JSON types, dotted names flattened, in field order."""
    flat = {}
    for name in field_types(type(recipe)):
        value: Any = recipe
        for part in name.split("."):
            value = getattr(value, part)
        flat[name] = list(value) if isinstance(value, tuple) else value
    return flat


@typing.overload
def from_dict(values: Mapping[str, Any]) -> Recipe: ...
@typing.overload
def from_dict(values: Mapping[str, Any], cls: type[R]) -> R: ...
def from_dict(values: Mapping[str, Any], cls: type = Recipe) -> Any:
    """The inverse of :func:`to_dict`; unknown keys are errors, absent ones take the default."""
    return override(cls(), values)


def differences(ours: R, theirs: R, ignore: tuple[str, ...] = ()) -> list[str]:
    """One line per field that differs, ``name: theirs -> ours``."""
    a, b = to_dict(theirs), to_dict(ours)
    return [f"{k}: {json.dumps(a[k])} -> {json.dumps(b[k])}" for k in b if k not in ignore and a[k] != b[k]]


def suggest(name: str, known: typing.Iterable[str]) -> str:
    """``, did you mean 'NEAREST'?`` for an unknown name, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean '{near[0]}'?" if near else ""


def _parse(name: str, value: Any, kind: Any) -> Any:
    """``value`` (a string from the command line, or a JSON value) as the field's type."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):  # only `X | None` occurs
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        return _parse(name, value, next(a for a in args if a is not type(None)))
    if origin is Literal:
        if value not in args:
            raise InputError(f"{name}={value}: choose one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if isinstance(value, str):
            value = [v for v in value.strip("()[]").split(",") if v.strip()]
        if not isinstance(value, list | tuple):
            raise InputError(f"{name}={value}: needs comma-separated values (in JSON, a list)")
        items = list(value)
        inner = [args[0]] * len(items) if args[-1] is Ellipsis else list(args)
        if len(items) != len(inner):
            raise InputError(f"{name}={','.join(map(str, items))}: needs {len(inner)} comma-separated values")
        return tuple(_parse(name, v.strip() if isinstance(v, str) else v, k) for v, k in zip(items, inner, strict=True))
    if kind is bool:
        words = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
        if isinstance(value, bool) or str(value).lower() in words:
            return value if isinstance(value, bool) else words[str(value).lower()]
        raise InputError(f"{name}={value}: say true or false")
    try:
        if isinstance(value, bool) or (kind is str and not isinstance(value, str)):
            raise ValueError
        if kind is int and isinstance(value, float) and value != int(value):
            raise ValueError
        parsed = kind(value)
        if not (math.isfinite(parsed) if kind is float else kind is str or abs(parsed) < 2**63):
            raise ValueError
        return parsed
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{name}={value}: needs a value of type {kind.__name__}") from None
