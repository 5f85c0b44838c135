"""EVA-CLIP and its kind: open_clip models with a timm trunk, enhanced and exported in open_clip's own format.

Legend: B batch, H = W image side, N local tokens, D width of the shared space.

transformers' CLIPModel cannot hold them (rotary positions, SwiGLU, norms inside attention). All tensors keep
open_clip's names; LLaVA, which takes transformers' folders, cannot use the result.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava_genhancer import run
from llava_genhancer.convert.architecture import has_timm_trunk, hf_config
from llava_genhancer.convert.open_clip import own_state, read_config, write_folder
from llava_genhancer.enhance.backbones import OPEN_CLIP, VisionBackbone
from llava_genhancer.errors import InputError
from llava_genhancer.files import staged_folder
from llava_genhancer.tower.export import MARKER, TOKENIZER_FILES, check_export, find_file, read_marker


class OpenClipBackbone(VisionBackbone):
    """The vision half of an open_clip model whose trunk is timm's. The global token is its image embedding."""

    def __init__(
        self, model: nn.Module, image_mean: list[float], image_std: list[float], image_size: int | None = None
    ):
        super().__init__(model, image_mean, image_std, image_size)
        if self.resized:
            raise InputError(f"image_size={image_size}: a backbone in open_clip's format keeps its own size")

    def _adopt(self, model: nn.Module) -> int:
        self.model_type = OPEN_CLIP
        visual: Any = model.get_submodule("visual")
        self.visual = visual
        self.patch_size = visual.trunk.patch_embed.patch_size[0]
        side: int = visual.image_size[0]
        linears = {f"visual.{n}": m for n, m in visual.named_modules() if isinstance(m, nn.Linear)}
        called: set[nn.Module] = set()
        hooks = [m.register_forward_hook(lambda module, *_: called.add(module)) for m in linears.values()]
        with torch.no_grad():
            self.token_dim = visual(torch.zeros(1, 3, side, side)).shape[1]
        for hook in hooks:
            hook.remove()
        self.bypassed = [n for n, m in linears.items() if m not in called]
        return side

    def keep_text(self, model: nn.Module) -> None:
        self.text = model.get_submodule("text")

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.visual(pixel_values)

    def tokens(self, pixel_values: Tensor) -> Tensor:
        """As :meth:`VisionBackbone.tokens`; the locals go the way of the CLS, through timm's norm and head."""
        visual: Any = self.visual
        encoded = visual.trunk.forward_features(pixel_values)
        local = visual.trunk.head(visual.trunk.fc_norm(encoded[:, visual.trunk.num_prefix_tokens :]))
        return visual.head(torch.cat([visual.trunk.forward_head(encoded)[:, None], local], 1))


def check_open_clip(name: str, path: str) -> str:
    """The ``model_type`` of a backbone in open_clip's format, from its config alone.

    Raises:
        InputError: one that transformers can hold, and LLaVA use, once it is converted; or no trunk of timm's.
    """
    model_cfg = read_config(path)[0]
    try:
        hf_config(model_cfg)
    except InputError:
        if not has_timm_trunk(model_cfg) or not model_cfg.get("custom_text", False):
            raise InputError(
                f"backbone {name}: of open_clip's own kinds only those with a timm trunk can be enhanced"
            ) from None
        return OPEN_CLIP
    raise InputError(
        f"backbone {name} is in open_clip's format: `llava-genhancer convert {name} --output_dir DIR` makes a folder "
        "of it that can be enhanced and goes into LLaVA"
    )


def save_open_clip(model: nn.Module, output_dir: Path, *, source: str, marker: dict[str, Any]) -> None:
    """Write an enhanced open_clip model as :func:`tower.export.save_tower` writes transformers'.

    Args:
        source: the original's folder or hub id, whose config, preprocessing and tokenizer go with it.
        marker: facts for the marker file.

    Raises:
        InputError: something else is in the way, or the disk is full.
    """
    check_export(None, output_dir)
    with staged_folder(output_dir) as folder:
        write_folder(folder, *read_config(source), own_state(model), torch.float32)
        for name in TOKENIZER_FILES:
            if found := find_file(source, name):
                shutil.copyfile(found, folder / name)
        weights = {p.name: run.sha256(p) for p in sorted(folder.glob("*.safetensors"))}
        run.write_json(folder / MARKER, {"format": 1, "model_type": OPEN_CLIP, **marker, "weights": weights})


def verify_open_clip(folder: Path) -> dict[str, Any]:
    """The marker, once every weight file has the hash it lists.

    Raises:
        InputError: a file is missing or was changed.
    """
    marker = read_marker(folder)
    for name, expected in marker["weights"].items():
        path = folder / Path(name).name
        if not path.is_file() or run.sha256(path) != expected:
            raise InputError(f"{path} is missing or not the file that was exported: export the tower again")
    return marker
