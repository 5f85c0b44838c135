"""The command ``convert``: from any of the three formats to any other, checked by both models' embeddings."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from llava_genhancer.convert import hf, open_clip
from llava_genhancer.convert.architecture import (
    CLIP_VOCABULARY,
    ModelCfg,
    build_open_clip,
    hf_config,
    model_cfg_of,
    packaged_siglip,
)
from llava_genhancer.convert.checkpoints import SUFFIXES, read_state
from llava_genhancer.convert.companions import copy_tokenizer, read_preprocess, write_clip_tokenizer, write_processor
from llava_genhancer.convert.open_clip import OpenClipSource
from llava_genhancer.convert.weights import clip_rows, siglip_rows, to_hf, to_open_clip, without_text_prefix
from llava_genhancer.errors import InputError
from llava_genhancer.files import expand, sha256, staged_folder
from llava_genhancer.run import write_json
from llava_genhancer.tower.export import MARKER, is_tower, save_tower

log = logging.getLogger(__name__)
FORMATS = ("hf", "open_clip", "openai")
DTYPES = ("float32", "float16", "bfloat16")
OPENAI_WEIGHTS = "openai_clip.pt"
TOLERANCE = 1e-5  # largest allowed difference of two models' embeddings, relative to their largest entry


def convert(
    source: str,
    output_dir: str | os.PathLike,
    *,
    to: str = "hf",
    like: str | None = None,
    activation: str | None = None,
    head_width: int | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
    facts: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write ``source`` in another format.

    Args:
        source: a weight file (``.pt``, ``.pth``, ``.bin``, ``.safetensors``) in OpenAI's or open_clip's layout; a
            folder or hub id in open_clip's or transformers' format; or one inside a hub repository
            (``hf://owner/name/folder``).
        output_dir: a new folder.
        to: "hf" (a tower for training, evaluation and LLaVA), "open_clip" or "openai" (one ``.pt`` file).
        like: a model of the same architecture that says what ``source`` lacks: a folder or hub id in transformers' or
            open_clip's format (also its tokenizer and image processor), or the name of one of open_clip's models.
        activation: "quick_gelu" or "gelu", where neither the weights nor ``like`` say.
        head_width: width of a head of the vision tower, where it is unusual.
        dtype: of the weights; float32 holds every format exactly. OpenAI's own files are float16.
        overwrite: replace what was exported or converted to ``output_dir`` before.
        facts: more for the marker file.

    Returns:
        ``output_dir``.

    Raises:
        InputError: what is given cannot be read or says too little, the format cannot hold it, or both models differ.
    """
    for name, value, choices in (("--to", to, FORMATS), ("--dtype", dtype, DTYPES)):
        if value not in choices:
            raise InputError(f"{name} {value} is unknown: choose {', '.join(choices)}")
    if activation not in (None, "quick_gelu", "gelu"):
        raise InputError(f"--activation {activation} is unknown: choose quick_gelu or gelu")
    output_dir = Path(expand(output_dir))
    if output_dir.exists() and any(output_dir.iterdir()) and not (overwrite and is_tower(output_dir)):
        way_out = ", or add --overwrite" if is_tower(output_dir) else ""
        raise InputError(f"{output_dir} is not empty: choose another --output_dir{way_out}")
    given = hf.local(expand(source))
    like = hf.local(expand(like)) if like else None
    quick = None if activation is None else activation == "quick_gelu"
    if hf.is_hf(given):
        return _from_hf(source, given, output_dir, to, like, getattr(torch, dtype), facts)
    if Path(given).suffix in SUFFIXES:
        loaded = _read_file(Path(given), like, quick, head_width)
    else:
        loaded = open_clip.read_folder(given)
    return _from_open_clip(replace(loaded, name=source), output_dir, to, like, getattr(torch, dtype), facts)


def _read_file(path: Path, like: str | None, quick: bool | None, head_width: int | None) -> OpenClipSource:
    if like is None or not hf.is_hf(like):
        return open_clip.read_file(path, like=like, quick_gelu=quick, head_width=head_width)
    config = hf.read_config(like)
    model_cfg = packaged_siglip(config) if config.model_type == "siglip" else model_cfg_of(config)
    if quick is not None:
        model_cfg["quick_gelu"] = quick
    if head_width is not None:
        model_cfg["vision_cfg"]["head_width"] = head_width
    return open_clip.OpenClipSource(str(path), model_cfg, read_preprocess(like), read_state(path)[0], path, like)


def _from_open_clip(
    source: OpenClipSource, output_dir: Path, to: str, like: str | None, dtype: torch.dtype, facts: Mapping[str, str]
) -> Path:
    model = open_clip.load_model(source)
    hf.check_finite(model, source.name, dtype)
    if to == "hf":
        config = hf_config(source.model_cfg)
        target = hf.build(config)
        rows = _rows(config)
        shapes = {n: v.shape for n, v in target.state_dict().items()}
        target.load_state_dict(to_hf(open_clip.own_state(model), rows, shapes))
        difference = _check(compare(model, target, config))
        with tempfile.TemporaryDirectory() as folder:
            _write_companions(Path(folder), source, config, like)
            marker = {"source": source.name, **facts, **_facts(source.weights, "open_clip", difference)}
            return save_tower(target.to(dtype), output_dir, source=folder, marker=marker)
    with staged_folder(output_dir) as folder:
        if to == "openai":
            _write_openai(folder, source.model_cfg, open_clip.own_state(model), dtype)
        else:
            open_clip.write_folder(folder, source.model_cfg, source.preprocess_cfg, open_clip.own_state(model), dtype)
            if source.tokenizer:
                copy_tokenizer([source.tokenizer], folder)
        _finish(folder, to, source.name, source.weights, "open_clip", 0.0, facts)
    return output_dir


def _from_hf(
    source: str, given: str, output_dir: Path, to: str, like: str | None, dtype: torch.dtype, facts: Mapping[str, str]
) -> Path:
    model, file = hf.load(given)
    hf.check_finite(model, source, dtype)
    if to == "hf":
        with tempfile.TemporaryDirectory() as folder:
            hf.gather_companions(given, like, Path(folder))
            marker = {"source": source, **facts, **_facts(file, "hf", 0.0)}
            return save_tower(model.to(dtype), output_dir, source=folder, marker=marker)
    model_cfg = model_cfg_of(model.config)
    target = build_open_clip(model_cfg)
    shapes = {n: v.shape for n, v in open_clip.own_state(target).items()}
    state = to_open_clip(model.state_dict(), _rows(model.config), shapes)
    target.load_state_dict(state if model_cfg.get("custom_text") else without_text_prefix(state))
    difference = compare(model, target, model.config)
    if _activations(hf_config(model_cfg)) == _activations(model.config):
        _check(difference)
    else:
        log.warning(
            "open_clip's SigLIP of this shape computes GELU %s where this one has %s: embeddings differ by %.1e",
            *(" and ".join(_activations(c)) for c in (hf_config(model_cfg), model.config)),
            difference,
        )
    with staged_folder(output_dir) as folder:
        if to == "openai":
            _write_openai(folder, model_cfg, state, dtype)
        else:
            tokens = copy_tokenizer([given, like], folder)
            if model.config.text_config.vocab_size != CLIP_VOCABULARY:
                if not tokens:
                    raise InputError(f"{source} has no tokenizer to go with it: add --like and the original's name")
                model_cfg["text_cfg"]["hf_tokenizer_name"] = "."  # open_clip then reads the folder's own
            preprocess = read_preprocess(given if hf.has_processor(given) else like or given)
            open_clip.write_folder(folder, model_cfg, preprocess, state, dtype)
        _finish(folder, to, source, file, "hf", difference, facts)
    return output_dir


def _rows(config: Any) -> Any:
    make = {"clip": clip_rows, "siglip": siglip_rows}[config.model_type]
    return make(config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers)


@torch.no_grad()
def compare(one: nn.Module, other: nn.Module, config: Any) -> float:
    """The largest difference of two models' embeddings of random images and texts, relative to the largest entry.

    Raises:
        InputError: an embedding of either model is not finite.
    """
    generator = torch.Generator().manual_seed(0)
    side, text = config.vision_config.image_size, config.text_config
    pixels = torch.randn(2, 3, side, side, generator=generator)
    tokens = torch.randint(0, text.vocab_size - 2, (2, text.max_position_embeddings), generator=generator)
    # CLIP reads its text where it ends; id 2 is how older configs write the last of the vocabulary.
    tokens[:, -1] = (
        text.vocab_size - 1 if config.model_type == "siglip" or text.eos_token_id == 2 else text.eos_token_id
    )
    pairs = list(zip(hf.embeddings(one, pixels, tokens), hf.embeddings(other, pixels, tokens), strict=True))
    for name, found in zip(("the original", "the converted model"), zip(*pairs, strict=True), strict=True):
        if not all(embedding.isfinite().all() for embedding in found):
            raise InputError(f"the embeddings of {name} are not finite, so nothing was written: its weights are broken")
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def _check(difference: float) -> float:
    if not difference <= TOLERANCE:  # so that NaN fails
        raise InputError(
            f"the converted model's embeddings differ by {difference:.1e} of their largest entry (allowed "
            f"{TOLERANCE:.0e}), so nothing was written: are --activation and --head_width right?"
        )
    return difference


def _activations(config: Any) -> tuple[str, str]:
    return config.vision_config.hidden_act, config.text_config.hidden_act


def _facts(file: Path | None, layout: str, difference: float) -> dict[str, Any]:
    """What the marker says of where a converted folder is from."""
    digest = {file.name: sha256(file)} if file is not None else {}
    return {"converted_from": {"format": layout, "weights": digest, "largest_difference": difference}}


def _write_companions(folder: Path, source: OpenClipSource, config: Any, like: str | None) -> None:
    write_processor(folder, config.model_type, source.preprocess_cfg, config.vision_config.image_size)
    if copy_tokenizer([source.tokenizer, like if like and hf.is_hf(like) else None], folder):
        return
    if config.text_config.vocab_size != CLIP_VOCABULARY:
        raise InputError(
            f"{source.name} has no tokenizer to go with it: add --like and the original's folder or hub id"
        )
    write_clip_tokenizer(folder, config.text_config.max_position_embeddings)


def _write_openai(folder: Path, model_cfg: ModelCfg, state: dict[str, Tensor], dtype: torch.dtype) -> None:
    """OpenAI's ``clip.load(FILE, jit=False)`` builds its model from the shapes alone, so the rest must be its defaults.

    Raises:
        InputError: a model that it would build differently.
    """
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    usual = (
        model_cfg.get("quick_gelu", False)
        and "layers" in vision
        and vision.get("head_width", 64) == 64
        and text["heads"] * 64 == text["width"]
        and all(cfg.get("mlp_ratio", 4) == 4 for cfg in (vision, text))
        and not any(cfg.get(n) for cfg in (vision, text) for n in ("norm_kwargs", "act_kwargs", "pool_type"))
    )
    if not usual:
        raise InputError(
            "OpenAI's loader makes every model with QuickGELU, heads of 64 and MLPs of four times the width: this one "
            "is another, choose --to open_clip"
        )
    halved = ("conv1.weight", "in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias", "c_fc.weight",
              "c_fc.bias", "c_proj.weight", "c_proj.bias", "proj", "text_projection")  # fmt: skip
    whole = {n: v for n, v in without_text_prefix(state).items()}
    if dtype != torch.float32:
        # As OpenAI's own files: embeddings, norms and the scale stay in fp32.
        whole = {n: v.to(dtype) if n.endswith(halved) else v for n, v in whole.items()}
    torch.save(whole, folder / OPENAI_WEIGHTS)


def _finish(
    folder: Path, to: str, source: str, file: Path | None, layout: str, difference: float, facts: Mapping[str, str]
) -> None:
    weights = {p.name: sha256(p) for p in sorted(folder.iterdir()) if p.suffix in SUFFIXES}
    marker = {"format": 1, "model_type": to, "source": source, **facts, **_facts(file, layout, difference)}
    write_json(folder / MARKER, {**marker, "weights": weights})
