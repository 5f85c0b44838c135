"""From the backbone's global token to what the denoiser is told.

Legend: B batch, D width of the global token, L condition tokens.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class Condition(NamedTuple):
    """What a denoiser reads: ``vec`` (B, vec_dim) modulates its blocks, ``txt`` (B, L, txt_dim) joins its attention."""

    vec: Tensor
    txt: Tensor


def _head(token_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(token_dim), nn.Linear(token_dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim))


class ClsProjector(nn.Module):
    """The global token alone (the paper's choice, Fig. 5): one head to ``vec``, one to a single ``txt`` token."""

    def __init__(self, token_dim: int, vec_dim: int, txt_dim: int):
        super().__init__()
        self.to_vec = _head(token_dim, vec_dim)
        self.to_txt = _head(token_dim, txt_dim)

    def forward(self, token: Tensor) -> Condition:
        """Global tokens (B, D) to a condition with L = 1."""
        return Condition(self.to_vec(token), self.to_txt(token)[:, None])


PROJECTORS = {"cls": ClsProjector}
