"""The original LLaVA's checkpoints, written and read: what its ``load_pretrained_model`` takes, and what it released.

It wants "llava" in the folder's name and reads the tower from ``mm_vision_tower``, a path, not from the checkpoint.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from llava_genhancer import run
from llava_genhancer.errors import InputError
from llava_genhancer.llava.checkpoint import Checkpoint, generation_config, read_shards, vision_config, write_shards
from llava_genhancer.llava.model import local
from llava_genhancer.tower.export import TOKENIZER_FILES, find_file

# model_type and class of the original code, by the language model's model_type.
ORIGINAL = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "qwen2": ("llava_qwen", "LlavaQwenForCausalLM"),
}
PROJECTOR = {"linear_1": "model.mm_projector.0", "linear_2": "model.mm_projector.2"}


def write_llava(checkpoint: Checkpoint, folder: Path) -> None:
    """The original code's checkpoint, complete but for the tower."""
    state = {n: v.to(checkpoint.dtype) for n, v in checkpoint.language.items()}
    state |= {n: v.to(checkpoint.dtype) for n, v in original_projector(checkpoint.projector).items()}
    write_shards(state, folder)
    write_llava_config(checkpoint, folder)
    run.write_json(folder / "generation_config.json", generation_config(checkpoint))
    for name in TOKENIZER_FILES:
        source = find_file(local(checkpoint.companions), name)
        if source:
            shutil.copyfile(source, folder / name)


def write_llava_projector(checkpoint: Checkpoint, folder: Path) -> None:
    """What the original pretraining leaves: ``config.json`` and ``mm_projector.bin``."""
    state = {n: v.to(checkpoint.dtype) for n, v in original_projector(checkpoint.projector).items()}
    torch.save(state, folder / "mm_projector.bin")
    write_llava_config(checkpoint, folder)


def write_llava_config(checkpoint: Checkpoint, folder: Path) -> None:
    """The language model's ``config.json`` with what the original code adds to it."""
    config = checkpoint.llm_config
    model_type, architecture = ORIGINAL[config["model_type"]]
    tower = local(checkpoint.tower)
    vision = vision_config(checkpoint.tower)
    run.write_json(
        folder / "config.json",
        {
            **config,
            "model_type": model_type,
            "architectures": [architecture],
            "torch_dtype": str(checkpoint.dtype).removeprefix("torch."),
            "mm_vision_tower": str(Path(tower).resolve()) if Path(tower).exists() else tower,
            "mm_hidden_size": vision["hidden_size"],
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": checkpoint.vision_feature_layer,
            "mm_vision_select_feature": "patch",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "mm_patch_merge_type": "flat",
            "mm_conversation": checkpoint.conversation,  # ours: the original code goes by the folder's name
            "image_aspect_ratio": "pad" if checkpoint.image_mode == "pad" else "square",
            "use_mm_proj": True,
            "tune_mm_mlp_adapter": False,
            "freeze_mm_mlp_adapter": False,
            "tokenizer_padding_side": "right",
            "use_cache": True,
        },
    )


def original_projector(projector: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``linear_1.weight`` as ``model.mm_projector.0.weight`` and so on."""
    return {f"{PROJECTOR[n.split('.')[0]]}.{n.split('.')[1]}": v for n, v in projector.items()}


def read_llava(folder: str | os.PathLike, *, tower: str | None = None, conversation: str | None = None) -> Checkpoint:
    """A checkpoint of the original form, such as the released LLaVA-1.5.

    Args:
        tower: replaces the ``mm_vision_tower`` that the checkpoint names.
        conversation: the template of its prompts; if absent the one that our export named, else LLaVA-1.5's ``v1``.

    Raises:
        InputError: not such a checkpoint, or one with a projector or image tokens other than LLaVA-1.5's.
    """
    folder = Path(folder)
    config = run.read_json(folder / "config.json")
    kinds = {original: kind for kind, (original, _) in ORIGINAL.items()} | {"llava": "llama"}
    if config.get("model_type") not in kinds or config.get("mm_projector_type") != "mlp2x_gelu":
        raise InputError(
            f"{folder} is not a checkpoint of LLaVA-1.5's form: model_type {config.get('model_type')}, "
            f"mm_projector_type {config.get('mm_projector_type')}"
        )
    if config.get("mm_use_im_start_end") or config.get("mm_use_im_patch_token"):
        raise InputError(f"{folder} frames its images with tokens of its own (mm_use_im_start_end): not supported")
    state = read_shards(folder)
    back = {original: ours for ours, original in PROJECTOR.items()}
    projector, language = {}, {}
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        if module in back:
            projector[f"{back[module]}.{kind}"] = value
        elif ".vision_tower." not in name:  # the original code reads the tower from its own folder, and so do we
            language[name] = value
    ours = ("mm_", "image_aspect_ratio", "use_mm_proj", "tune_mm", "freeze_mm", "tokenizer_", "image_", "unfreeze_mm")
    return Checkpoint(
        llm_config={k: v for k, v in config.items() if not k.startswith(ours)}
        | {"model_type": kinds[config["model_type"]]},
        companions=str(folder),
        tower=tower or config["mm_vision_tower"],
        language=language,
        projector=projector,
        conversation=conversation or config.get("mm_conversation", "v1"),
        image_mode="pad" if config.get("image_aspect_ratio") == "pad" else "square",
        vision_feature_layer=config["mm_vision_select_layer"],
        dtype=next(iter(language.values())).dtype,
    )
