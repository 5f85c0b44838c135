"""The toy world's models as ordinary Hugging Face folders: a CLIP, a VAE, a VQ-VAE, and a SigLIP of random
weights for tests.

``python -m llava_genhancer.toyworld`` trains what is shipped of them.

Shapes: B images, 3 x 48 x 48; 6 x 6 patches of 8 pixels; embeddings of 96. VAE latents: 8 x 12 x 12. VQ: 12 x 12 ids.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, VQModel
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
)

from llava_genhancer.toyworld.paths import resolve
from llava_genhancer.toyworld.scenes import IMAGE_SIZE
from llava_genhancer.toyworld.tokenizer import MAX_LENGTH, write_tokenizer

__all__ = [
    "build_clip_config", "build_siglip_config", "build_vae", "build_vq", "resolve", "save_clip", "save_siglip",
    "save_vae",
]  # fmt: skip

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def build_clip_config(
    vocab_size: int, *, width: int = 96, layers: int = 3, text_layers: int = 2, image_size: int = IMAGE_SIZE
) -> CLIPConfig:
    """A CLIP of OpenAI's design, tiny: patches of 8 pixels, heads of 32, embeddings as wide as the towers."""
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        image_size=image_size,
        patch_size=8,
        projection_dim=width,
    )
    text = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=text_layers,
        num_attention_heads=width // 32,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=width,
        # The tokenizer's two highest ids, whether a version of transformers pools by id or by maximum.
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )
    return CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=width)


def build_siglip_config(
    vocab_size: int, *, width: int = 64, layers: int = 2, image_size: int = IMAGE_SIZE
) -> SiglipConfig:
    """A tiny SigLIP, for tests: it is never trained."""
    shared = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
    }
    vision = SiglipVisionConfig(**shared, image_size=image_size, patch_size=8)
    text = SiglipTextConfig(
        **shared,
        vocab_size=vocab_size,
        max_position_embeddings=64,
        projection_size=width,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )
    return SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())


def build_vae() -> AutoencoderKL:
    """A small ``AutoencoderKL``, f = 4 with 8 latent channels, for images in [-1, 1]."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_vq() -> VQModel:
    """A small ``VQModel``, f = 4 with 256 codes of 8 channels, for images in [-1, 1]."""
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=8,
        num_vq_embeddings=256,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
    )


def save_clip(model: CLIPModel, folder: str | Path, *, half: bool = False) -> Path:
    """Write ``model``, its image processor and its tokenizer as one Hugging Face folder; ``half`` stores float16."""
    folder = Path(folder)
    _save_model(model, folder, half)
    side = model.config.vision_config.image_size
    size = {"shortest_edge": side}
    crop = {"height": side, "width": side}
    CLIPImageProcessor(size=size, crop_size=crop, image_mean=CLIP_MEAN, image_std=CLIP_STD).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def save_siglip(folder: str | Path, *, seed: int = 0) -> Path:
    """Write a tiny SigLIP with random weights, its image processor and a tokenizer."""
    folder = Path(folder)
    tokenizer = write_tokenizer(folder)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = SiglipModel(build_siglip_config(len(tokenizer)))
    torch.random.set_rng_state(state)
    _save_model(model, folder, half=False)
    side = model.config.vision_config.image_size
    SiglipImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)
    return folder


def save_vae(vae: AutoencoderKL | VQModel, folder: str | Path, *, half: bool = False) -> Path:
    """Write a VAE or a VQ-VAE as a diffusers folder; ``half`` stores float16."""
    folder = Path(folder)
    (vae.half() if half else vae).save_pretrained(folder)
    return folder


def _save_model(model: CLIPModel | SiglipModel, folder: Path, half: bool) -> None:
    (model.half() if half else model).save_pretrained(folder)


def load_clip(folder: str | Path) -> tuple[CLIPModel, CLIPTokenizer]:
    """The CLIP of ``folder`` in float32 and evaluation mode, and its tokenizer."""
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), CLIPTokenizer.from_pretrained(folder)
