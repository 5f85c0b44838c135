"""The numbers of a two-tower model and of a target tokenizer that decide a recipe's cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Backbone:
    """The numbers of a two-tower model's HF config that decide its cost."""

    kind: str  # clip, siglip, siglip2
    width: int
    layers: int
    mlp: int
    patch: int
    image_size: int
    projection: int  # 0: the pooled token is used as it is
    text_width: int
    text_layers: int
    text_mlp: int
    vocabulary: int
    text_positions: int

    @property
    def token_dim(self) -> int:
        """Width of the global token that conditions the denoiser."""
        return self.projection or self.width

    def tokens(self, image_size: int) -> int:
        """Tokens in the vision tower at this image side (SigLIP has no CLS; a remainder of the patching is cut off)."""
        return (image_size // self.patch) ** 2 + (self.kind == "clip")


@dataclass(frozen=True)
class Vae:
    """The numbers of an AutoencoderKL's config, or with ``codes`` of a VQModel's, that decide its cost."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 16
    mid_attention: bool = True
    quant_conv: bool = False
    codes: int = 0  # entries of the codebook; 0: continuous latents
    code_dim: int = 0
    lowest_attention: bool = False  # attention in the blocks of the lowest level, as in taming's f16

    @property
    def downscale(self) -> int:
        """Image side over latent side."""
        return int(2 ** (len(self.channels) - 1))


FLUX_VAE = Vae()
# taming's f16 with 16 384 codes, LlamaGen's but for the width of a code.
VQ_F16 = Vae((128, 128, 256, 256, 512), 2, 256, True, True, codes=16_384, code_dim=256, lowest_attention=True)
# For predictions before anything is downloaded; a folder's own config is read where there is one.
_L14 = Backbone("clip", 1024, 24, 4096, 14, 224, 768, 768, 12, 3072, 49408, 77)
KNOWN_BACKBONES = {
    "openai/clip-vit-large-patch14": _L14,
    "openai/clip-vit-large-patch14-336": Backbone("clip", 1024, 24, 4096, 14, 336, 768, 768, 12, 3072, 49408, 77),
    "facebook/metaclip-l14-fullcc2.5b": _L14,
    "facebook/metaclip-h14-fullcc2.5b": Backbone("clip", 1280, 32, 5120, 14, 224, 1024, 1024, 24, 4096, 49408, 77),
    "google/siglip-so400m-patch14-224": Backbone("siglip", 1152, 27, 4304, 14, 224, 0, 1152, 27, 4304, 32000, 16),
    "google/siglip-so400m-patch14-384": Backbone("siglip", 1152, 27, 4304, 14, 384, 0, 1152, 27, 4304, 32000, 64),
}


def backbone_facts(config: Any) -> Backbone:
    """The facts in a loaded CLIPConfig, SiglipConfig or Siglip2Config."""
    vision, text = config.vision_config, config.text_config
    kind = config.model_type
    # NaFlex (siglip2) counts patches instead of pixels.
    native = vision.image_size if kind != "siglip2" else round(vision.num_patches**0.5) * vision.patch_size
    return Backbone(
        kind=kind,
        width=vision.hidden_size,
        layers=vision.num_hidden_layers,
        mlp=vision.intermediate_size,
        patch=vision.patch_size,
        image_size=native,
        projection=config.projection_dim if kind == "clip" else 0,
        text_width=text.hidden_size,
        text_layers=text.num_hidden_layers,
        text_mlp=text.intermediate_size,
        vocabulary=text.vocab_size,
        text_positions=text.max_position_embeddings,
    )


def vae_facts(config: Any) -> Vae:
    """The facts in an AutoencoderKL's or a VQModel's ``config.json`` (a dict)."""
    latent = config.get("latent_channels", 4 if "num_vq_embeddings" not in config else 3)
    return Vae(
        channels=tuple(config["block_out_channels"]),
        layers_per_block=config.get("layers_per_block", 1),
        latent_channels=latent,
        mid_attention=config.get("mid_block_add_attention", True),
        quant_conv=config.get("use_quant_conv", True),
        codes=config.get("num_vq_embeddings", 0),
        code_dim=(config.get("vq_embed_dim") or latent) if "num_vq_embeddings" in config else 0,
        lowest_attention="Attn" in config.get("down_block_types", [""])[-1],
    )


@dataclass(frozen=True)
class Work:
    """A denoiser's width and parameters, and one image's multiply-adds forward, with weights and between tokens."""

    width: int
    parameters: int
    linear: float
    attention: float
