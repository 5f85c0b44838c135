"""The whole stage-1 loss against a second implementation in plain torch, written from the papers' equations.

It shares nothing with the package but the names in the state dict: its own ViT, projector, rotary embedding, AdaLN,
joint attention and rectified flow, sample by sample and head by head where that is the plainer way to say it.

Legend: D width, L tokens of one sample, H heads.
"""

import math

import pytest
import torch
from torch import Tensor

from llava_genhancer import recipes
from llava_genhancer.enhance.stages import build_stage

State = dict[str, Tensor]


def linear(x: Tensor, state: State, name: str) -> Tensor:
    y = x @ state[f"{name}.weight"].T
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def normalise(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps)


def layer_norm(x: Tensor, state: State, name: str) -> Tensor:
    return normalise(x, 1e-5) * state[f"{name}.weight"] + state[f"{name}.bias"]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, prepare=lambda x, which: x) -> Tensor:
    """Softmax attention of one sample, (L, D); ``prepare`` sees each head's q ("q") and k ("k")."""
    outputs = []
    for q_h, k_h, v_h in zip(*(x.chunk(heads, dim=-1) for x in (q, k, v)), strict=True):
        scores = prepare(q_h, "q") @ prepare(k_h, "k").T / math.sqrt(q_h.shape[-1])
        weights = torch.exp(scores - scores.max(-1, keepdim=True).values)
        outputs.append(weights / weights.sum(-1, keepdim=True) @ v_h)
    return torch.cat(outputs, dim=-1)


# --- CLIP's ViT -----------------------------------------------------------------------------------------------------


def clip_token(image: Tensor, state: State, patch: int, layers: int, heads: int) -> Tensor:
    """A normalised image (3, S, S) to the projected class token (D,)."""
    vision = "backbone.vision_model"
    kernel = state[f"{vision}.embeddings.patch_embedding.weight"].flatten(1)
    side = image.shape[1] // patch
    tokens = [state[f"{vision}.embeddings.class_embedding"]]
    for row in range(side):
        for column in range(side):
            cut = image[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            tokens.append(kernel @ cut.flatten())
    x = torch.stack(tokens) + state[f"{vision}.embeddings.position_embedding.weight"]
    x = layer_norm(x, state, f"{vision}.pre_layrnorm")
    for i in range(layers):
        layer = f"{vision}.encoder.layers.{i}"
        h = layer_norm(x, state, f"{layer}.layer_norm1")
        q, k, v = (linear(h, state, f"{layer}.self_attn.{n}_proj") for n in "qkv")
        x = x + linear(attend(q, k, v, heads), state, f"{layer}.self_attn.out_proj")
        h = linear(layer_norm(x, state, f"{layer}.layer_norm2"), state, f"{layer}.mlp.fc1")
        x = x + linear(h * torch.sigmoid(1.702 * h), state, f"{layer}.mlp.fc2")
    return linear(layer_norm(x[0], state, f"{vision}.post_layernorm"), state, "backbone.visual_projection")


def projected(token: Tensor, state: State, head: str) -> Tensor:
    """LayerNorm, linear, exact GELU, linear."""
    h = linear(layer_norm(token, state, f"projector.{head}.0"), state, f"projector.{head}.1")
    return linear(h * 0.5 * (1 + torch.erf(h / math.sqrt(2))), state, f"projector.{head}.3")


# --- FLUX's DiT -----------------------------------------------------------------------------------------------------


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def sinusoid(value: float) -> Tensor:
    """256 numbers for 1000 times a scalar, cosines first."""
    angles = [1000 * value * 10_000 ** (-i / 128) for i in range(128)]
    return torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])


def embedded(x: Tensor, state: State, name: str) -> Tensor:
    return linear(silu(linear(x, state, f"{name}.linear_1")), state, f"{name}.linear_2")


def rotated(x: Tensor, positions: list[tuple[int, int, int]], axes: tuple[int, ...]) -> Tensor:
    """Rotary embedding of one head (L, head_dim): channel pairs as complex numbers, turned by position * frequency."""
    turns = []
    for position in positions:
        angles = [p * 10_000 ** (-2 * i / n) for p, n in zip(position, axes, strict=True) for i in range(n // 2)]
        turns.append(torch.tensor([complex(math.cos(a), math.sin(a)) for a in angles], dtype=torch.complex64))
    pairs = torch.view_as_complex(x.reshape(len(x), -1, 2))
    return torch.view_as_real(pairs * torch.stack(turns)).flatten(1)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * weight


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (1 + scale) * normalise(x, 1e-6) + shift


def dit_velocity(x_t: Tensor, t: float, vec: Tensor, txt: Tensor, state: State, recipe: recipes.Recipe) -> Tensor:
    """One sample's tokens (L, E) at time t to velocity tokens (L, E)."""
    net = "denoiser.transformer"
    heads, axes = recipe.denoiser_heads, recipe.denoiser_rope_axes
    side = math.isqrt(len(x_t))
    # One text token at the origin, then the grid.
    positions = [(0, 0, 0), *((0, row, column) for row in range(side) for column in range(side))]
    embed = f"{net}.time_text_embed"
    time = embedded(sinusoid(t), state, f"{embed}.timestep_embedder")
    guidance = embedded(sinusoid(recipe.guidance), state, f"{embed}.guidance_embedder")
    c = silu(time + guidance + embedded(vec, state, f"{embed}.text_embedder"))

    def prepare(block: str, texts: int):
        """QK norm (the text stream's own, in double blocks) and rotation of one head."""

        def norm_and_turn(x: Tensor, which: str) -> Tensor:
            image = rms(x[texts:], state[f"{block}.attn.norm_{which}.weight"])
            text = rms(x[:texts], state[f"{block}.attn.norm_added_{which}.weight"]) if texts else x[:0]
            return rotated(torch.cat([text, image]), positions, axes)

        return norm_and_turn

    img = linear(x_t, state, f"{net}.x_embedder")
    ctx = linear(txt, state, f"{net}.context_embedder")
    for i in range(recipe.denoiser_layers):
        block = f"{net}.transformer_blocks.{i}"
        m = linear(c, state, f"{block}.norm1.linear").chunk(6)
        n = linear(c, state, f"{block}.norm1_context.linear").chunk(6)
        h_img, h_ctx = modulated(img, m[0], m[1]), modulated(ctx, n[0], n[1])
        q, k, v = (
            torch.cat(
                [linear(h_ctx, state, f"{block}.attn.add_{x}_proj"), linear(h_img, state, f"{block}.attn.to_{x}")]
            )
            for x in "qkv"
        )
        mixed = attend(q, k, v, heads, prepare(block, len(ctx)))
        ctx = ctx + n[2] * linear(mixed[: len(ctx)], state, f"{block}.attn.to_add_out")
        img = img + m[2] * linear(mixed[len(ctx) :], state, f"{block}.attn.to_out.0")
        h = gelu_tanh(linear(modulated(img, m[3], m[4]), state, f"{block}.ff.net.0.proj"))
        img = img + m[5] * linear(h, state, f"{block}.ff.net.2")
        h = gelu_tanh(linear(modulated(ctx, n[3], n[4]), state, f"{block}.ff_context.net.0.proj"))
        ctx = ctx + n[5] * linear(h, state, f"{block}.ff_context.net.2")
    x = torch.cat([ctx, img])
    for i in range(recipe.denoiser_single_layers):
        block = f"{net}.single_transformer_blocks.{i}"
        shift, scale, gate = linear(c, state, f"{block}.norm.linear").chunk(3)
        h = modulated(x, shift, scale)
        q, k, v = (linear(h, state, f"{block}.attn.to_{n}") for n in "qkv")
        mixed = attend(q, k, v, heads, prepare(block, 0))
        both = torch.cat([mixed, gelu_tanh(linear(h, state, f"{block}.proj_mlp"))], dim=-1)
        x = x + gate * linear(both, state, f"{block}.proj_out")
    scale, shift = linear(c, state, f"{net}.norm_out.linear").chunk(2)  # diffusers stores scale first
    return linear(modulated(x[1:], shift, scale), state, f"{net}.proj_out")


def plain_loss(
    pixels: Tensor,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    state: State,
    recipe: recipes.Recipe,
    clip: dict[str, int],
) -> Tensor:
    errors = []
    for image, latent, eps, time in zip(pixels, latents, noise, t.tolist(), strict=True):
        token = clip_token(image, state, **clip)
        side = latent.shape[1] // 2
        clean = torch.stack(
            [latent[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].flatten() for r in range(side) for c in range(side)]
        )
        x_t = (1 - time) * clean + time * eps
        vec, txt = projected(token, state, "to_vec"), projected(token, state, "to_txt")
        errors.append((dit_velocity(x_t, time, vec, txt[None], state, recipe) - (eps - clean)) ** 2)
    return torch.stack(errors).mean()


@pytest.mark.parametrize("blocks", [(1, 1), (2, 3)])
def test_stage_1_loss_and_gradients(recipe_of, tiny_target, blocks: tuple[int, int]) -> None:
    recipe = recipe_of(denoiser_layers=blocks[0], denoiser_single_layers=blocks[1])
    enhancer = build_stage(recipe, 1, tiny_target).train()
    generator = torch.Generator().manual_seed(4)
    pixels = torch.randn(3, 3, 32, 32, generator=generator)
    latents = torch.randn(3, 8, 8, 8, generator=generator)
    noise = torch.randn(3, 16, 32, generator=generator)
    t = torch.tensor([0.03, 0.46, 0.91])
    with torch.no_grad():  # unit norms are at 1, biases near 0: move all, so that none could be left out unseen
        for parameter in enhancer.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)

    loss = enhancer(pixels, latents, draws={"noise": noise, "t": t})
    loss.backward()
    state = {n: p.detach().clone().requires_grad_(p.requires_grad) for n, p in enhancer.named_parameters()}
    config = {"patch": 8, "layers": 2, "heads": 1}
    expected = plain_loss(pixels, latents, noise, t, state, recipe, config)
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    learns = {n for n, p in enhancer.named_parameters() if p.requires_grad}
    assert learns == {n for n in state if n.startswith(("projector.", "denoiser."))}
    for name, parameter in enhancer.named_parameters():
        if name not in learns:
            assert parameter.grad is None
            continue
        assert parameter.grad is not None
        assert state[name].grad is not None
        difference = (parameter.grad - state[name].grad).norm() / state[name].grad.norm()
        assert difference < 1e-3, f"{name}: {difference:.1e}"  # fp32: some are sums that nearly cancel
