"""The one exception that a user is meant to read, how it is printed, and what other libraries' exceptions mean."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import sys
import tempfile
import time

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
        text = str(message)
        if "\nOriginal Traceback" in text:  # torch passes a data worker's exception on as the page of its traceback
            text = text.strip().splitlines()[-1].partition("Error: ")[2]
        super().__init__(plain(text))


def print_error(message: object, program: str = "llava-genhancer") -> None:
    """Print an error as one line on stderr, once for all ranks of this launch on this machine that have the same one.

    Every rank that has an error calls this, so that an error of one rank alone is printed too. A leading "rank N: "
    does not make two errors different.
    """
    line = " ".join(str(message).split())
    if os.environ.get("WORLD_SIZE", "1") in ("", "1") or _first_with(re.sub(r"^rank \d+:? ", "", line)):
        print(f"{program}: {line}", file=sys.stderr, flush=True)


_IMPORTED = time.time()


def _started() -> float:
    """Seconds since 1970 when this process began; all ranks of a launch begin before one of them can have an error."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no /proc on this system
        with open("/proc/self/stat", encoding="utf-8") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        return boot + ticks / os.sysconf("SC_CLK_TCK")
    return _IMPORTED


def _first_with(line: str) -> bool:
    """Whether no other rank of this launch has claimed ``line`` yet; claims it then.

    Ranks that share a parent process and a rendezvous belong to one launch. A claim of a rank that repeats itself, or
    from before this process began, is of an earlier launch. Ranks that fail need no process group for this: a claim is
    a small file in the folder for temporary files. Where none can be written or locked, every rank prints.
    """
    launch = [str(os.getppid())] + [
        os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")
    ]
    rank = os.environ.get("RANK", "0")
    user = os.getuid() if hasattr(os, "getuid") else 0
    name = hashlib.sha256("\n".join([*launch, line]).encode(errors="surrogatepass")).hexdigest()[:24]
    folder = os.path.join(tempfile.gettempdir(), f"llava-genhancer-errors-{user}")
    claim = os.path.join(folder, name)
    try:
        import fcntl

        os.makedirs(folder, mode=0o700, exist_ok=True)
        with open(os.path.join(folder, "lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # else two ranks may both remove an earlier launch's claim
            _forget(folder)
            ranks: list[str] = []
            with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
                if os.path.getmtime(claim) >= _started():
                    with open(claim, encoding="utf-8") as file:
                        ranks = json.load(file)
            first = not ranks or rank in ranks
            with open(claim, "w", encoding="utf-8") as file:
                json.dump([rank] if first else [*ranks, rank], file)
            return first
    except (ImportError, OSError, ValueError):
        return True


def _forget(folder: str) -> None:
    """Remove claims that are more than an hour old."""
    for entry in os.scandir(folder):
        with contextlib.suppress(OSError):
            if time.time() - entry.stat().st_mtime > 3600:
                os.unlink(entry.path)


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
