"""Weight files as state dicts: safetensors, ``torch.save``, OpenAI's TorchScript archives, and trainers' wrappings."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from llava_genhancer.convert.weights import with_text_prefix
from llava_genhancer.errors import InputError, reason

SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
_WRAPPINGS = ("state_dict", "model_state_dict", "model")
# Archives carry these beside the weights.
_CONSTANTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")
# A tensor that every layout has, to find what stands before the model's own names (DIVA: "class_model.model.").
_ANCHOR = "visual."


def read_state(path: Path) -> tuple[dict[str, Tensor], bool]:
    """A CLIP's tensors under open_clip's names, the text tower below ``text.``, as the file has them, on the CPU.

    Returns:
        The tensors, and whether the file is an archive of OpenAI's, whose models all use QuickGELU.

    Raises:
        InputError: not a weight file, one that would run code, or no CLIP in open_clip's layout inside.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return _own_names(path, load_file(path)), False
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} cannot be read ({reason(error)})") from None
    if _is_archive(path):
        try:
            state = torch.jit.load(str(path), map_location="cpu").state_dict()
        except (RuntimeError, OSError) as error:
            raise InputError(f"{path} is a TorchScript archive that cannot be loaded ({reason(error)})") from None
        return _own_names(path, state), True
    return _own_names(path, _unwrap(path, _load(path))), False


def _is_archive(path: Path) -> bool:
    """TorchScript keeps its code in the zip file; ``torch.save`` has none."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return any("/code/" in name for name in file.namelist())


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except Exception as error:  # bytes that are no pickle make torch raise anything
        why = "it holds Python objects beside tensors" if isinstance(error, UnpicklingError) else reason(error)
        raise InputError(
            f"{path} cannot be read safely ({why}): where its own code is installed, save the weights alone with "
            "torch.save(model.state_dict(), FILE) and convert that"
        ) from None


def _unwrap(path: Path, loaded: Any) -> Mapping[str, Any]:
    for name in _WRAPPINGS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping):
            loaded = loaded[name]
    if not isinstance(loaded, Mapping):
        raise InputError(f"{path} holds a {type(loaded).__name__}, not a state dict")
    return loaded


def _own_names(path: Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The CLIP's tensors without the names of what it was part of; what lies outside it is left behind."""
    if any(n.startswith(("vision_model.", "text_model.")) for n in state):
        raise InputError(f"{path} has transformers' names: give its folder, with the config.json that belongs to it")
    prefixes = {n[: n.index(_ANCHOR)] for n in state if _ANCHOR in n and f"{n[: n.index(_ANCHOR)]}logit_scale" in state}
    if len(prefixes) != 1:
        what = "no CLIP in open_clip's or OpenAI's layout" if not prefixes else f"{len(prefixes)} CLIPs"
        raise InputError(f"{path} holds {what} (first name: {next(iter(state), 'none')})")
    prefix = prefixes.pop()
    own = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
    return with_text_prefix({n: v for n, v in own.items() if isinstance(v, Tensor) and n not in _CONSTANTS})
