"""Local copies of benchmarks: which cache `datasets` may keep of them.

`datasets` knows a copy by its folder's last name: of two different copies of ScienceQA it reads the one that it saw
first. So each collection of copies, in each state, gets a cache of its own.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from llava_genhancer.files import expand

CACHE_VARIABLE = "LMMS_EVAL_DATASETS_CACHE"  # lmms-eval's; whoever sets it has chosen


def cache_folder(root: Path) -> Path:
    """The cache for the copies in ``root/<organisation>/<name>``."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(expand(chosen))
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    base = Path(expand(os.environ.get("HF_DATASETS_CACHE") or f"{home}/datasets"))
    files = sorted(p for p in root.resolve().glob("*/*/**/*") if p.is_file())
    listed = [f"{p} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files]
    return base / f"llava_genhancer-{hashlib.sha256(repr(listed).encode()).hexdigest()[:16]}"
