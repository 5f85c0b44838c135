"""Which tensor of open_clip's layout is which of transformers', read in either direction.

open_clip's text tower is named here as in its CustomTextCLIP, below ``text.``; its plain CLIP class has the same
tensors without that prefix (:func:`with_text_prefix`, :func:`without_text_prefix`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from llava_genhancer.errors import InputError

_TEXT = ("text_projection", "positional_embedding", "token_embedding.", "transformer.", "ln_final.")


class Row(NamedTuple):
    """The same numbers under both layouts. One side may have them in several tensors, stacked along the first axis."""

    open_clip: tuple[str, ...]
    hf: tuple[str, ...]
    transposed: bool = False


def clip_rows(vision_layers: int, text_layers: int) -> Iterator[Row]:
    """All tensors of a CLIPModel and of an open_clip (or OpenAI) CLIP with a plain ViT."""
    vision = "vision_model."
    yield Row(("visual.class_embedding",), (f"{vision}embeddings.class_embedding",))
    yield Row(("visual.positional_embedding",), (f"{vision}embeddings.position_embedding.weight",))
    yield Row(("visual.conv1.weight",), (f"{vision}embeddings.patch_embedding.weight",))
    yield from _pairs("visual.ln_pre", f"{vision}pre_layrnorm")
    for i in range(vision_layers):
        yield from _block(f"visual.transformer.resblocks.{i}.", f"{vision}encoder.layers.{i}.", _OPEN_CLIP_BLOCK)
    yield from _pairs("visual.ln_post", f"{vision}post_layernorm")
    yield Row(("visual.proj",), ("visual_projection.weight",), transposed=True)
    yield from _text_rows(text_layers)
    yield Row(("text.text_projection",), ("text_projection.weight",), transposed=True)


def siglip_rows(vision_layers: int, text_layers: int) -> Iterator[Row]:
    """All tensors of a SiglipModel and of an open_clip SigLIP, whose trunk is a timm ViT with attention pooling."""
    trunk, vision = "visual.trunk.", "vision_model."
    yield Row((f"{trunk}pos_embed",), (f"{vision}embeddings.position_embedding.weight",))
    yield from _pairs(f"{trunk}patch_embed.proj", f"{vision}embeddings.patch_embedding")
    for i in range(vision_layers):
        yield from _block(f"{trunk}blocks.{i}.", f"{vision}encoder.layers.{i}.", _TIMM_BLOCK)
    yield from _pairs(f"{trunk}norm", f"{vision}post_layernorm")
    pool, head = f"{trunk}attn_pool.", f"{vision}head."
    yield Row((f"{pool}latent",), (f"{head}probe",))
    for kind in ("weight", "bias"):
        yield Row((f"{pool}q.{kind}", f"{pool}kv.{kind}"), (f"{head}attention.in_proj_{kind}",))
    yield from _pairs(f"{pool}proj", f"{head}attention.out_proj")
    yield from _pairs(f"{pool}norm", f"{head}layernorm")
    for layer in ("mlp.fc1", "mlp.fc2"):
        yield from _pairs(f"{pool}{layer}", f"{head}{layer}")
    yield from _text_rows(text_layers)
    yield from _pairs("text.text_projection", "text_model.head")
    yield Row(("logit_bias",), ("logit_bias",))


def to_hf(state: Mapping[str, Tensor], rows: Iterable[Row], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """open_clip's tensors under transformers' names, in the ``shapes`` that its model has.

    Raises:
        InputError: a tensor is missing, unknown or of another shape.
    """
    return _translate(state, ((r.open_clip, r.hf, r.transposed) for r in rows), shapes)


def to_open_clip(
    state: Mapping[str, Tensor], rows: Iterable[Row], shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """The inverse of :func:`to_hf`, bit for bit."""
    return _translate(state, ((r.hf, r.open_clip, r.transposed) for r in rows), shapes)


def with_text_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of open_clip's plain CLIP class (and OpenAI's) as those of its CustomTextCLIP; those already so stay."""
    return {f"text.{n}" if n.startswith(_TEXT) else n: v for n, v in state.items()}


def without_text_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`with_text_prefix`."""
    return {n.removeprefix("text."): v for n, v in state.items()}


def _text_rows(layers: int) -> Iterator[Row]:
    text = "text_model."
    yield Row(("text.token_embedding.weight",), (f"{text}embeddings.token_embedding.weight",))
    yield Row(("text.positional_embedding",), (f"{text}embeddings.position_embedding.weight",))
    for i in range(layers):
        yield from _block(f"text.transformer.resblocks.{i}.", f"{text}encoder.layers.{i}.", _OPEN_CLIP_BLOCK)
    yield from _pairs("text.ln_final", f"{text}final_layer_norm")
    yield Row(("logit_scale",), ("logit_scale",))


# open_clip's or timm's name of a block's fused projection, output projection, two norms and two MLP layers.
_OPEN_CLIP_BLOCK = ("attn.in_proj_", "attn.out_proj", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj")
_TIMM_BLOCK = ("attn.qkv.", "attn.proj", "norm1", "norm2", "mlp.fc1", "mlp.fc2")
_HF_BLOCK = ("self_attn.out_proj", "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")


def _block(theirs: str, hf: str, names: tuple[str, ...]) -> Iterator[Row]:
    fused, *layers = names
    for kind in ("weight", "bias"):
        yield Row((f"{theirs}{fused}{kind}",), tuple(f"{hf}self_attn.{p}_proj.{kind}" for p in "qkv"))
    for layer, name in zip(layers, _HF_BLOCK, strict=True):
        yield from _pairs(theirs + layer, hf + name)


def _pairs(theirs: str, hf: str) -> Iterator[Row]:
    for kind in ("weight", "bias"):
        yield Row((f"{theirs}.{kind}",), (f"{hf}.{kind}",))


def _translate(
    state: Mapping[str, Tensor],
    rows: Iterable[tuple[tuple[str, ...], tuple[str, ...], bool]],
    shapes: Mapping[str, torch.Size],
) -> dict[str, Tensor]:
    left, result = dict(state), {}
    for sources, targets, transposed in rows:
        if missing := [n for n in sources if n not in left]:
            raise InputError(f"the checkpoint has no {missing[0]}: it is incomplete, or not a plain ViT's")
        value = torch.cat([left.pop(n) for n in sources]) if len(sources) > 1 else left.pop(sources[0])
        value = value.T if transposed else value
        wanted = [shapes[n] for n in targets]
        if sum(s.numel() for s in wanted) != value.numel() or (len(wanted) == 1 and not _like(value.shape, wanted[0])):
            shape = " and ".join(str(tuple(s)) for s in wanted)
            raise InputError(f"{sources[0]} is {tuple(value.shape)} where its configuration says {shape}")
        parts = value.split([s[0] for s in wanted]) if len(wanted) > 1 else [value.reshape(wanted[0])]
        result.update({n: p.contiguous() for n, p in zip(targets, parts, strict=True)})
    if left:
        raise InputError(f"the checkpoint has {min(left)}, which the target model has no place for")
    return result


def _like(have: torch.Size, want: torch.Size) -> bool:
    """Equal but for leading axes of length one, which timm's and SigLIP's classes add or leave out."""
    return [n for n in have if n != 1] == [n for n in want if n != 1]
