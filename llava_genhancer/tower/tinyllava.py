"""TinyLLaVA Factory's idea of a tower: a class made from a vision config, whose weights come later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava_genhancer.errors import InputError
from llava_genhancer.tower.export import VISION_MODELS, is_tower, verify_tower
from llava_genhancer.tower.processor import build_processor
from llava_genhancer.tower.tower import hidden_state, load_vision_model, naflex_inputs, read_config


class FactoryTower(nn.Module):
    """One of our towers under the names that TinyLLaVA Factory reads and saves.

    Args:
        cfg: the vision config it made from the folder; ``model_name_or_path`` is the folder.
    """

    def __init__(self, cfg: Any):
        import transformers

        super().__init__()
        folder = str(cfg.model_name_or_path)
        self.model_type, config = read_config(folder)
        self.config = cfg
        self.config.image_size = config.image_size
        self._vision_tower = getattr(transformers, VISION_MODELS[self.model_type])(cfg)
        self._image_processor = build_processor(folder, self.model_type, int(config.image_size))

    def load_model(self, vision_tower_name: str, **kwargs: Any) -> None:
        """Load and check the weights.

        Args:
            vision_tower_name: one of our folders.
            kwargs: ``pretrained_vision_tower_path``, a folder that TinyLLaVA Factory saved in an earlier stage,
                comes first; the rest are transformers' and have no use here.

        Raises:
            InputError: weights missing, or not those that were exported.
        """
        saved = kwargs.get("pretrained_vision_tower_path")
        if saved is not None and not is_tower(saved):
            self._load_saved(Path(saved) / "pytorch_model.bin")
        else:
            folder = str(saved or vision_tower_name)
            verify_tower(folder)
            self._vision_tower = load_vision_model(folder, self.model_type)
        self._vision_tower.requires_grad_(False)

    def _load_saved(self, path: Path) -> None:
        try:
            self._vision_tower.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{path} does not hold this tower's weights: {reason}") from None

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Images (B, 3, H, W) to features (B, N, D) of ``vision_feature_layer`` (default -2)."""
        inputs = naflex_inputs(x, self.config.patch_size) if self.model_type == "siglip2" else (x,)
        features = hidden_state(self._vision_tower, inputs, kwargs.get("vision_feature_layer", -2))
        tokens = kwargs.get("vision_feature_select_strategy", "patch")
        if tokens not in ("patch", "cls_patch"):
            raise InputError(f"vision_feature_select_strategy {tokens!r} is unknown: choose patch or cls_patch")
        return features[:, 1:] if tokens == "patch" and self.model_type == "clip" else features

    @property
    def vision_tower(self) -> nn.Module:
        return self._vision_tower
