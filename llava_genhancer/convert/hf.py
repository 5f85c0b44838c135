"""transformers' folders and hub ids, whole or inside a repository, and embeddings of whatever model."""

from __future__ import annotations

import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from llava_genhancer.convert.checkpoints import SUFFIXES
from llava_genhancer.convert.companions import copy_tokenizer
from llava_genhancer.errors import InputError, out_of_memory, reason
from llava_genhancer.tower.export import PROCESSOR_FILES, find_file

MODELS = {"clip": "CLIPModel", "siglip": "SiglipModel"}
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# Constants that older transformers saved among the weights.
BUFFERS = re.compile(r"(^|\.)(position_ids|inv_freq|masked_bias|attn\.bias)$")


def local(name: str) -> str:
    """A path or hub id as it is; of ``hf://owner/name`` or what is inside it (``hf://owner/name/PATH``) a local copy.

    Raises:
        InputError: the hub does not have it, or cannot be reached.
    """
    if not name.startswith("hf://"):
        return name
    repository, path = _split(name)
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if Path(path).suffix in SUFFIXES:
            return str(hf_hub_download(repository, path))
        folder = Path(snapshot_download(repository, allow_patterns=f"{path}/*" if path else None)) / path
    except Exception as error:  # the hub's client and its transport have exceptions of their own
        raise InputError(
            f"{name} cannot be fetched ({reason(error)}): download it where that works, and give its path to "
            "`llava-genhancer convert`"
        ) from None
    if not folder.is_dir():
        raise InputError(f"the hub's {repository} has no folder {path}")
    return str(folder)


def _split(name: str) -> tuple[str, str]:
    owner, _, rest = name.removeprefix("hf://").partition("/")
    repository, _, path = rest.partition("/")
    if not owner or not repository:
        raise InputError(f"{name} names no repository: write hf://owner/name or hf://owner/name/folder")
    return f"{owner}/{repository}", path.strip("/")


def is_hf(name: str) -> bool:
    """Whether a local folder, or a hub id, is in transformers' format (``config.json`` with a ``model_type``)."""
    path = Path(name)
    if path.is_file() or path.suffix in SUFFIXES or (not path.exists() and name.startswith((".", "/"))):
        return False
    if not path.exists() and path.parent != Path() and path.parent.is_dir():
        raise InputError(f"{name} does not exist, though {path.parent}/ does: give a file, a folder or a hub id")
    if not path.exists() and name.count("/") != 1:
        return False
    found = find_file(name, "config.json")
    return found is not None and '"model_type"' in Path(found).read_text(encoding="utf-8")


def read_config(name: str) -> Any:
    """Its CLIPConfig or SiglipConfig.

    Raises:
        InputError: another kind of model; a vision tower alone has no text side to compare with.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:  # a config may hold anything, and transformers then raises anything
        raise InputError(f"{name}: its config.json cannot be used ({reason(error)})") from None
    if config.model_type not in MODELS:
        raise InputError(f"{name} is a '{config.model_type}' model: needed is a whole CLIPModel or SiglipModel")
    return config


def build(config: Any) -> Any:
    """The config's model in fp32 on the CPU, untrained, in evaluation mode."""
    import transformers

    return getattr(transformers, MODELS[config.model_type])(config).float().eval()


def load(name: str) -> tuple[Any, Path | None]:
    """The whole model in fp32 on the CPU, every weight accounted for, and its weight file if it is one file.

    Raises:
        InputError: weights missing, or not readable.
    """
    import transformers

    config = read_config(name)
    model = load_whole(getattr(transformers, MODELS[config.model_type]), name, name, dtype=torch.float32)
    file = next((f for w in WEIGHTS if (f := find_file(name, w)) is not None), None)
    return model.eval(), Path(file) if file else None


def load_whole(cls: Any, path: Any, what: str, *, aside: tuple[str, ...] = (), advice: str = "", **options: Any) -> Any:
    """Return ``cls.from_pretrained(path, **options)`` once every weight of the model comes from the files.

    Args:
        cls: a model class of transformers.
        path: folder or hub id; None where ``options`` hold a state dict.
        what: names the model in messages.
        aside: beginnings of names in the files that the model need not have a place for.
        advice: what to do about a missing weight, for the message.

    Raises:
        InputError: the files cannot be read, a weight is missing or of another shape, or one has no place.
    """
    try:
        model, info = cls.from_pretrained(path, output_loading_info=True, **options)
    except (
        OSError, EOFError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, UnpicklingError,
    ) as error:  # fmt: skip
        if out_of_memory(error):
            raise
        raise InputError(f"{what}: its weights cannot be loaded ({reason(error)})") from None
    missing = sorted(info["missing_keys"]) + sorted(map(str, info.get("mismatched_keys", [])))
    if missing:
        raise InputError(
            f"{what}: {len(missing)} weights are not in its files (first: {missing[0]}) and would be random"
            + (f"; {advice}" if advice else "")
        )
    left = sorted(k for k in info["unexpected_keys"] if not k.startswith(aside) and not BUFFERS.search(k))
    if left:
        raise InputError(
            f"{what}: its files hold {len(left)} weights (first: {left[0]}) that the {type(model).__name__} of its "
            "config.json has no place for: config.json and weights do not belong together"
        )
    return model


def check_finite(model: nn.Module, what: str, dtype: torch.dtype | None = None) -> None:
    """Refuse a model with broken weights, which else shows as a bad loss, or only in another program.

    Args:
        what: names the model in the message.
        dtype: that the weights will be written in; None for their own.

    Raises:
        InputError: with the first weight that has a NaN or infinite entry, or one too large for ``dtype``.
    """
    for name, value in model.named_parameters():
        if not value.isfinite().all():
            raise InputError(f"{what}: {name} is not finite: the file of this weight is broken, fetch it again")
        if dtype is not None and not value.to(dtype).isfinite().all():
            raise InputError(f"{what}: {name} has entries too large for {str(dtype).removeprefix('torch.')}")


def has_processor(name: str) -> bool:
    """Whether the folder or hub id has an image processor."""
    return find_file(name, "preprocessor_config.json") is not None


def gather_companions(name: str, like: str | None, folder: Path) -> None:
    """Image processor and tokenizer into ``folder``: its own, and what it lacks from ``like``.

    Raises:
        InputError: neither has them.
    """
    for file in PROCESSOR_FILES:
        found = find_file(name, file) or (find_file(like, file) if like else None)
        if found is None:
            raise InputError(f"{name} has no {file}: add --like and the name of the original model")
        (folder / file).write_bytes(Path(found).read_bytes())
    if not copy_tokenizer([name, like], folder):
        raise InputError(f"{name} has no tokenizer: add --like and the name of the original model")


@torch.no_grad()
def embeddings(model: Any, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Image and text embeddings, not normalised (B, D), of transformers' or open_clip's model."""
    if hasattr(model, "encode_image"):
        return model.encode_image(pixels), model.encode_text(tokens)
    images = model.get_image_features(pixel_values=pixels).pooler_output
    return images, model.get_text_features(input_ids=tokens).pooler_output
