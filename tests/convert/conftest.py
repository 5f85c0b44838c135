"""Tiny CLIPs of open_clip's own classes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

CLIP = {
    "embed_dim": 48,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 128, "head_width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
}


@pytest.fixture(scope="session")
def make_clip() -> Callable[..., tuple[dict[str, Any], torch.nn.Module]]:
    """``make(quick_gelu=..., vision=..., text=...)``: a ``model_cfg`` and its model, weights spread wide."""

    def make(quick_gelu: bool = True, vision: dict | None = None, text: dict | None = None, **other: Any):
        from open_clip import model as classes

        cfg = {**CLIP, "quick_gelu": quick_gelu, **other}
        cfg["vision_cfg"] = {**CLIP["vision_cfg"], **(vision or {})}
        cfg["text_cfg"] = {**CLIP["text_cfg"], **(text or {})}
        arguments = {k: v for k, v in cfg.items() if k != "custom_text"}
        model = (classes.CustomTextCLIP if cfg.get("custom_text") else classes.CLIP)(**arguments).eval()
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            with torch.no_grad():
                if parameter.ndim:
                    centre = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
                    parameter.copy_(centre + 0.1 * torch.randn(parameter.shape, generator=generator))
        return cfg, model

    return make


@pytest.fixture(scope="session")
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (3, 3, 32, 32) and texts (3, 77) that end, as CLIP's do, with the vocabulary's last id."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 49406, (3, 77), generator=generator)
    for row, end in enumerate((5, 40, 76)):
        tokens[row, end] = 49407
        tokens[row, end + 1 :] = 0
    return torch.randn(3, 3, 32, 32, generator=generator), tokens
