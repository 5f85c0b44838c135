"""The eye: the trainable vision half of a CLIPModel, SiglipModel or Siglip2Model.

Legend: B batch, H = W image side, P patch side, D width of the global token.

Only the vision model and its projection are kept, under the names they have in the full model, so that weights map back
by name alone. CLIP's ``logit_scale`` must stay out: DeepSpeed cannot broadcast a 0-dim parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava_genhancer.convert.hf import check_finite, load_whole
from llava_genhancer.convert.open_clip import is_open_clip, load_model, read_config, read_folder
from llava_genhancer.convert.released import tower_folder
from llava_genhancer.errors import InputError, reason
from llava_genhancer.files import expand
from llava_genhancer.recipes import Recipe
from llava_genhancer.toyworld.paths import resolve

OPEN_CLIP = "open_clip"  # the model_type of what is enhanced in open_clip's own format
FULL_MODELS = {"clip": "CLIPModel", "siglip": "SiglipModel", "siglip2": "Siglip2Model"}


class VisionBackbone(nn.Module):
    """Images in, one global token out, with the local ones beside it where a recipe asks for them.

    The global token is what the reference conditions on: ``visual_projection`` of the pooled CLS, not normalised, for
    CLIP; the attention-pooled ``pooler_output`` for SigLIP (released code; the paper says "[CLS]").
    """

    def __init__(
        self, model: nn.Module, image_mean: list[float], image_std: list[float], image_size: int | None = None
    ):
        super().__init__()
        self.bypassed: list[str] = []  # names of linear layers that the model never calls
        native = self._adopt(model)
        self.image_size: int = image_size or native
        self.resized: bool = self.image_size != native
        # A tower's own size may leave a rim over, as SigLIP's 384 pixels in patches of 14 do.
        if self.resized and self.image_size % self.patch_size:
            raise InputError(
                f"image_size={self.image_size} is not a multiple of the backbone's patch, {self.patch_size}"
            )
        self.image_mean = tuple(image_mean)
        self.image_std = tuple(image_std)

    def _adopt(self, model: nn.Module) -> int:
        """Keep the vision half of ``model``; returns the side of the images that it was made for."""
        config: Any = model.config  # not kept as self.config: peft would take this for a transformers model
        vision = config.vision_config
        self.model_type: str = config.model_type
        self.vision_model: nn.Module = model.get_submodule("vision_model")
        self.visual_projection: nn.Module | None = getattr(model, "visual_projection", None)
        self.patch_size: int = vision.patch_size
        self.token_dim: int = config.projection_dim if self.visual_projection is not None else vision.hidden_size
        if self.model_type == "siglip2":  # NaFlex: the config counts patches, not pixels
            return int(vision.num_patches**0.5) * vision.patch_size
        return vision.image_size

    def keep_text(self, model: nn.Module) -> None:
        """Keep the text half too, for ``lora_scope="all"``; no loss reaches it."""
        self.text_model = model.get_submodule("text_model")
        self.text_projection = getattr(model, "text_projection", None)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 images (B, 3, H, W) as this backbone's ``pixel_values``, fp32 (B, 3, H, W)."""
        mean, std = per_channel(self.image_mean, images.device), per_channel(self.image_std, images.device)
        return images.float().div_(255).sub_(mean).div_(std)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to global tokens (B, D)."""
        pooled = self._encode(pixel_values).pooler_output
        return pooled if self.visual_projection is None else self.visual_projection(pooled)

    def tokens(self, pixel_values: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to the global token and, in its space, the N local ones (B, 1 + N, D).

        CLIP's locals go the way of its CLS, through ``post_layernorm`` and ``visual_projection``; SigLIP's are the last
        hidden states that its pooling head attends to.
        """
        encoded = self._encode(pixel_values)
        pooled, local = encoded.pooler_output, encoded.last_hidden_state
        if self.visual_projection is None:
            return torch.cat([pooled[:, None], local], 1)
        local = self.vision_model.post_layernorm(local[:, 1:])  # type: ignore[operator]
        return self.visual_projection(torch.cat([pooled[:, None], local], 1))

    def _encode(self, pixel_values: Tensor) -> Any:
        """The vision model's output."""
        if self.model_type == "siglip2":
            b, c, h, w = pixel_values.shape
            p = self.patch_size
            patches = (
                pixel_values.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
            )
            mask = torch.ones(patches.shape[:2], dtype=torch.int32, device=patches.device)
            shapes = torch.tensor([[h // p, w // p]] * b, device=patches.device)
            return self.vision_model(patches, pixel_attention_mask=mask, spatial_shapes=shapes)
        return self.vision_model(pixel_values, interpolate_pos_encoding=self.resized)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers of a channel each (3, 1, 1), made once: from Python to a GPU they make the host wait for the device."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


def locate(name: str) -> str:
    """A backbone's folder or hub id: toy-world names and ``~`` written out, released weights and files converted."""
    return tower_folder(expand(resolve(name)))


def check_backbone(name: str) -> str:
    """The backbone's ``model_type``, read from its config alone (before any weight is loaded).

    Raises:
        InputError: no such folder or id, or not a model we can enhance.
    """
    from transformers import AutoConfig

    path = locate(name)
    if is_open_clip(path):
        from llava_genhancer.enhance.eva import check_open_clip

        return check_open_clip(name, path)
    looks_local = path.startswith((".", "/")) or Path(path).exists()
    if looks_local and not (Path(path) / "config.json").is_file():
        raise InputError(f"backbone {name}: no config.json there; give the folder of a CLIPModel or SiglipModel")
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:  # a config may hold anything, and transformers then raises anything
        raise InputError(
            f"backbone {name} cannot be loaded ({reason(error)}): give a local folder, or a hub id this "
            "machine can reach (HF_TOKEN for gated ones)"
        ) from None
    if config.model_type not in FULL_MODELS:
        raise InputError(
            f"backbone {name} is a '{config.model_type}' model: needed is a CLIPModel, SiglipModel or Siglip2Model "
            "(both towers; a vision-only folder has no MMVP-VLM to measure)"
        )
    return str(config.model_type)


def load_full_model(name: str) -> nn.Module:
    """The whole two-tower model in fp32 on the CPU, every weight accounted for.

    Raises:
        InputError: as :func:`check_backbone`, or weights missing from the checkpoint or not finite.
    """
    import transformers

    model_type = check_backbone(name)
    path = locate(name)
    model: nn.Module
    if model_type == OPEN_CLIP:
        model = load_model(read_folder(path))
    else:
        model = load_whole(
            getattr(transformers, FULL_MODELS[model_type]), path, f"backbone {name}", dtype=torch.float32,
            use_safetensors=_safetensors_or_any(path),
            advice="a vision-only folder cannot be enhanced, give the full two-tower model",
        )  # fmt: skip
    check_finite(model, f"backbone {name}")
    return model


def _safetensors_or_any(path: str) -> bool | None:
    """None lets transformers choose; it reads ``.bin`` files with ``weights_only=True``."""
    return True if Path(path).is_dir() and any(Path(path).glob("*.safetensors")) else None


def load_image_statistics(name: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the backbone's own image processor.

    Raises:
        InputError: the folder has no ``preprocessor_config.json``.
    """
    from transformers import AutoImageProcessor

    if is_open_clip(locate(name)):
        preprocess = read_config(locate(name))[1]
        return list(preprocess["mean"]), list(preprocess["std"])
    try:
        processor = AutoImageProcessor.from_pretrained(locate(name))
    except (OSError, ValueError, ImportError) as error:
        raise InputError(
            f"backbone {name}: no usable image processor ({reason(error)}); its folder needs preprocessor_config.json"
        ) from None
    return list(processor.image_mean), list(processor.image_std)


def vision_half(model: nn.Module, recipe: Recipe) -> VisionBackbone:
    """The half of a whole model that is enhanced; it shares the model's weights."""
    from llava_genhancer.enhance.eva import OpenClipBackbone

    mean, std = load_image_statistics(recipe.backbone)
    kind = VisionBackbone if hasattr(model, "config") else OpenClipBackbone
    backbone = kind(model, mean, std, image_size=recipe.image_size)
    if recipe.lora_scope == "all":
        backbone.keep_text(model)
    return backbone


def load_backbone(recipe: Recipe) -> VisionBackbone:
    """The recipe's vision half in fp32 on the CPU, without LoRA, everything frozen."""
    backbone = vision_half(load_full_model(recipe.backbone), recipe)
    # OpenAI's 336 px checkpoint holds transposed, non-contiguous projections, which DeepSpeed refuses.
    for parameter in backbone.parameters():
        parameter.data = parameter.data.contiguous()
    return backbone.requires_grad_(False)


def linear_layers(backbone: VisionBackbone) -> list[str]:
    """Names of the linear layers that LoRA may adapt: all of them but those whose weight is read past them.

    Torch's ``nn.MultiheadAttention`` reads ``out_proj.weight`` directly and would never call an adapter put there
    (SigLIP's pooling head has one); so do some of timm's attentions with their ``qkv``.
    """
    fused = tuple(f"{n}." for n, m in backbone.named_modules() if isinstance(m, nn.MultiheadAttention))
    return [
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear) and name not in backbone.bypassed and not (fused and name.startswith(fused))
    ]


def add_lora(backbone: VisionBackbone, recipe: Recipe) -> None:
    """Inject LoRA adapters in place (paper: rank 16, alpha 16, dropout .1, bias "lora_only")."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=int(recipe.lora_alpha) if recipe.lora_alpha == int(recipe.lora_alpha) else recipe.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=recipe.lora_dropout,
        bias=recipe.lora_bias,
        target_modules=linear_layers(backbone),
    )
    inject_adapter_in_model(config, backbone)


def trainable_backbone_names(backbone: VisionBackbone, recipe: Recipe) -> Iterator[str]:
    """Names of the backbone parameters that learn when the backbone learns."""
    for name, _ in backbone.named_parameters():
        if recipe.lora_rank == 0:
            if not name.startswith(("text_", "text.")):
                yield name
        elif (
            ".lora_A." in name
            or ".lora_B." in name
            or (recipe.lora_bias == "lora_only" and name.endswith(".base_layer.bias"))
        ):
            yield name


@torch.no_grad()
def merged_state(backbone: VisionBackbone) -> dict[str, Tensor]:
    """State dict of the backbone with LoRA folded in, under the full model's names, in the weights' own dtype."""
    from peft.tuners.lora import LoraLayer

    deltas: dict[str, Tensor] = {}
    for name, module in backbone.named_modules():
        if isinstance(module, LoraLayer):
            deltas[f"{name}.weight"] = module.get_delta_weight("default")  # type: ignore[operator]
    state = {}
    for name, value in backbone.state_dict().items():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        state[plain] = value + deltas[plain].to(value.dtype) if plain in deltas else value
    return state
