"""The continuous denoiser: a light FLUX-like DiT that predicts the velocity of rectified flow (paper section 3.2).

Legend: B batch, C latent channels, S latent side, N = (S/2)^2 image tokens, E = 4 C token width.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from llava_genhancer.enhance.conditions import Condition
from llava_genhancer.enhance.objectives import rectified_flow_path, sample_t, velocity_loss
from llava_genhancer.enhance.targets import VaeTarget
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


class FlowDenoiser(nn.Module):
    """diffusers' ``FluxTransformer2DModel`` with t kept in fp32, and its training loss and ODE sampler.

    With the paper's recipe it has exactly the reference's 1 310 154 816 parameters.
    """

    def __init__(self, recipe: Recipe, latent_channels: int, latent_side: int):
        super().__init__()
        from diffusers import FluxTransformer2DModel

        self.t_sampling, self.t_scale, self.t_shift = recipe.t_sampling, recipe.t_scale, recipe.t_shift
        self.t_dtype = getattr(torch, recipe.t_dtype)
        self.guidance = recipe.guidance
        self.ode_steps = recipe.sample_ode_steps
        self.width = recipe.denoiser_heads * recipe.denoiser_head_dim
        self.token_shape = ((latent_side // 2) ** 2, latent_channels * 4)
        self.vec_dim, self.txt_dim = recipe.vec_dim, recipe.txt_dim
        self.transformer = FluxTransformer2DModel(
            in_channels=latent_channels * 4,
            num_layers=recipe.denoiser_layers,
            num_single_layers=recipe.denoiser_single_layers,
            attention_head_dim=recipe.denoiser_head_dim,
            num_attention_heads=recipe.denoiser_heads,
            joint_attention_dim=recipe.txt_dim,
            pooled_projection_dim=recipe.vec_dim,
            guidance_embeds=True,
            axes_dims_rope=recipe.denoiser_rope_axes,
        )
        if recipe.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self._t: Tensor | None = None
        self.transformer.time_text_embed.register_forward_pre_hook(self._restore_t)

    @classmethod
    def from_recipe(cls, recipe: Recipe, target: VaeTarget, image_size: int) -> FlowDenoiser:
        """The recipe's denoiser for the latents of an image of ``image_size`` pixels."""
        return cls(recipe, target.channels, target.latent_side(image_size))

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
            guidance=torch.full_like(t, self.guidance),
            img_ids=ids.flatten(0, 1),
            txt_ids=torch.zeros(txt.shape[1], 3, device=x_t.device),
            return_dict=False,
        )[0]

    def forward(
        self, target: Tensor, condition: Condition, noise: Tensor | None = None, t: Tensor | None = None
    ) -> Tensor:
        """Training loss, a scalar in fp32.

        Args:
            target: clean latents (B, C, S, S).
            condition: what the backbone saw.
            noise: standard normal tokens (B, N, E); drawn from the global RNG if absent.
            t: times (B,) in [0, 1]; drawn likewise.
        """
        clean = patchify(target)
        if t is None:
            t = sample_t(len(clean), self.t_sampling, self.t_scale, self.t_shift, device=clean.device)
        if noise is None:
            noise = torch.randn_like(clean, dtype=torch.float32)
        x_t, velocity = rectified_flow_path(clean, noise, t)
        return velocity_loss(self.velocity(x_t, t, condition), velocity)

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
