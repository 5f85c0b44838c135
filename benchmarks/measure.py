"""Timing and machine rates, with the same meaning on a CPU and on a GPU."""

from __future__ import annotations

import platform
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def own_time() -> Callable[[], float]:
    """A CPU's clock that leaves out what other programs take of it, where one thread computes; else the wall's."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


class Clock:
    """Marks on a device's time line. On a GPU they are events in its queue: nothing waits while work is measured.

    Args:
        now: a CPU's clock.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter):
        self.cuda, self.now = device.type == "cuda", now
        self.marks: list[Any] = []

    def mark(self) -> None:
        """Note where the device's work stands now."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(self.now())

    def seconds(self) -> list[float]:
        """Time between successive marks."""
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in zip(self.marks, self.marks[1:], strict=False)]
        return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]


def timed(
    work: Callable[[], object],
    device: torch.device,
    *,
    repeats: int,
    warmup: int,
    prepare: Callable[[], object] = lambda: None,
    now: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Seconds of each repeat. ``prepare`` runs before each and is not counted; the device is waited for once."""
    for _ in range(warmup):
        prepare()
        work()
    clock = Clock(device, now)
    for _ in range(repeats):
        prepare()
        clock.mark()
        work()
        clock.mark()
    return clock.seconds()[::2]


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and range of repeated timings, in seconds."""
    return {
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "repeats": len(seconds),
    }


def matmul_rate(device: torch.device, dtype: torch.dtype, *, tf32: bool = False) -> float:
    """FLOP/s of a large square matrix product, the median of ten; a CPU's without what other programs take of it."""
    side = 8192 if device.type == "cuda" else 1024
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        a = torch.randn(side, side, device=device, dtype=torch.float32).to(dtype)
        return 2 * side**3 / statistics.median(timed(lambda: a @ a, device, repeats=10, warmup=3, now=own_time()))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def copy_rate(device: torch.device) -> float:
    """Bytes per second of a large copy, reads and writes both counted; a CPU's as in :func:`matmul_rate`."""
    size = 2**30 if device.type == "cuda" else 2**27
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = timed(lambda: target.copy_(source), device, repeats=10, warmup=3, now=own_time())
    return 2 * size / statistics.median(copies)


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were taken on."""
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        facts["memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
        facts["cuda"] = torch.version.cuda
    return facts


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            names = [line.split(":", 1)[1].strip() for line in f if line.startswith("model name")]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.machine()


def reset_peak(device: torch.device) -> None:
    """Start a new peak on a GPU; a CPU process has one peak for its whole life."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes(device: torch.device) -> int:
    """Peak memory of the tensors on a GPU; on a CPU of the whole process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
