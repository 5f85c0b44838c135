"""A whole LLaVA between the forms it is stored in: its weights, and the files around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava_genhancer import run
from llava_genhancer.errors import InputError
from llava_genhancer.llava.conversation import stop_token_ids
from llava_genhancer.llava.model import local, read_config
from llava_genhancer.llava.tokenizer import load_tokenizer
from llava_genhancer.tower.export import find_file

SHARD_BYTES = 5_000_000_000
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole LLaVA but for the tower's weights, which stay in the tower's folder.

    Attributes:
        llm_config: the language model's ``config.json``, verbatim.
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
    """``config.json`` as it is: what an old reader understands must not be re-written by a new transformers.

    Where a new one wrote it, RoPE's base is put where old readers look for it; they would take 10 000 in silence.
    """
    path = find_file(local(name), "config.json")
    if path is None:
        raise InputError(f"{name} has no config.json")
    config = dict(run.read_json(path))
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

    Raises:
        InputError: none there, or damaged ones.
    """
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise InputError(f"{folder} holds no weights (*.safetensors or pytorch_model*.bin)")
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                state |= load_file(file)
            else:
                state |= torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # each reader has its own exceptions for damage
            raise InputError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None
    return state
