"""Where the toy world's files lie. Imports nothing heavy."""

import os
from pathlib import Path

from llava_genhancer.files import expand

CACHE_NAME = "toyworld-v1"
_WEIGHTS = Path(__file__).parent / "weights"
SHIPPED = ("clip", "vae", "vq", "llama", "sd", "flux")


def resolve(name: str) -> str:
    """``"toyworld:clip"``, ``:vae``, ... as the absolute folders of the shipped weights; other names unchanged."""
    world, _, model = name.partition(":")
    return str((_WEIGHTS / model).resolve()) if world == "toyworld" and model in SHIPPED else name


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """The folder that holds the rendered world.

    ``cache_dir`` itself if given, else ``$LLAVA_GENHANCER_CACHE/toyworld-v1``, else
    ``~/.cache/llava_genhancer/toyworld-v1``.
    """
    if cache_dir is not None:
        return Path(expand(cache_dir)).resolve()
    base = os.environ.get("LLAVA_GENHANCER_CACHE") or "~/.cache/llava_genhancer"
    return Path(expand(base)).resolve() / CACHE_NAME
