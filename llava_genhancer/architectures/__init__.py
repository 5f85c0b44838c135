"""Configs of published models, for weight files that come without one and for counting before a download."""

from pathlib import Path

_HERE = Path(__file__).parent
FLUX_VAE_CONFIG = _HERE / "flux_vae"  # FLUX.1's autoencoder
FLUX_CONFIG = _HERE / "flux_transformer"  # FLUX.1-dev
SD_UNET_CONFIG = _HERE / "sd21_unet"  # Stable Diffusion 2.1
