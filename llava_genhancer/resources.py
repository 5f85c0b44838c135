"""Where the folders that travel with the package lie: ``configs/``, ``scripts/`` and ``eval/``. Imports nothing heavy.

In a checkout (or an editable install) they stand beside the package; a wheel carries them inside it, because a
top-level module called ``eval`` or ``scripts`` would be in everybody's way.
"""

from __future__ import annotations

from pathlib import Path

from llava_genhancer.errors import InputError

NAMES = ("configs", "eval", "scripts")
_PACKAGE = Path(__file__).resolve().parent


def resource_dir(name: str) -> Path:
    """The absolute path of one of the folders that travel with the package.

    Args:
        name: ``"configs"``, ``"eval"`` or ``"scripts"``.

    Raises:
        InputError: no such folder is part of this project, or this installation lacks it.
    """
    if name not in NAMES:
        raise InputError(f"no folder '{name}' travels with llava_genhancer; there are {', '.join(NAMES)}")
    installed = _PACKAGE / "_resources" / name
    if installed.is_dir():
        return installed
    # The neighbour counts only in our own checkout: in site-packages, a `scripts` folder is somebody else's.
    checkout = _PACKAGE.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / name).is_dir():
        return checkout / name
    raise InputError(
        f"{name}/ is neither in {installed.parent} nor in {checkout}: reinstall llava-genhancer, or use a full checkout"
    )
