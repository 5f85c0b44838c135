"""Two-tower models for evaluation: CLIPModel, SiglipModel and Siglip2Model through one door, always in fp32.

Legend: B images or texts in a batch, L tokens of a text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from llava_genhancer.convert.open_clip import is_open_clip
from llava_genhancer.convert.released import tower_folder
from llava_genhancer.errors import InputError
from llava_genhancer.evaluate.paper import Backbone, Method, find_backbone
from llava_genhancer.run import sha256
from llava_genhancer.tower.export import is_tower, read_marker

MODEL_CLASSES = {"clip": "CLIPModel", "siglip": "SiglipModel", "siglip2": "Siglip2Model"}
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
CLIP_CONTEXT = 77


@dataclass(frozen=True)
class Tower:
    """A loaded model with its own tokenizer and image processor.

    Attributes:
        name: what the user gave: folder or hub id.
        model: in eval mode, fp32, on its device.
        recipe: the recipe that made it, from our marker file; None for any other model.
        method: whose released weights these are ("genhancer", "diva"); None for all others.
        backbone: its row in the paper's Table 1, if it is one of the six or made from one.
        weights: SHA-256 by file name.
    """

    name: str
    model_type: str
    model: nn.Module
    tokenizer: Any
    image_processor: Any
    max_length: int
    device: torch.device
    recipe: str | None = None
    method: Method | None = None
    backbone: Backbone | None = None
    weights: dict[str, str] = field(default_factory=dict)

    def images(self, images: list[Image.Image]) -> dict[str, Tensor]:
        """RGB images as the model's inputs: pixel_values, and NaFlex's patch mask and shapes where it has them."""
        return {k: v.to(self.device) for k, v in self.image_processor(images=images, return_tensors="pt").items()}

    def texts(self, texts: list[str]) -> Tensor:
        """Token ids (B, L), padded to the model's full length and truncated.

        No attention mask goes with them: CLIP reads its end token causally, SigLIP was trained on the padding.
        """
        if self.model_type != "clip" and getattr(self.tokenizer, "do_lower_case", True):
            # SigLIP's tokenizer does it itself; SigLIP2's Gemma tokenizer needs it done (idempotent where it does not).
            texts = [t.lower() for t in texts]
        options: dict[str, Any] = {"truncation": True, "padding": "max_length", "max_length": self.max_length}
        return self.tokenizer(texts, return_tensors="pt", **options)["input_ids"].to(self.device)

    @torch.no_grad()
    def logits(self, images: list[Image.Image], texts: list[str]) -> Tensor:
        """Every text against every image (texts, images), fp32; scale, bias and normalisation are the model's own."""
        with exact_fp32():
            return self.model(input_ids=self.texts(texts), **self.images(images)).logits_per_text

    @torch.no_grad()
    def image_features(self, images: list[Image.Image]) -> Tensor:
        """Embeddings of RGB images, not normalised: fp32 (B, D) on the tower's device, D the shared space's width."""
        model: Any = self.model
        with exact_fp32():
            return model.get_image_features(**self.images(images)).pooler_output

    @torch.no_grad()
    def text_features(self, texts: list[str]) -> Tensor:
        """Embeddings of texts, not normalised: fp32 (B, D) on the tower's device, D the shared space's width."""
        model: Any = self.model
        with exact_fp32():
            return model.get_text_features(input_ids=self.texts(texts)).pooler_output


@contextlib.contextmanager
def exact_fp32() -> Iterator[None]:
    """fp32 that is fp32: no TF32 in matmuls or convolutions, and the same kernels every time."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def resolve_name(name: str) -> str:
    """A folder or hub id for what a user may write.

    That is ``~``, ``toyworld:...`` for the embedded models, and what :func:`tower_folder` knows: others' released
    weights by name, a weight file.
    """
    if name.startswith("toyworld:"):
        from llava_genhancer.toyworld.paths import resolve

        return str(resolve(name))
    return tower_folder(str(Path(name).expanduser()) if name.startswith("~") else name)


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
        from llava_genhancer.evaluate.open_clip_tower import load_open_clip_tower

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

    try:
        model, info = getattr(transformers, MODEL_CLASSES[config.model_type]).from_pretrained(
            path, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError, EOFError) as error:
        raise InputError(f"tower {name}: its weights cannot be loaded ({_first_line(error)})") from None
    missing = sorted(map(str, info["missing_keys"])) + sorted(str(m) for m in info.get("mismatched_keys", ()))
    if missing:
        raise InputError(f"tower {name}: {len(missing)} weights are not in its files (first: {missing[0]})")
    model = model.eval().requires_grad_(False).to(chosen)

    folder = _folder(path)
    names = [name, path, getattr(config, "_name_or_path", "")]
    return Tower(
        name=name,
        model_type=config.model_type,
        model=model,
        tokenizer=tokenizer,
        image_processor=image_processor,
        max_length=max_length,
        device=chosen,
        weights=_weights(folder),
        **marker_facts(folder, names, getattr(config.vision_config, "image_size", None)),
    )


def marker_facts(folder: Path, names: list[str], image_size: int | None) -> dict[str, Any]:
    """What made a tower, as :class:`Tower` keeps it, from its marker file and what it is called."""
    marker = read_marker(folder) if is_tower(folder) else {}
    recipe = _recipe(marker)
    named = [*names, marker.get("source"), marker.get("backbone"), recipe]
    backbone = find_backbone(n for n in named if isinstance(n, str))
    if backbone is not None and image_size != backbone.image_size:
        backbone = None  # called like one of Table 1's, but it is another model
    return {"recipe": recipe, "method": marker.get("method"), "backbone": backbone}


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


def _recipe(marker: dict[str, Any]) -> str | None:
    """The recipe's name; an original tower has no marker and so none."""
    recipe = marker.get("recipe")
    recipe = recipe.get("name") if isinstance(recipe, dict) else recipe
    return recipe if isinstance(recipe, str) else None


def _weights(folder: Path) -> dict[str, str]:
    """Hashes of the weight files, safetensors before ``.bin`` as transformers prefers them."""
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        if found := sorted(folder.glob(pattern)):
            return {p.name: sha256(p) for p in found}
    return {}
