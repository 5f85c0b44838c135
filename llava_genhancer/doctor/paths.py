"""Where the images are, and where the run goes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from llava_genhancer import machine
from llava_genhancer.doctor.findings import INSTALL, NOTE, OK, PROBLEM, Finding
from llava_genhancer.errors import InputError
from llava_genhancer.recipes import Recipe


def data(recipe: Recipe) -> tuple[Finding, int | None]:
    """What the images are, and how many where a cache asks (of shards an estimate)."""
    if recipe.data is None:
        if recipe.backbone.startswith("toyworld:"):
            return Finding(OK, "data", "the toy world's images, drawn when they are first needed"), None
        return Finding(NOTE, "data", "none given", "add --data PATH to have it looked at; `enhance` needs it"), None
    if recipe.data.startswith("hf:"):
        return Finding(NOTE, "data", f"{recipe.data} is on the hub, which was not asked"), None
    try:
        from llava_genhancer.data.images import ParquetSource, ShardSource, open_source

        source = open_source(recipe.data, image_folder=recipe.image_folder)
    except InputError as error:
        return Finding(PROBLEM, "data", str(error)), None
    except ImportError as error:
        return Finding(PROBLEM, "data", f"{recipe.data} could not be opened: {error}", INSTALL), None
    shards = isinstance(source, ShardSource) and not isinstance(source, ParquetSource)
    count = f"{len(source)} shards" if shards else f"{source.estimate()} images"
    found = Finding(OK, "data", f"{recipe.data}: {count}, the first image decodes")
    return found, _count(source) if recipe.cache_crops else None


def _count(source: Any) -> int | None:
    try:
        from llava_genhancer.data.records import count_images

        return count_images(source)
    except ImportError:  # the lines on versions say what is missing
        return None


def run_folder(recipe: Recipe, run_dir: Path) -> Finding:
    """Whether the run can begin there, or go on."""
    there, todo = machine.existing(run_dir), "choose another --output_dir"
    if not os.access(there, os.W_OK):
        return Finding(PROBLEM, "run folder", f"{there} may not be written", todo)
    if (run_dir / "manifest.json").is_file():
        from llava_genhancer.run import EXPORT_FIELDS, HARMLESS_FIELDS, differences, recipe_of

        try:
            changed = differences(recipe, recipe_of(run_dir), ignore=(*HARMLESS_FIELDS, *EXPORT_FIELDS))
        except InputError as error:
            changed = [str(error)]
        if changed:
            found = f"{run_dir} holds a run of another recipe ({'; '.join(changed)})"
            return Finding(PROBLEM, "run folder", found, f"{todo}, or repeat the run's own recipe")
        return Finding(OK, "run folder", f"{run_dir} holds a run of this recipe, which would go on")
    if run_dir != Path(".") and run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        return Finding(PROBLEM, "run folder", f"{run_dir} is not an empty folder", todo)
    return Finding(OK, "run folder", f"{run_dir} can be written")
