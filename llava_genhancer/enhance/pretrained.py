"""Pre-trained diffusers models, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_genhancer.toyworld.paths import resolve


def load_whole(cls: Any, name: str, subfolder: str, **options: Any) -> Any:
    """A diffusers model from a folder or hub id, where it lies at the root or in a pipeline's ``subfolder``.

    Raises:
        OSError, ValueError, ...: as diffusers; ValueError too if a weight would be left random (it only warns).
    """
    path = Path(resolve(name)).expanduser()
    options["output_loading_info"] = True
    if path.is_dir():
        inside = None if (path / "config.json").is_file() else subfolder
        model, info = cls.from_pretrained(path, subfolder=inside, **options)
    else:
        try:
            model, info = cls.from_pretrained(name, subfolder=subfolder, **options)
        except (OSError, ValueError):
            model, info = cls.from_pretrained(name, **options)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{len(missing)} weights are not in its files, first: {missing[0]}")
    return model
