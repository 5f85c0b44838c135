"""What a checkpoint's model looks like, in open_clip's words (its ``model_cfg``) and in transformers' (a config).

Both are read off real models: open_clip's is built on the meta device and asked for its heads, activations and norms,
so that a default of open_clip's or timm's is never repeated here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llava_genhancer.convert.weights import with_text_prefix
from llava_genhancer.errors import InputError, reason

ModelCfg = dict[str, Any]
CLIP_VOCABULARY = 49408
HEAD_WIDTH = 64  # of every CLIP whose shape open_clip does not list


def build_open_clip(model_cfg: ModelCfg, device: str = "cpu") -> nn.Module:
    """open_clip's model, not yet trained, in evaluation mode.

    Raises:
        InputError: open_clip or timm refuses the configuration.
    """
    from open_clip.model import CLIP, CustomTextCLIP

    cfg = {k: dict(v) if isinstance(v, dict) else v for k, v in model_cfg.items()}
    if "multimodal_cfg" in cfg or cfg["text_cfg"].get("hf_model_name"):
        raise InputError("CoCa and text towers of other libraries are not CLIPs that can be converted or enhanced here")
    try:
        with torch.device(device):
            model = (CustomTextCLIP if cfg.pop("custom_text", False) else CLIP)(**cfg)
    except (TypeError, KeyError, RuntimeError, ValueError, AssertionError) as error:
        raise InputError(f"open_clip cannot build this model_cfg ({reason(error)})") from None
    return model.eval()


def has_timm_trunk(model_cfg: ModelCfg) -> bool:
    """Whether the vision tower is one of timm's, as SigLIP's and EVA-CLIP's are."""
    return bool(model_cfg["vision_cfg"].get("timm_model_name"))


def infer_model_cfg(state: Mapping[str, Tensor], *, quick_gelu: bool | None, head_width: int | None) -> ModelCfg:
    """The ``model_cfg`` of a checkpoint that came without one, from its tensors.

    Args:
        state: names as :func:`read_state` gives them.
        quick_gelu: which GELU a plain ViT uses; its tensors do not say.
        head_width: of its vision tower; default: what open_clip uses for a tower of this width and depth, else 64.

    Raises:
        InputError: a ResNet, not told which GELU, a vocabulary that is not CLIP's, or a trunk of timm's that fits none
            or several of open_clip's models.
    """
    if "visual.conv1.weight" not in state or "visual.class_embedding" not in state:
        if "visual.layer1.0.conv1.weight" in state:
            raise InputError("it is a CLIP with a ResNet: only vision transformers can be converted")
        return _of_same_shapes(state)
    if quick_gelu is None:
        raise InputError(
            "its tensors do not say which GELU it uses: add --activation quick_gelu (OpenAI, MetaCLIP, DFN) or gelu "
            "(LAION, DataComp), or --like MODEL for a model of the same kind"
        )
    if state["text.token_embedding.weight"].shape[0] != CLIP_VOCABULARY:
        raise InputError("its vocabulary is not CLIP's, so how its texts end is not known: add --like MODEL")
    width, _, patch, _ = state["visual.conv1.weight"].shape
    grid = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5)
    text_width = state["text.ln_final.weight"].shape[0]
    layers, text_layers = (_depth(state, tower) for tower in ("visual.transformer.", "text.transformer."))
    known = [c for _, c in _packaged() if not has_timm_trunk(c)]
    head_width = head_width or _only(
        {c["vision_cfg"].get("head_width", 64) for c in known if _sizes(c["vision_cfg"]) == (width, layers)}
    )
    text_heads = _only({c["text_cfg"]["heads"] for c in known if _sizes(c["text_cfg"]) == (text_width, text_layers)})
    return {
        "embed_dim": state["visual.proj"].shape[1],
        "quick_gelu": quick_gelu,
        "vision_cfg": {
            "image_size": grid * patch,
            "layers": layers,
            "width": width,
            "head_width": head_width or HEAD_WIDTH,
            "patch_size": patch,
            "mlp_ratio": _ratio(state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0], width),
        },
        "text_cfg": {
            "context_length": state["text.positional_embedding"].shape[0],
            "vocab_size": state["text.token_embedding.weight"].shape[0],
            "width": text_width,
            "heads": text_heads or max(1, text_width // HEAD_WIDTH),
            "layers": text_layers,
            "mlp_ratio": _ratio(state["text.transformer.resblocks.0.mlp.c_fc.weight"].shape[0], text_width),
        },
    }


def hf_config(model_cfg: ModelCfg) -> Any:
    """The CLIPConfig or SiglipConfig of a model that computes the same.

    Raises:
        InputError: transformers has no class that could hold it.
    """
    model: Any = build_open_clip(model_cfg, "meta")
    text = getattr(model, "text", model)
    blocks = text.transformer.resblocks
    shared_text = {
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.context_length,
        "hidden_size": text.token_embedding.embedding_dim,
        "intermediate_size": blocks[0].mlp.c_fc.out_features,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": blocks[0].attn.num_heads,
        "hidden_act": _activation(blocks[0].mlp.gelu),
        "layer_norm_eps": text.ln_final.eps,
    }
    _hold(isinstance(blocks[0].ls_1, nn.Identity), "its blocks have layer scale")
    build = _siglip_config if has_timm_trunk(model_cfg) else _clip_config
    return build(model_cfg, model, shared_text)


def model_cfg_of(config: Any) -> ModelCfg:
    """The ``model_cfg`` for a CLIPConfig or SiglipConfig: the inverse of :func:`hf_config`.

    Raises:
        InputError: open_clip has no such model. It takes SigLIP's trunk by name from timm.
    """
    vision, text = config.vision_config, config.text_config
    if config.model_type == "siglip":
        cfg = packaged_siglip(config)
        cfg["text_cfg"]["act_kwargs"] = {"approximate": "tanh" if text.hidden_act == "gelu_pytorch_tanh" else "none"}
        return cfg
    if config.model_type != "clip":
        raise InputError(f"a '{config.model_type}' model has no place in open_clip's format")
    acts = {vision.hidden_act, text.hidden_act}
    quick = acts == {"quick_gelu"}
    _hold(quick or "quick_gelu" not in acts, "its towers use different GELUs", "open_clip")
    pooling = {} if text.eos_token_id in (2, text.vocab_size - 1) else {"pool_type": "eos", "eos_id": text.eos_token_id}
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": quick,
        "vision_cfg": {
            "image_size": vision.image_size,
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "patch_size": vision.patch_size,
            "mlp_ratio": _ratio(vision.intermediate_size, vision.hidden_size),
            **_kwargs(vision),
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "mlp_ratio": _ratio(text.intermediate_size, text.hidden_size),
            **_kwargs(text),
            **pooling,
        },
    }


def _clip_config(model_cfg: ModelCfg, model: Any, text_config: dict[str, Any]) -> Any:
    from open_clip.transformer import VisionTransformer
    from transformers import CLIPConfig

    visual, text = model.visual, getattr(model, "text", model)
    _hold(isinstance(visual, VisionTransformer), "its vision tower is no ViT")
    _hold(visual.pool_type == "tok" and visual.attn_pool is None, f"its vision tower pools by '{visual.pool_type}'")
    _hold(isinstance(visual.ln_pre, nn.LayerNorm) and not visual.final_ln_after_pool, "its norms stand elsewhere")
    _hold(visual.proj is not None and isinstance(text.text_projection, nn.Parameter), "it lacks CLIP's projections")
    _hold(text.attn_mask is not None, "its text tower is not causal")
    pool = getattr(text, "pool_type", None) or model.text_pool_type
    _hold(pool in ("argmax", "eos"), f"its text tower pools by '{pool}'")
    blocks, (side, other), (patch, _) = visual.transformer.resblocks, visual.image_size, visual.patch_size
    _hold(side == other, "its images are not square")
    last = text_config["vocab_size"] - 1
    eos = last if pool == "argmax" else getattr(text, "eos_id", None) or model.text_eos_id
    return CLIPConfig(
        projection_dim=model_cfg["embed_dim"],
        text_config={**text_config, "bos_token_id": last - 1, "eos_token_id": eos, "pad_token_id": eos},
        vision_config={
            "image_size": side,
            "patch_size": patch,
            "hidden_size": visual.conv1.out_channels,
            "intermediate_size": blocks[0].mlp.c_fc.out_features,
            "num_hidden_layers": len(blocks),
            "num_attention_heads": blocks[0].attn.num_heads,
            "hidden_act": _activation(blocks[0].mlp.gelu),
            "layer_norm_eps": visual.ln_post.eps,
        },
    )


def _siglip_config(model_cfg: ModelCfg, model: Any, text_config: dict[str, Any]) -> Any:
    from timm.layers import AttentionPoolLatent
    from transformers import SiglipConfig

    trunk, text = model.visual.trunk, getattr(model, "text", model)
    pooling = isinstance(getattr(trunk, "attn_pool", None), AttentionPoolLatent)
    _hold(pooling, f"its vision tower is timm's {type(trunk).__name__} without SigLIP's pooling")
    _hold(
        getattr(trunk, "cls_token", None) is None and isinstance(trunk.norm_pre, nn.Identity),
        "its trunk is no plain ViT",
    )
    _hold(len(model.visual.head) == 0 and isinstance(trunk.head, nn.Identity), "its pooled token is projected")
    _hold(text.attn_mask is None and text.pool_type == "last", "its text tower is not SigLIP's")
    _hold(isinstance(text.text_projection, nn.Linear), "its text head has no bias")
    block = trunk.blocks[0]
    side, other = model.visual.image_size
    _hold(side == other, "its images are not square")
    return SiglipConfig(
        text_config={
            **text_config,
            "projection_size": text.text_projection.out_features,
            "bos_token_id": None,
            "eos_token_id": 1,
        },
        vision_config={
            "image_size": side,
            "patch_size": trunk.patch_embed.patch_size[0],
            "hidden_size": trunk.embed_dim,
            "intermediate_size": block.mlp.fc1.out_features,
            "num_hidden_layers": len(trunk.blocks),
            "num_attention_heads": block.attn.num_heads,
            "hidden_act": _activation(block.mlp.act),
            "layer_norm_eps": trunk.norm.eps,
        },
    )


def packaged_siglip(config: Any) -> ModelCfg:
    """open_clip's SigLIP of a SiglipConfig's shape, with open_clip's activations; equal ones where it has a choice.

    Raises:
        InputError: it has none: it takes SigLIP's trunk by its name in timm.
    """
    text, fits = config.text_config, []
    for name, cfg in _packaged():
        if not has_timm_trunk(cfg) or _sizes(cfg["text_cfg"]) != (text.hidden_size, text.num_hidden_layers):
            continue
        if cfg["vision_cfg"].get("timm_pool") != "map" or cfg["text_cfg"]["vocab_size"] != text.vocab_size:
            continue
        theirs = hf_config(cfg)
        if _shape(theirs) == _shape(config):
            fits.append((theirs.vision_config.hidden_act != config.vision_config.hidden_act, name, cfg))
    if not fits:
        raise InputError("open_clip takes SigLIP's trunk by its name in timm, and knows none of this shape")
    return min(fits, key=lambda fit: fit[:2])[2]


def _shape(config: Any) -> list[Any]:
    vision = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "image_size",
        "patch_size",
    )
    text = (*vision[:4], "vocab_size", "max_position_embeddings")
    return [*(getattr(config.vision_config, n) for n in vision), *(getattr(config.text_config, n) for n in text)]


def _of_same_shapes(state: Mapping[str, Tensor]) -> ModelCfg:
    """The one packaged model with a trunk of timm's whose tensors have these names and shapes."""
    shapes, fits = {n: v.shape for n, v in state.items()}, {}
    text = [state[f"text.{n}"].shape for n in ("token_embedding.weight", "positional_embedding")]
    for name, cfg in _packaged():
        if not has_timm_trunk(cfg) or "vocab_size" not in cfg["text_cfg"] or _text_shapes(cfg["text_cfg"]) != text:
            continue
        model = build_open_clip(cfg, "meta")
        if {n: v.shape for n, v in with_text_prefix(model.state_dict()).items()} == shapes:
            fits[name] = cfg
    if len(fits) != 1:
        which = f"of the shapes of several of open_clip's models: add --like and one of {', '.join(fits)}"
        raise InputError(
            f"it is {which if fits else 'no model that open_clip knows: give it with open_clip_config.json'}"
        )
    return next(iter(fits.values()))


def _text_shapes(cfg: dict[str, Any]) -> list[torch.Size]:
    return [torch.Size((cfg[n], cfg["width"])) for n in ("vocab_size", "context_length")]


def _packaged() -> Iterator[tuple[str, ModelCfg]]:
    """open_clip's own configurations of two-tower models whose text tower is its own."""
    import open_clip

    for name in open_clip.list_models():
        cfg = open_clip.get_model_config(name)
        if "multimodal_cfg" not in cfg and "hf_model_name" not in cfg["text_cfg"]:
            yield name, cfg


def _sizes(cfg: dict[str, Any]) -> tuple[int | None, int | None]:
    return cfg.get("width"), cfg.get("layers")


def _only(values: set[int]) -> int | None:
    return values.pop() if len(values) == 1 else None


def _depth(state: Mapping[str, Tensor], tower: str) -> int:
    return len({n.split("resblocks.")[1].split(".")[0] for n in state if n.startswith(f"{tower}resblocks.")})


def _ratio(inner: int, width: int) -> float:
    """open_clip multiplies and rounds down; half a unit more keeps ``inner`` whatever the float does."""
    return inner // width if inner % width == 0 else (inner + 0.5) / width


def _activation(module: nn.Module) -> str:
    from open_clip.transformer import QuickGELU

    if isinstance(module, QuickGELU):
        return "quick_gelu"
    tanh = getattr(module, "approximate", "none") == "tanh" or type(module).__name__ == "GELUTanh"
    _hold(isinstance(module, nn.GELU) or tanh, f"{type(module).__name__} is no GELU")
    return "gelu_pytorch_tanh" if tanh else "gelu"


def _kwargs(config: Any) -> dict[str, Any]:
    """What one tower of open_clip must be told beyond its defaults, exact GELU and norms with eps 1e-5."""
    extra: dict[str, Any] = {}
    if config.hidden_act == "gelu_pytorch_tanh":
        extra["act_kwargs"] = {"approximate": "tanh"}
    elif config.hidden_act not in ("gelu", "quick_gelu"):
        raise InputError(f"open_clip has no activation '{config.hidden_act}'")
    if config.layer_norm_eps != 1e-5:
        extra["norm_kwargs"] = {"eps": config.layer_norm_eps}
    return extra


def _hold(condition: bool, why: str, who: str = "transformers' CLIPModel and SiglipModel") -> None:
    if not condition:
        raise InputError(
            f"{who} cannot hold it: {why}; in open_clip's own format (--to open_clip) it can be measured, and "
            "EVA-CLIP's kind enhanced"
        )
