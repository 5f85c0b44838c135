"""Bytes: a device's memory while a stage trains, and the run folder on disk."""

from __future__ import annotations

from dataclasses import dataclass, field

from llava_genhancer.costs.facts import FLUX_VAE, Backbone, Vae
from llava_genhancer.costs.work import (
    condition_tokens,
    denoiser_parameters,
    denoiser_passes,
    denoiser_work,
    engine_parameters,
    full_model_parameters,
    target_size,
    trained_parameters,
    vae_parameters,
)
from llava_genhancer.recipes import Recipe

GIB = 2**30
UNET_BLOCKS = 9  # of Stable Diffusion: four down, one in the middle, four up


@dataclass(frozen=True)
class Zero:
    """What a DeepSpeed JSON says about memory. ``stage`` None: no DeepSpeed at all."""

    stage: int | None = None
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bucket: int = 500_000_000  # elements, DeepSpeed's default
    live_parameters: int = 1_000_000_000  # gathered at once under ZeRO-3, DeepSpeed's default


@dataclass(frozen=True)
class Memory:
    """Predicted peak of one device, by purpose, and what one rank puts into the host's memory; bytes."""

    device: dict[str, float]
    host: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return sum(self.device.values())


def memory(
    recipe: Recipe,
    stage: int,
    backbone: Backbone,
    vae: Vae = FLUX_VAE,
    *,
    zero: Zero = Zero(),
    ranks: int = 1,
    cuda: bool = True,
) -> Memory:
    """Predicted memory of a stage's training.

    Trained parameters take 16 bytes each: bf16 weight and gradient (2 + 2) with fp32 master and two moments (4 + 8) in
    DeepSpeed, fp32 weight, gradient and moments (4 + 4 + 8) without. ZeRO-1 shards the optimizer's 12, ZeRO-2 the
    gradients too, ZeRO-3 everything. Activations: :func:`activation_bytes`. Context, fragmentation and buffers are
    estimates, everything else is counted.
    """
    trained = trained_parameters(recipe, stage, backbone, vae)
    frozen = engine_parameters(recipe, stage, backbone, vae) - trained
    small = frozen_half(recipe, stage, backbone, vae)
    batch = recipe.per_device_batch_size
    level, half = zero.stage, recipe.precision == "bf16"
    weights = gradients = optimizer = rest = buffers = 0.0
    if level is None:
        weights, gradients, optimizer, rest = 4.0 * trained, 4.0 * trained, 8.0 * trained, 4.0 * frozen - 2.0 * small
        # Autocast keeps a bf16 copy of each weight for the backward pass; DDP a bucket for each gradient.
        buffers = (2.0 * (trained + frozen - small) if half else 0) + (4.0 * trained if ranks > 1 else 0)
    else:
        width = 2 if half else 4
        sharded = [ranks if level >= at else 1 for at in (3, 2, 1)]
        weights, gradients, optimizer = (n * trained / s for n, s in zip((width, width, 12), sharded, strict=True))
        rest = (width * frozen - (width - 2) * small) / sharded[0]  # DeepSpeed casts in bf16 alone
        buffers = 2.0 * width * min(zero.bucket, trained)
        if level >= 3:
            buffers += width * min(zero.live_parameters, trained + frozen)
    size = target_size(recipe, backbone)
    pixel = 4 if recipe.vae_dtype == "float32" else 2
    # Encoding ends before the forward pass starts: the larger of the two counts. Four maps of the first level live.
    encoding = 4 * batch * vae.channels[0] * size**2 * pixel
    activations = max(encoding, activation_bytes(recipe, stage, backbone, vae, engine=level is not None))
    host: dict[str, float] = {}
    if zero.offload_optimizer and level:
        host["optimizer"], optimizer = optimizer, 0.0
    if zero.offload_parameters and level == 3:
        host["weights"], weights, rest = weights + rest, 0.0, 0.0
    device = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "frozen weights": rest,
        "target tokenizer": vae_parameters(vae) * pixel,
        "activations": activations,
        "buffers": buffers,
        "context": (0.6 if cuda else 1.0) * GIB + 0.1 * activations,
    }
    return Memory(device, host)


def built_bytes(recipe: Recipe, stage: int, backbone: Backbone, vae: Vae = FLUX_VAE) -> float:
    """Bytes of the model that one rank builds in main memory: fp32, but for a frozen denoiser's own dtype."""
    return 4.0 * engine_parameters(recipe, stage, backbone, vae) - 2.0 * frozen_half(recipe, stage, backbone, vae)


def frozen_half(recipe: Recipe, stage: int, backbone: Backbone, vae: Vae = FLUX_VAE) -> int:
    """Parameters that a stage holds in bfloat16 from the start: a pretrained denoiser's that does not learn."""
    if recipe.denoiser_dtype == "float32" or "denoiser" in recipe.stage(stage).trains:
        return 0
    return denoiser_parameters(recipe, vae, target_size(recipe, backbone))


def activation_bytes(
    recipe: Recipe, stage: int, backbone: Backbone, vae: Vae = FLUX_VAE, *, engine: bool = True
) -> float:
    """Activations kept for the backward pass, on one device.

    Calibrated, not derived: 29.3 bf16 maps of the denoiser's width per block and token, and 4 bytes per head and pair
    of tokens, give the 3.5 / 8.8 / 12.1 GiB measured on the reference's denoiser at batch 16 and 224 / 336 / 384 px
    (diffusers' class with fused attention keeps 2.9 / 6.5 / 8.5). The other factors are counts of the tensors that
    autograd saves in the classes used here: 0.6 of that where the denoiser is frozen, 17 maps per layer of the masked
    denoiser, 347 of the first level's width at each latent position in Stable Diffusion's UNet (attention fused), 31 of
    the tower's width per layer with LoRA and 22 without; fp32 keeps 1.7 to 2 times as much as bf16,
    autocast 1.5 to 1.9.

    Args:
        engine: the weights are bf16 under DeepSpeed; without it bf16 means autocast.
    """
    trains = recipe.stage(stage).trains
    batch, size = recipe.per_device_batch_size, recipe.image_size or backbone.image_size
    side = target_size(recipe, backbone) // vae.downscale
    d = denoiser_work(recipe, target_size(recipe, backbone), vae).width
    if recipe.denoiser == "unet":
        n, blocks = side**2, UNET_BLOCKS
        one_block = batch * denoiser_passes(recipe) * n * 347.0 * 2 * d / blocks
    elif recipe.denoiser == "masked":
        n, blocks = side**2, recipe.denoiser_layers
        one_block = batch * n * 17.0 * 2 * d
    else:
        n, blocks = (side // 2) ** 2 + condition_tokens(recipe, backbone), recipe.denoiser_layers
        blocks += recipe.denoiser_single_layers
        one_block = batch * denoiser_passes(recipe) * n * (29.3 * 2 * d + 4 * recipe.denoiser_heads * n)
    if "denoiser" not in trains:
        one_block *= 0.6
    half = recipe.precision == "bf16"
    denoiser = blocks * one_block * (1.0 if half and engine else 1.85 if half else 1.7)
    if recipe.gradient_checkpointing:  # each block's input, and one block at a time in full
        denoiser = denoiser / blocks + blocks * batch * n * d * 4
    denoiser += batch * n * 8 * vae.codes  # scores of every code, in fp32 for the loss
    if "backbone" not in trains:
        return denoiser
    maps = 31 if recipe.lora_rank else 22
    tower = batch * backbone.tokens(size) * backbone.width * backbone.layers * maps * 2
    return denoiser + tower * (1.0 if half and engine else 1.5 if half else 2.0)


def checkpoint_bytes(
    recipe: Recipe,
    stage: int,
    backbone: Backbone,
    vae: Vae = FLUX_VAE,
    zero: Zero = Zero(),
) -> float:
    """One checkpoint of a stage: trained weights and optimizer, no frozen weight."""
    per_parameter = 12 if zero.stage is None else 14 if recipe.precision == "bf16" else 16
    return per_parameter * trained_parameters(recipe, stage, backbone, vae)


def disk_bytes(
    recipe: Recipe,
    backbone: Backbone,
    vae: Vae = FLUX_VAE,
    zero: Zero = Zero(),
) -> dict[str, float]:
    """The run folder at its fullest, by purpose. A new checkpoint is whole before the oldest is deleted."""
    parts: dict[str, float] = {}
    largest = 0.0
    for stage in (1, 2):
        table = recipe.stage(stage)
        if not table.max_steps:
            continue
        trained = trained_parameters(recipe, stage, backbone, vae)
        one = checkpoint_bytes(recipe, stage, backbone, vae, zero)
        kept = min(recipe.keep_checkpoints, -(-table.max_steps // table.save_steps))
        snapshots = sum(step <= table.max_steps for step in table.snapshot_steps)
        parts[f"stage {stage} checkpoints"] = kept * one
        parts[f"stage {stage} weights"] = 4.0 * trained * (1 + snapshots)
        largest = max(largest, one)
    parts["one more while saving"] = largest
    parts["tower"] = 4.0 * full_model_parameters(backbone)
    return parts
