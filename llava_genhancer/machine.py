"""What this machine has to give: main memory and disk. Imports nothing heavy."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from llava_genhancer.files import expand


def free_bytes(path: str | os.PathLike) -> float:
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


def existing(path: str | os.PathLike) -> Path:
    """The nearest folder above ``path`` (or itself) that exists."""
    there = Path(expand(path)).absolute()
    while not there.is_dir() and there != there.parent:
        there = there.parent
    return there
