"""Paths from data to noise and losses on what is predicted there, as pure functions: no network in here.

Rectified flow (paper section 3.2; SD3, arXiv 2403.03206) by FLUX's convention: t = 0 is clean, t = 1 is noise; Stable
Diffusion's discrete steps, of which 0 is the cleanest.

Legend: B batch, ... any data shape.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

TSampling = Literal["logit_normal", "uniform"]
Prediction = Literal["epsilon", "v_prediction"]


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


def velocity_loss(predicted: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error over everything, in fp32; of noise as well as of velocities."""
    return torch.nn.functional.mse_loss(predicted.float(), truth.float())


def diffusion_path(
    clean: Tensor, noise: Tensor, alphas_cumprod: Tensor, prediction: Prediction = "epsilon"
) -> tuple[Tensor, Tensor]:
    """Stable Diffusion's variance-preserving path (DDPM, arXiv 2006.11239; v: arXiv 2202.00512, appendix D).

    Args:
        clean: data (B, ...).
        noise: standard normal, same shape.
        alphas_cumprod: share of the signal's variance that is left, a (B,) in (0, 1).
        prediction: what the network gives.

    Returns:
        ``x_t = sqrt(a) clean + sqrt(1 - a) noise``, and what is predicted there: ``noise`` for "epsilon",
        ``sqrt(a) noise - sqrt(1 - a) clean`` for "v_prediction"; both (B, ...), fp32.
    """
    clean, noise = clean.float(), noise.float()
    a = alphas_cumprod.float().view(-1, *[1] * (clean.ndim - 1))
    signal, spread = a.sqrt(), (1 - a).sqrt()
    return signal * clean + spread * noise, noise if prediction == "epsilon" else signal * noise - spread * clean


def contrast_loss(anchors: Tensor, positives: list[Tensor], negatives: Tensor, temperature: float) -> Tensor:
    """InfoNCE between predictions (DCR, arXiv 2603.04803): what the own condition predicts against the others'.

    Each positive makes a loss of its own against all negatives; the mean over positives and batch is returned.

    Args:
        anchors: predictions at B noisy images (B, ...).
        positives: each (B, ...), what row i of the anchors should be like.
        negatives: (K, B, ...), K predictions at each noisy image that it should be unlike.
        temperature: of the cosines, above 0.
    """

    def unit(x: Tensor, keep: int) -> Tensor:
        return torch.nn.functional.normalize(x.float().flatten(keep), dim=-1)

    anchor = unit(anchors, 1)
    unlike = (anchor * unit(negatives, 2)).sum(-1).T  # (B, K)
    losses = []
    for positive in positives:
        like = (anchor * unit(positive, 1)).sum(-1, keepdim=True)
        losses.append(like[:, 0] / temperature - (torch.cat([like, unlike], 1) / temperature).logsumexp(1))
    return -torch.stack(losses).mean()
