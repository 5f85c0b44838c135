"""What a recipe costs, counted before anything is loaded: parameters, FLOPs, memory, disk.

Every function here is arithmetic on a recipe and on the facts of its backbone and VAE. A multiply-add counts as two
FLOPs, as in ``torch.utils.flop_counter``; norms, activations and softmax count as none, as there.

Legend: d width, m width of the MLP, n image tokens, t tokens of a tower, e = 4 C width of a latent token.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from llava_genhancer.recipes import Recipe, StageRecipe

Mode = Literal["forward", "train", "frozen"]
GIB = 2**30


@dataclass(frozen=True)
class Backbone:
    """The numbers of a two-tower model's HF config that decide its cost."""

    kind: str  # clip, siglip, siglip2
    width: int
    layers: int
    mlp: int
    patch: int
    image_size: int
    projection: int  # 0: the pooled token is used as it is
    text_width: int
    text_layers: int
    text_mlp: int
    vocabulary: int
    text_positions: int

    @property
    def token_dim(self) -> int:
        """Width of the global token that conditions the denoiser."""
        return self.projection or self.width

    def tokens(self, image_size: int) -> int:
        """Tokens in the vision tower at this image side (SigLIP has no CLS; a remainder of the patching is cut off)."""
        return (image_size // self.patch) ** 2 + (self.kind == "clip")


@dataclass(frozen=True)
class Vae:
    """The numbers of an AutoencoderKL's config that decide its cost."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 16
    mid_attention: bool = True
    quant_conv: bool = False

    @property
    def downscale(self) -> int:
        """Image side over latent side."""
        return int(2 ** (len(self.channels) - 1))


FLUX_VAE = Vae()
# For predictions before anything is downloaded; a folder's own config is read where there is one.
_L14 = Backbone("clip", 1024, 24, 4096, 14, 224, 768, 768, 12, 3072, 49408, 77)
KNOWN_BACKBONES = {
    "openai/clip-vit-large-patch14": _L14,
    "openai/clip-vit-large-patch14-336": Backbone("clip", 1024, 24, 4096, 14, 336, 768, 768, 12, 3072, 49408, 77),
    "facebook/metaclip-l14-fullcc2.5b": _L14,
    "facebook/metaclip-h14-fullcc2.5b": Backbone("clip", 1280, 32, 5120, 14, 224, 1024, 1024, 24, 4096, 49408, 77),
    "google/siglip-so400m-patch14-224": Backbone("siglip", 1152, 27, 4304, 14, 224, 0, 1152, 27, 4304, 32000, 16),
    "google/siglip-so400m-patch14-384": Backbone("siglip", 1152, 27, 4304, 14, 384, 0, 1152, 27, 4304, 32000, 64),
}


def backbone_facts(config: Any) -> Backbone:
    """The facts in a loaded CLIPConfig, SiglipConfig or Siglip2Config."""
    vision, text = config.vision_config, config.text_config
    kind = config.model_type
    # NaFlex (siglip2) counts patches instead of pixels.
    native = vision.image_size if kind != "siglip2" else round(vision.num_patches**0.5) * vision.patch_size
    return Backbone(
        kind=kind,
        width=vision.hidden_size,
        layers=vision.num_hidden_layers,
        mlp=vision.intermediate_size,
        patch=vision.patch_size,
        image_size=native,
        projection=config.projection_dim if kind == "clip" else 0,
        text_width=text.hidden_size,
        text_layers=text.num_hidden_layers,
        text_mlp=text.intermediate_size,
        vocabulary=text.vocab_size,
        text_positions=text.max_position_embeddings,
    )


def vae_facts(config: Any) -> Vae:
    """The facts in an AutoencoderKL's ``config.json`` (a dict)."""
    return Vae(
        channels=tuple(config["block_out_channels"]),
        layers_per_block=config.get("layers_per_block", 1),
        latent_channels=config.get("latent_channels", 4),
        mid_attention=config.get("mid_block_add_attention", True),
        quant_conv=config.get("use_quant_conv", True),
    )


# --- parameters -----------------------------------------------------------------------------------------------------


def _linear(inputs: int, outputs: int, bias: bool = True) -> int:
    return inputs * outputs + bias * outputs


def denoiser_parameters(recipe: Recipe, vae: Vae = FLUX_VAE) -> int:
    """Parameters of the light DiT; 1 310 154 816 with the paper's recipe (Table 5: 2 + 4 blocks)."""
    head = recipe.denoiser_head_dim
    d, e = recipe.denoiser_heads * head, 4 * vae.latent_channels
    conditioning = 2 * (_linear(256, d) + _linear(d, d)) + _linear(recipe.vec_dim, d) + _linear(d, d)
    stream = _linear(d, 6 * d) + 4 * _linear(d, d) + 2 * head + _linear(d, 4 * d) + _linear(4 * d, d)
    single = _linear(d, 3 * d) + 3 * _linear(d, d) + 2 * head + _linear(d, 4 * d) + _linear(5 * d, d)
    blocks = recipe.denoiser_layers * 2 * stream + recipe.denoiser_single_layers * single
    ends = _linear(e, d) + _linear(recipe.txt_dim, d) + _linear(d, 2 * d) + _linear(d, e)
    return conditioning + blocks + ends


def projector_parameters(recipe: Recipe, backbone: Backbone) -> int:
    """Parameters of the heads that turn tokens into the condition."""
    token = backbone.token_dim
    if recipe.projector == "linear":
        return sum(_linear(token, out) for out, _ in _heads(recipe, backbone))
    return sum(2 * token + _linear(token, out) + _linear(out, out) for out, _ in _heads(recipe, backbone))


def _heads(recipe: Recipe, backbone: Backbone) -> list[tuple[int, int]]:
    """Width and number of tokens of each head of the projector."""
    ways = {"vec": (recipe.vec_dim, 1), "txt": (recipe.txt_dim, condition_tokens(recipe, backbone))}
    return [size for way, size in ways.items() if recipe.condition_into in (way, "both")]


def condition_tokens(recipe: Recipe, backbone: Backbone) -> int:
    """Tokens that the denoiser is told of one image: the global one, and the local ones that the recipe adds."""
    if recipe.condition == "cls":
        return 1
    if recipe.condition == "pooled":
        return 2
    local = ((recipe.image_size or backbone.image_size) // backbone.patch) ** 2
    count = round(recipe.local_ratio * local) if recipe.local_count is None else recipe.local_count
    return 1 + (count if recipe.local_replacement else min(count, local))


def _layers(count: int, d: int, m: int) -> int:
    """A pre-norm transformer's layers."""
    return count * (4 * _linear(d, d) + _linear(d, m) + _linear(m, d) + 4 * d)


def vision_parameters(backbone: Backbone) -> int:
    """Parameters of the vision tower and, for CLIP, its projection: what the training engine holds."""
    d, patches = backbone.width, backbone.tokens(backbone.image_size)
    total = _linear(3 * backbone.patch**2, d, bias=backbone.kind != "clip") + patches * d
    total += _layers(backbone.layers, d, backbone.mlp) + 2 * d
    if backbone.kind == "clip":  # class token, pre-norm, projection
        return total + d + 2 * d + d * backbone.projection
    pooling = d + 4 * _linear(d, d) + 2 * d + _linear(d, backbone.mlp) + _linear(backbone.mlp, d)
    return total + pooling


def full_model_parameters(backbone: Backbone) -> int:
    """Parameters of both towers with projections and scales: what the exported folder holds."""
    d = backbone.text_width
    text = (backbone.vocabulary + backbone.text_positions) * d + 2 * d
    text += _layers(backbone.text_layers, d, backbone.text_mlp)
    text += d * backbone.projection + 1 if backbone.kind == "clip" else _linear(d, backbone.width) + 2
    return vision_parameters(backbone) + text


def lora_parameters(recipe: Recipe, backbone: Backbone) -> int:
    """What learns when the backbone learns: LoRA's pairs and the adapted biases; everything at rank 0."""
    if recipe.lora_rank == 0:
        return vision_parameters(backbone)
    bias = recipe.lora_bias == "lora_only"

    def adapted(inputs: int, outputs: int, has_bias: bool = True) -> int:
        return recipe.lora_rank * (inputs + outputs) + (outputs if bias and has_bias else 0)

    def tower(count: int, d: int, m: int) -> int:
        return count * (4 * adapted(d, d) + adapted(d, m) + adapted(m, d))

    d, m = backbone.width, backbone.mlp
    total = tower(backbone.layers, d, m)
    # SigLIP's pooling attention is fused and stays as it is; its MLP is adapted.
    total += adapted(d, backbone.projection, False) if backbone.kind == "clip" else adapted(d, m) + adapted(m, d)
    if recipe.lora_scope == "all":
        total += tower(backbone.text_layers, backbone.text_width, backbone.text_mlp)
        total += (
            adapted(backbone.text_width, backbone.projection, False)
            if backbone.kind == "clip"
            else adapted(backbone.text_width, d)
        )
    return total


def stage_recipe(recipe: Recipe, stage: int) -> StageRecipe:
    """The table of stage 1 or 2."""
    return recipe.stage1 if stage == 1 else recipe.stage2


def trained_parameters(recipe: Recipe, stage: int, backbone: Backbone, vae: Vae = FLUX_VAE) -> int:
    """Parameters that learn in a stage."""
    sizes = {
        "backbone": lora_parameters(recipe, backbone),
        "projector": projector_parameters(recipe, backbone),
        "denoiser": denoiser_parameters(recipe, vae),
    }
    return sum(sizes[part] for part in stage_recipe(recipe, stage).trains)


def engine_parameters(recipe: Recipe, stage: int, backbone: Backbone, vae: Vae = FLUX_VAE) -> int:
    """All parameters of the model that the engine holds in a stage, frozen ones included, the VAE not."""
    towers = vision_parameters(backbone)
    if recipe.lora_scope == "all":
        towers = full_model_parameters(backbone)
    adapted = any("backbone" in stage_recipe(recipe, s).trains for s in range(1, stage + 1)) and recipe.lora_rank > 0
    # The biases that LoRA trains are the tower's own; only the pairs come on top.
    adapters = lora_parameters(dataclasses.replace(recipe, lora_bias="none"), backbone) if adapted else 0
    return towers + adapters + projector_parameters(recipe, backbone) + denoiser_parameters(recipe, vae)


def vae_parameters(vae: Vae = FLUX_VAE) -> int:
    """Parameters of the whole VAE; the decoder, used for pictures only, is loaded too."""
    c, n = vae.channels, vae.layers_per_block

    def conv(a: int, b: int, k: int = 3) -> int:
        return a * b * k * k + b

    def resnet(a: int, b: int) -> int:
        return 2 * a + conv(a, b) + 2 * b + conv(b, b) + (conv(a, b, 1) if a != b else 0)

    middle = 2 * resnet(c[-1], c[-1]) + (vae.mid_attention * (2 * c[-1] + 4 * _linear(c[-1], c[-1])))
    encoder = conv(3, c[0]) + middle + 2 * c[-1] + conv(c[-1], 2 * vae.latent_channels)
    decoder = conv(vae.latent_channels, c[-1]) + middle + 2 * c[0] + conv(c[0], 3)
    for i, out in enumerate(c):
        encoder += resnet(c[max(i - 1, 0)], out) + (n - 1) * resnet(out, out)
        encoder += conv(out, out) if i < len(c) - 1 else 0
    for i, out in enumerate(reversed(c)):
        decoder += resnet(c[min(len(c) - i, len(c) - 1)], out) + n * resnet(out, out)
        decoder += conv(out, out) if i < len(c) - 1 else 0
    latent = vae.latent_channels
    return encoder + decoder + vae.quant_conv * (conv(2 * latent, 2 * latent, 1) + conv(latent, latent, 1))


# --- FLOPs per image ------------------------------------------------------------------------------------------------


def _passes(linear: float, attention: float, mode: Mode) -> float:
    """Forward; plus gradients to weights and inputs; or to inputs alone where the weights are frozen."""
    if mode == "forward":
        return linear + attention
    return (3 if mode == "train" else 2) * linear + 3 * attention


def denoiser_flops(
    recipe: Recipe, image_size: int, vae: Vae = FLUX_VAE, mode: Mode = "forward", *, text: int = 1
) -> float:
    """FLOPs of the DiT for one image: 271.5 G forward, 814.5 G trained, 545.8 G frozen but differentiated at 224 px.

    Args:
        image_size: side of what the target tokenizer sees.
        text: condition tokens in joint attention.
    """
    d, e = recipe.denoiser_heads * recipe.denoiser_head_dim, 4 * vae.latent_channels
    n = (image_size // vae.downscale // 2) ** 2
    double, single = recipe.denoiser_layers, recipe.denoiser_single_layers
    per_image = 2 * (256 * d + d * d) + recipe.vec_dim * d + d * d + double * 12 * d * d + single * 3 * d * d
    per_image += 2 * d * d + text * recipe.txt_dim * d + 2 * n * e * d
    per_token = (double + single) * 12 * d * d * (n + text)
    attention = (double + single) * 2 * (n + text) ** 2 * d
    return _passes(2 * (per_image + per_token), 2 * attention, mode)


def projector_flops(recipe: Recipe, backbone: Backbone, mode: Mode = "forward") -> float:
    """FLOPs of the condition's heads for one image."""
    deep = recipe.projector == "mlp"
    heads = sum(n * (backbone.token_dim * out + deep * out * out) for out, n in _heads(recipe, backbone))
    return _passes(2 * heads, 0, mode)


def backbone_flops(recipe: Recipe, backbone: Backbone, mode: Mode = "forward", *, lora: bool = False) -> float:
    """FLOPs of the vision tower for one image: 162 G forward for ViT-L/14 at 224 px, about 324 G with LoRA trained.

    Args:
        mode: "train" fine-tunes every weight, "frozen" passes gradients through frozen ones (the case of LoRA).
        lora: add the adapters' own work.
    """
    size = recipe.image_size or backbone.image_size
    t, d, m = backbone.tokens(size), backbone.width, backbone.mlp
    patches = t - (backbone.kind == "clip")
    embedding = 3 * backbone.patch**2 * d * patches
    layers = backbone.layers * t * (4 * d * d + 2 * d * m)
    attention = backbone.layers * 2 * t * t * d
    if backbone.kind == "clip":
        head = d * backbone.projection * (1 if recipe.condition == "cls" else t)
    else:  # one probe attends to all tokens
        head = 2 * t * d * d + 2 * d * d + 2 * d * m
        attention += 2 * t * d
    total = _passes(2 * (layers + head), 2 * attention, mode)
    total += 2 * embedding * (2 if mode == "train" else 1)  # pixels need no gradient
    if lora:
        pairs = backbone.layers * t * recipe.lora_rank * (4 * 2 * d + 2 * (d + m))
        total += _passes(2 * pairs, 0, "forward" if mode == "forward" else "train")
    return total


def vae_encoder_flops(image_size: int, vae: Vae = FLUX_VAE) -> float:
    """FLOPs of encoding one image: 208.6 G for FLUX's VAE at 224 px."""
    c, n, side = vae.channels, vae.layers_per_block, image_size
    total = 9 * 3 * c[0] * side**2

    def resnet(a: int, b: int) -> int:
        return (9 * a * b + 9 * b * b + (a * b if a != b else 0)) * side**2

    for i, out in enumerate(c):
        total += resnet(c[max(i - 1, 0)], out) + (n - 1) * resnet(out, out)
        if i < len(c) - 1:
            side //= 2
            total += 9 * out * out * side**2
    total += 2 * resnet(c[-1], c[-1]) + 9 * c[-1] * 2 * vae.latent_channels * side**2
    if vae.mid_attention:
        total += 4 * c[-1] ** 2 * side**2 + 2 * side**4 * c[-1]
    return 2 * total + vae.quant_conv * 2 * (2 * vae.latent_channels) ** 2 * side**2


def step_flops(recipe: Recipe, stage: int, backbone: Backbone, vae: Vae = FLUX_VAE) -> dict[str, float]:
    """FLOPs of one image in a training step, by part; the denoiser's part holds the projector."""
    trains = stage_recipe(recipe, stage).trains
    target_size = recipe.target_size or recipe.image_size or backbone.image_size
    through = "backbone" in trains
    lora = through and recipe.lora_rank > 0

    def mode(part: str) -> Mode:
        # A frozen projector or denoiser passes gradients on only to what learns before it.
        upstream = through or (part == "denoiser" and "projector" in trains)
        return "train" if part in trains else "frozen" if upstream else "forward"

    eye: Mode = "forward" if not through else "frozen" if lora else "train"
    return {
        "target encoding": vae_encoder_flops(target_size, vae),
        "backbone": backbone_flops(recipe, backbone, eye, lora=lora),
        "denoiser": denoiser_flops(recipe, target_size, vae, mode("denoiser"), text=condition_tokens(recipe, backbone))
        + projector_flops(recipe, backbone, mode("projector")),
    }


def total_flops(recipe: Recipe, stage: int, backbone: Backbone, vae: Vae = FLUX_VAE) -> float:
    """FLOPs of a whole stage over all devices."""
    images = stage_recipe(recipe, stage).max_steps * recipe.global_batch_size
    return images * sum(step_flops(recipe, stage, backbone, vae).values())


# --- bytes ----------------------------------------------------------------------------------------------------------


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
    batch = recipe.per_device_batch_size
    level, half = zero.stage, recipe.precision == "bf16"
    weights = gradients = optimizer = rest = buffers = 0.0
    if level is None:
        weights, gradients, optimizer, rest = 4.0 * trained, 4.0 * trained, 8.0 * trained, 4.0 * frozen
        # Autocast keeps a bf16 copy of each weight for the backward pass; DDP a bucket for each gradient.
        buffers = (2.0 * (trained + frozen) if half else 0) + (4.0 * trained if ranks > 1 else 0)
    else:
        width = 2 if half else 4
        sharded = [ranks if level >= at else 1 for at in (3, 2, 1)]
        weights, gradients, optimizer = (n * trained / s for n, s in zip((width, width, 12), sharded, strict=True))
        rest = width * frozen / sharded[0]
        buffers = 2.0 * width * min(zero.bucket, trained)
        if level >= 3:
            buffers += width * min(zero.live_parameters, trained + frozen)
    size = recipe.target_size or recipe.image_size or backbone.image_size
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
        "VAE": vae_parameters(vae) * pixel,
        "activations": activations,
        "buffers": buffers,
        "context": (0.6 if cuda else 1.0) * GIB + 0.1 * activations,
    }
    return Memory(device, host)


def activation_bytes(
    recipe: Recipe, stage: int, backbone: Backbone, vae: Vae = FLUX_VAE, *, engine: bool = True
) -> float:
    """Activations kept for the backward pass, on one device.

    Calibrated, not derived: 29.3 bf16 maps of the denoiser's width per block and token, and 4 bytes per head and pair
    of tokens, give the 3.5 / 8.8 / 12.1 GiB measured on the reference's denoiser at batch 16 and 224 / 336 / 384 px
    (diffusers' class with fused attention keeps 2.9 / 6.5 / 8.5). The other factors are counts of the tensors that
    autograd saves in the classes used here: 0.6 of that where the denoiser is frozen, 31 maps of the tower's width per
    layer with LoRA and 22 without; fp32 keeps 1.7 to 2 times as much as bf16, autocast 1.5 to 1.9.

    Args:
        engine: the weights are bf16 under DeepSpeed; without it bf16 means autocast.
    """
    trains = stage_recipe(recipe, stage).trains
    batch, size = recipe.per_device_batch_size, recipe.image_size or backbone.image_size
    d, blocks = recipe.denoiser_heads * recipe.denoiser_head_dim, recipe.denoiser_layers + recipe.denoiser_single_layers
    target_size = recipe.target_size or size
    n = (target_size // vae.downscale // 2) ** 2 + condition_tokens(recipe, backbone)
    one_block = batch * n * (29.3 * 2 * d + 4 * recipe.denoiser_heads * n)
    if "denoiser" not in trains:
        one_block *= 0.6
    half = recipe.precision == "bf16"
    denoiser = blocks * one_block * (1.0 if half and engine else 1.85 if half else 1.7)
    if recipe.gradient_checkpointing:  # each block's input, and one block at a time in full
        denoiser = denoiser / blocks + blocks * batch * n * d * 4
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
        table = stage_recipe(recipe, stage)
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
