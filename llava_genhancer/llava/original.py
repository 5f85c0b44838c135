"""The original LLaVA's checkpoints, written and read: what its ``load_pretrained_model`` takes, and what it released.

It wants "llava" in the folder's name and reads the tower from ``mm_vision_tower``, a path, not from the checkpoint.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llava_genhancer import run
from llava_genhancer.convert.hf import BUFFERS
from llava_genhancer.errors import InputError
from llava_genhancer.files import expand
from llava_genhancer.llava.checkpoint import (
    NOT_EXPORTED,
    Checkpoint,
    check_weights,
    generation_config,
    language_config,
    read_shards,
    read_weights,
    vision_config,
    write_shards,
)
from llava_genhancer.llava.model import local
from llava_genhancer.tower.export import TOKENIZER_FILES, find_file

# model_type and class of the original code, by the language model's model_type.
ORIGINAL = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "qwen2": ("llava_qwen", "LlavaQwenForCausalLM"),
}
PROJECTOR = {"linear_1": "model.mm_projector.0", "linear_2": "model.mm_projector.2"}
BACK = {original: ours for ours, original in PROJECTOR.items()}
# What LLaVA-1.5's checkpoints may say; the first is what an absent key means.
READ_AS: dict[str, tuple[str | bool | None, ...]] = {
    "mm_vision_select_feature": ("patch",),
    "mm_patch_merge_type": ("flat", None),
    "image_aspect_ratio": ("square", "pad", None),
    "unfreeze_mm_vision_tower": (False, None),  # True: the tower was trained too and lies in the checkpoint
    "s2": (False, None),
}
LORA_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin")


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
        InputError: not such a checkpoint, one with a projector or image tokens other than LLaVA-1.5's, or one whose
            weights are not those of its configuration.
    """
    folder, tower = Path(expand(folder)), None if tower is None else expand(tower)
    refuse_lora(folder)
    config = run.read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise InputError(f"{folder / 'config.json'} must be an object")
    kinds = {original: kind for kind, (original, _) in ORIGINAL.items()} | {"llava": "llama"}
    if config.get("model_type") not in kinds or config.get("mm_projector_type") != "mlp2x_gelu":
        raise InputError(
            f"{folder} is not a checkpoint of LLaVA-1.5's form: model_type {config.get('model_type')}, "
            f"mm_projector_type {config.get('mm_projector_type')}"
        )
    if config.get("mm_use_im_start_end") or config.get("mm_use_im_patch_token"):
        raise InputError(f"{folder} frames its images with tokens of its own (mm_use_im_start_end): not supported")
    for key, values in READ_AS.items():
        if config.get(key, values[0]) not in values:
            raise InputError(f"{folder}: config.json has {key} {config[key]!r}, which LLaVA-1.5 has not: not supported")
    if "mm_vision_tower" in str(config.get("mm_tunable_parts")):
        raise InputError(
            f"{folder}: config.json has mm_tunable_parts {config['mm_tunable_parts']!r}: a vision tower that was "
            "trained too is not supported"
        )
    layer = config.get("mm_vision_select_layer")
    tower = tower or config.get("mm_vision_tower")
    if not isinstance(layer, int) or not isinstance(tower, str):
        raise InputError(
            f"{folder}: config.json must have mm_vision_select_layer, a number, and mm_vision_tower, a path"
        )
    projector_file = folder / "mm_projector.bin"
    try:
        state = read_shards(folder)
    except InputError as error:
        if projector_file.is_file() and "holds no weights" in str(error):
            raise InputError(
                f"{folder} is what a pretraining leaves, a projector without its language model: finetune from it first"
            ) from None
        raise
    if projector_file.is_file() and not any(_module(name) in BACK for name in state):
        state |= read_weights(projector_file)
    projector, language = {}, {}
    for name, value in state.items():
        module, kind = _module(name), name.rpartition(".")[2]
        if module in BACK:
            projector[f"{BACK[module]}.{kind}"] = value
        elif ".vision_tower." in name or BUFFERS.search(name):
            continue  # the original code reads the tower from its own folder, and so do we
        else:
            language[name] = value
    kind = kinds[config["model_type"]]
    llm_config = {k: v for k, v in config.items() if k in _language_keys(kind)} | {"model_type": kind}
    if language_config(llm_config, folder).tie_word_embeddings and "lm_head.weight" in language:
        head = language.pop("lm_head.weight")
        if not torch.equal(head, language.get("model.embed_tokens.weight", head)):
            raise InputError(
                f"{folder}: config.json ties the embeddings (tie_word_embeddings), but lm_head.weight and "
                "model.embed_tokens.weight differ: one of both is wrong"
            )
    sizes = Counter[torch.dtype]()
    for value in language.values():
        sizes[value.dtype] += value.numel()
    checkpoint = Checkpoint(
        llm_config=llm_config,
        companions=str(folder),
        tower=tower,
        language=language,
        projector=projector,
        conversation=conversation or config.get("mm_conversation", "v1"),
        image_mode="pad" if config.get("image_aspect_ratio") == "pad" else "square",
        vision_feature_layer=layer,
        dtype=sizes.most_common(1)[0][0] if sizes else torch.float32,
    )
    check_weights(checkpoint, folder)
    return checkpoint


def refuse_lora(folder: Path) -> None:
    """Refuse a LoRA training's folder, whose weights are only differences from a language model.

    Raises:
        InputError: it is one, with the command that merges it.
    """
    found = next((folder / n for n in LORA_FILES if (folder / n).is_file()), None)
    if found is None:
        return
    settings = folder / "adapter_config.json"
    base = (run.read_json(settings).get("base_model_name_or_path") if settings.is_file() else None) or "LANGUAGE_MODEL"
    raise InputError(
        f"{folder} is a LoRA training's folder ({found.name} is there): merge it with the original LLaVA's code first, "
        f"python scripts/merge_lora_weights.py --model-path {folder} --model-base {base} --save-model-path MERGED"
    )


def _module(name: str) -> str:
    """A projector's layer as the original names it; ``mm_projector.bin`` of some forks leaves out ``model.``"""
    module = name.rpartition(".")[0]
    return f"model.{module}" if module.startswith("mm_projector.") else module


def _language_keys(model_type: str) -> set[str]:
    """The keys of a language model's ``config.json`` that are its own, not the original LLaVA's additions."""
    known = set(CONFIG_MAPPING[model_type]().to_dict())
    return (known | {"rope_theta", "rope_scaling", "head_dim"}) - {"architectures", *NOT_EXPORTED}
