"""Can this machine run a recipe? Versions, devices, memory, disk and paths, each with what to do about it.

Runs on the base install (torch, transformers 4.37+, Python 3.10): what is missing is reported and never imported.
Nothing is downloaded and the hub is not asked.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_genhancer import costs
from llava_genhancer.costs import GIB, Backbone, Vae, Zero
from llava_genhancer.errors import InputError
from llava_genhancer.recipes import Recipe
from llava_genhancer.toyworld.paths import resolve

OK, NOTE, PROBLEM = "OK", "note", "PROBLEM"
INSTALL = 'pip install "llava-genhancer[train]"'
PYTHON = (3, 11)
# The lower bounds of pyproject.toml's base and [train]; a test holds them together.
REQUIRED = {
    "torch": "2.8", "torchvision": "", "transformers": "5.20", "accelerate": "1.12", "diffusers": "0.36",
    "peft": "0.18", "safetensors": "0.4", "pillow": "9", "braceexpand": "0.1.7", "torchdata": "0.11",
    "tensorboard": "2.18", "matplotlib": "3.9", "markdown-it-py": "3",
}  # fmt: skip
SOMETIMES = {"deepspeed": "0.18", "datasets": "4.0", "sentencepiece": "0.2"}
_UNBROKEN: Any = {"break_long_words": False, "break_on_hyphens": False}  # paths stay copyable
CPU_DAYS = 3.0  # a training that takes longer than this on the CPU wants a GPU
A100 = 312e12  # dense bf16 FLOP/s, for a forecast where no GPU can be asked
WORKER_BYTES = 0.5 * GIB  # a data worker: imports and a shuffle block of undecoded images


@dataclass(frozen=True)
class Finding:
    """One line of the list: how it is, what it is about, what was found, and what to do."""

    status: str
    what: str
    found: str
    todo: str = ""


@dataclass(frozen=True)
class Device:
    """A GPU as torch sees it; bytes."""

    name: str
    free: float
    total: float
    capability: tuple[int, int]


def examine(recipe: Recipe, *, deepspeed: str | None = None, gpus: int | None = None, run_dir: str = ".") -> int:
    """Print what this machine has and lacks for a recipe.

    Args:
        recipe: what would be run.
        deepspeed: path of the DeepSpeed JSON it would be run with.
        gpus: predict for this many GPUs instead of those found here.
        run_dir: where the run would go.

    Returns:
        0 if the recipe can run here, 1 if something must be done first.
    """
    problems = _show(inspect(recipe, deepspeed=deepspeed, gpus=gpus, run_dir=run_dir))
    count = f"{problems} problem{'s' if problems > 1 else ''} above"
    print(f"\n{recipe.name} {f'cannot run here yet: {count}' if problems else 'can run here'}")
    return 1 if problems else 0


def examine_fork(fork: str, tower: str) -> int:
    """Print which class a LLaVA fork would build for a tower folder, and what to do about it.

    Args:
        fork: the fork's checkout; its source is read and nothing of it is imported.
        tower: one of our tower folders.

    Returns:
        0 if the folder's path is all that the fork needs, 1 if something must be done first.

    Raises:
        InputError: no fork of a known layout there, or not a tower as it was exported.
    """
    from llava_genhancer.tower.choice import WORKS, fork_choice

    choice = fork_choice(fork, tower)
    works = choice.verdict == WORKS
    chosen = f"{choice.chosen} for {tower}" if choice.chosen else f"nothing for {tower}"
    findings = [
        Finding(OK, "tower", f"{tower}: a {choice.model_type} folder, every weight file as exported"),
        Finding(OK, "fork", f"{choice.rule.function} in {choice.rule.path}"),
        Finding(OK if works else PROBLEM, "chooses", f"{chosen}: {choice.reason}", choice.todo),
    ]
    _show(findings)
    print(
        f"\n{'--vision_tower (or --image_tower) with this path is enough' if works else 'something must be done first'}"
    )
    return 0 if works else 1


def _show(findings: Iterable[Finding]) -> int:
    """Print findings; the number of problems among them."""
    problems = 0
    for finding in findings:
        problems += finding.status == PROBLEM
        head = f"{finding.status:8} {finding.what:16} "
        for start, text in ((head, finding.found), (f"{'':{len(head)}}-> ", finding.todo)):
            if text:
                print(textwrap.fill(start + text, 118, subsequent_indent=" " * len(head), **_UNBROKEN))
    return problems


def inspect(
    recipe: Recipe, *, deepspeed: str | None = None, gpus: int | None = None, run_dir: str = "."
) -> Iterator[Finding]:
    """The findings behind :func:`examine`, in its order."""
    if gpus is not None and gpus < 1:
        raise InputError(f"--gpus {gpus}: one at least")
    yield from _versions(recipe, deepspeed)
    zero, findings = _deepspeed(deepspeed)
    yield from findings
    torch = _torch()
    devices = _devices(torch)
    ranks = gpus or len(devices) or 1
    backbone, finding = _backbone(recipe)
    yield finding
    vae, finding = _target(recipe)
    yield finding
    if recipe.denoiser_weights is not None:
        yield _denoiser(recipe)
    yield _data(recipe)
    yield from _device_lines(recipe, torch, devices, gpus)
    if backbone is not None:
        yield from _work(recipe, backbone, vae, torch, devices, ranks)
        yield from _shapes(recipe, backbone, vae, ranks)
        yield from _memory(recipe, backbone, vae, zero, ranks, devices)
        yield _disk(recipe, backbone, vae, zero, Path(run_dir).expanduser())
    yield _run_folder(recipe, Path(run_dir).expanduser())
    yield from _optional(deepspeed)


# --- versions -------------------------------------------------------------------------------------------------------


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        module = {"pillow": "PIL"}.get(package, package)
        return "unknown version" if importlib.util.find_spec(module) else None


def _older(found: str, wanted: str) -> bool:
    numbers = [[int(n) for n in re.findall(r"\d+", v.split("+")[0])[:2]] for v in (found, wanted)]
    return bool(wanted and numbers[0]) and numbers[0] < numbers[1]


def _versions(recipe: Recipe, deepspeed: str | None) -> Iterator[Finding]:
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
        found = _version(package)
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


def _deepspeed(path: str | None) -> tuple[Zero, list[Finding]]:
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


# --- devices --------------------------------------------------------------------------------------------------------


def _torch() -> Any:
    try:
        import torch

        return torch
    except (ImportError, OSError):  # not installed, or a library of its own is missing
        return None


def _devices(torch: Any) -> list[Device]:
    found = []
    if torch is not None and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            capability = torch.cuda.get_device_capability(index)
            found.append(Device(torch.cuda.get_device_name(index), free, total, capability))
    return found


def _device_lines(recipe: Recipe, torch: Any, devices: list[Device], gpus: int | None) -> Iterator[Finding]:
    for index, device in enumerate(devices):
        found = f"{device.name}: {_gib(device.free)} of {_gib(device.total)} free"
        if recipe.precision == "bf16" and device.capability < (8, 0):
            todo = "bf16 needs an Ampere GPU or newer: use another one, or --precision fp32"
            yield Finding(PROBLEM, f"GPU {index}", found, todo)
        elif device.free < 0.9 * device.total:
            yield Finding(NOTE, f"GPU {index}", found, "another process uses it; `nvidia-smi` names it")
        else:
            yield Finding(OK, f"GPU {index}", found)
    if devices and gpus is not None and gpus > len(devices):
        todo = f"launch over several nodes, or leave --gpus out to predict for {len(devices)}"
        yield Finding(NOTE, "GPUs", f"{gpus} asked for, {len(devices)} here", todo)
    if not devices and torch is not None and shutil.which("nvidia-smi"):
        why = "was built without CUDA" if torch.version.cuda is None else "does not fit the driver"
        todo = "install the torch build for this driver: https://pytorch.org/get-started"
        yield Finding(NOTE, "GPUs", f"nvidia-smi is here, but this torch {why}", todo)


def _matmul_rate(torch: Any, device: str, dtype: Any, side: int, seconds: float = 0.2) -> float:
    """FLOP/s of a square matrix product, the best of what fits into ``seconds``."""
    a = torch.randn(side, side, device=device).to(dtype)
    fastest, end = float("inf"), time.perf_counter() + seconds
    while fastest == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - start)
    return float(2 * side**3 / fastest)


def _work(
    recipe: Recipe, backbone: Backbone, vae: Vae, torch: Any, devices: list[Device], ranks: int
) -> Iterator[Finding]:
    """How long the counted work takes at least; a GPU is a must where the CPU would take days."""
    work = [costs.total_flops(recipe, stage, backbone, vae) for stage in (1, 2)]
    counted = f"stage 1 {_flops(work[0])}, stage 2 {_flops(work[1])}"
    if torch is None:
        return
    if devices:
        try:
            rate = _matmul_rate(torch, "cuda", torch.bfloat16 if recipe.precision == "bf16" else torch.float32, 8192)
        except RuntimeError:  # no memory free on it; the lines on memory say so
            yield Finding(OK, "compute", counted)
            return
        least = _hours(sum(work) / rate / ranks / 3600)
        basis = f"{_count(ranks, 'GPU')} at this one's measured {rate / 1e12:.0f} TFLOP/s"
        yield Finding(OK, "compute", f"{counted}: at least {least} on {basis}")
        return
    hours = sum(work) / _matmul_rate(torch, "cpu", torch.float32, 512) / 3600
    cores = f"{_count(os.cpu_count() or 1, 'CPU core')}, no GPU"
    if hours > CPU_DAYS * 24:
        gpu = f"{_count(ranks, 'A100')} would take at least {_hours(sum(work) / A100 / ranks / 3600)}"
        yield Finding(PROBLEM, "devices", cores, f"use a machine with a GPU ({gpu}); the recipe `tiny` runs here")
    else:
        yield Finding(OK, "devices", cores)
    yield Finding(OK, "compute", f"{counted}: at least {_hours(hours)} on this CPU")


# --- memory and disk ------------------------------------------------------------------------------------------------


def free_bytes(path: str | Path) -> float:
    """Bytes that may still be written where ``path`` lies."""
    return float(shutil.disk_usage(path).free)


def host_memory() -> float:
    """Bytes of main memory that a new process may take: what is available, within the container's limit."""
    available = float("inf")
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        available = int(found.group(1)) * 1024.0 if found else available
    except OSError:
        available = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit != "max":
            available = min(available, int(limit) - used)
    except (OSError, ValueError):
        pass
    return available


def _memory(
    recipe: Recipe, backbone: Backbone, vae: Vae, zero: Zero, ranks: int, devices: list[Device]
) -> Iterator[Finding]:
    here = min((d.free for d in devices[:ranks]), default=0.0)
    label = f"ZeRO-{zero.stage}" if zero.stage is not None else "no ZeRO"
    largest_host = 0.0
    for stage in (1, 2):
        if costs.stage_recipe(recipe, stage).max_steps == 0:
            continue
        need = costs.memory(recipe, stage, backbone, vae, zero=zero, ranks=ranks, cuda=bool(devices) or ranks > 1)
        # On a CPU what counts as device memory is main memory; several ranks are a forecast for GPUs elsewhere.
        largest_host = max(largest_host, sum(need.host.values()) + (0 if devices or ranks > 1 else need.total))
        parts = ", ".join(f"{name} {_gib(size)}" for name, size in need.device.items() if size >= 0.05 * GIB)
        where = f"{_count(ranks, 'GPU')}, {label}" if devices or ranks > 1 else label
        found = f"{_gib(need.total)} per device ({where}): {parts}"
        if not devices:
            yield Finding(OK, f"memory stage {stage}", found)
        elif need.total > here:
            todo = _smaller(recipe, stage, backbone, vae, zero, ranks, here)
            yield Finding(PROBLEM, f"memory stage {stage}", f"{found}; there: {_gib(here)}", todo)
        elif need.total > 0.9 * here:
            todo = f"tight; if it fails, {_smaller(recipe, stage, backbone, vae, zero, ranks, 0.9 * here)}"
            yield Finding(NOTE, f"memory stage {stage}", f"{found}; there: {_gib(here)}", todo)
        else:
            yield Finding(OK, f"memory stage {stage}", f"{found}; there: {_gib(here)}")
    yield from _host(recipe, backbone, vae, largest_host, min(ranks, len(devices) or 1))


def _smaller(recipe: Recipe, stage: int, backbone: Backbone, vae: Vae, zero: Zero, ranks: int, room: float) -> str:
    """The mildest change under which a stage fits."""
    batch = recipe.per_device_batch_size
    levels = [("", zero)]
    for level, name in ((2, "zero2"), (3, "zero3")):
        if (zero.stage or 0) < level:
            levels.append((f"--deepspeed configs/deepspeed/{name}.json", Zero(level)))
    levels.append(("--deepspeed configs/deepspeed/zero3_offload.json", Zero(3, True, True)))
    sizes = [b for b in (batch, 8, 4, 2, 1) if b <= batch and recipe.global_batch_size % (b * ranks) == 0]
    for size in sizes or [batch]:
        for option, other in levels:
            for again in (False, True):
                if again and recipe.gradient_checkpointing:
                    continue
                tried = replace(
                    recipe,
                    per_device_batch_size=size,
                    gradient_checkpointing=again or recipe.gradient_checkpointing,
                )
                if costs.memory(tried, stage, backbone, vae, zero=other, ranks=ranks).total <= 0.9 * room:
                    words = [option] if option else []
                    words += ["--gradient_checkpointing true"] if again else []
                    words += [f"--per_device_batch_size {size}"] if size != batch else []
                    return f"use {' '.join(words)}" if words else "close other programs on the GPU"
    return "no setting fits: use a larger GPU, or more of them with ZeRO-3"


def _host(recipe: Recipe, backbone: Backbone, vae: Vae, extra: float, ranks: int) -> Iterator[Finding]:
    """Main memory: each rank builds the whole model in fp32 first, and reads images with its workers."""
    model = 4.0 * (costs.full_model_parameters(backbone) + costs.denoiser_parameters(recipe, vae))
    need = ranks * (max(extra, model + GIB) + recipe.num_workers * WORKER_BYTES)
    found = f"{_gib(need)} needed, {_gib(host_memory())} available"
    if need > host_memory():
        todo = "lower --num_workers, run fewer ranks per node, or use a machine with more memory"
        yield Finding(PROBLEM, "main memory", found, todo)
    else:
        yield Finding(OK, "main memory", found)
    size = recipe.image_size or backbone.image_size
    batches = ranks * recipe.num_workers * 3.0 * recipe.per_device_batch_size * 3 * size**2  # prefetched, uint8
    if recipe.num_workers and os.path.isdir("/dev/shm") and free_bytes("/dev/shm") < batches:
        found = f"{_gib(free_bytes('/dev/shm'))} free in /dev/shm, {_gib(batches)} needed by data workers"
        yield Finding(PROBLEM, "shared memory", found, "start the container with --shm-size=2g, or --num_workers 0")


def _disk(recipe: Recipe, backbone: Backbone, vae: Vae, zero: Zero, run_dir: Path) -> Finding:
    parts = costs.disk_bytes(recipe, backbone, vae, zero)
    there = _existing(run_dir)
    free, need = free_bytes(there), sum(parts.values())
    if (run_dir / "manifest.json").is_file():  # what the run has written already is not needed again
        need -= min(need, sum(p.stat().st_size for p in run_dir.rglob("*") if p.is_file()))
    named = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items() if size >= 0.05 * GIB)
    found = f"{_gib(need)} needed{f' ({named})' if named else ''}, {_gib(free)} free at {there}"
    if need > free:
        return Finding(PROBLEM, "disk", found, "choose an --output_dir on a larger disk")
    return Finding(OK, "disk", found)


# --- paths ----------------------------------------------------------------------------------------------------------


def _existing(path: Path) -> Path:
    """The nearest folder above ``path`` (or itself) that exists."""
    path = path.absolute()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def _run_folder(recipe: Recipe, run_dir: Path) -> Finding:
    there, todo = _existing(run_dir), "choose another --output_dir"
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


def _cached(name: str, *files: str) -> str | None:
    """The path of the first of a hub id's files that the local cache holds."""
    try:
        from huggingface_hub import try_to_load_from_cache

        for file in files:
            path = try_to_load_from_cache(name, file)
            if isinstance(path, str):
                return path
    except (ImportError, ValueError, OSError):
        pass
    return None


def _download(what: str, name: str, size: float, gated: bool = False) -> Finding:
    """What happens to a hub id that is not in the cache."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        todo = "unset HF_HUB_OFFLINE, or give the path of a local copy"
        return Finding(PROBLEM, what, f"{name} is not in the cache and HF_HUB_OFFLINE is set", todo)
    if gated and not _has_token():
        todo = f"accept its licence at https://huggingface.co/{name} and set HF_TOKEN, or give a local copy by path"
        todo += " (--vae ae.safetensors)" if what == "VAE" else ""
        return Finding(PROBLEM, what, f"{name} is gated and there is no HF_TOKEN", todo)
    cache = os.environ.get("HF_HUB_CACHE") or os.path.join(os.environ.get("HF_HOME", "~/.cache/huggingface"), "hub")
    there = _existing(Path(cache).expanduser())
    free = free_bytes(there)
    if free < size:
        return Finding(PROBLEM, what, f"{name}: {_gib(size)} to download, {_gib(free)} free at {there}", "set HF_HOME")
    return Finding(NOTE, what, f"{name} will be downloaded (about {_gib(size)}); the hub was not asked")


def _has_token() -> bool:
    if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return True
    try:
        from huggingface_hub import get_token

        return get_token() is not None
    except ImportError:
        return False


def _is_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or Path(resolve(name)).expanduser().exists()


WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
VAE_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def _backbone(recipe: Recipe) -> tuple[Backbone | None, Finding]:
    """The backbone's facts, from its own config where it lies here."""
    from llava_genhancer.convert.checkpoints import SUFFIXES
    from llava_genhancer.convert.open_clip import is_open_clip
    from llava_genhancer.convert.released import RELEASED

    name = recipe.backbone
    local, known = _is_local(name), costs.KNOWN_BACKBONES.get(name)
    path = str(Path(resolve(name)).expanduser())
    todo = "give the folder or hub id of a CLIPModel, SiglipModel or Siglip2Model"
    if is_open_clip(path):
        found = f"{name}: in open_clip's format, and so will its tower be, which LLaVA cannot use; its cost is unknown"
        return None, Finding(NOTE, "backbone", found, f"`llava-genhancer convert {name} --output_dir DIR`, if it can")
    if name in RELEASED or Path(path).suffix in SUFFIXES:
        found = f"{name} is converted when it is first used, so its cost is unknown"
        return None, Finding(
            NOTE, "backbone", found, f"`llava-genhancer convert {name} --output_dir DIR` to know it now"
        )
    if local and not (Path(path) / "config.json").is_file():
        return None, Finding(PROBLEM, "backbone", f"{name}: no config.json there", todo)
    if not local and _cached(name, "config.json") is None:
        if known is None:
            return None, Finding(
                NOTE, "backbone", f"{name} is not here, so its cost is unknown", f"download it, or {todo}"
            )
        return known, _download("backbone", name, 4.0 * costs.full_model_parameters(known))
    try:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(path if local else name, local_files_only=True)
        facts = costs.backbone_facts(config)
    except (ImportError, OSError, ValueError, AttributeError, KeyError) as error:
        return known, Finding(
            PROBLEM, "backbone", f"{name} cannot be used: {(str(error).splitlines() or ['?'])[0]}", todo
        )
    found = f"{name}: {facts.kind}, {costs.full_model_parameters(facts) / 1e6:.0f} M parameters, {facts.image_size} px"
    if local and not any((Path(path) / file).is_file() for file in WEIGHTS):
        return facts, Finding(
            PROBLEM, "backbone", f"{found}, but no weights", "fetch model.safetensors into that folder"
        )
    if not local and _cached(name, *WEIGHTS) is None:
        return facts, _download("backbone", name, 4.0 * costs.full_model_parameters(facts))
    return facts, Finding(OK, "backbone", found)


def facts_of(recipe: Recipe) -> tuple[Backbone, Vae] | None:
    """What a recipe's cost is counted from; None where that is not known before something is loaded."""
    backbone, _ = _backbone(recipe)
    return None if backbone is None else (backbone, _target(recipe)[0])


def _target(recipe: Recipe) -> tuple[Vae, Finding]:
    """The facts of what makes the denoiser's targets."""
    return _vq(recipe) if recipe.denoiser == "masked" else _vae(recipe)


def _denoiser(recipe: Recipe) -> Finding:
    """A pretrained denoiser: there, to be downloaded, or not to be had."""
    name = str(recipe.denoiser_weights)
    try:
        from llava_genhancer.enhance.pretrained import check_denoiser

        check_denoiser(recipe)
    except ImportError as error:
        return Finding(PROBLEM, "denoiser", f"{name} could not be looked at: {error}", INSTALL)
    except InputError as error:
        return Finding(PROBLEM, "denoiser", str(error), "--denoiser_weights PATH")
    size = costs.denoiser_parameters(recipe)
    part = "unet" if recipe.denoiser == "unet" else "transformer"
    if not _is_local(name) and _cached(name, f"{part}/config.json") is None:
        bytes_each = 2.0 if recipe.denoiser_dtype == "bfloat16" else 4.0
        return _download("denoiser", name, bytes_each * size, name.startswith("black-forest-labs/"))
    return Finding(OK, "denoiser", f"{name}: {size / 1e6:.1f} M parameters")


def _vq(recipe: Recipe) -> tuple[Vae, Finding]:
    """The VQ-GAN's facts, from its own config where it lies here; else those of f16 with 16 384 codes."""
    name = recipe.vq
    path = Path(resolve(name)).expanduser()
    try:
        from llava_genhancer.enhance.vq import check_vq

        check_vq(name)
    except ImportError as error:
        return costs.VQ_F16, Finding(PROBLEM, "VQ-GAN", f"{name} could not be looked at: {error}", INSTALL)
    except InputError as error:
        return costs.VQ_F16, Finding(PROBLEM, "VQ-GAN", str(error), "--vq PATH")
    if not path.is_dir():
        what = "a checkpoint file" if path.is_file() else "on the hub"
        return costs.VQ_F16, Finding(OK, "VQ-GAN", f"{name}: {what}, counted as f16 with 16 384 codes")
    config = path / "config.json" if (path / "config.json").is_file() else path / "vqvae" / "config.json"
    try:
        facts = costs.vae_facts(json.loads(config.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return costs.VQ_F16, Finding(PROBLEM, "VQ-GAN", f"{name}: its config.json cannot be used ({error})")
    size = f"{costs.vae_parameters(facts) / 1e6:.1f} M parameters"
    return facts, Finding(OK, "VQ-GAN", f"{name}: {size}, {facts.codes} codes")


def _vae(recipe: Recipe) -> tuple[Vae, Finding]:
    """The VAE's facts, from its own config where it lies here; else FLUX's."""
    name = recipe.vae
    path = Path(resolve(name)).expanduser()
    todo = "give a diffusers AutoencoderKL folder, a hub id, or FLUX's ae.safetensors"
    if not _is_local(name):
        config = _cached(name, "vae/config.json", "config.json")
        weights = _cached(name, *(f"{sub}{file}" for sub in ("vae/", "") for file in VAE_WEIGHTS))
        if config is None or weights is None:
            gated = name.startswith("black-forest-labs/")
            return costs.FLUX_VAE, _download("VAE", name, 2.0 * costs.vae_parameters(), gated)
        folder = Path(config).parent
    elif path.is_file():
        if path.suffix != ".safetensors":
            return costs.FLUX_VAE, Finding(PROBLEM, "VAE", f"{name}: only .safetensors single files are read", todo)
        return costs.FLUX_VAE, Finding(OK, "VAE", f"{name}: single file, read as FLUX's VAE")
    else:
        folder = next((path / sub for sub in ("", "vae") if (path / sub / "config.json").is_file()), path)
        if not any((folder / file).is_file() for file in VAE_WEIGHTS):
            return costs.FLUX_VAE, Finding(PROBLEM, "VAE", f"{name}: no weights there", todo)
    try:
        facts = costs.vae_facts(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return costs.FLUX_VAE, Finding(PROBLEM, "VAE", f"{name}: its config.json cannot be used ({error})", todo)
    return facts, Finding(OK, "VAE", f"{name}: {costs.vae_parameters(facts) / 1e6:.1f} M parameters")


def _data(recipe: Recipe) -> Finding:
    if recipe.data is None:
        if recipe.backbone.startswith("toyworld:"):
            return Finding(OK, "data", "the toy world's images, drawn when they are first needed")
        return Finding(NOTE, "data", "none given", "add --data PATH to have it looked at; `enhance` needs it")
    if recipe.data.startswith("hf:"):
        return Finding(NOTE, "data", f"{recipe.data} is on the hub, which was not asked")
    try:
        from llava_genhancer.data.images import open_source

        source = open_source(recipe.data, image_folder=recipe.image_folder)
    except InputError as error:
        return Finding(PROBLEM, "data", str(error))
    except ImportError as error:
        return Finding(PROBLEM, "data", f"{recipe.data} could not be opened: {error}", INSTALL)
    kind = "shards" if hasattr(source, "shards") else "images"
    return Finding(OK, "data", f"{recipe.data}: {len(source)} {kind}, the first image decodes")


# --- the rest -------------------------------------------------------------------------------------------------------


def _shapes(recipe: Recipe, backbone: Backbone, vae: Vae, ranks: int) -> Iterator[Finding]:
    size = costs.target_size(recipe, backbone)
    needed = vae.downscale * (2 if recipe.denoiser == "flow" else 1)  # FLUX's tokens are 2x2 patches of latents
    if size % needed:
        todo = f"set --image_size or --target_size to a multiple of {needed}, or choose another target tokenizer"
        yield Finding(PROBLEM, "image size", f"{size} px do not fit the target tokenizer and the denoiser", todo)
    micro = recipe.per_device_batch_size * ranks
    if recipe.global_batch_size % micro:
        found = f"{recipe.global_batch_size} images are not a multiple of {ranks} x {recipe.per_device_batch_size}"
        yield Finding(PROBLEM, "batch", found, "change --global_batch_size or --per_device_batch_size")
    else:
        times = recipe.global_batch_size // micro
        found = f"{ranks} x {recipe.per_device_batch_size} x {times} accumulated = {recipe.global_batch_size} images"
        yield Finding(OK, "batch", found)


def _optional(deepspeed: str | None) -> Iterator[Finding]:
    if deepspeed is not None:
        compiler = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None)
        missing = [n for n, there in (("a C++ compiler", compiler), ("ninja", shutil.which("ninja"))) if not there]
        if missing:
            todo = "only DeepSpeed's offloaded optimizer needs it; `pip install ninja`, and the system's C++ compiler"
            yield Finding(NOTE, "compiler", f"{' and '.join(missing)} not found", todo)
        else:
            yield Finding(OK, "compiler", f"{compiler} and ninja")
    flash = _version("flash-attn")
    yield Finding(OK, "flash-attn", flash or "not installed (optional): torch's own attention is used")


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= 0.05 * GIB else f"{size / 2**20:.0f} MiB"


def _flops(count: float) -> str:
    for power, name in ((18, "EFLOP"), (15, "PFLOP"), (12, "TFLOP"), (9, "GFLOP")):
        if count >= 10**power:
            return f"{count / 10**power:.1f} {name}"
    return f"{count:.0f} FLOP"


def _hours(hours: float) -> str:
    if hours < 1:
        return f"{max(hours * 60, 0.1):.1f} minutes"
    return f"{hours:.1f} hours" if hours < 72 else f"{hours / 24:.0f} days"


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'s' if number != 1 else ''}"
