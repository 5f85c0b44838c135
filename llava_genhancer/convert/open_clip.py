"""open_clip's folders: ``open_clip_config.json``, the weights, and a tokenizer where it is not CLIP's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava_genhancer.convert.architecture import ModelCfg, build_open_clip, infer_model_cfg
from llava_genhancer.convert.checkpoints import read_state
from llava_genhancer.convert.companions import PreprocessCfg
from llava_genhancer.convert.hf import is_hf
from llava_genhancer.convert.weights import with_text_prefix, without_text_prefix
from llava_genhancer.errors import InputError, reason
from llava_genhancer.run import read_json, write_json
from llava_genhancer.tower.export import find_file

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
_WEIGHTS = (
    WEIGHTS, "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth",
    "model.safetensors", "pytorch_model.bin",
)  # fmt: skip


@dataclass(frozen=True)
class OpenClipSource:
    """A CLIP in open_clip's words.

    Attributes:
        name: as the user gave it.
        state: every tensor on the CPU in its own dtype, the text tower's names below ``text.``.
        weights: the file they are from.
        tokenizer: folder or hub id with the tokenizer's files; None where it is CLIP's own.
    """

    name: str
    model_cfg: ModelCfg
    preprocess_cfg: PreprocessCfg
    state: dict[str, Tensor]
    weights: Path
    tokenizer: str | None = None

    @property
    def image_size(self) -> int:
        """Side of the square images in pixels."""
        size = self.model_cfg["vision_cfg"]["image_size"]
        return int(size if isinstance(size, int) else size[0])


def is_open_clip(name: str) -> bool:
    """Whether a local folder is in open_clip's format and not in transformers' too."""
    folder = Path(name)
    return (folder / CONFIG).is_file() and not is_hf(name)


def read_config(name: str) -> tuple[ModelCfg, PreprocessCfg]:
    """``model_cfg`` and a complete ``preprocess_cfg`` of a folder or hub id.

    Raises:
        InputError: no ``open_clip_config.json`` there, or it has no ``model_cfg``.
    """
    found = find_file(name, CONFIG)
    if found is None:
        raise InputError(f"{name} has no {CONFIG}: it is not in open_clip's format")
    config = read_json(found)
    if not isinstance(config, dict) or not {"vision_cfg", "text_cfg"} <= set(config.get("model_cfg", ())):
        raise InputError(f"{found} has no model_cfg with vision_cfg and text_cfg")
    return config["model_cfg"], {**default_preprocess(config["model_cfg"]), **config.get("preprocess_cfg", {})}


def default_preprocess(model_cfg: ModelCfg) -> PreprocessCfg:
    """What a model is shown where its checkpoint does not say: SigLIP's squashed square, or open_clip's default."""
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    if model_cfg["vision_cfg"].get("timm_pool") == "map":
        return {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    mean, std = list(OPENAI_DATASET_MEAN), list(OPENAI_DATASET_STD)
    return {"mean": mean, "std": std, "interpolation": "bicubic", "resize_mode": "shortest"}


def read_folder(name: str) -> OpenClipSource:
    """A folder or hub id in open_clip's format.

    Raises:
        InputError: as :func:`read_config`, or its weights are missing or cannot be read.
    """
    model_cfg, preprocess = read_config(name)
    found = next((f for w in _WEIGHTS if (f := find_file(name, w)) is not None), None)
    if found is None:
        raise InputError(f"{name} has no weights beside its {CONFIG}: looked for {', '.join(_WEIGHTS)}")
    own_tokenizer = name if model_cfg["text_cfg"].get("hf_tokenizer_name") else None
    return OpenClipSource(name, model_cfg, preprocess, read_state(Path(found))[0], Path(found), own_tokenizer)


def read_file(
    path: Path, *, like: str | None = None, quick_gelu: bool | None = None, head_width: int | None = None
) -> OpenClipSource:
    """A lone weight file in open_clip's or OpenAI's layout.

    Args:
        like: name of an open_clip model, or an open_clip folder or hub id, of the same architecture.
        quick_gelu: which GELU, where neither the file nor ``like`` says.
        head_width: of the vision tower, where it is not what open_clip uses.

    Raises:
        InputError: it cannot be read, or does not say enough.
    """
    import open_clip

    state, from_openai = read_state(path)
    preprocess: PreprocessCfg | None = None
    tokenizer = None
    try:
        if like in open_clip.list_models():
            model_cfg = open_clip.get_model_config(like)
            if quick_gelu is not None:
                model_cfg["quick_gelu"] = quick_gelu
        elif like is not None:
            model_cfg, preprocess = read_config(like)
            tokenizer = like if model_cfg["text_cfg"].get("hf_tokenizer_name") else None
        else:
            quick_gelu = True if quick_gelu is None and from_openai else quick_gelu
            model_cfg = infer_model_cfg(state, quick_gelu=quick_gelu, head_width=head_width)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    preprocess = preprocess or default_preprocess(model_cfg)
    return OpenClipSource(str(path), model_cfg, preprocess, state, path, tokenizer)


def load_model(source: OpenClipSource) -> Any:
    """open_clip's own model with every weight of the source, fp32 on the CPU, in evaluation mode.

    Raises:
        InputError: weights that do not fit the configuration; a grid of positions is never resized in silence.
    """
    model = build_open_clip(source.model_cfg)
    state = {n: v.float() if v.is_floating_point() else v for n, v in source.state.items()}
    if not source.model_cfg.get("custom_text", False):
        state = without_text_prefix(state)
    expected = model.state_dict()
    for name in ("logit_scale", "logit_bias"):  # scalars in open_clip, of length one in its older files
        if name in state and name in expected:
            state[name] = state[name].reshape(expected[name].shape)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]] or [reason(error)]
        raise InputError(f"{source.name}: its weights do not fit its model_cfg ({lines[0][:200]})") from None
    return model


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors as :attr:`OpenClipSource.state` names them."""
    return with_text_prefix(model.state_dict())


def write_folder(
    folder: Path, model_cfg: ModelCfg, preprocess: PreprocessCfg, state: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Config and weights; ``state`` is named as :attr:`OpenClipSource.state`."""
    from safetensors.torch import save_file

    names = state if model_cfg.get("custom_text", False) else without_text_prefix(state)
    write_json(folder / CONFIG, {"model_cfg": model_cfg, "preprocess_cfg": preprocess})
    tensors = {n: (v.to(dtype) if v.is_floating_point() else v).contiguous() for n, v in names.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
