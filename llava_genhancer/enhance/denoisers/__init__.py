"""Denoisers by a recipe's ``denoiser``: each says what it rebuilds, from which condition, and with which loss."""

from __future__ import annotations

from typing import Any

from llava_genhancer.enhance.denoisers.flow import FlowDenoiser
from llava_genhancer.enhance.denoisers.masked import MaskedDenoiser
from llava_genhancer.enhance.denoisers.unet import UNetDenoiser

# A denoiser has ``from_recipe(recipe, target, image_size)``, ``width``, ``forward(target, condition, **draws) -> loss``
# in fp32, where absent draws come from the global RNG, and ``sample(condition, generator) -> target``.
DENOISERS: dict[str, Any] = {"flow": FlowDenoiser, "masked": MaskedDenoiser, "unet": UNetDenoiser}
