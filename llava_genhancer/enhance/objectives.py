"""Rectified flow as pure functions (paper section 3.2; SD3, arXiv 2403.03206): no network in here.

Legend: B batch, ... any data shape. Convention of FLUX: t = 0 is clean, t = 1 is noise.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

TSampling = Literal["logit_normal", "uniform"]


def sample_t(
    batch: int,
    sampling: TSampling = "logit_normal",
    scale: float = 1.0,
    shift: float = 0.0,
    *,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Times (B,) in (0, 1), fp32: uniform, or sigmoid(scale * eps + shift) with eps ~ N(0, 1) (Table 4, Fig. 7)."""
    if sampling == "uniform":
        return torch.rand(batch, device=device, generator=generator)
    eps = torch.randn(batch, device=device, generator=generator)
    return torch.sigmoid(scale * eps + shift)


def t_density(t: Tensor, sampling: TSampling = "logit_normal", scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """The density of :func:`sample_t` at times t in (0, 1), any shape."""
    if sampling == "uniform":
        return torch.ones_like(t)
    z = (torch.logit(t) - shift) / scale
    return torch.exp(-0.5 * z**2) / (scale * math.sqrt(2 * math.pi) * t * (1 - t))


def rectified_flow_path(clean: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The straight path between data and noise.

    Args:
        clean: data (B, ...).
        noise: standard normal, same shape.
        t: times (B,) in [0, 1].

    Returns:
        ``x_t = (1 - t) clean + t noise`` and its velocity ``noise - clean``, both (B, ...), fp32.
    """
    clean, noise = clean.float(), noise.float()
    t = t.float().view(-1, *[1] * (clean.ndim - 1))
    return (1 - t) * clean + t * noise, noise - clean


def velocity_loss(predicted: Tensor, velocity: Tensor) -> Tensor:
    """Mean squared error over everything, in fp32."""
    return torch.nn.functional.mse_loss(predicted.float(), velocity.float())
