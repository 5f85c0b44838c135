"""Enhanced weights that others have released, by name; and any weight file as a tower, converted once and kept.

Names and files are those of the authors' own READMEs (mashijie1028/GenHancer, baaivision/DIVA). DCR's are on a
file-sharing site (boyuh/DCR): download a folder and give its path to ``convert`` with ``--like``.

DIVA's OpenAI scores are of the CLS plus the mean of 76 patches drawn at random; here, as for every tower, the CLS
counts alone, so they do not compare.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llava_genhancer.convert import hf
from llava_genhancer.convert.checkpoints import SUFFIXES
from llava_genhancer.convert.convert import convert
from llava_genhancer.errors import InputError
from llava_genhancer.files import expand, locked, staged_folder
from llava_genhancer.tower.export import is_tower

log = logging.getLogger(__name__)
PATIENCE = 1800.0  # seconds to wait for another process's conversion


@dataclass(frozen=True)
class Release:
    """A hub repository's folder or file, and the original with what it lacks: architecture, processor, tokenizer."""

    method: Literal["genhancer", "diva"]
    path: str
    like: str


_GENHANCER = {
    "openai-l14-224": ("OpenAICLIP", "openai/clip-vit-large-patch14"),
    "openai-l14-336": ("OpenAICLIP", "openai/clip-vit-large-patch14-336"),
    "metaclip-l14-224": ("MetaCLIP", "facebook/metaclip-l14-fullcc2.5b"),
    "metaclip-h14-224": ("MetaCLIP", "facebook/metaclip-h14-fullcc2.5b"),
    "siglip-so400m-224": ("SigLIP", "google/siglip-so400m-patch14-224"),
    "siglip-so400m-384": ("SigLIP", "google/siglip-so400m-patch14-384"),
}
# DIVA's files are open_clip's; its name is enough where the tokenizer is CLIP's own.
_DIVA = {
    "openai-l14-224": ("OpenAICLIP/OpenAI-ViT-L-14-224", "ViT-L-14-quickgelu"),
    "openai-l14-336": ("OpenAICLIP/OpenAI-ViT-L-14-336", "ViT-L-14-336-quickgelu"),
    "metaclip-l14-224": ("MetaCLIP/MetaCLIP-ViT-L-14", "ViT-L-14-quickgelu"),
    "metaclip-h14-224": ("MetaCLIP/MetaCLIP-ViT-H-14", "ViT-H-14-quickgelu"),
    "siglip-so400m-224": ("SigLIP/SigLIP-ViT-SO-14-224", "google/siglip-so400m-patch14-224"),
    "siglip-so400m-384": ("SigLIP/SigLIP-ViT-SO-14-384", "google/siglip-so400m-patch14-384"),
    "dfn-h14-224": ("DFN/DFN-ViT-H-14-224", "ViT-H-14-quickgelu"),
    "dfn-h14-378": ("DFN/DFN-ViT-H-14-378", "ViT-H-14-378-quickgelu"),
}
RELEASED: dict[str, Release] = {
    **{
        f"genhancer:{name}": Release("genhancer", f"hf://msj9817/GenHancer/{folder}/{like.split('/')[1]}", like)
        for name, (folder, like) in _GENHANCER.items()
    },
    **{f"diva:{name}": Release("diva", f"hf://BAAI/DIVA/{file}.pth", like) for name, (file, like) in _DIVA.items()},
}


def tower_folder(name: str) -> str:
    """A folder or hub id, as transformers or open_clip take it, for whatever a user may call a tower.

    A name of :data:`RELEASED` is fetched and completed, a weight file converted, both once however many processes ask,
    into ``$LLAVA_GENHANCER_CACHE/towers``; what is inside a hub repository
    (``hf://owner/name/folder``) is fetched; other names stay.

    Raises:
        InputError: it cannot be fetched, or a weight file says too little (`convert` takes what it lacks).
    """
    if name.startswith(("genhancer:", "diva:")) and name not in RELEASED:
        raise InputError(f"{name} is no released tower: choose {', '.join(RELEASED)}")
    if name in RELEASED:
        release = RELEASED[name]
        facts = {"method": release.method, "backbone": name.split(":")[1]}
        return str(
            _converted(
                _cache() / name.replace(":", "-"), lambda to: convert(release.path, to, like=release.like, facts=facts)
            )
        )
    path = Path(expand(name))
    if path.suffix in SUFFIXES and path.is_file():
        stat = path.stat()
        key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
        try:
            return str(_converted(_cache() / f"{path.stem}-{key}", lambda to: convert(str(path), to)))
        except InputError as error:
            raise InputError(f"{error} (of `llava-genhancer convert {name} --output_dir DIR`)") from None
    return hf.local(name)


def _converted(folder: Path, write: Callable[[Path], object]) -> Path:
    """Have ``write`` fill ``folder``, unless there is a tower; one process at a time, the others wait and use it.

    Where the lock does not reach other hosts, or its holder takes longer than any conversion, several processes
    convert: each into a folder of its own, and the first whole tower stays.
    """
    if is_tower(folder):
        return folder
    with contextlib.ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder.with_name(f".{folder.name}.lock"), str(folder), wait=PATIENCE))
        except OSError as error:
            raise InputError(f"{folder} cannot be written: {error.strerror or error}") from None
        except InputError as error:
            log.warning("%s; converting without a lock", error)
        if not is_tower(folder):
            with staged_folder(folder, keep=is_tower) as staging:
                write(staging)
    return folder


def _cache() -> Path:
    return Path(expand(os.environ.get("LLAVA_GENHANCER_CACHE") or "~/.cache/llava_genhancer")) / "towers"
