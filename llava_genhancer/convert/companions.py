"""What goes beside the weights: the image processor's JSON and the tokenizer's files, in both worlds' words."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from llava_genhancer.errors import InputError, reason
from llava_genhancer.run import write_json
from llava_genhancer.tower.export import TOKENIZER_FILES, find_file

PreprocessCfg = dict[str, Any]
_RESAMPLE = {"nearest": 0, "bilinear": 2, "bicubic": 3}
_BPE_MERGES = 49152 - 256 - 2  # CLIP's vocabulary is 256 bytes, those bytes at a word's end, the merges and two ends


def write_processor(folder: Path, model_type: str, preprocess: PreprocessCfg, image_size: int) -> None:
    """``preprocessor_config.json`` for what open_clip's ``preprocess_cfg`` says.

    Raises:
        InputError: a resize mode or interpolation that transformers' processors do not have.
    """
    mode, interpolation = preprocess.get("resize_mode", "shortest"), preprocess.get("interpolation", "bicubic")
    if mode not in ("shortest", "squash") or interpolation not in _RESAMPLE:
        raise InputError(f"transformers has no image processor for resize_mode {mode} with {interpolation} resampling")
    square = {"height": image_size, "width": image_size}
    crops = model_type == "clip" and mode == "shortest"
    if model_type == "siglip" and mode == "shortest":
        raise InputError(
            "SigLIP's image processor cannot crop (resize_mode shortest): correct preprocess_cfg to squash"
        )
    config = {
        "image_processor_type": "CLIPImageProcessor" if model_type == "clip" else "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image_size} if crops else square,
        "resample": _RESAMPLE[interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess["mean"]),
        "image_std": list(preprocess["std"]),
    }
    if model_type == "clip":
        config |= {"do_center_crop": crops, "crop_size": square}
    write_json(folder / "preprocessor_config.json", config)


def read_preprocess(source: str) -> PreprocessCfg:
    """open_clip's ``preprocess_cfg`` for the image processor of a folder or hub id in transformers' format.

    Raises:
        InputError: ``source`` has no ``preprocessor_config.json``, or that file lacks mean and standard deviation.
    """
    found = find_file(source, "preprocessor_config.json")
    if found is None:
        raise InputError(f"{source} has no preprocessor_config.json: add --like and the original model's name")
    try:
        config = json.loads(Path(found).read_text(encoding="utf-8"))
        mean, std = config["image_mean"], config["image_std"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{found}: image_mean and image_std cannot be read ({reason(error)}): add them") from None
    size = config.get("size")
    crops = isinstance(size, int) or "shortest_edge" in (size or {})
    names = {number: name for name, number in _RESAMPLE.items()}
    return {
        "mean": mean,
        "std": std,
        "interpolation": names.get(config.get("resample", 3), "bicubic"),
        "resize_mode": "shortest" if crops else "squash",
    }


def write_clip_tokenizer(folder: Path, context_length: int) -> None:
    """CLIP's own tokenizer in transformers' files, from the merges that open_clip brings along."""
    from open_clip.tokenizer import bytes_to_unicode, default_bpe

    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        merges = file.read().split("\n")[1 : _BPE_MERGES + 1]
    letters = list(bytes_to_unicode().values())
    ends = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = [*letters, *(x + "</w>" for x in letters), *(m.replace(" ", "") for m in merges), *ends]
    start, end = ends
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(vocabulary)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, **special},
    )
    write_json(folder / "special_tokens_map.json", special)


def copy_tokenizer(sources: list[str | None], folder: Path) -> bool:
    """The tokenizer's files of the first of ``sources`` that has any, byte for byte; whether one had."""
    for source in sources:
        files = [found for name in TOKENIZER_FILES if source and (found := find_file(source, name))]
        for file in files:
            (folder / Path(file).name).write_bytes(Path(file).read_bytes())
        if files:
            return True
    return False
