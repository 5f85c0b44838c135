"""S2 (arXiv 2403.13043): one image at several scales, cut into tiles the tower knows, features side by side.

Legend: B images, H = W their side, N = h * h tokens, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def multiscale(
    encode: Callable[[Tensor], Tensor], images: Tensor, sides: Sequence[int], max_tile: int, output: int = 0
) -> Tensor:
    """Features of every scale, on the token grid of one of them.

    Args:
        encode: images (B, 3, tile, tile) to tokens (B, N, D); no CLS among them.
        images: (B, 3, H, W).
        sides: the scales, in pixels.
        max_tile: a scale larger than this is cut into equal tiles no larger.
        output: index of the scale whose grid the others are pooled to.

    Returns:
        (B, N, D * number of scales).
    """
    grids = []
    for side in sides:
        tiles = math.ceil(side / max_tile)
        scaled = F.interpolate(images.float(), size=(side, side), mode="bicubic").to(images.dtype)
        grids.append(_merge(_grid(encode(_split(scaled, tiles))), tiles))
    size = grids[output].shape[-2:]
    pooled = [F.interpolate(grid.float(), size=size, mode="area").to(grid.dtype) for grid in grids]
    return torch.cat(pooled, dim=1).flatten(2).transpose(1, 2)


def resize_tokens(tokens: Tensor, number: int) -> Tensor:
    """A square grid of tokens (B, N, D), bilinearly to (B, number, D), ``number`` being square."""
    if tokens.shape[1] == number:
        return tokens
    side = int(number**0.5)
    grid = F.interpolate(_grid(tokens).float(), size=(side, side), mode="bilinear", align_corners=False)
    return grid.to(tokens.dtype).flatten(2).transpose(1, 2)


def _grid(tokens: Tensor) -> Tensor:
    side = int(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (side, side))  # (B, D, h, w)


def _split(images: Tensor, tiles: int) -> Tensor:
    """(B, C, H, W) to (tiles**2 * B, C, H / tiles, W / tiles), the tiles row by row."""
    rows = images.chunk(tiles, dim=2)
    return torch.cat([tile for row in rows for tile in row.chunk(tiles, dim=3)])


def _merge(grids: Tensor, tiles: int) -> Tensor:
    """The inverse of :func:`_split`."""
    pieces = grids.chunk(tiles * tiles)
    rows = [torch.cat(pieces[i * tiles : (i + 1) * tiles], dim=3) for i in range(tiles)]
    return torch.cat(rows, dim=2)
