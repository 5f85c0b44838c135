"""GPUs as torch sees them, and how fast they or the CPU multiply."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llava_genhancer.doctor.findings import NOTE, OK, PROBLEM, Finding, gib
from llava_genhancer.recipes import Recipe


@dataclass(frozen=True)
class Gpu:
    """A GPU as torch sees it; bytes."""

    name: str
    free: float
    total: float
    capability: tuple[int, int]


def find_torch() -> Any:
    """The module, or None."""
    try:
        import torch

        return torch
    except (ImportError, OSError):  # not installed, or a library of its own is missing
        return None


def find_gpus(torch: Any) -> list[Gpu]:
    """What is here; none where torch is not."""
    found = []
    if torch is not None and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            capability = torch.cuda.get_device_capability(index)
            found.append(Gpu(torch.cuda.get_device_name(index), free, total, capability))
    return found


def gpu_lines(recipe: Recipe, torch: Any, devices: list[Gpu], gpus: int | None) -> Iterator[Finding]:
    """Each GPU found, and those that are missing.

    Args:
        gpus: as many are asked for.
    """
    for index, device in enumerate(devices):
        found = f"{device.name}: {gib(device.free)} of {gib(device.total)} free"
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


def matmul_rate(torch: Any, device: str, dtype: Any, side: int, seconds: float = 0.2) -> float:
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
