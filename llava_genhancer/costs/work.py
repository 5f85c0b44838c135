"""Parameters, and FLOPs per image. A multiply-add counts as two, as in ``torch.utils.flop_counter``.

Norms, activations and softmax count as none, as there.

Legend: d width, m width of the MLP, n image tokens, t tokens of a tower, e = 4 C width of a latent token.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from llava_genhancer.costs.facts import FLUX_VAE, Backbone, Vae, Work
from llava_genhancer.recipes import Recipe

Mode = Literal["forward", "train", "frozen"]


def _linear(inputs: int, outputs: int, bias: bool = True) -> int:
    return inputs * outputs + bias * outputs


def denoiser_parameters(recipe: Recipe, vae: Vae = FLUX_VAE, image_size: int = 224) -> int:
    """Parameters of the denoiser; 1 310 154 816 with the paper's recipe (Table 5: 2 + 4 blocks).

    Args:
        image_size: side of what the target tokenizer sees; the masked denoiser has an embedding per position.
    """
    return denoiser_work(recipe, image_size, vae).parameters


def denoiser_work(recipe: Recipe, image_size: int, vae: Vae, text: int = 1) -> Work:
    """What the recipe's denoiser costs; ``text`` counts its condition tokens."""
    counts = {"flow": _flow_work, "masked": _masked_work, "unet": _unet_work}
    return counts[recipe.denoiser](recipe, image_size, vae, text)


def _unet_work(recipe: Recipe, image_size: int, vae: Vae, text: int) -> Work:
    from llava_genhancer.costs.counting import count_unet

    # One token moves all 77 states of the empty prompt; any other number stands in their place.
    return count_unet(recipe.denoiser_weights or "", image_size // vae.downscale, 77 if text == 1 else text)


def _masked_work(recipe: Recipe, image_size: int, vae: Vae, text: int) -> Work:
    d, n = recipe.denoiser_heads * recipe.denoiser_head_dim, (image_size // vae.downscale) ** 2
    layer = 4 * d + 3 * d * d + _linear(d, d) + _linear(d, 4 * d) + _linear(4 * d, d)
    positions = n * d if recipe.masked_positions == "learned" else 0
    ends = (vae.codes + 1) * d + positions + 4 * d + _linear(d, vae.codes)
    depth = recipe.denoiser_layers
    return Work(
        width=d,
        parameters=depth * layer + ends,
        linear=depth * d * d * (10 * n + 2 * (n + text)) + n * d * vae.codes,
        attention=depth * 2 * n * (n + text) * d,
    )


def _flow_work(recipe: Recipe, image_size: int, vae: Vae, text: int) -> Work:
    head = recipe.denoiser_head_dim
    d, e = recipe.denoiser_heads * head, 4 * vae.latent_channels
    conditioning = 2 * (_linear(256, d) + _linear(d, d)) + _linear(recipe.vec_dim, d) + _linear(d, d)
    stream = _linear(d, 6 * d) + 4 * _linear(d, d) + 2 * head + _linear(d, 4 * d) + _linear(4 * d, d)
    single = _linear(d, 3 * d) + 3 * _linear(d, d) + 2 * head + _linear(d, 4 * d) + _linear(5 * d, d)
    blocks = recipe.denoiser_layers * 2 * stream + recipe.denoiser_single_layers * single
    ends = _linear(e, d) + _linear(recipe.txt_dim, d) + _linear(d, 2 * d) + _linear(d, e)
    n = (image_size // vae.downscale // 2) ** 2
    double, lone = recipe.denoiser_layers, recipe.denoiser_single_layers
    per_image = 2 * (256 * d + d * d) + recipe.vec_dim * d + d * d + double * 12 * d * d + lone * 3 * d * d
    per_image += 2 * d * d + text * recipe.txt_dim * d + 2 * n * e * d
    return Work(
        width=d,
        parameters=conditioning + blocks + ends,
        linear=per_image + (double + lone) * 12 * d * d * (n + text),
        attention=(double + lone) * 2 * (n + text) ** 2 * d,
    )


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


def trained_parameters(recipe: Recipe, stage: int, backbone: Backbone, vae: Vae = FLUX_VAE) -> int:
    """Parameters that learn in a stage."""
    sizes = {
        "backbone": lora_parameters(recipe, backbone),
        "projector": projector_parameters(recipe, backbone),
        "denoiser": denoiser_parameters(recipe, vae, target_size(recipe, backbone)),
    }
    return sum(sizes[part] for part in recipe.stage(stage).trains)


def engine_parameters(recipe: Recipe, stage: int, backbone: Backbone, vae: Vae = FLUX_VAE) -> int:
    """All parameters of the model that the engine holds in a stage, frozen ones included, the VAE not."""
    denoiser = denoiser_parameters(recipe, vae, target_size(recipe, backbone))
    towers = vision_parameters(backbone)
    if recipe.lora_scope == "all":
        towers = full_model_parameters(backbone)
    adapted = any("backbone" in recipe.stage(s).trains for s in range(1, stage + 1)) and recipe.lora_rank > 0
    # The biases that LoRA trains are the tower's own; only the pairs come on top.
    adapters = lora_parameters(dataclasses.replace(recipe, lora_bias="none"), backbone) if adapted else 0
    return towers + adapters + projector_parameters(recipe, backbone) + denoiser


def vae_parameters(vae: Vae = FLUX_VAE) -> int:
    """Parameters of the whole VAE or VQ-GAN; the decoder, used for pictures only, is loaded too."""
    c, n = vae.channels, vae.layers_per_block

    def conv(a: int, b: int, k: int = 3) -> int:
        return a * b * k * k + b

    def resnet(a: int, b: int) -> int:
        return 2 * a + conv(a, b) + 2 * b + conv(b, b) + (conv(a, b, 1) if a != b else 0)

    middle = 2 * resnet(c[-1], c[-1]) + (vae.mid_attention * (2 * c[-1] + 4 * _linear(c[-1], c[-1])))
    attended = vae.lowest_attention * (2 * c[-1] + 4 * _linear(c[-1], c[-1]))
    encoder = conv(3, c[0]) + middle + 2 * c[-1] + conv(c[-1], (1 if vae.codes else 2) * vae.latent_channels)
    encoder += n * attended
    decoder = conv(vae.latent_channels, c[-1]) + middle + 2 * c[0] + conv(c[0], 3)
    for i, out in enumerate(c):
        encoder += resnet(c[max(i - 1, 0)], out) + (n - 1) * resnet(out, out)
        encoder += conv(out, out) if i < len(c) - 1 else 0
    for i, out in enumerate(reversed(c)):
        decoder += resnet(c[min(len(c) - i, len(c) - 1)], out) + n * resnet(out, out)
        decoder += conv(out, out) if i < len(c) - 1 else 0
    latent = vae.latent_channels
    if vae.codes:
        quantizer = conv(latent, vae.code_dim, 1) + vae.codes * vae.code_dim + conv(vae.code_dim, latent, 1)
        return encoder + decoder + (n + 1) * attended + quantizer
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
    """FLOPs of the denoiser for one image.

    The paper's DiT at 224 px: 271.5 G forward, 814.5 G trained, 545.8 G frozen but differentiated.

    Args:
        image_size: side of what the target tokenizer sees.
        text: condition tokens in joint attention.
    """
    work = denoiser_work(recipe, image_size, vae, text)
    return _passes(2 * work.linear, 2 * work.attention, mode)


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
    total += 2 * resnet(c[-1], c[-1]) + 9 * c[-1] * (1 if vae.codes else 2) * vae.latent_channels * side**2
    attentions = vae.mid_attention + n * vae.lowest_attention
    total += attentions * (4 * c[-1] ** 2 * side**2 + 2 * side**4 * c[-1])
    if vae.codes:  # into the codes' width, and the distance to every code
        return 2 * (total + side**2 * vae.code_dim * (vae.latent_channels + vae.codes))
    return 2 * total + vae.quant_conv * 2 * (2 * vae.latent_channels) ** 2 * side**2


def denoiser_passes(recipe: Recipe) -> int:
    """Passes of the denoiser over each image in a step: one per draw, or DCR's under every condition of the batch."""
    return recipe.per_device_batch_size + 1 if recipe.objective == "contrast" else recipe.draws_per_image


def step_flops(recipe: Recipe, stage: int, backbone: Backbone, vae: Vae = FLUX_VAE) -> dict[str, float]:
    """FLOPs of one image in a training step, by part; the denoiser's part holds the projector.

    With ``cache_crops`` what the cache holds costs none: see :func:`llava_genhancer.costs.fill_flops` for filling it.
    """
    trains = recipe.stage(stage).trains
    size = target_size(recipe, backbone)
    through = "backbone" in trains
    lora = through and recipe.lora_rank > 0

    def mode(part: str) -> Mode:
        # A frozen projector or denoiser passes gradients on only to what learns before it.
        upstream = through or (part == "denoiser" and "projector" in trains)
        return "train" if part in trains else "frozen" if upstream else "forward"

    views = 2 if recipe.objective == "contrast" else 1
    told = views * recipe.draws_per_image
    denoiser = denoiser_flops(recipe, size, vae, mode("denoiser"), text=condition_tokens(recipe, backbone))
    eye: Mode = "forward" if not through else "frozen" if lora else "train"
    seen = recipe.cache_crops > 0 and recipe.frozen_backbone(stage)
    return {
        "target encoding": 0.0 if recipe.cache_crops else vae_encoder_flops(size, vae),
        "backbone": 0.0 if seen else views * backbone_flops(recipe, backbone, eye, lora=lora),
        "denoiser": denoiser_passes(recipe) * denoiser + told * projector_flops(recipe, backbone, mode("projector")),
    }


def target_size(recipe: Recipe, backbone: Backbone) -> int:
    """Side of the image that the target tokenizer sees, in pixels."""
    return recipe.target_size or recipe.image_size or backbone.image_size


def total_flops(recipe: Recipe, stage: int, backbone: Backbone, vae: Vae = FLUX_VAE) -> float:
    """FLOPs of a whole stage over all devices."""
    images = recipe.stage(stage).max_steps * recipe.global_batch_size
    return images * sum(step_flops(recipe, stage, backbone, vae).values())
