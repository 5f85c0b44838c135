"""Tower folders: written so that every transformers from 4.37 to 5.x, and so every LLaVA fork, loads all their weights.

A tower folder is the full two-tower model. transformers 5 drops the ``vision_model.`` prefix when a vision model is
saved alone; a 4.37 reader then finds no key it knows, warns, and goes on with random weights. The full model keeps it.
The marker file ``llava_genhancer.json`` lists each weight file's SHA-256, so that a reader can tell.

This module needs torch, transformers >= 4.37 and safetensors, and runs on Python 3.10.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

from llava_genhancer.errors import InputError, reason
from llava_genhancer.files import expand, sha256, staged_folder
from llava_genhancer.machine import existing, free_bytes

MARKER = "llava_genhancer.json"
VISION_MODELS = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel", "siglip2": "Siglip2VisionModel"}
# The first release of transformers in which llava_genhancer's class builds the model; SigLIP's classes came with 4.37.
FIRST_TRANSFORMERS = {"clip": "4.37", "siglip": "4.37", "siglip2": "4.50"}
PROCESSOR_FILES = ("preprocessor_config.json",)
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "spiece.model", "tokenizer.model",
)  # fmt: skip

TOKENIZER_VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")  # one of them is enough


def save_tower(model: Any, output_dir: str | os.PathLike, *, source: str, marker: dict[str, Any]) -> Path:
    """Write a tower folder next to its final place, check it, and rename it there.

    Args:
        model: a full CLIPModel, SiglipModel or Siglip2Model.
        output_dir: the folder; an earlier tower there is replaced, anything else is refused.
        source: folder or hub id whose image processor and tokenizer go with it, byte for byte.
        marker: facts for the marker file (recipe, steps, ...).

    Returns:
        ``output_dir``.

    Raises:
        InputError: something else is in the way, the source lacks processor or tokenizer, or the disk is full.
    """
    output_dir, source = Path(expand(output_dir)), expand(source)
    check_export(source, output_dir)
    with staged_folder(output_dir) as staging:
        model.save_pretrained(staging, safe_serialization=True, max_shard_size="20GB")
        _copy_companions(source, staging)
        weights = {p.name: sha256(p) for p in sorted(staging.glob("*.safetensors"))}
        facts = {"format": 1, "model_type": model.config.model_type, **marker, "weights": weights}
        (staging / MARKER).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        check_keys(staging)
    return output_dir


def check_export(source: str | None, output_dir: str | os.PathLike, size: float = 0) -> None:
    """Refuse what would stop the export of a tower, before anything is trained; reads no weights.

    Args:
        source: folder or hub id that must have an image processor and a tokenizer; None asks for neither.
        output_dir: the tower's folder.
        size: bytes that the tower takes on the disk.

    Raises:
        InputError: with the file that ``source`` lacks, or with what is wrong with ``output_dir`` or its disk.
    """
    folder = Path(expand(output_dir))
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file, and the tower needs a folder of that name: move the file")
    if folder.exists() and any(folder.iterdir()) and not is_tower(folder):
        raise InputError(f"{folder} holds something that is not one of our towers: choose another folder")
    there = existing(folder)
    if not os.access(there, os.W_OK):
        raise InputError(f"{folder} cannot be written: no permission in {there}")
    if not is_tower(folder) and free_bytes(there) < size:
        raise InputError(
            f"{os.strerror(errno.ENOSPC)}: the tower needs {size / 2**30:.2g} GiB in {folder}, and "
            f"{free_bytes(there) / 2**30:.2g} GiB are free: make room or choose another --output_dir"
        )
    if source is None:
        return
    if find_file(source, "preprocessor_config.json") is None:  # saved by a processor class of transformers 5, or absent
        from transformers import AutoImageProcessor

        try:
            AutoImageProcessor.from_pretrained(source)
        except (OSError, ValueError, ImportError) as error:
            raise InputError(
                f"{source} has no image processor to go with the tower ({reason(error)}): add preprocessor_config.json"
            ) from None
    if not any(find_file(source, name) for name in TOKENIZER_VOCABULARIES):
        raise InputError(
            f"{source} has no tokenizer to go with the tower: add its tokenizer files "
            f"({' or '.join(TOKENIZER_VOCABULARIES)})"
        )
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(source)
    except ImportError:
        pass  # a library that this environment lacks says nothing about the files
    except Exception as error:  # tokenizer files may hold anything, and transformers then raises anything
        raise InputError(
            f"{source}: its tokenizer cannot be loaded ({reason(error)}): repair or replace its tokenizer files"
        ) from None


def _copy_companions(source: str, folder: Path) -> None:
    """Processor and tokenizer files, verbatim: re-saving them with a new transformers can lose an old reader."""
    for name in (*PROCESSOR_FILES, *TOKENIZER_FILES):
        found = find_file(source, name)
        if found:
            shutil.copyfile(found, folder / name)
    if not (folder / "preprocessor_config.json").exists():  # saved by a processor class of transformers 5
        from transformers import AutoImageProcessor

        AutoImageProcessor.from_pretrained(source).save_pretrained(folder)


def find_file(source: str, name: str) -> str | None:
    """Return the path of a file of a folder or hub id, or None if it is not there or the hub cannot be reached.

    Raises:
        InputError: ``source`` cannot be a hub id, or the hub refuses it.
    """
    if os.path.isdir(source):
        path = os.path.join(source, name)
        return path if os.path.isfile(path) else None
    from transformers.utils import cached_file

    try:
        found = cached_file(
            source,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError as error:
        raise InputError(f"{source} is neither a folder here nor a model of the hub ({reason(error)})") from None
    return None if found is None else str(found)


def is_tower(folder: str | os.PathLike) -> bool:
    """Whether a folder carries our marker."""
    return (Path(expand(folder)) / MARKER).is_file()


def read_marker(folder: str | os.PathLike) -> dict[str, Any]:
    """The facts in a tower's marker.

    Raises:
        InputError: no marker there, or one that cannot be read.
    """
    path = Path(expand(folder)) / MARKER
    try:
        marker = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} is not one of our towers: it has no {MARKER}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(marker, dict) or not isinstance(marker.get("weights"), dict):
        raise InputError(f"{path} is not a tower's marker: it lists no weights")
    return marker


def verify_tower(folder: str | os.PathLike) -> dict[str, Any]:
    """Check a tower's files against the marker and return the marker's content.

    Every weight file must have the hash that the marker lists, every key the prefix that old transformers needs, and
    the files that a fork reads beside the weights must be there.

    Raises:
        InputError: a file is missing or was changed, or weights would stay random.
    """
    folder = expand(folder)
    marker = read_marker(folder)
    if not marker["weights"]:
        raise InputError(f"{Path(folder) / MARKER} lists no weight files: export the tower again")
    for name, expected in marker["weights"].items():
        path = Path(folder) / name
        if name != os.path.basename(name):
            raise InputError(f"{Path(folder) / MARKER} lists {name!r}, which is no name of a file in it")
        if not path.is_file() or sha256(path) != expected:
            raise InputError(f"{path} is missing or not the file that was exported: export the tower again")
    check_keys(folder)
    if not {"model.safetensors", "model.safetensors.index.json"} & set(os.listdir(folder)):
        raise InputError(f"{folder} has no model.safetensors, which transformers loads: export the tower again")
    found = {name: _read_object(Path(folder) / name) for name in ("config.json", *PROCESSOR_FILES)}
    if found["config.json"].get("model_type") != marker.get("model_type"):
        raise InputError(
            f"{Path(folder) / 'config.json'}: model_type is {found['config.json'].get('model_type')!r}, but {MARKER} "
            f"lists {marker.get('model_type')!r}: export the tower again"
        )
    return marker


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON file's object.

    Raises:
        InputError: the file is missing or holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing, and LLaVA's forks read it: export the tower again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}): export the tower again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object: export the tower again")
    return value


def check_keys(folder: str | os.PathLike) -> None:
    """Every vision weight must be named ``vision_model.*``, and both towers must be there.

    Raises:
        InputError: with the first key that an old transformers would not find.
    """
    from safetensors import SafetensorError, safe_open

    keys: list[str] = []
    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(str(path), framework="pt") as f:
                keys.extend(f.keys())
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} cannot be read ({error}): export the tower again") from None
    expected = ("vision_model.", "text_model.", "visual_projection.", "text_projection.", "logit_scale", "logit_bias")
    foreign = [k for k in keys if not k.startswith(expected)]
    if foreign:
        raise InputError(f"{folder}: {foreign[0]} would not load in LLaVA's forks")
    for tower in ("vision_model.", "text_model."):
        if not any(k.startswith(tower) for k in keys):
            raise InputError(f"{folder}: no weight is named {tower}*, so it would not load in LLaVA's forks")
