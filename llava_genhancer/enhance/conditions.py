"""From the backbone's tokens to what the denoiser is told (paper section 3.1, Fig. 5).

Legend: B batch, N local tokens, n those of them that are told, D width of a token, L = 1 + n condition tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llava_genhancer.recipes import Recipe


class Condition(NamedTuple):
    """What a denoiser reads; None where the recipe's ``condition_into`` leaves a way out.

    ``vec`` (B, vec_dim) modulates its blocks, ``txt`` (B, L, txt_dim) joins its attention.
    """

    vec: Tensor | None
    txt: Tensor | None

    @property
    def batch(self) -> int:
        """Number of images told."""
        told = self.txt if self.vec is None else self.vec
        assert told is not None
        return len(told)

    def roll(self, places: int) -> Condition:
        """Each image's condition given to the one ``places`` after it."""
        return Condition(*(None if told is None else told.roll(places, 0) for told in self))


def _mlp(token_dim: int, out_dim: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(token_dim), nn.Linear(token_dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim))


HEADS: dict[str, Callable[[int, int], nn.Module]] = {"mlp": _mlp, "linear": nn.Linear}


class Projector(nn.Module):
    """Chooses tokens and projects them: one head makes ``vec`` of the global token, one makes ``txt`` of every token.

    The paper's choice is the global token alone into both.
    """

    def __init__(self, recipe: Recipe, token_dim: int):
        super().__init__()
        self.condition = recipe.condition
        self.ratio, self.count, self.replacement = recipe.local_ratio, recipe.local_count, recipe.local_replacement
        head = HEADS[recipe.projector]
        self.to_vec = head(token_dim, recipe.vec_dim) if recipe.condition_into in ("vec", "both") else None
        self.to_txt = head(token_dim, recipe.txt_dim) if recipe.condition_into in ("txt", "both") else None

    @property
    def needs_locals(self) -> bool:
        """Whether the local tokens must be computed at all."""
        return self.condition != "cls"

    def forward(self, tokens: Tensor) -> Condition:
        """Tokens (B, 1 + N, D), the global one first, to a condition of L tokens."""
        chosen = self.choose(tokens)
        return Condition(
            None if self.to_vec is None else self.to_vec(chosen[:, 0]),
            None if self.to_txt is None else self.to_txt(chosen),
        )

    def choose(self, tokens: Tensor) -> Tensor:
        """The tokens that are told (B, L, D); a random choice of locals in training, an even one otherwise."""
        if self.condition == "cls":
            return tokens[:, :1]
        first, local = tokens[:, :1], tokens[:, 1:]
        if self.condition == "pooled":
            return torch.cat([first, local.mean(1, keepdim=True)], 1)
        b, n, _ = local.shape
        count = self.count if self.count is not None else round(self.ratio * n)
        if count >= n and not self.replacement:
            return tokens
        if not self.training:
            index = torch.linspace(0, n - 1, count, device=local.device).round().long().expand(b, count)
        elif self.replacement:
            index = torch.randint(n, (b, count), device=local.device)
        else:
            index = torch.rand(b, n, device=local.device).argsort(1)[:, :count]
        return torch.cat([first, local.gather(1, index[..., None].expand(-1, -1, local.shape[-1]))], 1)
