"""A whole LLaVA between the forms it is stored in: its weights, and the files around them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llava_genhancer import run
from llava_genhancer.errors import InputError, reason
from llava_genhancer.llava.conversation import stop_token_ids
from llava_genhancer.llava.model import local, read_config
from llava_genhancer.llava.tokenizer import load_tokenizer
from llava_genhancer.tower.export import find_file

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# Where a language model came from, how it was stored, and code beside it: none of it holds for a LLaVA made of it.
NOT_EXPORTED = ("_name_or_path", "auto_map", "dtype", "quantization_config", "transformers_version")
SHARD_BYTES = 5_000_000_000
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole LLaVA but for the tower's weights, which stay in the tower's folder.

    Attributes:
        llm_config: the language model's ``config.json``, from :func:`raw_config`.
        companions: folder or hub id of its tokenizer and generation config.
        tower: folder or hub id of the vision tower.
        language: the causal language model's weights by their own names (``model.*``, ``lm_head.weight``).
        projector: ``linear_1.weight`` and so on.
        conversation, image_mode: how prompts and images were shown in training.
    """

    llm_config: dict[str, Any]
    companions: str
    tower: str
    language: Mapping[str, Tensor]
    projector: Mapping[str, Tensor]
    conversation: str
    image_mode: str
    vision_feature_layer: int
    dtype: torch.dtype


def raw_config(name: str) -> dict[str, Any]:
    """Return ``config.json`` as it is but for NOT_EXPORTED: a new transformers must not re-write what old ones read.

    Where a new one wrote it, RoPE's base is put where old readers look for it; they would take 10 000 in silence.
    """
    path = find_file(local(name), "config.json")
    if path is None:
        raise InputError(f"{name} has no config.json")
    config = {k: v for k, v in run.read_json(path).items() if k not in NOT_EXPORTED}
    base = (config.get("rope_parameters") or {}).get("rope_theta")
    return config if base is None else {"rope_theta": base, **config}


def vision_config(tower: str) -> dict[str, Any]:
    """The tower's vision configuration with every number that a reader could take another default for."""
    config = read_config(tower, "tower")
    vision = getattr(config, "vision_config", config).to_dict()
    keep = (
        "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels",
        "image_size", "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout", "projection_dim",
    )  # fmt: skip
    return {k: vision[k] for k in keep if k in vision}


def generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The language model's own, ending where the template ends an answer, and repaired.

    Sampling parameters without ``do_sample`` (Vicuna's temperature) cannot be saved by transformers.
    """
    path = find_file(local(checkpoint.companions), "generation_config.json")
    config = dict(run.read_json(path)) if path else {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if checkpoint.llm_config.get(name) is not None:
            config.setdefault(name, checkpoint.llm_config[name])
    end = config.get("eos_token_id")
    ends = list(end) if isinstance(end, list) else [i for i in [end] if i is not None]
    stops = stop_token_ids(checkpoint.conversation, load_tokenizer(checkpoint.companions))
    ends = list(dict.fromkeys([*ends, *stops]))
    config["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    ignored = () if config.get("do_sample") else SAMPLING
    return {k: v for k, v in config.items() if k not in (*ignored, "transformers_version")}


def write_shards(state: Mapping[str, Tensor], folder: Path) -> None:
    """``state`` as safetensors of at most 5 GB each, with an index if there are several."""
    from huggingface_hub import split_torch_state_dict_into_shards

    plan = split_torch_state_dict_into_shards(dict(state), max_shard_size=SHARD_BYTES)
    for file, names in plan.filename_to_tensors.items():
        save_file({n: state[n].contiguous() for n in names}, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        run.write_json(folder / "model.safetensors.index.json", index)


def read_shards(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder, safetensors where there are some, else ``.bin`` files read as weights only.

    An index names the files and what is in each; without one, names such as ``model-00001-of-00002`` are counted.

    Raises:
        InputError: none there, damaged ones, or not all of them.
    """
    index = next((folder / n for n in INDEXES if (folder / n).is_file()), None)
    where: dict[str, str] = {}
    if index is not None:
        read = run.read_json(index)
        named = read.get("weight_map") if isinstance(read, dict) else None
        if not named or not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
            raise InputError(f"{index} is no index of weights: weight_map must name a file for each weight")
        where = named
        files = [folder / name for name in sorted(set(where.values()))]
    else:
        found = {p for pattern in ("model*.safetensors", "pytorch_model*.bin") for p in folder.glob(pattern)}
        files = sorted(p for p in found if p.suffix == ".safetensors") or sorted(found)
        parts = [re.fullmatch(r"(.*-)(\d+)-of-(\d+)(\..*)", p.name) for p in files]
        for part in filter(None, parts):
            files += [folder / f"{part[1]}{i + 1:0{len(part[2])}}-of-{part[3]}{part[4]}" for i in range(int(part[3]))]
        files = sorted(set(files))
    if not files:
        raise InputError(f"{folder} holds no weights (model*.safetensors or pytorch_model*.bin)")
    if missing := [file.name for file in files if not file.is_file() or file.parent != folder]:
        raise InputError(f"{folder}: {len(missing)} of {len(files)} weight files are missing (first: {missing[0]})")
    state: dict[str, Tensor] = {}
    for file in files:
        state |= read_weights(file)
    if absent := sorted(where.keys() - state.keys()):
        raise InputError(f"{folder}: {absent[0]} is not in {where[absent[0]]}, where {index.name} names it")  # type: ignore[union-attr]
    return state


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a weight file by name.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # each reader has its own exceptions for damage
        raise InputError(f"{file} cannot be read: {reason(error)}") from None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{file} holds something else than named weights")
    return dict(state)


def check_weights(checkpoint: Checkpoint, source: str | os.PathLike) -> None:
    """Compare names, shapes and types of a checkpoint's weights with what its configurations say.

    Args:
        source: names the checkpoint in messages.

    Raises:
        InputError: a weight is missing, has no place, has another shape or type, or is not finite, with the first such
            weight.
    """
    config = language_config(checkpoint.llm_config, source)
    try:
        with torch.device("meta"):
            language = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # sizes that do not divide, numbers that are none, ...
        raise InputError(f"{source}: no language model can be made of its config.json ({reason(error)})") from None
    width, hidden = config.hidden_size, vision_config(checkpoint.tower)["hidden_size"]
    projector = {
        "linear_1.weight": (width, hidden), "linear_1.bias": (width,),
        "linear_2.weight": (width, width), "linear_2.bias": (width,),
    }  # fmt: skip
    shapes = {name: tuple(p.shape) for name, p in language.named_parameters()}  # tied weights once
    shapes |= {name: tuple(b.shape) for name, b in language.named_buffers() if name in language.state_dict()}
    for part, have, expected in (
        ("projector", checkpoint.projector, projector),
        ("language model", checkpoint.language, shapes),
    ):
        if absent := sorted(expected.keys() - have.keys()):
            what = f"no {part}" if not have else f"{len(absent)} weights of the {part} missing (first: {absent[0]})"
            raise InputError(f"{source} cannot be used: {what}")
        if left := sorted(have.keys() - expected.keys()):
            raise InputError(
                f"{source} cannot be used: {len(left)} weights of the {part} (first: {left[0]}) have no place in the "
                "model of config.json"
            )
        for name, value in have.items():
            if tuple(value.shape) != tuple(expected[name]):
                empty = ": an empty tensor is what ZeRO-3 leaves where weights were not gathered, so save them with "
                raise InputError(
                    f"{source} cannot be used: {name} of the {part} is {tuple(value.shape)}, expected "
                    f"{tuple(expected[name])} by the configurations of language model and tower"
                    + (f"{empty}zero_to_fp32.py" if not value.numel() else "")
                )
            if value.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                raise InputError(
                    f"{source} cannot be used: {name} of the {part} is {value.dtype}, expected float32, float16 or "
                    "bfloat16: save it without quantisation"
                )
            if not value.isfinite().all():
                raise InputError(
                    f"{source} cannot be used: {name} of the {part} holds NaN or infinity: take an earlier checkpoint"
                )


def language_config(config: Mapping[str, Any], source: str | os.PathLike) -> Any:
    """The language model's ``config.json`` as transformers' class, with the defaults of its ``model_type``.

    Raises:
        InputError: transformers does not take a value in it.
    """
    try:
        return CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    except Exception as error:  # a config may hold anything, and its class then raises anything
        raise InputError(f"{source}: config.json of the language model cannot be used ({reason(error)})") from None
