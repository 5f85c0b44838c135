"""Versions of what is installed, the DeepSpeed JSON, and what helps where it is there."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from llava_genhancer.costs import Zero
from llava_genhancer.doctor.findings import INSTALL, NOTE, OK, PROBLEM, Finding
from llava_genhancer.recipes import Recipe

PYTHON = (3, 11)
# The lower bounds of pyproject.toml's base and [train]; a test holds them together.
REQUIRED = {
    "torch": "2.8", "torchvision": "", "transformers": "5.20", "accelerate": "1.12", "diffusers": "0.36",
    "peft": "0.18", "safetensors": "0.4", "pillow": "9", "braceexpand": "0.1.7", "torchdata": "0.11",
    "tensorboard": "2.18", "matplotlib": "3.9", "markdown-it-py": "3",
}  # fmt: skip
SOMETIMES = {"deepspeed": "0.18", "datasets": "4.0", "sentencepiece": "0.2"}


def version(package: str) -> str | None:
    """Of an installed package; None: it is not here."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        module = {"pillow": "PIL"}.get(package, package)
        return "unknown version" if importlib.util.find_spec(module) else None


def _older(found: str, wanted: str) -> bool:
    numbers = [[int(n) for n in re.findall(r"\d+", v.split("+")[0])[:2]] for v in (found, wanted)]
    return bool(wanted and numbers[0]) and numbers[0] < numbers[1]


def versions(recipe: Recipe, deepspeed: str | None) -> Iterator[Finding]:
    """Python and the packages that this recipe needs."""
    python = platform.python_version()
    if sys.version_info >= PYTHON:
        yield Finding(OK, "python", python)
    else:
        todo = "training needs Python 3.11 or newer (an enhanced tower loads in 3.10 too): make a new environment"
        yield Finding(PROBLEM, "python", python, todo)
    wanted = dict(REQUIRED)
    if deepspeed is not None:
        wanted["deepspeed"] = SOMETIMES["deepspeed"]
    if (recipe.data or "").startswith("hf:"):
        wanted["datasets"] = SOMETIMES["datasets"]
    if "siglip" in recipe.backbone.lower():
        wanted["sentencepiece"] = SOMETIMES["sentencepiece"]
    lines = []
    for package, least in wanted.items():
        found = version(package)
        if found is None:
            lines.append(Finding(PROBLEM, package, "not installed"))
        elif _older(found, least):
            lines.append(Finding(PROBLEM, package, f"{found}, needed {least} or newer"))
        else:
            lines.append(Finding(OK, package, found))
    bad = [i for i, line in enumerate(lines) if line.status == PROBLEM]
    if bad:  # one command mends them all
        lines[bad[-1]] = replace(lines[bad[-1]], todo=INSTALL)
    yield from lines


def deepspeed_json(path: str | None) -> tuple[Zero, list[Finding]]:
    """The JSON's facts about memory, and what is wrong with it."""
    if path is None:
        return Zero(), []
    try:
        text = json.loads(Path(path).read_text(encoding="utf-8"))
        section = text.get("zero_optimization", {})
        stage = int(section.get("stage", 0))
        if stage not in (0, 1, 2, 3):
            raise ValueError(f"ZeRO stage {stage}")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        todo = "give a DeepSpeed JSON; configs/deepspeed/ has zero1, zero2, zero3 and zero3_offload"
        return Zero(), [Finding(PROBLEM, "deepspeed JSON", f"{path} cannot be used: {error}", todo)]

    def number(key: str, default: int) -> int:
        value = section.get(key)
        return int(value) if isinstance(value, int | float) else default

    def offloads(key: str) -> bool:
        return isinstance(section.get(key), dict) and section[key].get("device", "none") not in ("none", None)

    zero = Zero(
        stage,
        offloads("offload_optimizer"),
        offloads("offload_param"),
        number("reduce_bucket_size", Zero.bucket),
        number("stage3_max_live_parameters", Zero.live_parameters),
    )
    moved = [n for n, on in (("optimizer", zero.offload_optimizer), ("weights", zero.offload_parameters)) if on]
    offloaded = f", {' and '.join(moved)} in host memory" if moved else ""
    findings = [Finding(OK, "deepspeed JSON", f"{path}: ZeRO-{stage}{offloaded}")]
    if "gradient_clipping" not in text:
        todo = 'add "gradient_clipping": "auto", which takes the recipe\'s max_grad_norm'
        findings.append(Finding(NOTE, "deepspeed JSON", "no gradient_clipping: DeepSpeed then clips at 1.0", todo))
    extra = [key for key in ("optimizer", "scheduler") if key in text]
    if extra:
        todo = "remove it: the recipe sets both, and one here puts all weights into one decay group"
        findings.append(Finding(NOTE, "deepspeed JSON", f"has a section for the {' and '.join(extra)}", todo))
    return zero, findings


def optional(deepspeed: str | None) -> Iterator[Finding]:
    """What is not needed, and helps."""
    if deepspeed is not None:
        compiler = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None)
        missing = [n for n, there in (("a C++ compiler", compiler), ("ninja", shutil.which("ninja"))) if not there]
        if missing:
            todo = "only DeepSpeed's offloaded optimizer needs it; `pip install ninja`, and the system's C++ compiler"
            yield Finding(NOTE, "compiler", f"{' and '.join(missing)} not found", todo)
        else:
            yield Finding(OK, "compiler", f"{compiler} and ninja")
    flash = version("flash-attn")
    yield Finding(OK, "flash-attn", flash or "not installed (optional): torch's own attention is used")
