"""The one exception a user is meant to read, and the words it takes from others."""

from __future__ import annotations

import errno
import os
import re

# What a full, read-only or forbidden disk answers.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)

_NO_MEMORY = re.compile(r"can't allocate memory|could not create a (?:primitive|memory)")  # torch's words; oneDNN's


class InputError(ValueError):
    """Something the user gave us cannot be used.

    The message is a single line that says what is wrong, where, and what to do about it. The command line prints it
    and exits with status 2; as a library, catch it like any ``ValueError``. What it quotes (file names, values) may
    come from anybody: line ends and terminal codes in it are written out, and the line is cut where it gets absurd.
    """

    def __init__(self, message: object):
        super().__init__(plain(str(message)))


class OneRankError(InputError):
    """An InputError that one rank may meet alone, so that it must speak for itself."""


def plain(text: str, longest: int = 1000) -> str:
    """``text`` as one line that a terminal can only show: line ends as spaces, control characters as ``\\x1b``."""
    line = "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text).strip()
    return line if len(line) <= longest else f"{line[: longest - 100]} ... {line[-90:]}"


def reason(error: BaseException) -> str:
    """What another library's exception says, as part of our one line: its first line, or its type if it is mute."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def disk_failure(error: BaseException) -> str | None:
    """What the disk answered if ``error`` is its refusal, by whichever library that was met; else None."""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"{error.strerror}{f' ({error.filename})' if error.filename else ''}"
    text = str(error)
    if type(error).__name__ == "SafetensorError":
        found = re.search(r"\(os error (\d+)\)", text)
        return os.strerror(int(found[1])) if found and int(found[1]) in DISK_ERRORS else None
    if isinstance(error, RuntimeError) and ("inline_container" in text or "PytorchStreamWriter" in text):
        known = next((os.strerror(number) for number in DISK_ERRORS if os.strerror(number) in text), None)
        # A write cut short shows as a wrong position in the archive, whatever the disk said. Reading has other words.
        return known or ("torch could not write a file to its end" if "unexpected pos" in text else None)
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that there is no memory left, on a GPU or here."""
    # torch raises its own class for GPUs and a RuntimeError for the rest.
    known = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    return known or bool(isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)))


def lost_rank(error: BaseException) -> str | None:
    """What torch.distributed says if ``error`` means that another rank, or the way to it, is gone; else None."""
    ours = {cls.__name__ for cls in type(error).__mro__} & {"DistNetworkError", "DistStoreError", "DistBackendError"}
    text = reason(error)
    if ours or (isinstance(error, RuntimeError) and "gloo" in text.lower()):
        return re.sub(r"^\[.*?\] ", "", text).partition(". This is")[0]  # without its place in the source, and advice
    return None
