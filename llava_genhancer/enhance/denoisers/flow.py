"""The continuous denoiser: FLUX's DiT, light or pretrained, predicts the velocity of rectified flow (section 3.2).

Legend: B batch, C latent channels, S latent side, N = (S/2)^2 image tokens, E = 4 C token width.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from llava_genhancer.architectures import FLUX_CONFIG
from llava_genhancer.enhance.conditions import Condition
from llava_genhancer.enhance.denoisers.continuous import ContinuousDenoiser
from llava_genhancer.enhance.objectives import rectified_flow_path, sample_t
from llava_genhancer.enhance.pretrained import load_pretrained
from llava_genhancer.enhance.targets import VaeTarget
from llava_genhancer.errors import InputError
from llava_genhancer.recipes import Recipe


def patchify(latents: Tensor) -> Tensor:
    """Latents (B, C, S, S) to tokens (B, N, E): each token a 2x2 patch, channels outermost as FLUX packs them."""
    b, c, h, w = latents.shape
    return latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)


def unpatchify(tokens: Tensor) -> Tensor:
    """The inverse of :func:`patchify` for a square grid."""
    b, n, e = tokens.shape
    side = round(n**0.5)
    return tokens.reshape(b, side, side, e // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, e // 4, side * 2, side * 2)


# Recipe fields that a pretrained transformer's config states too.
FLUX_FACTS = {
    "denoiser_layers": "num_layers",
    "denoiser_single_layers": "num_single_layers",
    "denoiser_heads": "num_attention_heads",
    "denoiser_head_dim": "attention_head_dim",
    "denoiser_rope_axes": "axes_dims_rope",
    "vec_dim": "pooled_projection_dim",
    "txt_dim": "joint_attention_dim",
}


class FlowDenoiser(ContinuousDenoiser):
    """diffusers' ``FluxTransformer2DModel`` with t kept in fp32, and its training loss and ODE sampler.

    With the paper's recipe it has exactly the reference's 1 310 154 816 parameters.

    Args:
        transformer: a pretrained one; none = the recipe's, of random weights.
    """

    def __init__(self, recipe: Recipe, latent_channels: int, latent_side: int, transformer: Any = None):
        super().__init__(recipe)
        self.t_sampling, self.t_scale, self.t_shift = recipe.t_sampling, recipe.t_scale, recipe.t_shift
        self.t_dtype = getattr(torch, recipe.t_dtype)
        self.guidance = recipe.guidance
        self.ode_steps = recipe.sample_ode_steps
        self.width = recipe.denoiser_heads * recipe.denoiser_head_dim
        self.token_shape = ((latent_side // 2) ** 2, latent_channels * 4)
        self.vec_dim, self.txt_dim = recipe.vec_dim, recipe.txt_dim
        self.transformer = new_transformer(recipe, latent_channels) if transformer is None else transformer
        if recipe.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self._t: Tensor | None = None
        self.transformer.time_text_embed.register_forward_pre_hook(self._restore_t)

    @classmethod
    def from_recipe(cls, recipe: Recipe, target: VaeTarget, image_size: int) -> FlowDenoiser:
        """The recipe's denoiser for the latents of an image of ``image_size`` pixels.

        Raises:
            InputError: the pretrained one cannot be loaded, or is made for another VAE.
        """
        transformer = None if recipe.denoiser_weights is None else load_flux(recipe)
        if transformer is not None and transformer.config.in_channels != target.channels * 4:
            raise InputError(
                f"denoiser_weights {recipe.denoiser_weights} rebuilds latents of "
                f"{transformer.config.in_channels // 4} channels, and vae {recipe.vae} gives {target.channels}"
            )
        return cls(recipe, target.channels, target.latent_side(image_size), transformer)

    def pack(self, latents: Tensor) -> Tensor:
        """Tokens (B, N, E)."""
        return patchify(latents)

    def sample_t(self, batch: int, device: torch.device) -> Tensor:
        """Times (B,) in (0, 1)."""
        return sample_t(batch, self.t_sampling, self.t_scale, self.t_shift, device=device)

    def path(self, clean: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The straight path and its velocity."""
        return rectified_flow_path(clean, noise, t)

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The velocity."""
        return self.velocity(x_t, t, condition)

    def _restore_t(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Undo the transformer's rounding of t to the activations' dtype before the sinusoid of 1000 t."""
        assert self._t is not None
        return (self._t.to(self.t_dtype) * 1000, *inputs[1:])

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predicted velocity (B, N, E) at tokens x_t (B, N, E) and times t (B,) in [0, 1]."""
        side = round(x_t.shape[1] ** 0.5)
        dtype = self.transformer.dtype
        # A way that the condition does not take carries zeros: the transformer's own biases stand in.
        vec = x_t.new_zeros(len(x_t), self.vec_dim) if condition.vec is None else condition.vec
        txt = x_t.new_zeros(len(x_t), 1, self.txt_dim) if condition.txt is None else condition.txt
        rows = torch.arange(side, device=x_t.device)
        ids = torch.zeros(side, side, 3, device=x_t.device)
        ids[..., 1], ids[..., 2] = rows[:, None], rows[None, :]
        self._t = t
        return self.transformer(
            hidden_states=x_t.to(dtype),
            encoder_hidden_states=txt.to(dtype),
            pooled_projections=vec.to(dtype),
            timestep=t,
            guidance=torch.full_like(t, self.guidance) if self.transformer.config.guidance_embeds else None,
            img_ids=ids.flatten(0, 1),
            txt_ids=torch.zeros(txt.shape[1], 3, device=x_t.device),
            return_dict=False,
        )[0]

    @torch.no_grad()
    def sample(self, condition: Condition, generator: torch.Generator | None = None) -> Tensor:
        """Latents (B, C, S, S) rebuilt from the condition: Euler steps from noise (t = 1) to data (t = 0)."""
        told = condition.txt if condition.vec is None else condition.vec
        assert told is not None
        device, (n, e) = told.device, self.token_shape
        x = torch.randn(len(told), n, e, generator=generator).to(device)
        times = torch.linspace(1, 0, self.ode_steps + 1, device=device)
        for now, after in pairwise(times):
            x = x + (after - now) * self.velocity(x, now.expand(len(x)), condition).float()
        return unpatchify(x)


def new_transformer(recipe: Recipe, latent_channels: int) -> Any:
    """The recipe's light transformer with random weights from the global RNG."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=latent_channels * 4,
        guidance_embeds=True,
        **{ours: getattr(recipe, name) for name, ours in FLUX_FACTS.items()},
    )


def load_flux(recipe: Recipe) -> Any:
    """The recipe's pretrained transformer: a FLUX.1 folder or hub id, or BFL's single file ``flux1-dev.safetensors``.

    Its config must say what the recipe says, so that costs, manifests and the condition's heads are true.

    Raises:
        InputError: nothing loadable there, or another size.
    """
    from diffusers import FluxTransformer2DModel

    config = {ours: getattr(recipe, name) for name, ours in FLUX_FACTS.items()}
    transformer = load_pretrained(FluxTransformer2DModel, recipe, "transformer", FLUX_CONFIG)
    changes = [
        f"--{name} {str(there).strip('()[]').replace(' ', '')}"
        for name, key in FLUX_FACTS.items()
        if (there := plain(transformer.config[key])) != plain(config[key])
    ]
    if changes:
        raise InputError(f"denoiser_weights {recipe.denoiser_weights} has another size: add {' '.join(changes)}")
    return transformer


def plain(value: Any) -> Any:
    """A config's value, lists as the tuples they were."""
    return tuple(value) if isinstance(value, list) else value
