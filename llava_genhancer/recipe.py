"""What a recipe of an enhancement holds: its fields, what each means, and what cannot go together.

Nothing in this file imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llava_genhancer.errors import InputError
from llava_genhancer.fields import check_bad_steps, option

PARTS = ("backbone", "projector", "denoiser")


@dataclass(frozen=True, kw_only=True)
class StageRecipe:
    """One training stage: what learns, how fast, for how long."""

    trains: tuple[str, ...] = option(("projector", "denoiser"), "parts that learn: backbone, projector, denoiser")
    learning_rate: float = option(1e-4, "peak learning rate")
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
    "denoiser_head_dim", "vec_dim", "txt_dim", "draws_per_image",
)  # fmt: skip
NOT_NEGATIVE = (
    "num_workers", "lora_rank", "lora_alpha", "sample_images", "seed", "max_grad_norm", "weight_decay",
    "denoiser_layers", "denoiser_single_layers", "unmask_temperature", "cache_crops",
)  # fmt: skip
MAX_SEED = 2**32 - 100  # numpy takes 32 bits, and the stages count on from it
# Fields that only some denoisers read; under another one they must keep their default.
READ_BY = {
    "vae": ("flow", "unet"),
    "vae_posterior": ("flow", "unet"),
    "vq": ("masked",),
    "mask_ratio": ("masked",),
    "masked_readout": ("masked",),
    "masked_positions": ("masked",),
    "unmask_temperature": ("masked",),
    "denoiser_weights": ("flow", "unet"),
    "denoiser_dtype": ("flow", "unet"),
    "denoiser_single_layers": ("flow",),
    "denoiser_rope_axes": ("flow",),
    "vec_dim": ("flow",),
    "guidance": ("flow",),
    "t_sampling": ("flow",),
    "t_scale": ("flow",),
    "t_shift": ("flow",),
    "t_dtype": ("flow",),
    "objective": ("flow", "unet"),
    "contrast_temperature": ("flow", "unet"),
    "draws_per_image": ("flow", "unet"),
}
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
        "openai/clip-vit-large-patch14",
        "folder or hub id of a CLIPModel, SiglipModel or Siglip2Model; EVA-CLIP's folder in open_clip's format; a "
        "weight file or released tower that `convert` takes",
    )
    image_size: int | None = option(None, "training resolution in pixels; none = the backbone's own (ours)")
    condition: Literal["cls", "locals", "pooled"] = option(
        "cls",
        "what the denoiser is told: the global token; and local tokens; and the mean of the local tokens (Fig. 5)",
    )
    local_ratio: float = option(1.0, "share of the local tokens beside the global one, 0..1, under condition=locals")
    local_count: int | None = option(None, "number of local tokens instead of a share (DIVA: 76)")
    local_replacement: bool = option(
        False, "draw local tokens with replacement (DIVA) or without (ours; the paper is silent)"
    )
    condition_into: Literal["vec", "txt", "both"] = option(
        "both", "where the condition enters: vec modulates every block (global token), txt joins the attention"
    )
    projector: Literal["mlp", "linear"] = option("mlp", "heads from tokens to the condition; DIVA: linear")

    # What is rebuilt.
    denoiser: Literal["flow", "masked", "unet"] = option(
        "flow", "flow: FLUX-like, velocity of VAE latents; masked: Perceiver, VQ tokens; unet: Stable Diffusion's"
    )
    denoiser_weights: str | None = option(
        None, "pretrained denoiser: diffusers folder or hub id; none = random init, as in the paper's light ones"
    )
    denoiser_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "a pretrained denoiser's weights (ours: bfloat16 halves a frozen one's memory)"
    )
    target_size: int | None = option(None, "pixels that the target tokenizer sees; none = image_size")
    vae: str = option(
        "black-forest-labs/FLUX.1-dev", "AutoencoderKL: diffusers folder, hub id, or the single file ae.safetensors"
    )
    vq: str = option(
        "vqgan_imagenet_f16_16384.ckpt", "VQ-GAN: diffusers VQModel folder, or a checkpoint of taming or LlamaGen"
    )
    vae_posterior: Literal["sample", "mean"] = option("sample", "target latent: a draw from the posterior, or its mean")
    vae_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "arithmetic of the frozen target tokenizer; the reference: float32"
    )

    # The light denoiser's size.
    denoiser_layers: int = option(2, "flow: double-stream blocks (Table 5: 1, 2, 3, 4); masked: layers (2, 4, 6, 8)")
    denoiser_single_layers: int = option(4, "single-stream blocks (Table 5: 2, 4, 6, 8)")
    denoiser_heads: int = option(24, "attention heads")
    denoiser_head_dim: int = option(128, "channels per head; width = heads x head_dim")
    denoiser_rope_axes: tuple[int, int, int] = option((16, 56, 56), "rotary channels per axis, summing to head_dim")
    vec_dim: int = option(768, "width of the condition that modulates every block (AdaLN)")
    txt_dim: int = option(4096, "width of the condition's tokens in attention")
    guidance: float = option(4.0, "constant fed to the guidance embedding")

    # Rectified flow.
    t_sampling: Literal["logit_normal", "uniform"] = option("logit_normal", "density of t in training (Table 4)")
    t_scale: float = option(1.0, "s in t = sigmoid(s * eps) (Table 4: 0.1, 0.5, 1, 5, 10)")
    t_shift: float = option(0.0, "m in t = sigmoid(s * eps + m); 0 is the paper's, positive means noisier (ours)")
    t_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "precision of t before its sinusoid (ours; the reference's bfloat16 keeps about 630 values)"
    )

    # Masked tokens.
    mask_ratio: tuple[float, float] = option(
        (0.5, 0.9), "share of masked tokens, drawn uniformly from this range; equal ends fix it (Table 8)"
    )
    masked_readout: Literal["every", "last"] = option(
        "every",
        "layers in which masked positions look at the known ones (the paper is silent; ours: every, so that the "
        "condition speaks to them at each depth; last: as Perceiver IO reads out)",
    )
    masked_positions: Literal["learned", "sincos"] = option(
        "learned", "position embedding of the tokens (the paper is silent; ours: learned, the grid never changes)"
    )
    unmask_temperature: float = option(
        1.0,
        "randomness of the order in which pictures are unmasked (ours; MaskGIT's 4.5 is after variety, these after the "
        "image); training never reads it",
    )

    # Objective.
    objective: Literal["rebuild", "contrast"] = option(
        "rebuild", "rebuild: predict the target; contrast: DCR's InfoNCE between predictions under different conditions"
    )
    contrast_temperature: float = option(0.1, "temperature of the contrast")
    draws_per_image: int = option(1, "(noise, t) draws per image in one step (DIVA: 2)")

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
    cache_crops: int = option(
        0,
        "fixed crops per image whose targets, and tokens while the backbone is frozen, are computed once and kept on "
        "disk (its cost is logged first); 0 computes fresh crops in every step, as the paper does (ours)",
    )
    cache_folder: str | None = option(
        None, "where; runs of the same data, crops and weights share it; none = in the run"
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
    on_bad_step: Literal["stop", "skip"] = option(
        "stop",
        "where a loss or gradient is not finite, or a loss spikes: end, or leave the step out; costs a sync a step",
    )
    spike_factor: float = option(
        0.0, "a loss this multiple of the median of the 50 steps before is a spike; 0 = never (ours)"
    )
    max_skipped_steps: int = option(10, "skipped steps of a training above which it ends all the same")
    timeout_minutes: float = option(30.0, "time without progress after which a rank that hangs is an error")

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
        if self.keep_checkpoints < 2:
            raise InputError(f"keep_checkpoints={self.keep_checkpoints}: keep two at least, one may be half-written")
        if not 0 <= self.lora_scale <= 1:
            raise InputError(f"lora_scale={self.lora_scale} must lie between 0 (original) and 1 (enhanced)")
        axes = self.denoiser_rope_axes
        if self.denoiser == "flow" and (sum(axes) != self.denoiser_head_dim or any(a % 2 for a in axes)):
            raise InputError(
                f"denoiser_rope_axes={axes} must be even and sum to denoiser_head_dim={self.denoiser_head_dim}"
            )
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
        check_bad_steps(self.spike_factor, self.max_skipped_steps, self.timeout_minutes)
        if self.seed > MAX_SEED:
            raise InputError(f"seed={self.seed} must be at most {MAX_SEED}")
        if self.denoiser_layers + self.denoiser_single_layers < 1:
            raise InputError("denoiser_layers and denoiser_single_layers are both 0: the denoiser needs a block")
        if self.cache_crops and self.target_size is not None:
            raise InputError("cache_crops keeps crops of one size: leave target_size at none")
        if self.cache_crops and self.objective == "contrast":
            raise InputError("cache_crops needs objective=rebuild: the contrast sees a fresh second view of each image")
        self._check_condition()
        self._check_masked()
        self._check_pretrained()
        for name, readers in READ_BY.items():
            if self.denoiser not in readers and getattr(self, name) != getattr(Recipe, name):
                raise InputError(
                    f"{name}={getattr(self, name)} has no meaning with denoiser={self.denoiser}: only "
                    f"{' and '.join(readers)} {'read' if len(readers) > 1 else 'reads'} it"
                )
        for name, top in (("crop_scale", 1.0), ("crop_ratio", float("inf")), ("mask_ratio", 1.0)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= top:
                raise InputError(f"{name}={low},{high} must rise from above 0{' to at most 1' if top == 1 else ''}")

    def _check_masked(self) -> None:
        if self.denoiser != "masked":
            return
        width = self.denoiser_heads * self.denoiser_head_dim
        if self.denoiser_layers < 1:
            raise InputError("denoiser_layers=0: denoiser=masked needs a layer")
        if self.txt_dim != width:
            raise InputError(
                f"txt_dim={self.txt_dim} must be denoiser_heads x denoiser_head_dim = {width} with denoiser=masked: "
                "condition and tokens are keys of one attention"
            )
        if self.masked_positions == "sincos" and width % 4:
            raise InputError(f"masked_positions=sincos needs a width that 4 divides, not {width}")

    def _check_pretrained(self) -> None:
        if self.denoiser == "unet" and self.denoiser_weights is None:
            raise InputError("denoiser=unet needs denoiser_weights: a Stable Diffusion folder or hub id")
        if self.denoiser_weights is None and self.denoiser_dtype != "float32":
            raise InputError(f"denoiser_dtype={self.denoiser_dtype} needs denoiser_weights: a new denoiser is float32")
        learns = [s for s in (self.stage1, self.stage2) if s.max_steps > 0 and "denoiser" in s.trains]
        if self.denoiser_dtype != "float32" and learns:
            raise InputError(f"denoiser_dtype={self.denoiser_dtype} is for a frozen denoiser: take it out of `trains`")
        if self.objective == "contrast" and self.per_device_batch_size < 2:
            raise InputError("objective=contrast compares images of a micro-batch: per_device_batch_size of 2 at least")
        if self.objective == "contrast" and self.draws_per_image > 1:
            raise InputError("objective=contrast takes one draw per image: draws_per_image=1")

    def _check_condition(self) -> None:
        if self.local_count is not None and self.local_ratio != 1.0:
            raise InputError(
                f"local_count={self.local_count} and local_ratio={self.local_ratio} both say how many: set one "
                "(--local_count none frees the share)"
            )
        if not 0 <= self.local_ratio <= 1:
            raise InputError(f"local_ratio={self.local_ratio} must lie between 0 and 1")
        local = (self.local_ratio, self.local_count, self.local_replacement)
        if self.condition != "locals" and local != (1.0, None, False):
            raise InputError(f"local_ratio, local_count, local_replacement need condition=locals, not {self.condition}")
        if self.condition_into == "vec" and self.condition != "cls":
            raise InputError("condition_into=vec carries the global token alone: local tokens need txt or both")
        if self.denoiser != "flow" and self.condition_into != "txt":
            raise InputError(f"denoiser={self.denoiser} takes its condition as tokens: condition_into=txt")
