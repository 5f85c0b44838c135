"""Markdown from names that came with data: a caption, a key or a path must never turn into markup."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any


def text(value: Any, limit: int = 300) -> str:
    """``value`` as plain words on one line, with HTML and Markdown switched off."""
    line = " ".join(str(value).split())
    line = "".join(c if c.isprintable() else "�" for c in line)
    line = line if len(line) <= limit else line[: limit - 1] + "…"
    return re.sub(r"([\\`*_{}\[\]#~|$])", r"\\\1", html.escape(line, quote=False)).replace("://", ":\\//")


def code(value: Any, limit: int = 300) -> str:
    """``value`` as a code span on one line."""
    line = " ".join(str(value).split())
    line = "".join(c if c.isprintable() else "�" for c in line)
    line = line if len(line) <= limit else line[: limit - 1] + "…"
    # A fence longer than any run of backticks inside; spaces keep the first and last ones apart from it.
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def block(lines: Sequence[str], language: str = "bash") -> str:
    """A fenced block that its content cannot close."""
    fence = "`" * max(3, 1 + max((len(run) for line in lines for run in re.findall("`+", line)), default=0))
    return "\n".join([f"{fence}{language}", *lines, fence])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of finished cells, the first column left and the others right."""
    ruler = [":--", *["--:"] * (len(header) - 1)]
    # Even inside a code span a bar ends the cell, unless a backslash stands before it.
    cells = [[re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ruler, *cells])
