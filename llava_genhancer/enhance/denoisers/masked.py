"""The discrete denoiser: a light Perceiver that fills in masked tokens of a VQ-GAN (paper section 3.2, Tables 5, 6, 8).

Legend: B batch, N tokens of an image, V codes, D width, L condition tokens.

The paper gives its queries (the unmasked tokens), its keys and values (the unmasked tokens and the projected global
token), its depth and its loss; no code was released. What else it takes is ours and said where it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llava_genhancer.enhance.conditions import Condition
from llava_genhancer.enhance.vq import VqTarget
from llava_genhancer.recipes import Recipe

INITIAL = 0.02  # standard deviation of tokens and positions before training


def draw_masks(batch: int, tokens: int, ratio: tuple[float, float], device: torch.device | None = None) -> Tensor:
    """Random masks (B, N), true where hidden: per image, a share drawn uniformly from ``ratio``, one token at least.

    The paper says what is drawn and not how often; a share per image (ours) lets one batch see the whole range.
    """
    low, high = ratio
    share = low + (high - low) * torch.rand(batch, 1, device=device)
    return rank(torch.rand(batch, tokens, device=device)) < (share * tokens).round().clamp(min=1)


def rank(values: Tensor) -> Tensor:
    """The place of each value (B, N) in its row's ascending order, from 0."""
    return values.argsort(1).argsort(1)


class Learned(nn.Module):
    """Adds a learned embedding of each position."""

    def __init__(self, side: int, width: int):
        super().__init__()
        self.table = nn.Embedding(side**2, width)
        nn.init.normal_(self.table.weight, std=INITIAL)

    def forward(self, x: Tensor) -> Tensor:
        """States (B, N, D), moved by where they are."""
        return x + self.table(torch.arange(x.shape[1], device=x.device))


class Sincos(nn.Module):
    """Adds fixed waves, as large as tokens begin: sines and cosines of the row, then of the column."""

    def __init__(self, side: int, width: int):
        super().__init__()
        rates = 10_000 ** (-torch.arange(width // 4) / (width // 4))
        angles = torch.arange(side)[:, None] * rates  # (S, D / 4)
        waves = 2**0.5 * INITIAL * torch.cat([angles.sin(), angles.cos()], 1)
        rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
        self.register_buffer("table", torch.cat([rows, columns], -1).flatten(0, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """States (B, N, D), moved by where they are."""
        return x + self.table.to(x.dtype)  # type: ignore[operator]


# How states are moved by where they are, by a recipe's ``masked_positions``.
POSITIONS: dict[str, Callable[[int, int], nn.Module]] = {"learned": Learned, "sincos": Sincos}


class Layer(nn.Module):
    """Pre-norm attention of every position to the unmasked ones and the condition, then an MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, told: Tensor, seen: Tensor) -> Tensor:
        """States x (B, N, D), condition (B, L, D), what may be attended to (B, 1, 1, N + L); returns (B, N, D)."""
        normed = self.norm_attention(x)
        keys, values = self.to_kv(torch.cat([normed, told.to(normed.dtype)], 1)).chunk(2, -1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.to_q(normed), keys, values))
        x = x + self.to_out(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


class MaskedDenoiser(nn.Module):
    """Scores of the masked tokens from the unmasked ones and the condition, the training loss, and a sampler.

    Masked positions are queries too (ours): a learned mask token plus the position, which attends to everything known
    and to which nothing attends. So the unmasked tokens and the condition run as in the paper, what reads the masked
    positions out needs no module of its own, and shapes stay fixed whatever is masked.
    """

    def __init__(self, recipe: Recipe, codes: int, side: int):
        super().__init__()
        self.mask_ratio, self.readout = recipe.mask_ratio, recipe.masked_readout
        self.steps, self.temperature = recipe.sample_ode_steps, recipe.unmask_temperature
        self.recompute = recipe.gradient_checkpointing
        self.codes, self.tokens = codes, side**2
        self.width = recipe.denoiser_heads * recipe.denoiser_head_dim
        # Every parameter lives in a submodule: a sharding engine gathers it there, whoever calls.
        self.token = nn.Embedding(codes + 1, self.width)  # the last one is the mask
        self.position = POSITIONS[recipe.masked_positions](side, self.width)
        self.norm_told = nn.LayerNorm(self.width)
        self.layers = nn.ModuleList(Layer(self.width, recipe.denoiser_heads) for _ in range(recipe.denoiser_layers))
        self.norm_out = nn.LayerNorm(self.width)
        self.to_logits = nn.Linear(self.width, codes)
        nn.init.normal_(self.token.weight, std=INITIAL)

    @classmethod
    def from_recipe(cls, recipe: Recipe, target: VqTarget, image_size: int) -> MaskedDenoiser:
        """The recipe's denoiser for the tokens of an image of ``image_size`` pixels."""
        return cls(recipe, target.codes, target.token_side(image_size))

    def logits(self, ids: Tensor, masked: Tensor, condition: Condition) -> Tensor:
        """Scores of every code at every position (B, N, V).

        Args:
            ids: tokens (B, N) in [0, V); what stands at masked positions does not matter.
            masked: true where a token is hidden (B, N).
            condition: what the backbone saw, as ``txt`` (B, L, D).
        """
        assert condition.txt is not None
        queries = self.position(self.token(ids.masked_fill(masked, self.codes)))
        told = self.norm_told(condition.txt)
        seen = torch.cat([~masked, masked.new_ones(told.shape[:2])], 1)[:, None, None]
        x = queries
        for number, layer in enumerate(self.layers, start=1):
            if number == len(self.layers) and self.readout == "last":
                x = torch.where(masked[..., None], queries, x)
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, told, seen, use_reentrant=False)
            else:
                x = layer(x, told, seen)
        return self.to_logits(self.norm_out(x))

    def forward(self, target: Tensor, condition: Condition, masked: Tensor | None = None) -> Tensor:
        """Training loss, a scalar in fp32: the cross-entropy of an image's masked tokens, averaged over images.

        Every image weighs the same whatever its share of masked tokens, so that a batch may be split over ranks and
        micro-batches without changing its loss (ours).

        Args:
            target: token ids (B, N).
            condition: what the backbone saw.
            masked: true where a token is hidden (B, N), at least one per image; drawn from the global RNG if absent.
        """
        if masked is None:
            masked = draw_masks(len(target), self.tokens, self.mask_ratio, target.device)
        scores = self.logits(target, masked, condition).float().flatten(0, 1)
        losses = F.cross_entropy(scores, target.flatten(), reduction="none").view_as(masked)
        return ((losses * masked).sum(1) / masked.sum(1)).mean()

    @torch.no_grad()
    def sample(self, condition: Condition, generator: torch.Generator | None = None) -> Tensor:
        """Token ids (B, N) rebuilt from the condition: iterative unmasking (MaskGIT, arXiv 2202.04200, section 3.2).

        Each step draws all masked tokens and keeps the most likely ones, with noise that fades; how many stay masked
        follows a cosine from all to none.
        """
        assert condition.txt is not None
        device, shape = condition.txt.device, (len(condition.txt), self.tokens)
        ids = torch.zeros(shape, dtype=torch.long, device=device)
        masked = torch.ones(shape, dtype=torch.bool, device=device)
        for step in range(1, self.steps + 1):
            chances = self.logits(ids, masked, condition).float().softmax(-1)
            uniform, noise = (torch.rand(shape, generator=generator).to(device) for _ in range(2))
            drawn = torch.searchsorted(chances.cumsum(-1), uniform[..., None]).clamp(max=self.codes - 1)
            ids = torch.where(masked, drawn[..., 0], ids)
            fading = self.temperature * (1 - step / self.steps)
            confidence = chances.gather(-1, drawn)[..., 0].log() - fading * (-noise.log()).log()  # Gumbel noise
            hidden = int(self.tokens * math.cos(math.pi / 2 * step / self.steps))
            masked = rank(confidence.masked_fill(~masked, math.inf)) < hidden
        return ids
