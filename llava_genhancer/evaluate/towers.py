"""Two-tower models for evaluation by folder, hub id or name: CLIPModel, SiglipModel, Siglip2Model, open_clip's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llava_genhancer.convert.hf import load_whole
from llava_genhancer.convert.open_clip import is_open_clip
from llava_genhancer.convert.released import tower_folder
from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.open_clip_tower import load_open_clip_tower
from llava_genhancer.evaluate.tower import Tower, marker_facts
from llava_genhancer.files import expand
from llava_genhancer.run import sha256

MODEL_CLASSES = {"clip": "CLIPModel", "siglip": "SiglipModel", "siglip2": "Siglip2Model"}
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
CLIP_CONTEXT = 77


def resolve_name(name: str) -> str:
    """A folder or hub id for what a user may write.

    That is ``~``, ``toyworld:...`` for the embedded models, and what :func:`tower_folder` knows: others' released
    weights by name, a weight file.
    """
    if name.startswith("toyworld:"):
        from llava_genhancer.toyworld.paths import resolve

        return str(resolve(name))
    return tower_folder(str(Path(expand(name))) if name.startswith("~") else name)


def choose_device(device: str | torch.device | None) -> torch.device:
    """``device``, or CUDA where there is one.

    Raises:
        InputError: not a device, or not there.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen).item()  # "meta" has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {device} cannot be used ({_first_line(error)}): try cpu or cuda") from None
    return chosen


def load_tower(name: str, device: str | torch.device | None = None) -> Tower:
    """Load a tower by folder or hub id.

    Raises:
        InputError: not there, not a two-tower model of a known kind, weights incomplete, or no tokenizer or image
            processor beside them.
    """
    import transformers

    chosen = choose_device(device)
    path = resolve_name(name)
    if is_open_clip(path):
        return load_open_clip_tower(name, path, chosen)
    config = _config(name, path)
    tokenizer, image_processor = _tokenizer(name, path), _image_processor(name, path)
    text = config.text_config
    if max(tokenizer(["a photo of two"])["input_ids"][0], default=0) >= text.vocab_size:
        raise InputError(
            f"tower {name}: its tokenizer makes ids beyond the model's {text.vocab_size}; wrong tokenizer files?"
        )
    # CLIP: the protocol says 77. SigLIP: its tokenizer's own, which SigLIP2's leaves unset.
    own = CLIP_CONTEXT if config.model_type == "clip" else tokenizer.model_max_length
    max_length = min(own, text.max_position_embeddings)

    model = load_whole(
        getattr(transformers, MODEL_CLASSES[config.model_type]), path, f"tower {name}", dtype=torch.float32
    )
    model = model.eval().requires_grad_(False).to(chosen)

    folder = _folder(path)
    return Tower(
        name=name,
        model_type=config.model_type,
        model=model,
        tokenizer=tokenizer,
        image_processor=image_processor,
        max_length=max_length,
        device=chosen,
        weights=_weights(folder),
        **marker_facts(folder, [name, path], getattr(config.vision_config, "image_size", None)),
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _config(name: str, path: str) -> Any:
    from transformers import AutoConfig

    looks_local = path.startswith((".", "/")) or Path(path).exists()
    if looks_local and not (Path(path) / "config.json").is_file():
        what = "has no config.json" if Path(path).is_dir() else "is not a folder"
        raise InputError(f"tower {name} {what}: give the folder (or hub id) of a CLIPModel or SiglipModel")
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"tower {name} cannot be loaded ({_first_line(error)}): give a local folder, or a hub id this machine can "
            "reach or has cached"
        ) from None
    if config.model_type not in MODEL_CLASSES:
        raise InputError(
            f"tower {name} is a '{config.model_type}' model: MMVP-VLM needs both towers of a "
            f"{', '.join(list(MODEL_CLASSES.values())[:-1])} or {MODEL_CLASSES['siglip2']}"
        )
    return config


def _tokenizer(name: str, path: str) -> Any:
    from transformers import AutoTokenizer

    # Without files transformers 5 makes an empty tokenizer without a word, and every statement would read the same.
    if Path(path).is_dir() and not any((Path(path) / f).is_file() for f in TOKENIZER_FILES):
        raise InputError(
            f"tower {name} has no tokenizer ({', '.join(TOKENIZER_FILES)}): copy the original model's files in, "
            "or let `llava-genhancer convert` add them (--like ORIGINAL)"
        )
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # tokenizers raise bare Exceptions for broken files
        raise InputError(f"tower {name}: its tokenizer cannot be loaded ({_first_line(error)})") from None


def _image_processor(name: str, path: str) -> Any:
    from transformers import AutoImageProcessor

    try:
        # Pillow's resize is what the published numbers were made with; torchvision's rounds differently.
        return AutoImageProcessor.from_pretrained(path, backend="pil")
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise InputError(
            f"tower {name} has no usable preprocessor_config.json ({_first_line(error)}): copy the original model's "
            "in, or let `llava-genhancer convert` add it (--like ORIGINAL)"
        ) from None


def _folder(path: str) -> Path:
    """The local folder of the loaded files; for a hub id the cached snapshot."""
    if Path(path).is_dir():
        return Path(path)
    from transformers.utils import cached_file

    return Path(str(cached_file(path, "config.json"))).parent


def _weights(folder: Path) -> dict[str, str]:
    """Hashes of the weight files, safetensors before ``.bin`` as transformers prefers them."""
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        if found := sorted(folder.glob(pattern)):
            return {p.name: sha256(p) for p in found}
    return {}
