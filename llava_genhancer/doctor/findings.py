"""What the doctor finds, line by line, and its units."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from llava_genhancer.costs import GIB

OK, NOTE, PROBLEM = "OK", "note", "PROBLEM"
INSTALL = 'pip install "llava-genhancer[train]"'
_UNBROKEN: Any = {"break_long_words": False, "break_on_hyphens": False}  # paths stay copyable


@dataclass(frozen=True)
class Finding:
    """One line of the list: how it is, what it is about, what was found, and what to do."""

    status: str
    what: str
    found: str
    todo: str = ""


def show(findings: Iterable[Finding]) -> int:
    """Print findings; returns the number of problems among them."""
    problems = 0
    for finding in findings:
        problems += finding.status == PROBLEM
        head = f"{finding.status:8} {finding.what:16} "
        for start, text in ((head, finding.found), (f"{'':{len(head)}}-> ", finding.todo)):
            if text:
                print(textwrap.fill(start + text, 118, subsequent_indent=" " * len(head), **_UNBROKEN))
    return problems


def gib(size: float) -> str:
    """Bytes in words."""
    return f"{size / GIB:.1f} GiB" if size >= 0.05 * GIB else f"{size / 2**20:.0f} MiB"


def flops(count: float) -> str:
    """FLOPs in words."""
    for power, name in ((18, "EFLOP"), (15, "PFLOP"), (12, "TFLOP"), (9, "GFLOP")):
        if count >= 10**power:
            return f"{count / 10**power:.1f} {name}"
    return f"{count:.0f} FLOP"


def several(number: int, name: str) -> str:
    """A number of things in words."""
    return f"{number} {name}{'s' if number != 1 else ''}"
