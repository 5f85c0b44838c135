"""Samples behind each other in one row, each seeing only itself.

transformers keeps packed samples apart wherever positions restart: flash-attention by its kernel for ragged batches,
torch's attention by a mask over the whole row, whose work grows with the square of the batch. The latter is called once
per sample here instead: the same result for the work of the samples alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llava_genhancer.errors import InputError

BY_SAMPLE = "sdpa_by_sample"


def packed(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """What a decoder of transformers is told of a row that holds samples of ``lengths`` tokens."""
    ends = torch.tensor([0, *lengths]).cumsum(0)
    position_ids = torch.arange(int(ends[-1])) - ends[:-1].repeat_interleave(torch.tensor(lengths))
    bounds, longest = ends.to(device, torch.int32), max(lengths)
    return {
        "position_ids": position_ids[None].to(device),
        # Flash-attention would find these from the positions, with a sync in every layer.
        **{"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest},
        "sample_lengths": list(lengths),
    }


def attend_by_sample(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sample_lengths: list[int],
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sample: (1, heads, L, d) to (1, L, heads, d)."""
    parts = zip(*(x.split(sample_lengths, dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *part, None, **kwargs)[0] for part in parts], dim=1), None


def packed_attention(name: str, config: Any, max_length: int) -> str:
    """The attention that takes packed rows in place of ``name``.

    Args:
        config: the language model's.

    Raises:
        InputError: the language model looks back less far than a sample is long, which torch's attention learns from
            the mask alone.
    """
    if name != "sdpa":
        return name
    window = getattr(config, "sliding_window", None)
    if window is not None and window < max_length:
        raise InputError(
            f"packing: the language model looks back {window} tokens only, and max_length={max_length} is more: use "
            f"--attention flash_attention_2 or eager, or --max_length {window}, or do not pack"
        )
    AttentionInterface.register(BY_SAMPLE, attend_by_sample)
    return BY_SAMPLE
