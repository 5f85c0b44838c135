"""Tiny models of timm's and open_clip's own classes, registered where open_clip looks for a trunk by its name."""

import json
from pathlib import Path
from typing import Any

import torch
from timm.models import build_model_with_cfg, is_model, register_model
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer


def _trunk(cls: type, name: str, side: int, fixed: dict[str, Any], given: dict[str, Any]) -> torch.nn.Module:
    cfg = {"input_size": (3, side, side), "num_classes": 0, "first_conv": "patch_embed.proj", "classifier": "head"}
    own = {n: v for n, v in given.items() if n in ("num_classes", "global_pool")}
    return build_model_with_cfg(cls, name, False, pretrained_cfg=cfg, **{**fixed, **own})


if not is_model("eva02_tiny_patch8_clip_32"):

    @register_model
    def eva02_tiny_patch8_clip_32(pretrained: bool = False, **kwargs: Any) -> Eva:
        """EVA02-L-14's blocks: rotary positions, SwiGLU, norms inside attention and MLP."""
        fixed = {
            "img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 4 * 2 / 3,
            "qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True,
            "use_rot_pos_emb": True, "ref_feat_shape": (4, 4), "global_pool": "token",
        }  # fmt: skip
        return _trunk(Eva, "eva02_tiny_patch8_clip_32", 32, fixed, kwargs)

    @register_model
    def vit_tiny_patch8_siglip_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
        """SigLIP's ViT: no CLS, attention pooling."""
        fixed = {
            "img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "class_token": False,
            "global_pool": "map",
        }  # fmt: skip
        return _trunk(VisionTransformer, "vit_tiny_patch8_siglip_32", 32, fixed, kwargs)


TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
EVA = {
    "embed_dim": 32,
    "vision_cfg": {
        "image_size": 32, "timm_model_name": "eva02_tiny_patch8_clip_32", "timm_model_pretrained": False,
        "timm_pool": "token", "timm_proj": None,
    },
    "text_cfg": TEXT,
    "custom_text": True,
}  # fmt: skip
SIGLIP = {
    "embed_dim": 48,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 32, "timm_model_name": "vit_tiny_patch8_siglip_32", "timm_model_pretrained": False,
        "timm_pool": "map", "timm_proj": "none",
    },
    "text_cfg": {
        "context_length": 16, "vocab_size": 100, "hf_tokenizer_name": "none", "width": 48, "heads": 3, "layers": 2,
        "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6},
        "act_kwargs": {"approximate": "tanh"},
    },
}  # fmt: skip
PREPROCESS = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}


def build(model_cfg: dict[str, Any]) -> torch.nn.Module:
    """The model with weights spread wide enough that nothing is decided by rounding."""
    from open_clip.model import CustomTextCLIP

    model = CustomTextCLIP(**{k: v for k, v in model_cfg.items() if k != "custom_text"}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim:
                centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(centre + 0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def write_folder(folder: Path, model_cfg: dict[str, Any]) -> torch.nn.Module:
    """An open_clip folder as its own ``push_to_hf_hub`` writes it; returns the model."""
    from open_clip.push_to_hf_hub import save_config_for_hf
    from safetensors.torch import save_file

    model = build(model_cfg)
    folder.mkdir(parents=True, exist_ok=True)
    model.visual.image_mean, model.visual.image_std = PREPROCESS["mean"], PREPROCESS["std"]
    save_config_for_hf(model, folder / "open_clip_config.json", model_cfg)
    assert json.loads((folder / "open_clip_config.json").read_text())["model_cfg"] == model_cfg
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model
