"""The run folder: atomic writes, hashes, the manifest, the lock, and which checkpoints count.

A file is either the old one or the whole new one (temporary name, fsync, rename). A folder of files (a checkpoint, a
finished stage) counts only once its ``complete.json`` exists, which is written last and lists every file with size and
SHA-256; everything without one is a leftover of a crash.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_genhancer import __version__, files
from llava_genhancer.errors import InputError
from llava_genhancer.fields import GUARD_FIELDS
from llava_genhancer.files import expand
from llava_genhancer.files import sha256 as sha256
from llava_genhancer.recipes import R, Recipe, differences, from_dict, to_dict

MANIFEST = "manifest.json"
MARKER = "complete.json"
LOCK = ".lock"
# Fields that may change between two starts of one run: they alter where or how often, never what is computed, or say
# what to do where the run would end.
HARMLESS_FIELDS = (
    "name", "data", "image_folder", "cache_folder", "keep_checkpoints", "sample_images", "sample_ode_steps",
    "stage1.save_steps", "stage1.sample_steps", "stage1.log_steps", "stage2.save_steps", "stage2.sample_steps",
    "stage2.log_steps", *GUARD_FIELDS,
)  # fmt: skip
# Fields that only the second stage or the export reads: a finished stage 1 may be reused when they differ.
EXPORT_FIELDS = ("lora_scale", "merge_dtype")


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a crash leaves the old file or the new one, never half of it."""
    path = Path(expand(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.staged_file(path) as staging:
        staging.write_bytes(data)


def write_text(path: str | os.PathLike, text: str) -> None:
    """:func:`write_bytes` in UTF-8; what is none in a file's name is written as ``\\udc80``, which JSON reads too."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_json(path: str | os.PathLike, value: Any) -> None:
    """:func:`write_text` of indented JSON; NaN and infinity are refused (they are not JSON)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """Parsed JSON.

    Raises:
        InputError: missing or malformed file, named.
    """
    try:
        return json.loads(Path(expand(path)).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:  # also numbers of a thousand digits, lists within lists
        raise InputError(f"{path} cannot be read as JSON: {error}") from None


# --- folders that count only when whole -------------------------------------------------------------------------


def content(folder: str | os.PathLike) -> list[str]:
    """Paths below ``folder`` of all files that a marker lists, sorted."""
    folder = Path(folder)
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name != MARKER
    )


def mark_complete(
    folder: str | os.PathLike, hashed: Mapping[str, Mapping[str, object]] | None = None, **facts: Any
) -> None:
    """Write the marker that makes ``folder`` count: every file below it with size and hash, and ``facts``.

    Args:
        hashed: what :func:`files.hash_files` gave of all files, which were synced; absent, they are hashed here.
    """
    folder = Path(folder)
    if hashed is None:  # the marker must not reach the disk before the files that it lists
        hashed = files.hash_files(folder, content(folder), sync=True)
    write_json(folder / MARKER, {"facts": facts, "files": dict(hashed)})


def complete_facts(folder: str | os.PathLike, *, verify: bool) -> dict[str, Any] | None:
    """The facts of a complete folder, or None. ``verify`` re-hashes every file instead of comparing sizes only."""
    folder = Path(folder)
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        for name, expected in marker["files"].items():
            if (folder / name).stat().st_size != expected["bytes"]:
                return None
        if verify:
            hashed = files.hash_files(folder, list(marker["files"]))
            if any(hashed[name]["sha256"] != expected["sha256"] for name, expected in marker["files"].items()):
                return None
        return dict(marker["facts"])
    # A marker may hold anything after a crash.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def checkpoints(stage_dir: str | os.PathLike) -> list[Path]:
    """All ``checkpoint-N`` folders of a stage, oldest first, complete or not."""
    found = [p for p in Path(stage_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def last_complete_checkpoint(stage_dir: str | os.PathLike) -> Path | None:
    """The newest checkpoint whose every file is there with the hash its marker lists."""
    for path in reversed(checkpoints(stage_dir)):
        if complete_facts(path, verify=True) is not None:
            return path
    return None


def rotate_checkpoints(stage_dir: str | os.PathLike, keep: int) -> None:
    """Delete all but the newest ``keep`` complete checkpoints, and incomplete ones older than the newest complete."""
    complete = [p for p in checkpoints(stage_dir) if complete_facts(p, verify=False) is not None]
    if not complete:
        return
    newest = int(complete[-1].name.split("-")[1])
    for path in checkpoints(stage_dir):
        if path not in complete[-keep:] and int(path.name.split("-")[1]) < newest:
            with contextlib.suppress(OSError):  # the marker goes first: a half-deleted folder must not count
                (path / MARKER).unlink()
            shutil.rmtree(path, ignore_errors=True)


# --- manifest and lock ------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Versions of what a result depends on; packages that are not installed are left out."""
    found = {"llava_genhancer": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "accelerate", "deepspeed", "diffusers", "peft", "torchdata"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def git_revision() -> str | None:
    """The commit of the checkout this package runs from, with ``+dirty`` if it has changes; None outside one."""
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return None
    try:
        ask = ["git", "-C", str(here)]
        commit = subprocess.run([*ask, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        status = subprocess.run([*ask, "status", "--porcelain"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+dirty" if status.stdout.strip() else "")


def open_run(
    run_dir: str | os.PathLike,
    recipe: Any,
    *,
    ignore: tuple[str, ...] = (*HARMLESS_FIELDS, *EXPORT_FIELDS),
    **facts: Any,
) -> None:
    """Create or re-open a run folder for ``recipe`` (call on rank 0).

    Args:
        recipe: of any recipe class.
        ignore: fields that may differ from the folder's recipe.
        facts: kept in the manifest beside it.

    Raises:
        InputError: the folder belongs to a run of another recipe (the differing fields are named), holds something
            else, or cannot be written.
    """
    run_dir = Path(expand(run_dir))
    manifest = run_dir / MANIFEST
    files.remove_leftovers(run_dir)
    if manifest.exists():
        changed = differences(recipe, recipe_of(run_dir, type(recipe)), ignore=ignore)
        # A run that was refused before it began has nothing to protect.
        if changed and _contents(run_dir) != {MANIFEST}:
            raise InputError(
                f"{run_dir} holds a run of another recipe ({'; '.join(changed)}): choose another --output_dir, "
                "or repeat the run's own recipe"
            )
    elif run_dir.exists() and _contents(run_dir):
        raise InputError(f"{run_dir} is not empty and has no {MANIFEST}: choose another --output_dir")
    try:
        old = read_json(manifest) if manifest.exists() else {}
        write_json(
            manifest,
            {
                "format": 1,
                "recipe": to_dict(recipe),
                "versions": versions(),
                "git": git_revision(),
                "command": sys.argv,
                "folder": os.getcwd(),
                "seed": recipe.seed,
                **{k: v for k, v in old.items() if k not in ("recipe", "versions", "git", "command", "folder", "seed")},
                **facts,
            },
        )
    except OSError as error:
        raise InputError(f"{run_dir} cannot be written: {error.strerror or error}") from None


def _contents(run_dir: Path) -> set[str]:
    """Names in a run folder, its lock's files aside."""
    return {p.name for p in run_dir.iterdir() if not p.name.startswith((LOCK, f".{LOCK}."))}


@typing.overload
def recipe_of(run_dir: str | os.PathLike) -> Recipe: ...
@typing.overload
def recipe_of(run_dir: str | os.PathLike, cls: type[R]) -> R: ...
def recipe_of(run_dir: str | os.PathLike, cls: type = Recipe) -> Any:
    """The recipe, of class ``cls``, in a run folder, a manifest file, or the output of `recipes NAME --json`."""
    path = Path(expand(run_dir))
    path = path / MANIFEST if path.is_dir() else path
    manifest = read_json(path)
    values = manifest.get("recipe", manifest) if isinstance(manifest, dict) else None
    if not isinstance(values, dict) or not values:
        raise InputError(f"{path} is neither a run's manifest (it has no 'recipe') nor a recipe's fields")
    try:
        return from_dict(values, cls)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


@contextlib.contextmanager
def exclusive(run_dir: str | os.PathLike, name: str = LOCK) -> Iterator[None]:
    """Hold a folder's lock ``name``; it goes with the process, however that ends.

    Raises:
        InputError: another process is working in the folder, or it cannot be created.
    """
    run_dir = Path(expand(run_dir))
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{run_dir} cannot be created or written: {error.strerror or error}") from None
    with files.locked(run_dir / name, str(run_dir)):
        yield
