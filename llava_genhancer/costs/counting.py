"""Networks too irregular for a formula, counted on their real class without memory for a weight."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from llava_genhancer.architectures import SD_UNET_CONFIG
from llava_genhancer.costs.facts import Work
from llava_genhancer.toyworld.paths import resolve


@lru_cache(maxsize=8)
def count_unet(name: str, latent_side: int, text: int) -> Work:
    """What Stable Diffusion's UNet costs.

    Args:
        name: a diffusers folder, whose ``unet/config.json`` is read; for anything else Stable Diffusion 2.1's.
        latent_side: side of the latents.
        text: tokens that it attends to.
    """
    import torch
    from diffusers import UNet2DConditionModel
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    folders = [Path(resolve(name)).expanduser() / sub for sub in ("unet", "")]
    folder = next((f for f in folders if (f / "config.json").is_file()), SD_UNET_CONFIG)
    config = UNet2DConditionModel.load_config(folder)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        latents = torch.zeros(1, unet.config.in_channels, latent_side, latent_side)
        told = torch.zeros(1, text, unet.config.cross_attention_dim)
        step = torch.zeros(1)
    # Plain matmuls in attention: only there are two activations multiplied.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        unet(latents, step, told)
    flops = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    attention = sum(n for op, n in flops.items() if "bmm" in op)
    parameters = sum(p.numel() for p in unet.parameters())
    return Work(unet.config.block_out_channels[0], parameters, (sum(flops.values()) - attention) / 2, attention / 2)
